"""The FLOPs of training on one image, before the first step and without taking one: on torch's meta device, where tensors have
shapes and no content. A run's utilisation (MFU) needs no more; ``fit --dry-run`` counts them in a step itself.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from ldm.runs.dry_run.cost import StepFlops


def denoiser_flops(denoiser: nn.Module, latents: Tensor, text: Tensor, mask: Tensor) -> float:
    """Forward and backward of the denoiser, for the first of the latents (B, C, h, w) and embeddings (B, L, D)."""
    latents, text, mask = map(_first, (latents, text, mask))
    asked = {"encoder_hidden_states": text.float(), "encoder_attention_mask": mask, "timestep": torch.ones(1, device="meta")}
    network = on_meta(denoiser)
    with StepFlops() as flops:
        network(latents.float(), **asked).sample.sum().backward()
    return flops.total


def autoencoder_flops(autoencoder: nn.Module, perceptual: nn.Module, discriminator: nn.Module, images: Tensor) -> float:
    """Forward and backward of all three in a step of both players, for the first of the images (B, 3, H, W)."""
    image = _first(images).float()
    autoencoder, perceptual, discriminator = map(on_meta, (autoencoder, perceptual, discriminator))
    with StepFlops() as flops:
        reconstruction = autoencoder.decode(autoencoder.encode(image).latent_dist.mode()).sample
        reconstruction.sum().backward()
        seen = reconstruction.detach().requires_grad_()
        perceptual(seen, image).backward()
        discriminator.requires_grad_(False)  # judging, it learns nothing
        discriminator(seen).sum().backward()
        discriminator.requires_grad_()
        (discriminator(image).sum() + discriminator(seen.detach()).sum()).backward()
    return flops.total


def _first(batch: Tensor) -> Tensor:
    """A batch of the first sample alone, without content."""
    return batch[:1].to("meta")


def on_meta(network: nn.Module) -> Any:
    """A copy without content: no memory is taken, and the network stays as it is."""
    copied: dict[int, Any] = {id(buffer): buffer.detach().to("meta") for buffer in network.buffers()}
    for parameter in network.parameters():
        copied[id(parameter)] = nn.Parameter(parameter.detach().to("meta"), parameter.requires_grad)
    return copy.deepcopy(network, copied)
