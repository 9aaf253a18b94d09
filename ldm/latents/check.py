"""Compare stored latents with what their autoencoder gives today."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torchmetrics.functional.image import peak_signal_noise_ratio

from ldm.data.decode import DecodeError
from ldm.data.latent_schema import LatentInfo, latent_info
from ldm.data.manifest import LATENT_SHARDS, Problem
from ldm.data.sources import open_source
from ldm.errors import UsageError
from ldm.latents.compute import PRECISIONS
from ldm.latents.image_encoder import LatentEncoder, load_matching
from ldm.latents.samples import SourceImages, StoredLatent, decode_mean, sample_latents
from ldm.machine import full_fp32
from ldm.models.autoencoder_kinds import Autoencoder

# An encoder rounds in each of its layers, and these errors add up as a random walk does: 1 to 3 times the eps of bf16 were
# measured. Eight leave room for deeper encoders, and are below every mistake that was tried (pixels in [0, 1] instead of
# [-1, 1] are 14 times the eps of bf16 away, latents of another image 60 and more).
ROUNDINGS = 8
VIEWS = {"": "images", "_flip": "mirrored"}


@dataclass(frozen=True)
class Comparison:
    """The result of :func:`compare`.

    Attributes:
        decoded: how many latents were decoded.
        compared: how many of their images were encoded again.
        skipped: images that can no longer be decoded.
        measured: "images" (and "mirrored") -> metric -> value: the largest and the average error of ``mean`` and ``std``, as
            they are and in standard deviations of the channel over the set; PSNR in dB against the image, of the stored mean
            decoded and of today's mean decoded. Averages are over images. Empty without images.
        tolerance: the largest average error of an image's latents that counts as rounding.
        problems: what does not agree.
        note: why there were no images to compare with; otherwise empty.
    """

    decoded: int
    compared: int
    skipped: int
    measured: dict[str, dict[str, float]]
    tolerance: float
    problems: tuple[Problem, ...]
    note: str


@torch.inference_mode()
@full_fp32()
def compare(
    folder: str | Path,
    autoencoder_path: str | Path,
    shards: str | Path | None = None,
    samples: int = 64,
    device: torch.device | str = "cpu",
    on_progress: Callable[[int, int], None] | None = None,
) -> Comparison:
    """Decode a sample of the stored latents and, where the images are available, encode these again and compare.

    Images are encoded in float32, whatever precision the export had, so that the error is that of the stored values. After
    subtracting what storing in ``dtype`` rounds, an image's ``mean`` may be off by ``ROUNDINGS`` times the eps of the export's
    precision, on average over its values and in standard deviations of the channel over the set; its ``std`` likewise,
    relative to itself. For fp32 eps is that of TF32 (2^-10), in which GPUs compute convolutions.

    Args:
        folder: of latent shards.
        autoencoder_path: as :func:`ldm.models.autoencoder.load_autoencoder` takes it.
        shards: see :meth:`SourceImages.open`.
        samples: how many latents, evenly spaced over the set.
        on_progress: called with (latents done, latents).

    Raises:
        UsageError: for another autoencoder or other image shards than were exported with.
        LdmError: for a broken shard.
    """
    if samples < 1:
        raise UsageError(f"samples is {samples}; give 1 or more")
    source = open_source(folder, LATENT_SHARDS)
    source.check_cheap()
    info = latent_info(source)
    autoencoder = load_matching(autoencoder_path, source, device)
    images = SourceImages.open(source, autoencoder, shards)
    errors = _Errors(info, autoencoder)
    total, decoded, compared, skipped = min(samples, source.manifest.samples), 0, 0, 0
    for decoded, stored in enumerate(sample_latents(source, samples), start=1):
        where = f"{stored.shard}: {stored.key}"
        reconstruction = decode_mean(autoencoder, stored.latents["mean"])
        if not reconstruction.isfinite().all():
            errors.problems["decodes to values that are not finite"].append(where)
        elif images is not None:
            try:
                image = images.image(stored, autoencoder.device)
            except DecodeError:
                skipped += 1
            else:
                compared += image is not None
                if image is None:
                    errors.problems[f"is not among the images of {images.source.spec}"].append(where)
                else:
                    errors.add(where, stored, image, reconstruction)
        if on_progress is not None:
            on_progress(decoded, total)
    note = ""
    if images is None:
        note = f"the image shards ({info.source_shards or 'unknown'}) are not available; give them to compare with the images"
    return Comparison(decoded, compared, skipped, errors.measured(), errors.tolerance, errors.found(), note)


class _Errors:
    """The errors of all compared latents, and which of them are too large."""

    def __init__(self, info: LatentInfo, autoencoder: Autoencoder):
        self.info, self.autoencoder = info, autoencoder
        self.encoder = LatentEncoder(autoencoder, "fp32", "float32", mode=info.posterior == "mode")
        std = np.array(info.latents_std)
        # a constant channel has no scale of its own
        self.scale = np.maximum(std, 1e-3 * std.max() or 1.0)[:, None, None]  # (C, 1, 1)
        coarsest = torch.finfo(PRECISIONS.get(info.precision, torch.bfloat16)).eps
        self.tolerance = ROUNDINGS * max(coarsest, 2.0**-10)
        self.problems: dict[str, list[str]] = defaultdict(list)  # what -> where
        self._values: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))  # view -> metric -> values
        self._errors: dict[str, list[tuple[float, str]]] = defaultdict(list)  # tensor -> average error of an image, where

    def add(self, where: str, stored: StoredLatent, image: Tensor, reconstruction: Tensor) -> None:
        """Encode one image again, and its mirror image where that was stored, and compare."""
        for end, view in VIEWS.items():
            if f"mean{end}" not in stored.latents:
                continue
            shown = image.flip(-1) if end else image
            again = {name: values[0].cpu().numpy() for name, values in self.encoder.encode(shown).items()}
            mean = stored.latents[f"mean{end}"]
            if again["mean"].shape != mean.shape:
                shapes = (" x ".join(map(str, latent.shape)) for latent in (mean, again["mean"]))
                self.problems["has latents of {}, its image gives {}".format(*shapes)].append(where)
                return
            for name, latent in again.items():
                self._compare(where, view, name, f"{name}{end}", stored.latents[f"{name}{end}"], latent)
            values = self._values[view]
            decoded = decode_mean(self.autoencoder, mean) if end else reconstruction
            values["PSNR of stored latents (dB)"].append(_psnr(decoded, shown))
            values["PSNR of re-encoded images (dB)"].append(_psnr(decode_mean(self.autoencoder, again["mean"]), shown))

    def _compare(self, where: str, view: str, name: str, tensor: str, stored: np.ndarray, again: np.ndarray) -> None:
        """``stored`` with ``again``, both (C, h, w)."""
        error, values, stored_as = np.abs(stored.astype(np.float64) - again), self._values[view], np.finfo(self.info.dtype)
        for unit, errors in (("", error), (" (standard deviations of the set)", error / self.scale)):
            values[f"{name}, largest error{unit}"].append(float(errors.max()))
            values[f"{name}, average error{unit}"].append(float(errors.mean()))
        unexplained = np.maximum(error - stored_as.eps * np.abs(again) - stored_as.smallest_subnormal, 0)
        average = (unexplained / self.scale).mean() if name == "mean" else unexplained.mean() / np.abs(again).mean()
        self._errors[tensor].append((float(average), where))

    def measured(self) -> dict[str, dict[str, float]]:
        return {
            view: {name: float(np.max(values) if "largest" in name else np.mean(values)) for name, values in metrics.items()}
            for view, metrics in self._values.items()
        }

    def found(self) -> tuple[Problem, ...]:
        """One problem of each kind, naming the worst case."""
        again = "export again: ldm latents export"
        found = []
        for what, places in self.problems.items():
            others = f" and {len(places) - 1} others" if len(places) > 1 else ""
            found.append(Problem(f"{places[0]}{others}", what, again, len(places)))
        for name, errors in self._errors.items():
            # not `>`: NaN is beyond the tolerance too
            beyond = [error for error in errors if not error[0] <= self.tolerance]
            if beyond:
                error, where = max(beyond)
                unit = "times itself" if name.startswith("std") else "standard deviations of the set"
                what = (
                    f"stores a {name} that is on average {error:.3g} {unit} from what its image gives, where "
                    f"{self.info.precision} explains {self.tolerance:.2g}; so are {len(beyond)} of {len(errors)} compared"
                )
                fix = f"the latents are of other images, or were prepared or normalised differently; {again}"
                found.append(Problem(where, what, fix, len(beyond)))
        return tuple(found)


def _psnr(images: Tensor, targets: Tensor) -> float:
    # a data range as a pair clamps both
    return float(peak_signal_noise_ratio(images, targets, data_range=(-1.0, 1.0)))
