"""Encoded images and captions -> the chunks of latent shards, and what the manifest says about all of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
from typing_extensions import TypedDict

from ldm.data.latent_schema import Chunk, LatentInfo
from ldm.data.moments import Moments
from ldm.errors import LdmError
from ldm.latents.text_encoders import Embedded, TextEncoders

CHUNK_SAMPLES = 256


class LatentSample(NamedTuple):
    """One image as a chunk stores it (:mod:`ldm.data.latent_schema`); ``latents``: float (C, h, w) each."""

    key: str
    captions: list[str]
    latents: dict[str, np.ndarray]
    original_size: Sequence[int]
    crop: Sequence[int]


class MomentsRecord(TypedDict):
    """:class:`Moments` as JSON values."""

    count: int
    mean: list[float]
    squares: list[float]


class Record(TypedDict):
    """A :class:`Summary` as JSON values; ``shapes``: (C, h, w, images)."""

    cut: list[int]
    shapes: list[tuple[int, int, int, int]]
    moments: MomentsRecord | None


class Summary:
    """Makes chunks and gathers what the manifest says about them.

    Attributes:
        shapes: images by latent shape (C, h, w).
        cut: how many captions each text encoder truncated.
        moments: of all latents; None before the first chunk.
    """

    def __init__(self, texts: TextEncoders):
        self.texts = texts
        self.shapes: Counter[tuple[int, int, int]] = Counter()
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
        )
        channels, height, width = chunk.latents["mean"].shape[1:]
        self.shapes[channels, height, width] += len(samples)
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
            "shapes": [(*shape, count) for shape, count in self.shapes.items()],
            "moments": None
            if moments is None
            else {"count": moments.count, "mean": moments.mean.tolist(), "squares": moments.squares.tolist()},
        }

    def add_record(self, record: Record) -> None:
        """Add another summary, as :meth:`as_record` gives it."""
        self.cut += record["cut"]
        for channels, height, width, count in record["shapes"]:
            self.shapes[channels, height, width] += count
        if found := record["moments"]:
            self._add(Moments(found["count"], np.array(found["mean"]), np.array(found["squares"])))

    def complete(self, info: LatentInfo, out: Path) -> LatentInfo:
        """``info`` with what was gathered, of one chunk at least, for the manifest in ``out``."""
        assert self.moments is not None
        return replace(
            info,
            text_encoders=self.texts.info(self.cut.tolist(), out),
            latent_shapes=tuple(shape for shape, _ in self.shapes.most_common()),
            latents_mean=tuple(self.moments.mean.tolist()),
            latents_std=tuple(self.moments.std.tolist()),
        )
