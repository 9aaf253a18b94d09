"""Latents that other codebases computed (:mod:`ldm.latents.external`) -> latent shards."""

from __future__ import annotations

import hashlib
import json
import logging
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from itertools import groupby
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from torch import Tensor

from ldm.data.decode import DecodeError
from ldm.data.latent_schema import LatentInfo, write_null_text
from ldm.data.manifest import LATENT_SHARDS, Manifest, relative_path
from ldm.data.quarantine import QUARANTINE_NAME, BadSample, Quarantine
from ldm.data.writer import ShardWriter
from ldm.errors import LdmError, UsageError
from ldm.files import atomic_folder, require_folder, require_new_folder
from ldm.latents.chunks import CHUNK_SAMPLES, LatentSample, Run, Summary
from ldm.latents.compute import Dtype, Process, versions
from ldm.latents.external import ExternalLatent, ExternalSource, FilePerImageFolder, LightningDiTFolder
from ldm.latents.text_encoders import TextEncoders
from ldm.models.autoencoder import autoencoder_hash, downsampling_factor, load_autoencoder, published_statistics
from ldm.models.autoencoder_kinds import Autoencoder
from ldm.models.text_encoder import TextChoice

MAX_BAD_SHARE = 0.01

# latents, evenly spaced over the set, from which its layout is inferred
_INSPECTED = 1000

log = logging.getLogger(__name__)


