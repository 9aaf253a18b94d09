"""Metrics of generated images against real ones, beside those of real images against real ones."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from torch import Tensor

from ldm.data.buckets import Size
from ldm.data.image_dataset import ImageDataset
from ldm.data.sources import ShardSource
from ldm.errors import UsageError
from ldm.evaluation.distances import (
    CANDIDATES,
    KID_SUBSET,
    LEAST,
    NEIGHBOURS,
    PRECISION_NEIGHBOURS,
    clip_scores,
    distance_metrics,
    nearest,
    retrieval_accuracy,
    vendi_score,
)
from ldm.evaluation.features import FeatureNetwork
from ldm.evaluation.image_sets import FixedSizes, ImageSet, OnProgress, Scorer
from ldm.latents.compute import versions

METRICS = ("fid", "kid", "precision", "recall", "density", "coverage", "vendi")
#: of a network that takes texts; agreement also wants captions
METRICS_OF_TEXTS, AGREEMENT = ("cmmd",), ("clipscore", "retrieval")
LOWER_IS_BETTER = ("fid", "kid", "cmmd")
#: real images are split in two halves of this many or more
LEAST_REAL = 2 * LEAST


@dataclass(frozen=True)
class Metric:
    """One metric of generated images.

    Attributes:
        name: with the network that gave the features: ``fid_inception``.
        value: of the generated images.
        real: what real images get in their place: of a distance, one half of real images against another; else the real images
            themselves. None where their captions are not known.
        note: what a reader has to know of the value; empty where nothing.
    """

    name: str
    value: float
    real: float | None
    note: str = ""

    @property
    def lower_is_better(self) -> bool:
        return self.name.split("_")[0] in LOWER_IS_BETTER


@dataclass(frozen=True)
class Results:
    """All metrics of one set of generated images.

    Attributes:
        metrics: in the order of the networks.
        agreement: of each network of images and text, the agreement of each image with its caption: of generated and of real
            images, (N,) each.
        distances: by network, of each generated image the distance to the nearest real one, and of real images in the first
            half the distance to the nearest of the other, (N,).
        protocol: counts and settings of the metrics, as JSON.
    """

    metrics: list[Metric]
    agreement: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
    distances: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
    protocol: dict[str, Any] = field(default_factory=dict)

    def __getitem__(self, name: str) -> float:
        return next(metric.value for metric in self.metrics if metric.name == name)

    def to_json(self) -> dict[str, Any]:
        """Each metric's value, that of real images, which is better, and its note."""
        return {
            metric.name: {"value": metric.value, "real": metric.real}
            | {"better": "lower" if metric.lower_is_better else "higher"}
            | ({"note": metric.note} if metric.note else {})
            for metric in self.metrics
        }


