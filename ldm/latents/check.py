"""Stored latents held against what made them: the autoencoder by its hash, the images by encoding some of them again."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from diffusers import AutoencoderKL
from torch import Tensor
from torchmetrics.functional.image import peak_signal_noise_ratio

from ldm.data.decode import DecodeError
from ldm.data.latent_schema import LatentInfo, LatentShard, latent_info
from ldm.data.manifest import IMAGE_SHARDS, LATENT_SHARDS, Problem
from ldm.data.shards import ShardReader
from ldm.data.sources import ShardSource, open_source
from ldm.errors import LdmError, UsageError
from ldm.latents.compute import PRECISIONS
from ldm.latents.image_encoder import LatentEncoder, load_matching
from ldm.latents.images import CaptionedImages
from ldm.models.autoencoder import decode as decode_latent
from ldm.models.autoencoder import downsampling_factor, pixels_to_images

# An encoder rounds in each of its layers, and what it rounds off adds up as a random walk does: measured were 1 to 3 times eps
# of bf16. Eight leave room for deeper ones, and are still below every mistake that was tried (pixels in [0, 1] instead of
# [-1, 1] are 14 times eps of bf16 away, latents of another image 60 and more).
ROUNDINGS = 8
VIEWS = {"": "images", "_flip": "mirrored"}


class Stored(NamedTuple):
    """One image's latents as they are stored.

    Attributes:
        shard: name of the latent shard.
        key: of the image.
        captions: its captions.
        latents: ``mean``, and ``std``, ``mean_flip``, ``std_flip`` where there are such, float32 (C, h, w).
    """

    shard: str
    key: str
    captions: list[str]
    latents: dict[str, np.ndarray]


def sampled(source: ShardSource, count: int) -> Iterator[Stored]:
    """So many latents, or all where there are no more: always the same, evenly spread over the whole set, in its order.

    Raises :class:`LdmError` for a shard that is broken.
    """
    entries = source.manifest.shards
    starts = np.cumsum([0, *(entry.samples for entry in entries)])
    total = int(starts[-1])
    count = min(count, total)
    rows = np.array([(2 * number + 1) * total // (2 * count) for number in range(count)], np.int64)
    for number, entry in enumerate(entries):
        wanted = rows[(rows >= starts[number]) & (rows < starts[number + 1])] - starts[number]
        if not len(wanted):
            continue
        shard = LatentShard(source.path(number), entry.samples)
        for row in wanted.tolist():
            chunk, row = shard.locate(row)
            try:
                tensors, words = shard.tensors(chunk), shard.words(chunk)
            except DecodeError as error:
                raise LdmError(f"{source.name(number)}: sample {row} {error}; restore it, or export again") from None
            names = [name for name in ("mean", "std", "mean_flip", "std_flip") if name in tensors]
            latents = {name: tensors[name][row].astype(np.float32) for name in names}
            yield Stored(entry.name, words["keys"][row], words["captions"][row], latents)
        shard.close()


def decode(autoencoder: AutoencoderKL, latent: np.ndarray) -> Tensor:
    """A stored mean (C, h, w) -> the image (1, 3, H, W), not clamped to [−1, 1]; not finite where the latent is broken."""
    return decode_latent(autoencoder, torch.from_numpy(latent)[None].to(autoencoder.device)).float()


class SourceImages:
    """The images that latents were made of, found by shard and key, as they were encoded."""

    def __init__(self, source: ShardSource, resolution: int | None, factor: int):
        """Of a source of images; the rest as :class:`ldm.latents.export.CaptionedImages` takes it."""
        self.source = source
        self.dataset = CaptionedImages(source, resolution, factor, "first")
        self._number: int | None = None

    @classmethod
    def open(cls, source: ShardSource, autoencoder: AutoencoderKL, shards: str | Path | None = None) -> SourceImages | None:
        """Those of a source of latents; None where they no longer stand where they stood, or not on this machine.

        Args:
            source: of latents.
            autoencoder: that made them.
            shards: where the image shards stand; None: where they stood when they were exported.

        Raises:
            UsageError: naming both where these are other shards.
        """
        info = latent_info(source)
        # a sample of every shard of a remote set is all of it: only who names it wants that
        if shards is None and "://" in info.source_shards:
            return None
        try:
            images = open_source(info.source_shards if shards is None else shards, IMAGE_SHARDS)
        except UsageError:
            if shards is None:
                return None
            raise
        if (found := images.manifest.hash) != info.source:
            raise UsageError(
                f"{source.spec} holds latents of image shards {info.source[:12]}, but {images.spec} is {found[:12]}; give "
                "by --shards those they were exported from, or export again: ldm latents export"
            )
        images.check_cheap()
        return cls(images, info.resolution, downsampling_factor(autoencoder))

    def image(self, stored: Stored, device: torch.device | str = "cpu") -> Tensor | None:
        """The image (1, 3, H, W) in [−1, 1] of a latent; None where its shard has no such key.

        Raises :class:`DecodeError` where it cannot be used.
        """
        number = _number_of(stored.shard)
        if not 0 <= number < len(self.source.manifest.shards):
            return None
        if number != self._number:  # latents come shard by shard
            self._reader, self._number = ShardReader(self.source.path(number)), number
            self._rows = {key: row for row, key in enumerate(self._reader.keys)}
        if stored.key not in self._rows:
            return None
        pixels = self.dataset.decode((self._reader[self._rows[stored.key]], False), None)["image"]
        return pixels_to_images(torch.from_numpy(np.ascontiguousarray(pixels))[None].to(device))


def _number_of(shard: str) -> int:
    """``latents-00012.tar`` => 12, the number of the image shard that it was made of; -1 for other names."""
    digits = shard.removesuffix(".tar").rpartition("-")[2]
    return int(digits) if digits.isdecimal() else -1


@dataclass(frozen=True)
class Comparison:
    """What came of encoding and decoding a sample of a set anew.

    Attributes:
        decoded: latents that were decoded.
        compared: of these, how many had their images encoded again.
        skipped: images that can no longer be decoded.
        figures: "images" (and "mirrored") -> what was measured of them: of the errors of ``mean`` and ``std`` the largest and
            the average, as they are and in standard deviations of the channel over the set; PSNR in dB against the image of
            the stored mean decoded, and of the mean encoded now; averages over images. Empty without images.
        tolerance: how far an image's latents may be off.
        problems: what does not agree.
        note: why there were no images to compare with; otherwise empty.
    """

    decoded: int
    compared: int
    skipped: int
    figures: dict[str, dict[str, float]]
    tolerance: float
    problems: tuple[Problem, ...]
    note: str

    def rows(self) -> dict[str, list[str]]:
        """A table's rows by name, a cell for each view of :attr:`figures`."""
        views = [*self.figures.values()]
        return {name: [f"{view[name]:.4g}" for view in views] for name in (views[0] if views else ())}


