"""FLOPs of training: counted while a step runs, or for one image before the first step.

A multiplication and an addition count as two, as in GPUs' data sheets; Peebles & Xie (arXiv 2212.09748) count the pair as
one "Gflop". Model FLOPs utilisation (MFU) is PaLM's (Chowdhery et al. 2022, arXiv 2204.02311, appendix B): the FLOPs of a
step's mathematics over the device's peak. What gradient checkpointing and fused attention recompute does not count.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.optim.optimizer import Optimizer, register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from ldm.data.datamodule import ShardDataModule
from ldm.diffusion.conditioning import Condition, denoise, takes_sizes
from ldm.runs.dry_run.peaks import peaks_of
from ldm.training.autoencoder import AutoencoderTraining
from ldm.training.denoiser import DenoiserTraining
from ldm.training.encoded import EncodedTraining
from ldm.training.matcher import MatcherTraining

# torch up to 2.10, at least, has no formulas of CPUs' fused attention
_ON_CPU = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: torch.ops.aten._scaled_dot_product_flash_attention,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: (
        torch.ops.aten._scaled_dot_product_flash_attention_backward
    ),
}
FORMULAS = {cpu: flop_registry[gpu] for cpu, gpu in _ON_CPU.items()} | flop_registry
# samples whose longest caption is taken as that of every batch
COUNTED_CAPTIONS = 16


class StepFlops:
    """A context manager that counts the FLOPs of the forward and backward passes of this process; results do not change.

    Matrix products, convolutions and attention count, by torch's formulas; everything else is free, and so are the products
    of an optimiser (Muon's), which do not depend on the batch. Compiled blocks run uncompiled inside. torch's own
    ``FlopCounterMode`` fails on ``torch.autograd.grad``, which stage one uses.
    """

    def __init__(self) -> None:
        self.forward = 0.0  # FLOPs outside of backward passes, frozen networks included
        self.backward = 0.0  # inside of them, less what gradient checkpointing and fused attention recompute
        self._recomputing = 0  # depth of modules called within a backward pass: gradient checkpointing
        self._in_optimiser = 0  # depth of optimiser steps; one may call another's

    @property
    def total(self) -> float:
        """Forward and backward."""
        return self.forward + self.backward

    def __enter__(self) -> StepFlops:
        self._entered = ExitStack()
        for hook in (
            register_module_forward_pre_hook(self._enter_module),
            # checkpointing ends a recomputation by an exception
            register_module_forward_hook(self._leave_module, always_call=True),
            register_optimizer_step_pre_hook(self._enter_optimiser),
            register_optimizer_step_post_hook(self._leave_optimiser),
        ):
            self._entered.callback(hook.remove)
        # up to torch 2.10 a block that is first called under a dispatch mode would never be compiled
        self._entered.enter_context(torch.compiler.set_stance("force_eager"))
        self._entered.enter_context(_Products(self._tally))
        return self

    def __exit__(self, *error: Any) -> None:
        self._entered.__exit__(*error)

    def _tally(self, operation: str, flops: int) -> None:
        if self._in_optimiser:
            return
        if not _in_backward():
            self.forward += flops
        elif not self._recomputing:
            # of the five products in attention's formula the first recomputes the logits
            self.backward += flops * 4 / 5 if "attention" in operation and "backward" in operation else flops

    def _enter_module(self, module: nn.Module, arguments: Any) -> None:
        self._recomputing += _in_backward()

    def _leave_module(self, module: nn.Module, arguments: Any, output: Any) -> None:
        self._recomputing -= _in_backward()

    def _enter_optimiser(self, optimiser: Optimizer, arguments: tuple, named: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        self._in_optimiser += 1
        closure = named.get("closure")
        if closure is None:
            return arguments, named

        def counted() -> Any:  # Lightning passes forward and backward to the optimiser as a closure
            self._in_optimiser -= 1
            try:
                return closure()
            finally:
                self._in_optimiser += 1

        return arguments, named | {"closure": counted}

    def _leave_optimiser(self, optimiser: Optimizer, arguments: tuple, named: dict[str, Any]) -> None:
        self._in_optimiser -= 1


class _Products(TorchDispatchMode):
    """Calls ``tally`` with the name and the FLOPs of every operation that torch has a formula for."""

    def __init__(self, tally: Callable[[str, int], None]):
        super().__init__()
        self.tally = tally

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), named: Any = None) -> Any:
        named, formula = named or {}, FORMULAS.get(function.overloadpacket)
        if formula is None:
            with self:  # its decomposition may have products
                result = function.decompose(*arguments, **named)
            return function(*arguments, **named) if result is NotImplemented else result
        result = function(*arguments, **named)
        self.tally(str(function), formula(*arguments, **named, out_val=result))
        return result


def _in_backward() -> bool:
    return torch._C._current_graph_task_id() != -1


def peak_flops(device: torch.device, precision: str) -> float | None:
    """A GPU's peak FLOP/s of dense products in a trainer's ``precision``; None for CPUs and unknown GPUs."""
    if device.type != "cuda":
        return None
    tf32 = torch.get_float32_matmul_precision() != "highest"
    peaks = peaks_of(torch.cuda.get_device_name(device))
    if peaks is None:
        return None
    peak = peaks.bf16 if "16" in precision else peaks.tf32 if tf32 else peaks.fp32
    return peak and peak * 1e12


class ImageFlops:
    """FLOPs of training on one image, forward and backward, through the trained networks and those of the losses.

    Counted on torch's meta device, where tensors have shapes and no content. Encoding for stage two online is not counted.
    """

    def __init__(self, module: nn.Module):
        """Copies the networks of ``module`` without their content; before FSDP shards them."""
        if isinstance(module, AutoencoderTraining):
            networks = [module.autoencoder, module.perceptual, module.adversary.discriminator]
        elif isinstance(module, EncodedTraining):
            networks = [module.denoiser if isinstance(module, DenoiserTraining) else module.averaged()]
        else:
            raise TypeError(f"{type(module).__name__}: its FLOPs cannot be counted")
        self._module, self._networks = module, [on_meta(network) for network in networks]

    def count(self, data: ShardDataModule) -> float:
        """For images of the size that ``data`` has; once the module is prepared."""
        module = self._module
        if isinstance(module, AutoencoderTraining):
            return self._autoencoder(data.train_set.batch([0])["image"])
        samples = data.train_set.batch(range(min(COUNTED_CAPTIONS, len(data.train_set))))
        if module.online:
            samples["image"] = samples["image"].to(module.encoders.autoencoder.device)
            samples = module.encoders.encode(samples)
        length = 1 + int(samples["text_mask"].any(0).nonzero().max())  # computing padding is no useful work
        of_one = samples["mean"], samples["text"][:, :length], samples["text_mask"][:, :length]
        latents, text, mask = map(_first, of_one)
        return (self._matcher if isinstance(module, MatcherTraining) else self._denoiser)(latents, text, mask)

    def _matcher(self, latents: Tensor, text: Tensor, mask: Tensor) -> float:
        """Latents (1, C, h, w), text embeddings (1, L, D) and their mask (1, L)."""
        (matcher,) = self._networks
        with StepFlops() as flops:
            found = matcher(latents.float(), None, text.float(), mask)
            (found.images.sum() + found.texts.sum()).backward()
        return flops.total

    def _denoiser(self, latents: Tensor, text: Tensor, mask: Tensor) -> float:
        """Latents (1, C, h, w), text embeddings (1, L, D) and their mask (1, L)."""
        (denoiser,) = self._networks
        sizes = torch.ones(1, 6, device="meta") if takes_sizes(denoiser) else None
        frozen = not any(weight.requires_grad for weight in denoiser.parameters())
        text = text.float().requires_grad_(frozen)  # a token's embedding is trained through it
        with StepFlops() as flops:
            condition, time = Condition(text, mask, sizes), torch.ones(1, device="meta")
            denoise(denoiser, latents.float(), time, condition).sum().backward()
        return flops.total

    def _autoencoder(self, images: Tensor) -> float:
        """A step of both optimisers on the first of the images (B, 3, H, W)."""
        autoencoder, perceptual, discriminator = self._networks
        image = _first(images).float()
        with StepFlops() as flops:
            reconstruction = autoencoder.decode(autoencoder.encode(image).latent_dist.mode()).sample
            reconstruction.sum().backward()
            leaf = reconstruction.detach().requires_grad_()
            perceptual(leaf, image).backward()
            discriminator.requires_grad_(False)  # in the generator's step it has no gradient
            discriminator(leaf).sum().backward()
            discriminator.requires_grad_()
            (discriminator(image).sum() + discriminator(leaf.detach()).sum()).backward()
        return flops.total


def _first(batch: Tensor) -> Tensor:
    """A batch of the first sample alone, without content."""
    return batch[:1].to("meta")


def on_meta(network: nn.Module) -> Any:
    """A copy of a network without content; it takes no memory."""
    copied: dict[int, Any] = {id(buffer): buffer.detach().to("meta") for buffer in network.buffers()}
    for parameter in network.parameters():
        copied[id(parameter)] = nn.Parameter(parameter.detach().to("meta"), parameter.requires_grad)
    return copy.deepcopy(network, copied)
