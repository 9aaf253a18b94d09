"""Encoded images and captions -> the chunks of latent shards, and what the manifest says about all of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import chain, groupby
from pathlib import Path
from typing import NamedTuple

import numpy as np
from typing_extensions import TypedDict

from ldm.data.latent_schema import Chunk, LatentInfo
from ldm.data.moments import Moments
from ldm.errors import LdmError
from ldm.latents.text_encoders import Embedded, TextEncoders

CHUNK_SAMPLES = 256

Run = tuple[int, int, int, int]  # (C, h, w, samples): consecutive samples of one shape


class LatentSample(NamedTuple):
    """One image as a chunk stores it (:mod:`ldm.data.latent_schema`); ``latents``: float (C, h, w) each."""

    key: str
    captions: list[str]
    latents: dict[str, np.ndarray]
    original_size: Sequence[int]
    crop: Sequence[int]
    caption_names: list[int] | None = None


class MomentsRecord(TypedDict):
    """:class:`Moments` as JSON values."""

    count: int
    mean: list[float]
    squares: list[float]


class Record(TypedDict):
    """A :class:`Summary` as JSON values."""

    cut: list[int]
    shapes: list[Run]
    moments: MomentsRecord | None


class Summary:
    """Makes chunks and gathers what the manifest says about them.

    Attributes:
        shapes: of the latents, in the order of the chunks.
        cut: how many captions each text encoder truncated.
        moments: of all latents; None before the first chunk.
    """

    def __init__(self, texts: TextEncoders):
        self.texts = texts
        self.shapes: list[Run] = []
        self.cut = np.zeros(len(texts.encoders), np.int64)
        self.moments: Moments | None = None

    def chunk(self, samples: Sequence[LatentSample], embedded: Sequence[dict[str, Embedded]], where: str) -> Chunk:
        """A chunk of samples of one size; ``embedded``: :meth:`TextEncoders.lookup` of their captions at least.

        Raises :class:`LdmError`, which begins with ``where``, for an embedding that is not finite.
        """
        for sample in samples:
            for known, encoder in zip(embedded, self.texts.encoders, strict=True):
                if not all(np.isfinite(known[caption].text).all() for caption in sample.captions):
                    raise LdmError(
                        f"{where}: the embedding of {sample.key}'s caption by {encoder.name} is not finite; store float32 and "
                        "compute in fp32"
                    )
        captions = [caption for sample in samples for caption in sample.captions]
        chunk = Chunk(
            keys=[sample.key for sample in samples],
            captions=[sample.captions for sample in samples],
            latents={name: np.stack([sample.latents[name] for sample in samples]) for name in samples[0].latents},
            texts=[[known[caption].text for caption in captions] for known in embedded],
            original_size=np.array([sample.original_size for sample in samples]),
            crop=np.array([sample.crop for sample in samples]),
            caption_names=None
            if samples[0].caption_names is None
            else [name for sample in samples for name in sample.caption_names or ()],
        )
        channels, height, width = chunk.latents["mean"].shape[1:]
        self.shapes.append((channels, height, width, len(samples)))
        self.cut += [sum(known[caption].cut for caption in captions) for known in embedded]
        self._add(chunk.moments())
        return chunk

    def _add(self, moments: Moments) -> None:
        self.moments = moments if self.moments is None else Moments.merge((self.moments, moments))

    def as_record(self) -> Record:
        """JSON values for :meth:`add_record`."""
        moments = self.moments
        return {
            "cut": self.cut.tolist(),
            "shapes": merged(self.shapes),
            "moments": None
            if moments is None
            else {"count": moments.count, "mean": moments.mean.tolist(), "squares": moments.squares.tolist()},
        }

    def add_record(self, record: Record) -> None:
        """Add another summary, as :meth:`as_record` gives it, but for its shapes."""
        self.cut += record["cut"]
        if found := record["moments"]:
            self._add(Moments(found["count"], np.array(found["mean"]), np.array(found["squares"])))

    @property
    def samples(self) -> int:
        """How many there are in its chunks."""
        return sum(run[3] for run in self.shapes)

    def complete(self, info: LatentInfo, out: Path, shards: Mapping[str, Sequence[Run]]) -> LatentInfo:
        """``info`` with what was gathered, of one chunk at least, for the manifest in ``out``, which has these ``shards``."""
        assert self.moments is not None
        counts: Counter[tuple[int, int, int]] = Counter()
        for run in chain.from_iterable(shards.values()):
            counts[run[:3]] += run[3]
        shapes = [shape for shape, _ in counts.most_common()]
        places = {name: tuple((shapes.index(run[:3]), run[3]) for run in merged(runs)) for name, runs in shards.items()}
        return replace(
            info,
            text_encoders=self.texts.info(self.cut.tolist(), out),
            latent_shapes=tuple(shapes),
            shard_shapes=places if len(shapes) > 1 else {},
            latents_mean=tuple(self.moments.mean.tolist()),
            latents_std=tuple(self.moments.std.tolist()),
        )


def merged(runs: Sequence[Run]) -> list[Run]:
    """Adjacent runs of one shape made one."""
    return [(*shape, sum(run[3] for run in of_shape)) for shape, of_shape in groupby(runs, key=lambda run: run[:3])]