@torch.inference_mode()
def compare(
    folder: str | Path,
    autoencoder_path: str | Path,
    shards: str | Path | None = None,
    samples: int = 64,
    device: torch.device | str = "cpu",
    on_progress: Callable[[int, int], None] | None = None,
) -> Comparison:
    """Decode a sample of stored latents, and where the images are at hand, encode these again and see that both agree.

    Images are encoded in float32, whatever the export computed in: the error is that of what is stored. An image's latents
    agree if, what storing in ``dtype`` rounds off apart, its ``mean`` is off by no more than ``ROUNDINGS`` times eps of the
    export's precision, on average over its values and in standard deviations of the channel over the set; and its ``std``
    likewise, as a share of itself. For fp32 eps is that of TF32 (2^-10), in which GPUs compute convolutions.

    Args:
        folder: of latent shards.
        autoencoder_path: a directory of ``AutoencoderKL.save_pretrained``.
        shards: see :meth:`SourceImages.open`.
        samples: latents looked at, evenly spread over the set.
        on_progress: called with (latents done, latents).

    Raises:
        UsageError: for another autoencoder or other image shards than were exported with.
        LdmError: for a broken shard.
    """
    if samples < 1:
        raise UsageError(f"--samples is {samples}; give 1 or more")
    source = open_source(folder, LATENT_SHARDS)
    source.check_cheap()
    info = latent_info(source)
    autoencoder = load_matching(autoencoder_path, source, device)
    encoder = LatentEncoder(autoencoder, "fp32", "float32", mode=info.posterior == "mode")
    images = SourceImages.open(source, autoencoder, shards)
    judge = _Judge(info)
    total, decoded, compared, skipped = min(samples, source.manifest.samples), 0, 0, 0
    for decoded, stored in enumerate(sampled(source, samples), start=1):
        where = f"{stored.shard}: {stored.key}"
        reconstruction = decode(autoencoder, stored.latents["mean"])
        if not reconstruction.isfinite().all():
            judge.problem(where, "decodes to values that are not finite")
        elif images is not None:
            try:
                image = images.image(stored, autoencoder.device)
            except DecodeError:
                skipped += 1
            else:
                compared += image is not None
                if image is None:
                    judge.problem(where, f"is not among the images of {images.source.spec}")
                else:
                    _look(judge, where, autoencoder, encoder, stored, image, reconstruction)
        if on_progress is not None:
            on_progress(decoded, total)
    note = ""
    if images is None:
        note = f"the image shards ({info.source_shards or 'unknown'}) are not at hand; --shards DIR compares with the images"
    return Comparison(decoded, compared, skipped, judge.figures(), judge.tolerance, judge.problems(), note)


