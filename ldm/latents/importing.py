"""Latents that other tools computed (:mod:`ldm.latents.foreign`) -> latent shards."""

from __future__ import annotations

import hashlib
import json
import logging
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import groupby
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
from diffusers import AutoencoderKL
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from torch import Tensor

from ldm.data.decode import DecodeError
from ldm.data.latent_schema import Chunk, LatentInfo, write_null_text
from ldm.data.manifest import LATENT_SHARDS, Manifest, ShardEntry
from ldm.data.moments import Moments
from ldm.data.quarantine import QUARANTINE_NAME, BadSample, Quarantine
from ldm.data.writer import ShardWriter
from ldm.errors import LdmError, UsageError
from ldm.files import atomic_folder, require_folder, require_new_folder
from ldm.latents.compute import Dtype, Process, versions
from ldm.latents.export import CHUNK_SAMPLES
from ldm.latents.foreign import FileFolder, Foreign, ForeignImage, LightningFolder
from ldm.latents.text_encoders import TextEncoders
from ldm.models.autoencoder import autoencoder_hash, downsampling_factor, load_autoencoder

MAX_BAD_SHARE = 0.01

# as many images, evenly spread, tell how the whole set was made
_LOOKED_AT = 1000

log = logging.getLogger(__name__)


class Layout(NamedTuple):
    """How a set was made. ``spread``: what the second half of the channels is, None: there is none."""

    spread: Literal["standard deviation", "log-variance"] | None
    flips: bool

    @classmethod
    def of(cls, source: Foreign) -> tuple[Layout, float]:
        """Told by images all over the set, most of which are alike; and the root mean square of their means."""
        kinds: Counter[tuple[bool, bool]] = Counter()
        squares, numbers, negative, bad = 0.0, 0, False, None
        for image in source.images(max(source.found // _LOOKED_AT, 1)):
            if isinstance(image, BadSample):
                bad = bad or image
                continue
            mean, second = image.latent[: source.channels], image.latent[source.channels :]
            kinds[len(second) > 0, image.flip is not None] += 1
            squares += float(mean.double().square().sum())
            numbers += mean.numel()
            negative |= bool((second < 0).any())
        if not kinds:
            raise UsageError(f"no latent in {source.src} can be used; the first: {bad}")
        ((moments, flips), _), *_ = kinds.most_common(1)
        # A log-variance that is nowhere negative would be that of an encoder that says nothing: its prior has variance 1.
        spread = ("log-variance" if negative else "standard deviation") if moments else None
        if spread is not None:
            log.info("%s: the second half of the channels is read as the %s", source.src, spread)
        return cls(spread, flips), math.sqrt(squares / numbers)

    def read(self, image: ForeignImage, dtype: str, undo: tuple[Tensor, Tensor] | None) -> dict[str, np.ndarray]:
        """``mean``, ``std``, ``mean_flip``, ``std_flip``, (C, h, w) each, those that the set has.

        ``undo`` is what the latents were normalised by. Raises :class:`DecodeError` where the image is not as the others are.
        """
        if self.flips != (image.flip is not None):
            raise DecodeError(f"has {'no' if self.flips else 'a'} mirrored latent, unlike the others")
        found: dict[str, Tensor] = {}
        for end, latent in (("", image.latent), ("_flip", image.flip)):
            if latent is not None:
                found |= {name + end: values for name, values in self._parts(latent, undo).items()}
        with np.errstate(over="ignore"):  # told below
            latents = {name: values.numpy().astype(dtype) for name, values in found.items()}
        if not all(np.isfinite(values).all() for values in latents.values()):
            raise DecodeError(f"does not fit {dtype}; give --dtype float32")
        return latents

    def _parts(self, latent: Tensor, undo: tuple[Tensor, Tensor] | None) -> dict[str, Tensor]:
        if self.spread == "log-variance":
            posterior = DiagonalGaussianDistribution(latent[None])
            parts = {"mean": posterior.mean[0], "std": posterior.std[0]}
        elif self.spread is not None:
            parts = dict(zip(("mean", "std"), latent.chunk(2), strict=True))
        else:
            parts = {"mean": latent}
        if undo is not None:
            mean, std = undo
            parts = {name: values * std + (mean if name == "mean" else 0) for name, values in parts.items()}
        if "std" in parts and (parts["std"] < 0).any():
            raise DecodeError("has a negative standard deviation")
        return parts


def _normalisation(autoencoder: AutoencoderKL) -> tuple[Tensor, Tensor]:
    """What diffusers' scripts normalise this autoencoder's latents by: mean and standard deviation, (C, 1, 1) or (1, 1, 1)."""
    config = autoencoder.config
    mean, std = [config.shift_factor or 0.0], [1 / config.scaling_factor]
    if (mean, std) == ([0.0], [1.0]) and config.latents_mean is not None and config.latents_std is not None:
        mean, std = config.latents_mean, config.latents_std
    return torch.tensor(mean).view(-1, 1, 1), torch.tensor(std).view(-1, 1, 1)


def _warn_of_other_scale(source: Foreign, autoencoder_path: str | Path, found: float, own: float, scaled: bool) -> None:
    """One line where the latents look scaled and are taken for the autoencoder's own, or the other way round.

    Args:
        found: root mean square of the latents as they are.
        own: of latents as the autoencoder gives them, by its config; normalised ones have 1.
        scaled: what the user said.
    """
    if abs(math.log(own)) < math.log(1.25) or found == 0:  # no telling them apart
        return
    look_scaled = abs(math.log(found)) < abs(math.log(found / own))
    if look_scaled != scaled:
        mend = "add --scaled" if look_scaled else "leave --scaled out"
        log.warning(
            "%s: the latents have a root mean square of %.3g, those of %s %.3g before scaling and 1 after; if they are %s, %s",
            *(source.src, found, autoencoder_path, own, "scaled" if look_scaled else "not scaled", mend),
        )


class ImportedSample(NamedTuple):
    """An image as it will be stored."""

    key: str
    captions: list[str]
    latents: dict[str, np.ndarray]


class Importer:
    """What is gathered on the way from images to a manifest."""

    def __init__(self, source: Foreign, layout: Layout, texts: TextEncoders, dtype: Dtype, undo: tuple[Tensor, Tensor] | None):
        self.source, self.layout, self.texts, self.dtype, self.undo = source, layout, texts, dtype, undo
        self.quarantine = Quarantine(source.found, max_share=1.0, max_in_a_row=source.found, config=None)
        self.entries: list[ShardEntry] = []
        self.shapes: Counter[tuple[int, ...]] = Counter()
        self.moments: Moments | None = None
        self.cut = np.zeros(len(texts.encoders), np.int64)
        self.has_several_captions = False
        self.digest = hashlib.sha256()

    def samples(self, on_progress: Callable[[int, int], None]) -> Iterator[ImportedSample]:
        """The images that can be used; raises :class:`LdmError` where too many cannot."""
        found, done = self.source.found, 0
        for done, image in enumerate(self.source.images(), start=1):
            sample = image if isinstance(image, BadSample) else self._sample(image)
            if isinstance(sample, BadSample):
                self.quarantine.add([[sample]])
                if (bad := len(self.quarantine)) > MAX_BAD_SHARE * found:
                    raise LdmError(
                        f"{bad} of {found} latents cannot be used, more than {MAX_BAD_SHARE:.0%}, the last one {sample}; "
                        "mend or move away those and import again"
                    )
            else:
                yield sample
            on_progress(done, found)
        if done != found:
            raise LdmError(f"{self.source.src} changed while it was read ({found} latents, then {done}); import again")

    def _sample(self, image: ForeignImage) -> ImportedSample | BadSample:
        try:
            if (len(image.latent) > self.source.channels) != (self.layout.spread is not None):
                raise DecodeError(f"has {len(image.latent)} channels, unlike the others")
            latents = self.layout.read(image, self.dtype, self.undo)
        except DecodeError as error:
            return self.source.bad(image.file, error)
        self.digest.update(json.dumps([image.key, image.captions, list(image.latent.shape)]).encode())
        for latent in (image.latent, image.flip):
            if latent is not None:
                self.digest.update(latent.numpy())
        self.has_several_captions |= len(image.captions) > 1
        return ImportedSample(image.key, image.captions, latents)

    def write_shard(self, folder: Path, samples: Iterable[ImportedSample], factor: int) -> None:
        """One more shard; ``factor``: image side over latent side."""
        before = self.shapes.total()
        with ShardWriter(folder, "latents", samples_per_shard=None, first_index=len(self.entries)) as writer:
            for number, few in enumerate(_alike(samples)):
                chunk = self._chunk(few, factor)
                writer.write(f"{number:08d}", chunk.members())
                moments = chunk.moments()
                self.moments = moments if self.moments is None else Moments.merge((self.moments, moments))
                self.shapes[few[0].latents["mean"].shape] += len(few)
        self.entries.append(replace(writer.entries[0], samples=self.shapes.total() - before))

    def _chunk(self, samples: list[ImportedSample], factor: int) -> Chunk:
        captions = [sample.captions for sample in samples]
        texts, cut = self.texts([caption for several in captions for caption in several])
        self.cut += cut
        for encoder, embeddings in zip(self.texts.encoders, texts, strict=True):
            if not all(np.isfinite(text).all() for text in embeddings):
                raise LdmError(
                    f"{self.source.src}: {samples[0].key} or one of the {len(samples) - 1} after it has a caption whose "
                    f"embedding by {encoder.name} is not finite; give --dtype float32"
                )
        # all that is known of the images
        size = [side * factor for side in samples[0].latents["mean"].shape[1:]]
        return Chunk(
            keys=[sample.key for sample in samples],
            captions=captions,
            latents={name: np.stack([sample.latents[name] for sample in samples]) for name in samples[0].latents},
            texts=texts,
            original_size=np.tile(size, (len(samples), 1)),
            crop=np.tile([0, 0, *size], (len(samples), 1)),
        )


def _alike(samples: Iterable[ImportedSample]) -> Iterator[list[ImportedSample]]:
    """Chunks of one size each."""
    waiting: dict[tuple[int, ...], list[ImportedSample]] = {}
    for sample in samples:
        shape = sample.latents["mean"].shape
        waiting.setdefault(shape, []).append(sample)
        if len(waiting[shape]) == CHUNK_SAMPLES:
            yield waiting.pop(shape)
    yield from waiting.values()


def import_latents(
    src: str | Path,
    out: str | Path,
    autoencoder_path: str | Path,
    text_encoder: str | Sequence[str] = "minilm",
    captions: str | Path | None = None,
    scaled: bool = False,
    dtype: Dtype = "float16",
    samples_per_shard: int = 1000,
    device: torch.device | str | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> Manifest:
    """Make latent shards of what another tool computed; see the head of this file for what can be read.

    ``manifest.samples`` and ``manifest.extra["quarantined"]`` make up all that was found; ``quarantine.jsonl`` names what was
    left out and why. Memory does not grow with the number of latents.

    Args:
        src: the folder.
        out: a new folder, which appears whole or not at all.
        autoencoder_path: directory of the ``AutoencoderKL`` that made the latents.
        text_encoder: see :meth:`ldm.models.text_encoder.TextEncoder.load`; one or several.
        captions: for class labels a ``.txt`` or ``.json`` with the caption of each class; else a CSV, JSONL or Parquet table
            with the columns ``file`` (relative to ``src``) and ``caption``, which then says what is imported. None: a ``.txt``
            beside each latent.
        scaled: the latents are normalised as the autoencoder's config says (scaling and shift factor, or mean and standard
            deviation where it has no such factor), which is undone.
        dtype: of what is stored.
        samples_per_shard: images per shard.
        device: of the text encoders. None: a GPU where there is one.
        on_progress: called with (images done, images found).

    Raises:
        UsageError: for folders, files or settings that do not serve.
        LdmError: where more than one in a hundred latents cannot be used, or ``out`` cannot be written.
    """
    if samples_per_shard < 1:
        raise UsageError(f"--samples-per-shard is {samples_per_shard}; give 1 or more")
    src, out = require_folder(src, "latents that another tool computed"), require_new_folder(out, "latent shards")
    autoencoder = load_autoencoder(autoencoder_path)
    channels = autoencoder.config.latent_channels
    paths = [path for path in sorted(src.glob("*.safetensors")) if not path.name.startswith(".")]
    source = LightningFolder(src, channels, paths, captions) if paths else FileFolder(src, channels, captions)
    mean, std = _normalisation(autoencoder)
    own = float((mean**2 + std**2).mean().sqrt())
    if scaled and not mean.any() and (std == 1).all():
        raise UsageError(f"--scaled undoes nothing: the config of {autoencoder_path} has no scaling factor; leave it out")
    layout, found = Layout.of(source)
    _warn_of_other_scale(source, autoencoder_path, found, own, scaled)

    device = Process.from_environment().device() if device is None else device
    texts = TextEncoders.load([text_encoder] if isinstance(text_encoder, str) else text_encoder, device, dtype, "fp32")
    importer = Importer(source, layout, texts, dtype, (mean, std) if scaled else None)
    samples = importer.samples(on_progress or (lambda done, total: None))
    factor = downsampling_factor(autoencoder)
    try:
        with atomic_folder(out) as folder:
            for _, of_shard in groupby(enumerate(samples), key=lambda pair: pair[0] // samples_per_shard):
                importer.write_shard(folder, (sample for _, sample in of_shard), factor)
            write_null_text(folder, texts.null())
            if bad := sorted(importer.quarantine.known):
                lines = [json.dumps(sample._asdict(), ensure_ascii=False) + "\n" for sample in bad]
                (folder / QUARANTINE_NAME).write_text("".join(lines), "utf-8")
            manifest = _manifest(importer, autoencoder_hash(autoencoder), factor)
            manifest.save(folder)
    except OSError as error:
        raise LdmError(f"{out} cannot be written ({error.strerror or error}); see to that and import again") from error
    return manifest


def _manifest(importer: Importer, autoencoder: str, factor: int) -> Manifest:
    sizes = {side for shape in importer.shapes for side in shape[1:]}
    info = LatentInfo(
        autoencoder=autoencoder,
        text_encoders=importer.texts.info(importer.cut.tolist()),
        latent_shapes=tuple(shape for shape, _ in importer.shapes.most_common()),
        resolution=sizes.pop() * factor if len(sizes) == 1 else None,
        posterior="mode" if importer.layout.spread is None else "gaussian",
        flips=importer.layout.flips,
        captions="all" if importer.has_several_captions else "first",
        dtype=importer.dtype,
        precision=importer.texts.precision,
        latents_mean=tuple(importer.moments.mean.tolist()),
        latents_std=tuple(importer.moments.std.tolist()),
        source=importer.digest.hexdigest(),
        source_shards=str(importer.source.src),
        versions=versions(),
    )
    return Manifest(LATENT_SHARDS, tuple(importer.entries), info.as_extra() | {"quarantined": len(importer.quarantine)})
