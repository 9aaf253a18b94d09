"""The autoencoder of an export: images -> posteriors, reproducible to the byte."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from threading import Semaphore

import numpy as np
import torch
from diffusers import AutoencoderKL
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from torch import Tensor, nn

from ldm.data.latent_schema import latent_info
from ldm.data.sources import ShardSource
from ldm.errors import UsageError
from ldm.latents.compute import Dtype, Precision, autocast, require_precision
from ldm.models.autoencoder import autoencoder_hash, encode, load_autoencoder

# Batches on a GPU at a time: one is computed while another is copied.
BATCHES_ON_GPU = 2


def load_matching(path: str | Path, source: ShardSource, device: torch.device | str = "cpu") -> AutoencoderKL:
    """The autoencoder at ``path``. Raises :class:`UsageError` naming both where the latents were encoded by another one."""
    info, autoencoder = latent_info(source), load_autoencoder(path, device)
    if (found := autoencoder_hash(autoencoder)) != info.autoencoder:
        raise UsageError(
            f"{source.spec} holds latents of autoencoder {info.autoencoder[:12]}, but {path} is {found[:12]}; give the one "
            "that they were exported with, or export again: ldm latents export"
        )
    return autoencoder


class LatentEncoder:
    """Images -> posteriors; thread-safe."""

    def __init__(self, autoencoder: AutoencoderKL, precision: Precision, dtype: Dtype, mode: bool):
        """
        Args:
            autoencoder: on its device.
            precision: of its computation.
            dtype: of the results.
            mode: return the mean only, without the standard deviation.
        """
        require_precision(autoencoder.device, precision)
        # channels last in memory: 20 to 33% faster on the CPU
        nn.Module.to(autoencoder, memory_format=torch.channels_last)
        self.autoencoder = autoencoder
        self.precision: Precision = precision
        self.dtype, self.mode = getattr(torch, dtype), mode
        on_gpu = autoencoder.device.type == "cuda"
        self._slots = Semaphore(BATCHES_ON_GPU) if on_gpu else nullcontext()

    def __call__(self, images: Tensor) -> dict[str, np.ndarray]:
        """Images (B, 3, H, W) in [−1, 1] -> ``mean`` and ``std``, (B, C, h, w)."""
        device = self.autoencoder.device
        with self._slots, torch.inference_mode(), autocast(device, self.precision), _own_stream(device):
            images = images.to(device, memory_format=torch.channels_last)
            posterior = DiagonalGaussianDistribution(encode(self.autoencoder, images).parameters.float())
            found = {"mean": posterior.mean} | ({} if self.mode else {"std": posterior.std})
            return {name: values.to(self.dtype).cpu().numpy() for name, values in found.items()}


def _own_stream(device: torch.device) -> torch.cuda.StreamContext | nullcontext:
    """A CUDA stream per call, so that one thread's copies overlap another's computation."""
    return torch.cuda.stream(torch.cuda.Stream(device)) if device.type == "cuda" else nullcontext()