class Layout(NamedTuple):
    """What a set stores. ``spread``: the meaning of the second half of the channels; None: there is none."""

    spread: Literal["standard deviation", "log-variance"] | None
    flips: bool

    @classmethod
    def of(cls, source: ExternalSource) -> tuple[Layout, float]:
        """The layout of most of the latents inspected, and the root mean square of their means."""
        kinds: Counter[tuple[bool, bool]] = Counter()
        squares, numbers, negative, bad = 0.0, 0, False, None
        for image in source.images(max(source.found // _INSPECTED, 1)):
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
        # Log-variances without a negative value would mean an encoder that learned nothing: its prior has variance 1.
        spread = ("log-variance" if negative else "standard deviation") if moments else None
        if spread is not None:
            log.info("%s: the second half of the channels is read as the %s", source.src, spread)
        return cls(spread, flips), math.sqrt(squares / numbers)

    def read(self, image: ExternalLatent, dtype: str, undo: tuple[Tensor, Tensor] | None) -> dict[str, np.ndarray]:
        """``mean``, ``std``, ``mean_flip``, ``std_flip``, (C, h, w) each, where the set has them.

        ``undo`` is the normalisation to undo: mean and standard deviation. Raises :class:`DecodeError` for another layout.
        """
        if self.flips != (image.flip is not None):
            raise DecodeError(f"has {'no' if self.flips else 'a'} mirrored latent, unlike the others")
        found: dict[str, Tensor] = {}
        for end, latent in (("", image.latent), ("_flip", image.flip)):
            if latent is not None:
                found |= {name + end: values for name, values in self._parts(latent, undo).items()}
        with np.errstate(over="ignore"):  # reported below
            latents = {name: values.numpy().astype(dtype) for name, values in found.items()}
        if not all(np.isfinite(values).all() for values in latents.values()):
            raise DecodeError(f"does not fit {dtype}; use float32")
        return latents

    def _parts(self, latent: Tensor, undo: tuple[Tensor, Tensor] | None) -> dict[str, Tensor]:
        parts = {"mean": latent}
        if self.spread == "log-variance":
            posterior = DiagonalGaussianDistribution(latent[None])
            parts = {"mean": posterior.mean[0], "std": posterior.std[0]}
        elif self.spread is not None:
            parts["mean"], parts["std"] = latent.chunk(2)
        if undo is not None:
            mean, std = undo
            parts = {name: values * std + (mean if name == "mean" else 0) for name, values in parts.items()}
        if "std" in parts and (parts["std"] < 0).any():
            raise DecodeError("has a negative standard deviation")
        return parts


def _normalisation(autoencoder: Autoencoder) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation by which diffusers' scripts normalise its latents, (C, 1, 1) each."""
    mean, std = published_statistics(autoencoder)
    own = autoencoder.config.get("latents_mean"), autoencoder.config.get("latents_std")
    if not any(mean) and {*std} == {1.0} and None not in own:
        mean, std = own
    return torch.tensor(mean).view(-1, 1, 1), torch.tensor(std).view(-1, 1, 1)


def _warn_of_other_scale(source: ExternalSource, autoencoder_path: str | Path, found: float, own: float, scaled: bool) -> None:
    """Log one line where the latents look scaled and are read as unscaled, or the other way round.

    Args:
        found: root mean square of the latents as they are.
        own: of latents as the autoencoder gives them, by its config; normalised ones have 1.
        scaled: what the user said.
    """
    if abs(math.log(own)) < math.log(1.25) or found == 0:  # too close to distinguish
        return
    look_scaled = abs(math.log(found)) < abs(math.log(found / own))
    if look_scaled != scaled:
        log.warning(
            "%s: the latents have a root mean square of %.3g, those of %s %.3g before scaling and 1 after; if they are %s, %s",
            *(source.src, found, autoencoder_path, own),
            *(("scaled", "set scaled") if look_scaled else ("not scaled", "do not set scaled")),
        )


class Importer:
    """Reads the latents of a source and gathers what the manifest says about them."""

    def __init__(
        self,
        source: ExternalSource,
        layout: Layout,
        texts: TextEncoders,
        dtype: Dtype,
        undo: tuple[Tensor, Tensor] | None,
        factor: int,
    ):
        """``factor``: image side over latent side; the others as in :meth:`Layout.read`."""
        self.source, self.layout, self.texts, self.undo, self.factor = source, layout, texts, undo, factor
        self.dtype: Dtype = dtype
        # its limits are checked here, with a message of their own
        self.quarantine = Quarantine(source.found, max_share=1.0, max_in_a_row=source.found)
        self.summary = Summary(texts)
        self.has_several_captions = False
        self.digest = hashlib.sha256()

    def samples(self, on_progress: Callable[[int, int], None]) -> Iterator[LatentSample]:
        """The images that can be used; raises :class:`LdmError` where too many cannot."""
        found, done = self.source.found, 0
        for done, image in enumerate(self.source.images(), start=1):
            sample = image if isinstance(image, BadSample) else self._sample(image)
            if isinstance(sample, BadSample):
                self.quarantine.add([[sample]])
                if (bad := len(self.quarantine)) > MAX_BAD_SHARE * found:
                    raise LdmError(
                        f"{bad} of {found} latents cannot be used, more than {MAX_BAD_SHARE:.0%}, the last one {sample}; "
                        "repair or remove them and import again"
                    )
            else:
                yield sample
            on_progress(done, found)
        if done != found:
            raise LdmError(f"{self.source.src} changed while it was read ({found} latents, then {done}); import again")

    def _sample(self, image: ExternalLatent) -> LatentSample | BadSample:
        try:
            if (len(image.latent) > self.source.channels) != (self.layout.spread is not None):
                raise DecodeError(f"has {len(image.latent)} channels, unlike the others")
            latents = self.layout.read(image, self.dtype, self.undo)
        except DecodeError as error:
            return self.source.bad(image.file, error)
        self.digest.update(json.dumps([image.key, image.captions, list(image.latent.shape)]).encode())
        for latent in (image.latent, image.flip):
            if latent is not None:
                self.digest.update(latent.numpy().tobytes())
        self.has_several_captions |= len(image.captions) > 1
        # all that is known of the image
        size = [side * self.factor for side in latents["mean"].shape[1:]]
        return LatentSample(image.key, image.captions, latents, size, [0, 0, *size])

    def write(self, writer: ShardWriter, samples: Iterable[LatentSample]) -> list[Run]:
        """Write one shard; returns the shapes of its latents."""
        before = len(self.summary.shapes)
        for number, group in enumerate(_by_size(samples)):
            embedded = self.texts.lookup(caption for sample in group for caption in sample.captions)
            writer.write(f"{number:08d}", self.summary.chunk(group, embedded, str(self.source.src)).members())
        return self.summary.shapes[before:]

    def manifest_extra(self, autoencoder: str, out: Path, null_text: str, shards: dict[str, list[Run]]) -> dict[str, Any]:
        """The entries of the manifest in ``out``; ``autoencoder`` and ``null_text`` are hashes, ``shards`` what :meth:`write`
        returned."""
        sides = {side for run in self.summary.shapes for side in run[1:3]}
        info = LatentInfo(
            autoencoder=autoencoder,
            resolution=sides.pop() * self.factor if len(sides) == 1 else None,
            posterior="mode" if self.layout.spread is None else "gaussian",
            flips=self.layout.flips,
            captions="all" if self.has_several_captions else "first",
            dtype=self.dtype,
            precision=self.texts.precision,
            source=self.digest.hexdigest(),
            source_shards=relative_path(self.source.src, out),
            versions=versions(),
            null_text=null_text,
        )
        return self.summary.complete(info, out, shards).as_extra() | {"quarantined": len(self.quarantine)}


def _by_size(samples: Iterable[LatentSample]) -> Iterator[list[LatentSample]]:
    """The samples of chunks: each of one size."""
    waiting: dict[tuple[int, ...], list[LatentSample]] = {}
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
    text_encoder: TextChoice = "minilm",
    captions: str | Path | None = None,
    scaled: bool = False,
    dtype: Dtype = "float16",
    samples_per_shard: int = 1000,
    device: torch.device | str | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> Manifest:
    """Make latent shards from what another codebase computed; :mod:`ldm.latents.external` describes the formats.

    ``manifest.samples`` and ``manifest.extra["quarantined"]`` add up to all images found; ``quarantine.jsonl`` names those that
    could not be used and why. Memory does not grow with the number of latents.

    Args:
        src: the folder.
        out: a new folder, which appears complete or not at all.
        autoencoder_path: of the autoencoder that encoded the latents, see :func:`ldm.models.autoencoder.load_autoencoder`.
        text_encoder: see :meth:`ldm.models.text_encoder.TextEncoder.load`; one or several.
        captions: for class labels a ``.txt`` or ``.json`` with the caption of each class; otherwise a CSV, JSONL or Parquet
            table with the columns ``file`` (relative to ``src``) and ``caption``, which lists what is imported. None: a
            ``.txt`` beside each latent.
        scaled: undo the normalisation in the autoencoder's config (scaling and shift factor, or mean and standard deviation
            where it has no such factor).
        dtype: of the stored tensors.
        samples_per_shard: images per shard.
        device: of the text encoders. None: a GPU where there is one.
        on_progress: called with (images done, images found).

    Raises:
        UsageError: for invalid folders, files or settings.
        LdmError: where more than 1% of the latents cannot be used, or ``out`` cannot be written.
    """
    if samples_per_shard < 1:
        raise UsageError(f"samples_per_shard is {samples_per_shard}; give 1 or more")
    src, out = require_folder(src, "latents of another codebase"), require_new_folder(out, "latent shards")
    autoencoder = load_autoencoder(autoencoder_path)
    channels = autoencoder.config["latent_channels"]
    paths = [path for path in sorted(src.glob("*.safetensors")) if not path.name.startswith(".")]
    source = LightningDiTFolder(src, channels, paths, captions) if paths else FilePerImageFolder(src, channels, captions)
    mean, std = _normalisation(autoencoder)
    own = float((mean**2 + std**2).mean().sqrt())
    if scaled and not mean.any() and (std == 1).all():
        raise UsageError(f"scaled has no effect: the config of {autoencoder_path} has no scaling factor; leave it out")
    layout, found = Layout.of(source)
    _warn_of_other_scale(source, autoencoder_path, found, own, scaled)

    device = Process.from_environment().device() if device is None else device
    texts = TextEncoders.load(text_encoder, device, dtype, "fp32")
    importer = Importer(source, layout, texts, dtype, (mean, std) if scaled else None, downsampling_factor(autoencoder))
    samples = importer.samples(on_progress or (lambda done, total: None))
    entries, shapes = [], {}
    try:
        with atomic_folder(out) as folder:
            for _, of_shard in groupby(enumerate(samples), key=lambda pair: pair[0] // samples_per_shard):
                with ShardWriter(folder, "latents", samples_per_shard=None, first_index=len(entries)) as writer:
                    runs = importer.write(writer, (sample for _, sample in of_shard))
                entries.append(replace(writer.entries[0], samples=sum(run[3] for run in runs)))
                shapes[entries[-1].name] = runs
            null_text = write_null_text(folder, texts.null())
            if bad := sorted(importer.quarantine.known):
                lines = [json.dumps(sample._asdict(), ensure_ascii=False) + "\n" for sample in bad]
                (folder / QUARANTINE_NAME).write_text("".join(lines), "utf-8")
            extra = importer.manifest_extra(autoencoder_hash(autoencoder), out, null_text, shapes)
            manifest = Manifest(LATENT_SHARDS, tuple(entries), extra)
            manifest.save(folder)
    except OSError as error:
        raise LdmError(f"{out} cannot be written ({error.strerror or error}); fix that and import again") from error
    return manifest