class Reference:
    """Real images with their captions, that generated ones are compared with.

    It is made once, and compares any number of generated sets. The metrics of real images are of two halves: the images of the
    captions against as many others, where there are; else of one half of them against the other.
    """

    def __init__(self, scorer: Scorer, images: ImageSet, count: int | None = None) -> None:
        """
        Args:
            images: real ones; those after the first ``count`` are the others.
            count: None: all.

        Raises:
            UsageError: for too few images.
        """
        count = min(count or len(images), len(images))
        if len(images) < LEAST_REAL or count < LEAST:
            raise UsageError(
                f"{count} of {len(images)} real images are too few to compare generated ones with; {LEAST} are needed, and "
                f"{LEAST_REAL} in the shards"
            )
        self.scorer, self.images = scorer, images.part(0, count)
        half = count if len(images) >= 2 * count else len(images) // 2
        self.halves = images.part(0, half), images.part(half, 2 * half)
        captions = [caption or "" for caption in self.images.captions]
        self.texts = scorer.embed_texts(captions) if any(captions) else [None] * len(scorer.networks)
        self._real: dict[int, dict[str, float]] = {}

    @classmethod
    def of_shards(
        cls,
        scorer: Scorer,
        dataset: ImageDataset,
        sizes: Sequence[Size],
        count: int,
        seed: int,
        on_progress: OnProgress | None = None,
    ) -> Reference:
        """``count`` images, and as many others where there are, taken at random by ``seed`` and cropped and resized to
        ``sizes``. Raises UsageError as the class does."""
        count, dataset.buckets = min(count, len(dataset)), FixedSizes(sizes=tuple(sizes))
        samples = np.random.default_rng(seed).permutation(len(dataset))[: 2 * count].tolist()
        return cls(scorer, scorer.real_images(dataset, samples, on_progress), count)

    def compare(self, generated: ImageSet) -> Results:
        """All metrics of generated images.

        Agreement with captions is measured where the network takes texts and every generated image has a caption.

        Raises:
            UsageError: for too few images.
        """
        if len(generated) < LEAST:
            raise UsageError(f"{len(generated)} generated images are too few for metrics; {LEAST} or more are needed")
        captions = [caption or "" for caption in generated.captions]
        with_texts = all(captions)
        same = captions == [caption or "" for caption in self.images.captions]
        texts = self.texts if same or not with_texts else self.scorer.embed_texts(captions)
        found = Results([])
        for number, network in enumerate(self.scorer.networks):
            real, made = self.images.features[number], generated.features[number]
            text, of_real = texts[number] if with_texts else None, self._of_real(number, network)
            values = _values(real, made, network.takes_texts, text, captions)
            if text is not None:
                found.agreement[network.name] = (clip_scores(made, text), self._agreement(number))
            for name, value in values.items():
                note = self._note(name, network, min(len(real), len(made)))
                found.metrics.append(Metric(f"{name}_{network.name}", value, of_real.get(name), note))
            first, second = (half.features[number] for half in self.halves)
            found.distances[network.name] = nearest(made, real)[0], nearest(second, first)[0]
        found.protocol.update(
            generated=len(generated),
            real=len(self.images),
            real_halves=len(self.halves[0]),
            kid_subset=min(KID_SUBSET, len(generated), len(self.images)),
            neighbours={"precision and recall": PRECISION_NEIGHBOURS, "density and coverage": NEIGHBOURS},
            retrieval_candidates=min(CANDIDATES, len(generated)),
        )
        if not with_texts and any(network.takes_texts for network in self.scorer.networks):
            missing = sum(not caption for caption in captions)
            found.protocol["agreement"] = f"not measured: the captions of {missing} of {len(generated)} images are not known"
        return found

    def values(self, features: Sequence[Tensor], rows: Sequence[int]) -> dict[str, float]:
        """All metrics of some of the images that were generated from the reference's captions, for the bootstrap.

        Args:
            features: of these images, by each network.
            rows: their numbers, some perhaps more than once.
        """
        captions = [self.images.captions[row] or "" for row in rows]
        found = {}
        for real, made, network, texts in zip(self.images.features, features, self.scorer.networks, self.texts, strict=True):
            values = _values(real, made, network.takes_texts, None if texts is None else texts[[*rows]], captions)
            found |= {f"{name}_{network.name}": value for name, value in values.items()}
        return found

    def _of_real(self, number: int, network: FeatureNetwork) -> dict[str, float]:
        """The metrics of real images, computed once."""
        if number not in self._real:
            features = self.images.features[number]
            first, second = (half.features[number] for half in self.halves)
            captions = [caption or "" for caption in self.images.captions]
            agreement = _agreement_metrics(features, self.texts[number], captions)
            self._real[number] = (
                distance_metrics(first, second, network.takes_texts) | {"vendi": vendi_score(features)} | agreement
            )
        return self._real[number]

    def _agreement(self, number: int) -> Tensor:
        text = self.texts[number]
        return self.images.features[number].new_empty(0) if text is None else clip_scores(self.images.features[number], text)

    def _note(self, name: str, network: FeatureNetwork, count: int) -> str:
        """What limits a metric of ``count`` images a set."""
        halves = len(self.halves[0])
        notes = []
        if name == "fid" and count <= network.num_features:
            notes.append(f"{count} images for {network.num_features} features: the covariance is not of full rank")
        if name in ("fid", "recall", "precision", "density", "coverage", "cmmd") and halves < count:
            notes.append(f"the halves of real images hold {halves}, not {count}")
        return "; ".join(notes)


def metric_names(networks: Sequence[FeatureNetwork], with_captions: bool = True) -> list[str]:
    """The names of the metrics that :meth:`Reference.compare` gives, by network."""
    of_texts = (*METRICS_OF_TEXTS, *(AGREEMENT if with_captions else ()))
    return [f"{name}_{each.name}" for each in networks for name in (*METRICS, *(of_texts if each.takes_texts else ()))]


def _values(real: Tensor, made: Tensor, of_texts: bool, texts: Tensor | None, captions: Sequence[str]) -> dict[str, float]:
    """The metrics of one network."""
    found = distance_metrics(real, made, of_texts) | {"vendi": vendi_score(made)}
    return found | _agreement_metrics(made, texts, captions)


def _agreement_metrics(images: Tensor, texts: Tensor | None, captions: Sequence[str]) -> dict[str, float]:
    """Of images with their captions; none without texts."""
    if texts is None:
        return {}
    return {
        "clipscore": float(clip_scores(images, texts).mean()),
        "retrieval": retrieval_accuracy(images, texts, captions),
    }


def record_of(
    results: Results, generated: ImageSet, reference: Reference, source: ShardSource, seed: int, made_by: dict[str, Any]
) -> dict[str, Any]:
    """All metrics with their whole protocol, as JSON.

    Args:
        source: of the real images; ``seed``: of their choice, and of the noise.
        made_by: what made the generated images.
    """
    protocol = {"shards": source.spec, "shards_hash": source.manifest.hash, "seed": seed} | results.protocol | made_by
    protocol |= {"sizes": [f"{width}x{height}" for height, width in generated.different_sizes]}
    protocol |= {"networks": networks_protocol(reference.scorer.networks), "versions": versions()}
    return {"format_version": 1, "metrics": results.to_json(), "protocol": protocol}


def networks_protocol(networks: Sequence[FeatureNetwork]) -> list[dict[str, Any]]:
    """What a result says of the networks."""
    return [
        {"name": network.name, "network": network.description, "hash": network.hash, "resize": network.resize}
        | {"features": network.num_features}
        for network in networks
    ]
