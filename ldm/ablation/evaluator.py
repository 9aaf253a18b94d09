"""Metrics of images that variants generate from the same captions and noise, against the same real images."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from ldm.ablation.comparison import Estimate
from ldm.ablation.look import Evaluated, Evaluator, Features
from ldm.errors import UsageError
from ldm.evaluation.features import FeatureNetwork
from ldm.evaluation.image_sets import Scorer, open_shards
from ldm.evaluation.results import Reference, networks_protocol
from ldm.pipeline import LatentDiffusionPipeline
from ldm.progress import Progress

# of the bootstrap over generated images: each takes all metrics again, and 40 know a standard error to a ninth
RESAMPLES = 40


class ImageEvaluator(Evaluator):
    """Generates images from captions of shards, and compares them with the images of these captions."""

    def __init__(
        self, shards: str, networks: Sequence[FeatureNetwork], count: int, steps: int, guidance: float, batch_size: int = 32
    ):
        """
        Args:
            shards: of a validation set.
            count: images of each look.
            steps, guidance: of sampling.

        Raises:
            UsageError: for shards that do not hold what is asked for.
        """
        self.dataset = open_shards(shards, need_captions=True)
        source = self.dataset.sources[0]
        if count > source.manifest.samples:
            raise UsageError(f"{count} images are asked for, but {shards} holds {source.manifest.samples}; give that or less")
        self.count, self.networks = count, [*networks]
        self.scorer = Scorer(self.networks, batch_size=batch_size)
        self.sampling = {"num_inference_steps": steps, "guidance_scale": guidance}
        self.settings = {"shards": shards, "shards_hash": source.manifest.hash, "count": count} | self.sampling
        self.settings |= {"networks": networks_protocol(self.networks)}
        self._reference: Reference | None = None

    def reference(self, sizes: Sequence[tuple[int, int]]) -> Reference:
        """The real images, of these sizes; computed once."""
        if self._reference is None:
            with Progress("scoring real images") as progress:
                self._reference = Reference.of_shards(self.scorer, self.dataset, sizes, self.count, 0, progress.update)
        return self._reference

    def __call__(self, pipeline: LatentDiffusionPipeline) -> Evaluated:
        real = self.reference(pipeline.trained_sizes).images
        captions = [caption or "" for caption in real.captions]
        with Progress("generating", len(captions)) as progress:
            made = self.scorer.generated_images(pipeline, captions, real.sizes, 0, progress.update, **self.sampling)
        results = self.reference(pipeline.trained_sizes).compare(made)
        names = [network.name for network in self.networks]
        features = {name: of.numpy() for name, of in zip(names, made.features, strict=True)}
        sizes = {"sizes": np.array(pipeline.trained_sizes)}
        return Evaluated({metric.name: metric.value for metric in results.metrics}, features | sizes)

    def differences(self, firsts: Sequence[Features], seconds: Sequence[Features]) -> dict[str, Estimate]:
        """Of all metrics. Images of the same caption and noise are resampled together."""
        seeds = [self._differences(first, second) for first, second in zip(firsts, seconds, strict=True)]
        return {name: Estimate.over_seeds([seed[name] for seed in seeds]) for name in seeds[0]}

    def _differences(self, first: Features, second: Features) -> dict[str, Estimate]:
        reference, random = self.reference([(int(h), int(w)) for h, w in first["sizes"]]), np.random.default_rng(0)
        sides = [[torch.from_numpy(side[network.name]) for network in self.networks] for side in (first, second)]
        count = len(sides[0][0])

        def difference(rows: np.ndarray) -> dict[str, float]:
            before, after = (reference.values([of[rows] for of in side], rows.tolist()) for side in sides)
            return {name: after[name] - before[name] for name in before}

        whole = difference(np.arange(count))
        resamples = [difference(random.integers(count, size=count)) for _ in range(RESAMPLES)]
        return {
            name: Estimate(value, float(np.std([each[name] for each in resamples], ddof=1))) for name, value in whole.items()
        }


def read_features(file: Path) -> dict[str, np.ndarray]:
    """What a look wrote of its images."""
    with np.load(file, allow_pickle=False) as content:
        return {name: content[name] for name in content.files}
