"""Random numbers of training that do not depend on the number of processes, and that resume exactly.

The random numbers of a sample (time, noise, sample of the posterior) depend only on the run's seed and on the sample's number
in the training order (:class:`ldm.data.plan.PlannedSample`). A step is therefore the same on one process, on many, and after
a resume, without any saved state. They are drawn where the batch is made, in the loader's workers, so that no GPU waits for
them. Dropout uses torch's global generators; checkpoints hold their state for each process.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any, cast

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from ldm.data.latent_dataset import allocate
from ldm.data.plan import PlannedSample
from ldm.diffusion.path import ProbabilityPath
from ldm.diffusion.timesteps import TimestepSampler
from ldm.errors import LdmError, first_line


def sample_generators(seed: int, samples: Sequence[PlannedSample]) -> list[torch.Generator]:
    """One generator for each sample of a batch. They are on the CPU, so that a GPU trains on the same noise as a CPU."""
    return [_generator(seed, b"draw", planned.number) for planned in samples]


@dataclass(frozen=True)
class PosteriorNoise:
    """Draws the noise of stage one's batches, which samples the latents (:class:`ldm.data.loader.BatchNoise`).

    Attributes:
        seed: of the run.
        channels, factor: of the autoencoder, whose latents of images (H, W) are (channels, H / factor, W / factor).
        dtype: of the posterior.
    """

    seed: int
    channels: int
    factor: int
    dtype: torch.dtype

    def __call__(
        self, batch: Mapping[str, Any], draws: Sequence[PlannedSample], empty: Callable[..., Tensor] = torch.empty
    ) -> dict[str, Tensor]:
        """``posterior_noise`` (B, C, h, w)."""
        height, width = batch["image"].shape[2:]
        noise = empty((len(draws), self.channels, height // self.factor, width // self.factor), dtype=self.dtype)
        for own, generator in zip(noise, sample_generators(self.seed, draws), strict=True):
            torch.randn(own.shape, generator=generator, out=own)
        return {"posterior_noise": noise}


@dataclass(frozen=True)
class DenoisingNoise:
    """Draws times and noise of stage two's batches, of latents or of images (:class:`ldm.data.loader.BatchNoise`).

    Attributes:
        seed: of the run.
        channels, factor: of the autoencoder, see :class:`PosteriorNoise`; the size is that of each batch.
        path, timesteps: of the objective.
    """

    seed: int
    channels: int
    factor: int
    path: ProbabilityPath
    timesteps: TimestepSampler

    def __call__(
        self, batch: Mapping[str, Any], draws: Sequence[PlannedSample], empty: Callable[..., Tensor] = torch.empty
    ) -> dict[str, Tensor]:
        """``t`` (B,) and ``eps`` (B, C, h, w), and ``posterior_noise`` like it, unless the batch holds modes of latents."""
        like, factor = (batch["mean"], 1) if "mean" in batch else (batch["image"], self.factor)
        shape = self.channels, like.shape[2] // factor, like.shape[3] // factor
        like_eps = (len(draws), *shape), torch.float32
        shapes = {"eps": like_eps, "t": ((len(draws),), torch.float32)}
        if "mean" not in batch or "std" in batch:
            shapes["posterior_noise"] = like_eps
        noise, x0 = allocate(shapes, empty), torch.empty(1, *shape)
        for row, generator in enumerate(sample_generators(self.seed, draws)):  # in an order that runs rely on
            if "posterior_noise" in noise:
                torch.randn(shape, generator=generator, out=noise["posterior_noise"][row])
            noise["t"][row] = self.timesteps(x0, self.path, generator)
            torch.randn(shape, generator=generator, out=noise["eps"][row])
        return noise


def step_generator(seed: int, step: int) -> torch.Generator:
    """For random numbers that all samples of a step share, on all processes."""
    return _generator(seed, b"step", step)


def _generator(seed: int, use: bytes, number: int) -> torch.Generator:
    digest = blake2b(b"%d %s %d" % (seed, use, number), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)  # seeds are signed


def global_states() -> list[dict[str, Any]]:
    """The states of every process's global generators, in plain types and tensors; a collective operation."""
    kind, keys, *rest = cast("tuple[str, np.ndarray, int, int, float]", np.random.get_state())
    state = {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else [],
        "python": random.getstate(),
        "numpy": (kind, keys.tolist(), *rest),
    }
    if not (dist.is_available() and dist.is_initialized()):
        return [state]
    states: list[dict[str, Any]] = [{}] * dist.get_world_size()
    dist.all_gather_object(states, state)
    return states


def set_global_state(state: dict[str, Any]) -> None:
    """Set this process's global generators to one of :func:`global_states`. Raises :class:`LdmError` if it is none."""
    try:
        torch.set_rng_state(state["torch"])
        if len(state["cuda"]) == torch.cuda.device_count():
            torch.cuda.set_rng_state_all(state["cuda"])
        version, numbers, gauss = state["python"]
        random.setstate((version, tuple(numbers), gauss))
        kind, keys, *rest = state["numpy"]
        np.random.set_state((kind, np.array(keys, np.uint32), *rest))
    except (KeyError, TypeError, ValueError, OverflowError, RuntimeError) as error:
        raise LdmError(f"the checkpoint's random states are broken ({first_line(error)}); resume from another one") from error