def _look(
    judge: _Judge,
    where: str,
    autoencoder: AutoencoderKL,
    encoder: LatentEncoder,
    stored: Stored,
    image: Tensor,
    reconstruction: Tensor,
) -> None:
    """Encode one image again, and its mirror image where that was stored, and hand over what was found."""
    for end, view in VIEWS.items():
        if f"mean{end}" not in stored.latents:
            continue
        shown = image.flip(-1) if end else image
        again = {name: values[0] for name, values in encoder(shown).items()}
        if again["mean"].shape != stored.latents[f"mean{end}"].shape:
            shapes = (" x ".join(map(str, latent.shape)) for latent in (stored.latents[f"mean{end}"], again["mean"]))
            judge.problem(where, "has latents of {}, its image gives {}".format(*shapes))
            return
        for name, latent in again.items():
            judge.errors(where, view, f"{name}{end}", stored.latents[f"{name}{end}"], latent)
        ours = reconstruction if not end else decode(autoencoder, stored.latents[f"mean{end}"])
        judge.add(view, "PSNR of the stored, decoded (dB)", _psnr(ours, shown))
        judge.add(view, "PSNR of the encoded again (dB)", _psnr(decode(autoencoder, again["mean"]), shown))


def _psnr(images: Tensor, targets: Tensor) -> float:
    # the range clamps both
    return float(peak_signal_noise_ratio(images, targets, data_range=(-1.0, 1.0)))


class _Judge:
    """Gathers figures and says which are too large."""

    def __init__(self, info: LatentInfo):
        self.info = info
        std = np.array(info.latents_std)
        # a channel that never changes has no scale of its own
        self.scale = np.maximum(std, 1e-3 * std.max() or 1.0)[:, None, None]  # (C, 1, 1)
        coarsest = torch.finfo(PRECISIONS.get(info.precision, torch.bfloat16)).eps
        self.tolerance = ROUNDINGS * max(coarsest, 2.0**-10)
        self.stored_in = np.finfo(info.dtype)
        self._found: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
        self._off: dict[str, list[tuple[float, str]]] = defaultdict(list)
        self._problems: dict[str, list[str]] = defaultdict(list)

    def add(self, view: str, name: str, value: float) -> None:
        self._found[view][name].append(value)

    def problem(self, where: str, what: str) -> None:
        self._problems[what].append(where)

    def errors(self, where: str, view: str, name: str, stored: np.ndarray, again: np.ndarray) -> None:
        """Of tensor ``name``, both (C, h, w)."""
        error = np.abs(stored.astype(np.float64) - again)
        plain = name.removesuffix("_flip")
        for unit, values in (("", error), (" (standard deviations of the set)", error / self.scale)):
            self.add(view, f"{plain}, largest error{unit}", float(values.max()))
            self.add(view, f"{plain}, average error{unit}", float(values.mean()))
        rounding = self.stored_in.eps * np.abs(again) + self.stored_in.smallest_subnormal
        unexplained = np.maximum(error - rounding, 0)
        off = (unexplained / self.scale).mean() if plain == "mean" else unexplained.mean() / np.abs(again).mean()
        self._off[name].append((float(off), where))

    def figures(self) -> dict[str, dict[str, float]]:
        return {
            view: {name: float(np.max(values) if "largest" in name else np.mean(values)) for name, values in found.items()}
            for view, found in self._found.items()
        }

    def problems(self) -> tuple[Problem, ...]:
        """One for each kind, naming the worst of it."""
        again = "export again: ldm latents export"
        found = [Problem(f"{at[0]}{_others(len(at))}", what, again, len(at)) for what, at in self._problems.items()]
        for name, offs in self._off.items():
            # not `>`: what is no number is not within bounds either
            beyond = [one for one in offs if not one[0] <= self.tolerance]
            if beyond:
                off, where = max(beyond)
                unit = "times itself" if name.startswith("std") else "standard deviations of the set"
                what = (
                    f"stores a {name} that is on average {off:.3g} {unit} from what its image gives, where "
                    f"{self.info.precision} explains {self.tolerance:.2g}; so are {len(beyond)} of {len(offs)} looked at"
                )
                mend = f"they are of other images, or were prepared or normalised in another way; {again}"
                found.append(Problem(where, what, mend, len(beyond)))
        return tuple(found)


def _others(count: int) -> str:
    return f" and {count - 1} others" if count > 1 else ""
