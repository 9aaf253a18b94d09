"""A look: what is measured of a variant within its training, after so many steps."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from hashlib import blake2b
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from lightning import Callback, LightningModule, Trainer
from lightning.fabric.utilities import move_data_to_device
from torch import Tensor
from typing_extensions import TypedDict

from ldm.ablation.comparison import Estimate
from ldm.diffusion.conditioning import denoise
from ldm.diffusion.path import expand
from ldm.errors import LdmError, UsageError
from ldm.files import atomic_file, write_json
from ldm.pipeline import LatentDiffusionPipeline
from ldm.training.denoiser import DenoiserTraining
from ldm.training.encoded import fixed_noise

# of the noise, sigma / (alpha + sigma), in validation samples: every path of ldm.diffusion.path has all of this range
SHARES = (0.02, 0.98)
# steps at the start of each part of a training that are not timed: they compile, and start the loader's workers. Nor is the
# last one, whose batch is read
UNTIMED = 2


#: of generated images, by the name of the network, (N, D)
Features = Mapping[str, np.ndarray]


class Evaluated(NamedTuple):
    """Metrics of generated images, and their features."""

    metrics: dict[str, float]
    features: Features = MappingProxyType({})


class Evaluator(ABC):
    """Measures images of a model that is being trained.

    Attributes:
        settings: of the measurement, as JSON; those of two ablations that can be compared are equal.
    """

    settings: dict[str, Any]

    @abstractmethod
    def __call__(self, pipeline: LatentDiffusionPipeline) -> Evaluated:
        """The pipeline has the averaged weights."""

    def differences(self, firsts: Sequence[Features], seconds: Sequence[Features]) -> dict[str, Estimate]:
        """second − first of metrics, by the features of images of each seed; of those whose uncertainty is known."""
        return {}


class LookRecord(TypedDict):
    """What a look measures.

    Attributes:
        step, images: after which it was taken.
        seconds_per_step: of the steps since the look before, without validations, checkpoints and looks; None of too few.
        errors: squared error of x0 of each validation sample.
        samples: root mean square of each validation sample, by which two trainings know that theirs are the same.
        val_loss: unweighted loss of the training's own prediction, at its own times.
        paired: digests of what the last step got, by name: samples, times, noise, captions.
        metrics: of generated images.
    """

    step: int
    images: int
    seconds_per_step: float | None
    errors: list[float]
    samples: list[float]
    val_loss: float
    paired: dict[str, str]
    metrics: dict[str, float]


class Look(Callback):
    """Measures the averaged weights after ``at`` steps, writes a :class:`LookRecord`, and ends this part of the training."""

    def __init__(self, at: int, file: Path, evaluator: Evaluator | None = None):
        """``file``: of the record; features of images are written beside it."""
        self.at, self.file, self.evaluator = at, file, evaluator
        self._digests = {name: blake2b(digest_size=16) for name in ("samples", "times", "noise", "captions")}

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._timed_from, self._last = trainer.global_step + UNTIMED, self.at - 1
        self._began = 0.0
        self._seconds: float | None = None

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        step = trainer.global_step
        if step == self._timed_from:
            self._began = now()
        if step == self._last:
            if step > self._timed_from:
                self._seconds = (now() - self._began) / (step - self._timed_from)
            for name, values in randomness_of(batch):
                self._digests[name].update(values)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.global_step != self.at:
            return
        module = cast(DenoiserTraining, pl_module)
        with trainer.precision_plugin.forward_context():
            errors, samples = x0_errors(module, cast("Iterable[dict[str, Any]]", trainer.val_dataloaders))
        if not (errors.isfinite() & (errors > 0)).all():
            raise LdmError(f"the errors of x0 at step {self.at} are not finite, or 0")
        evaluated = Evaluated({})
        if self.evaluator is not None:
            pipeline = module.pipeline()
            pipeline.to(module.device)
            pipeline.set_progress_bar_config(disable=True)
            evaluated = self.evaluator(pipeline)
        if evaluated.features:
            with atomic_file(self.file.with_suffix(".npz")) as file:
                np.savez(file, **cast(Any, dict(evaluated.features)))
        record = LookRecord(
            step=self.at,
            images=module.num_images_seen,
            seconds_per_step=self._seconds,
            errors=errors.tolist(),
            samples=samples.tolist(),
            val_loss=float(trainer.callback_metrics["val/loss"]),
            paired={name: digest.hexdigest() for name, digest in self._digests.items()},
            metrics=evaluated.metrics,
        )
        write_json(self.file, record)
        trainer.should_stop = True


def now() -> float:
    """Seconds, once the device has finished its queue."""
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()
    return time.perf_counter()


def randomness_of(batch: Mapping[str, Any]) -> Iterable[tuple[str, bytes]]:
    """What is random about a training batch, by name."""
    names = {"draws": "samples", "t": "times", "eps": "noise", "posterior_noise": "noise"}
    names |= {"text": "captions", "text_mask": "captions", "caption": "captions"}
    for name, kind in names.items():
        if name in batch:
            value = batch[name]
            if isinstance(value, Tensor):
                value = value.detach().cpu().contiguous().view(torch.uint8).numpy()
            yield kind, value.tobytes() if isinstance(value, np.ndarray) else repr(value).encode()


@torch.no_grad()
def x0_errors(module: DenoiserTraining, batches: Iterable[dict[str, Any]]) -> tuple[Tensor, Tensor]:
    """Of each validation sample the mean squared error of x0 at its level of noise, and its root mean square, (N,) each.

    The level is the share of the noise, sigma / (alpha + sigma), which means the same for every path. Errors of x0 can be
    compared between predictions, too: at one level they are the squared errors of any of them, times a constant.
    """
    path, prediction = module.objective.path, module.objective.prediction
    errors, samples, count = [], [], 0
    for batch in batches:
        x0, condition = module.encode(move_data_to_device(batch, module.device))
        share, eps = noise_shares(count, x0)
        t = path.time(share.logit())
        reached = path.sigma(t) / (path.alpha(t) + path.sigma(t))
        if (reached - share).abs().max() > 1e-2:
            raise UsageError(
                f"{type(path).__name__} has no noise of the share {float(share[(reached - share).abs().argmax()]):.2f}, at "
                "which variants are compared; take another path"
            )
        x_t = path.sample(x0, eps, t)
        y = denoise(module.denoiser, expand(path.input_scale(t), x_t) * x_t, path.network_time(t), condition).float()
        errors.append((prediction.endpoints(path, x_t, y, t).x0 - x0).square().flatten(1).mean(1).cpu())
        samples.append(x0.square().flatten(1).mean(1).sqrt().cpu())
        count += len(x0)
    return torch.cat(errors), torch.cat(samples)


def noise_shares(first: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """The share of the noise (B,) and noise like ``like``, of validation samples from number ``first``."""
    place, eps = fixed_noise(first, like)
    return SHARES[0] + (SHARES[1] - SHARES[0]) * place, eps


def noise_places(count: int) -> np.ndarray:
    """Where the shares of so many validation samples lie in their range, (N,) in [0, 1)."""
    return fixed_noise(0, torch.empty(count, 1, dtype=torch.float64))[0].numpy()
