"""The FLOPs of training on one image, before the first step and without taking one: on torch's meta device, where tensors have
shapes and no content. A run's utilisation (MFU) needs no more; ``fit --dry-run`` counts them in a step itself.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from ldm.data.datamodule import ShardDataModule
from ldm.runs.dry_run.cost import StepFlops
from ldm.training.autoencoder import AutoencoderTraining
from ldm.training.base import TrainingModule
from ldm.training.denoiser import DenoiserTraining

# samples whose longest caption counts as that of every batch
COUNTED_CAPTIONS = 16


class ImageFlops:
    """Counts the FLOPs of training on one image: forward and backward, through what is trained and the losses' networks.

    What stage two encodes online is not counted.
    """

    def __init__(self, module: TrainingModule):
        """Copies the networks of ``module`` without their content; before FSDP shards them."""
        self._module, self._networks = module, {}
        if isinstance(module, AutoencoderTraining):
            networks = (module.autoencoder, module.perceptual, module.adversary.discriminator)
        elif isinstance(module, DenoiserTraining):
            networks = (module.denoiser,)
        else:
            raise TypeError(f"{type(module).__name__}: its FLOPs cannot be counted")
        self._networks = [on_meta(network) for network in networks]

    def count(self, data: ShardDataModule) -> float:
        """For images of the size that ``data`` has; once the module is prepared."""
        module = self._module
        if isinstance(module, AutoencoderTraining):
            return _autoencoder_flops(*self._networks, data.train_set.batch([0])["image"])
        samples = data.train_set.batch(range(min(COUNTED_CAPTIONS, len(data.train_set))))
        if module.online:
            samples["image"] = samples["image"].to(module.frozen.autoencoder.device)
            samples = module.frozen.encode(samples)
        return _denoiser_flops(*self._networks, samples["mean"], samples["text"], samples["text_mask"])


def _denoiser_flops(denoiser: nn.Module, latents: Tensor, text: Tensor, mask: Tensor) -> float:
    """Forward and backward of the denoiser, for the first of the latents (B, C, h, w) and embeddings (B, L, D)."""
    latents, text, mask = map(_first, (latents, text, mask))
    given = {"encoder_hidden_states": text.float(), "encoder_attention_mask": mask, "timestep": torch.ones(1, device="meta")}
    with StepFlops() as flops:
        denoiser(latents.float(), **given).sample.sum().backward()
    return flops.total


def _autoencoder_flops(autoencoder: nn.Module, perceptual: nn.Module, discriminator: nn.Module, images: Tensor) -> float:
    """Forward and backward of all three in a step of both optimisers, for the first of the images (B, 3, H, W)."""
    image = _first(images).float()
    with StepFlops() as flops:
        reconstruction = autoencoder.decode(autoencoder.encode(image).latent_dist.mode()).sample
        reconstruction.sum().backward()
        seen = reconstruction.detach().requires_grad_()
        perceptual(seen, image).backward()
        discriminator.requires_grad_(False)  # the generator's loss has no gradient for it
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
