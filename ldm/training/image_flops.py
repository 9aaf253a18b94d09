"""The FLOPs of training on one image, before the first step and without taking one: on torch's meta device, where tensors have
shapes and no content. A run's utilisation (MFU) needs no more; ``fit --dry-run`` counts them in a step itself.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn

from ldm.data.datamodule import ShardDataModule
from ldm.training.autoencoder import AutoencoderTraining
from ldm.training.base import Stage
from ldm.training.cost import StepFlops
from ldm.training.denoiser import DenoiserTraining

# samples whose longest caption stands for that of a batch
CAPTIONS = 16


def flops_per_image(stage: Stage, data: ShardDataModule) -> float:
    """Forward and backward through the networks that are trained, and in stage one through LPIPS and the discriminator, both
    players in. What is encoded online is not in it.

    Args:
        stage: prepared, and not sharded.
        data: set up; its first training samples give the sizes.

    Raises:
        TypeError: for a stage whose networks are not known here.
    """
    if isinstance(stage, AutoencoderTraining):
        return _autoencoder_flops(stage, data)
    if isinstance(stage, DenoiserTraining):
        return _denoiser_flops(stage, data)
    raise TypeError(f"{type(stage).__name__} is none of the two stages")


def _denoiser_flops(stage: DenoiserTraining, data: ShardDataModule) -> float:
    samples = data.train_set.batch(range(min(CAPTIONS, len(data.train_set))))
    if stage.online:
        samples["image"] = samples["image"].to(stage.frozen.autoencoder.device)
        samples = stage.frozen.encode(samples)
    latents, text, mask = (_first(samples[name]) for name in ("mean", "text", "text_mask"))
    network = on_meta(stage.denoiser)
    asked = {"encoder_hidden_states": text.float(), "encoder_attention_mask": mask, "timestep": torch.ones(1, device="meta")}
    with StepFlops() as flops:
        network(latents.float(), **asked).sample.sum().backward()
    return flops.total


def _autoencoder_flops(stage: AutoencoderTraining, data: ShardDataModule) -> float:
    images = _first(data.train_set.batch([0])["image"]).float()
    autoencoder, perceptual, discriminator = map(on_meta, (stage.autoencoder, stage.perceptual, stage.adversary.discriminator))
    with StepFlops() as flops:
        reconstruction = autoencoder.decode(autoencoder.encode(images).latent_dist.mode()).sample
        reconstruction.sum().backward()
        seen = reconstruction.detach().requires_grad_()
        perceptual(seen, images).backward()
        discriminator.requires_grad_(False)  # judging, it learns nothing
        discriminator(seen).sum().backward()
        discriminator.requires_grad_()
        (discriminator(images).sum() + discriminator(seen.detach()).sum()).backward()
    return flops.total


def _first(batch: torch.Tensor) -> torch.Tensor:
    """A batch of the first sample alone, without content."""
    return batch[:1].to("meta")


def on_meta(network: nn.Module) -> Any:
    """A copy without content: no memory is taken, and the network stays as it is."""
    copied: dict[int, Any] = {id(buffer): buffer.detach().to("meta") for buffer in network.buffers()}
    for parameter in network.parameters():
        copied[id(parameter)] = nn.Parameter(parameter.detach().to("meta"), parameter.requires_grad)
    return copy.deepcopy(network, copied)
