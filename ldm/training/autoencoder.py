"""Stage one: a KL autoencoder and a patch discriminator.

Read :meth:`AutoencoderTraining.training_step` first. A step is one batch, however many micro-batches it is split into.
Lightning's ``global_step`` counts the steps of every optimiser; here it counts the autoencoder's only, because the
discriminator's optimiser is not wrapped by Lightning.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, cast

import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.utilities import rank_zero_info
from PIL import Image
from torch import Tensor, nn
from torch.nn.grad import conv2d_weight
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torchmetrics.image import PeakSignalNoiseRatio, StructuralSimilarityIndexMeasure

from ldm.data.datamodule import ShardDataModule, datamodule_of
from ldm.data.image_dataset import ImageDataset
from ldm.data.manifest import IMAGE_SHARDS
from ldm.data.quarantine import BadSample
from ldm.errors import UsageError, first_line
from ldm.evaluation.metrics import LatentHealth, ReconstructionFID, health_scalars
from ldm.evaluation.reconstruction import trim
from ldm.losses.adversarial import adaptive_weight
from ldm.losses.auxiliary import names_of
from ldm.losses.equivariance import SMALLEST_SIDE, Equivariance
from ldm.losses.perceptual import PerceptualLoss
from ldm.losses.reconstruction import LearnedVariance, ReconstructionLoss, WeightedLoss, kl_per_pixel_value
from ldm.models.autoencoder import (
    AutoencoderConfig,
    decode,
    encode,
    images_to_pil,
    pixels_to_images,
    reconstruct,
    set_latent_statistics,
)
from ldm.models.compiling import compile_modules
from ldm.training.adversarial import AdversarialTraining
from ldm.training.base import TrainingModule
from ldm.training.encoders import image_sizes, measure_statistics, require_format
from ldm.training.nonfinite import SkippedSteps
from ldm.training.optimiser import MuonConfig, OptimiserConfig
from ldm.training.randomness import PosteriorNoise, step_generator
from ldm.training.step import Update, mean_over_processes

PREVIEW_IMAGES = 8


class AutoencoderTraining(TrainingModule):
    """Reconstruction loss + LPIPS + KL, and an adversarial loss that starts late and rises slowly, under a guard."""

    command, artifact = "autoencoder", "autoencoder"
    reads_captions = False

    def __init__(
        self,
        autoencoder: AutoencoderConfig,
        adversary: AdversarialTraining,
        reconstruction: ReconstructionLoss,
        perceptual: PerceptualLoss,
        optimiser: MuonConfig,
        discriminator_optimiser: OptimiserConfig,
        equivariance: Equivariance | None = None,
        reconstruction_losses: list[WeightedLoss] | None = None,
        perceptual_weight: float = 1.0,
        kl_weight: float = 1e-6,
        kl_warmup: int = 0,
        learn_variance: bool = False,
        accumulate: int = 1,
        max_skipped: int = 10,
        fid_trunk: str | None = None,
        channels_last: bool = False,
        gradient_checkpointing: bool = False,
        compile: bool = False,
        ema_decay: float = 0.9999,
        offload_average: bool = False,
    ):
        """
        Args:
            autoencoder: the network, from scratch or from a directory.
            adversary: the discriminator, its loss, schedule and guard.
            reconstruction, perceptual: the reconstruction loss and LPIPS.
            optimiser: of the autoencoder.
            discriminator_optimiser: of the discriminator.
            equivariance: regulariser of the latents (default: none).
            reconstruction_losses: further losses between reconstruction and target, each with its weight.
            perceptual_weight: of LPIPS.
            kl_weight: of the KL in nats per pixel value.
            kl_warmup: steps over which the KL's weight rises from 0.
            learn_variance: learn the weight of reconstruction loss and LPIPS relative to the KL.
            accumulate: micro-batches that a batch is split into, to save memory; the step is still that of the whole batch.
            max_skipped: steps in a row with a loss or gradients that are not finite; each is skipped, one more stops the run.
            fid_trunk: also measure the reconstructions' FID at validation: inception, alex-random, vgg-random or the path of
                a checkpoint; see :class:`ldm.evaluation.metrics.ReconstructionFID`.
            channels_last: memory order of the networks: faster on GPUs and for large networks on CPUs, slower for tiny ones. On
                GPUs with a torch before 2.15 it needs ``compile``: there GroupNorm copies its input and its output.
            gradient_checkpointing: recompute the autoencoder's activations in the backward pass, to save memory.
            compile: compile every block, LPIPS and the discriminator with ``torch.compile``, which takes minutes at the start.
                Each size of a batch is compiled by itself, but with ``equivariance`` and whole images in validation all sizes
                together, which is slower.
            ema_decay: of the average of the autoencoder's weights.
            offload_average: keep the average in the host's memory, which frees 4 bytes a weight on the GPU; each step copies it
                there and back. Not with FSDP.
        """
        super().__init__()
        self.factor = autoencoder.factor
        self.autoencoder = autoencoder.build()
        self.adversary = adversary
        self.reconstruction, self.perceptual = reconstruction, perceptual
        self.equivariance = equivariance or Equivariance(0)
        self.reconstruction_losses = reconstruction_losses or []
        self.reconstruction_modules = nn.ModuleList([each.loss for each in self.reconstruction_losses])
        self.variance = LearnedVariance() if learn_variance else None
        self.losses = [*([self.variance] if self.variance else []), *self.reconstruction_modules]
        self.optimiser, self.discriminator_optimiser = optimiser, discriminator_optimiser
        self.perceptual_weight, self.kl_weight, self.kl_warmup = perceptual_weight, kl_weight, kl_warmup
        self.accumulate = accumulate
        self.skips = SkippedSteps(max_skipped)
        # every process validates on the same samples, so that metrics need no exchange
        own: dict[str, Any] = {"sync_on_compute": False}
        self.psnr = PeakSignalNoiseRatio(data_range=(-1.0, 1.0), dim=(1, 2, 3), reduction="elementwise_mean", **own)
        self.ssim = StructuralSimilarityIndexMeasure(data_range=(-1.0, 1.0), **own)
        self.health = LatentHealth(self.autoencoder.config["latent_channels"], **own)
        self.fid = ReconstructionFID(fid_trunk) if fid_trunk else None
        self.channels_last = channels_last
        if channels_last:
            networks: list[nn.Module] = [self.autoencoder, self.adversary.discriminator, self.perceptual]
            for network in networks:
                network.to(memory_format=torch.channels_last)
        if gradient_checkpointing:
            self.autoencoder.enable_gradient_checkpointing()
        self.compiles = compile
        self.start_average(ema_decay, offload=offload_average)

    # -- a step ------------------------------------------------------------------------------------------------------

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        """One step of the autoencoder on one batch, and from ``adversary.start`` on one of the discriminator."""
        step, draws, adversary = self.global_step, batch["draws"], self.adversary  # the first step is 0
        pairs, metrics = self._autoencoder_gradients(pixels_to_images(batch["image"]), batch["posterior_noise"], step)
        updates = [self._update("autoencoder", 0, self.trained().parameters(), self.optimiser, loss="train/loss")]
        if not adversary.trains(step):
            self.finish_step(metrics, updates, draws)
            return
        before = adversary.copy_buffers()
        metrics |= self._discriminator_gradients(pairs, step)
        parameters, settings = self._discriminator_parameters, self.discriminator_optimiser
        updates.append(self._update("discriminator", 1, parameters, settings, loss="train/d"))
        means, voids = self.finish_step(metrics, updates, draws, shared=adversary.lecam.averages())
        adversary.guard.watch_discriminator(means["train/d_accuracy"])
        adversary.restore_buffers(before, void=voids[1])

    def _update(
        self, network: str, number: int, parameters: Iterable[nn.Parameter], settings: OptimiserConfig, loss: str
    ) -> Update:
        """The update by an optimiser, whose steps count towards ``max_steps`` if it is the autoencoder's, number 0."""
        return Update(
            network, *self.optimiser_and_schedule(number, counted=number == 0), parameters, settings.max_grad_norm, loss
        )

    def _autoencoder_gradients(
        self, images: Tensor, noise: Tensor, step: int
    ) -> tuple[list[tuple[Tensor, Tensor]], dict[str, Tensor]]:
        """The autoencoder's gradients on one batch. Returns (target, reconstruction) of each micro-batch, and the metrics."""
        self.optimiser_and_schedule(0)[0].zero_grad()
        assert self.seed is not None
        shared_generator = step_generator(self.seed, step)
        pairs, metrics = [], []
        parts = [*zip(images.chunk(self.accumulate), noise.chunk(self.accumulate), strict=True)]
        for (part, own_noise), fraction in self.micro_batches(parts, [len(part) for part, _ in parts]):
            target, reconstruction, logged = self._autoencoder_backward(part, own_noise, fraction, step, shared_generator)
            pairs.append((target, reconstruction))
            metrics.append({name: fraction * value.detach() for name, value in logged.items()})
        return pairs, {f"train/{name}": torch.stack([part[name] for part in metrics]).sum(0) for name in metrics[0]}

    def _autoencoder_backward(
        self, images: Tensor, noise: Tensor, fraction: float, step: int, shared_generator: torch.Generator
    ) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Gradients of one micro-batch, a ``fraction`` of the batch. Returns (target, reconstruction, metrics).

        The latents are sampled with ``noise``; ``shared_generator`` chooses one transformation for the equivariance.

        The networks of the losses and the discriminator are differentiated once, with respect to the reconstruction. The
        sizes of the two gradients are compared at the decoder's last layer, and their weighted sum is propagated through the
        autoencoder.
        """
        posterior = encode(self.autoencoder, images)
        latents = posterior.mean + posterior.std * noise
        target, latents = self.equivariance(images, latents, shared_generator)
        before_last: list[Tensor] = []  # the last layer's input (B, C, H, W)
        last_layer = self.autoencoder.decoder.conv_out
        with last_layer.register_forward_pre_hook(lambda _, given: before_last.append(given[0].detach())):
            reconstruction = decode(self.autoencoder, latents).float()
        leaf = reconstruction.detach().requires_grad_()
        pixels, perceptual = self.reconstruction(leaf, target), self.perceptual(leaf, target)
        error = pixels + self.perceptual_weight * perceptual
        metrics = {"rec": pixels, "lpips": perceptual}
        for name, each in zip(names_of(self.reconstruction_modules), self.reconstruction_losses, strict=True):
            metrics[name] = term = each.loss(leaf, target)
            error = error + each.weight * term
        parameters = [parameter for parameter in self.reconstruction_modules.parameters() if parameter.requires_grad]
        gradient, *of_parameters = torch.autograd.grad(error, [leaf, *parameters])
        loss = error.detach()
        if self.variance is not None:
            loss = self.variance(loss)
            precision = torch.exp(-self.variance.log_variance.detach())
            gradient, of_parameters = gradient * precision, [each * precision for each in of_parameters]
            metrics["log_variance"] = self.variance.log_variance
        if (ramp := self.adversary.ramp(step)) > 0:
            generator = self.adversary.generator_loss(leaf)
            (by_generator,) = torch.autograd.grad(generator, leaf)
            weight = self.adversary.weight * ramp * self.adversary.guard.level
            weight = weight * self._adaptive_weight(before_last[0], gradient, by_generator)
            gradient = gradient + weight * by_generator
            metrics |= {"g": generator, "g_weight": weight, "g_level": self.adversary.guard.level}
            loss = loss + weight * generator.detach()
        kl = kl_per_pixel_value(posterior, images)
        loss = loss + self.kl_weight * (min(step / self.kl_warmup, 1.0) if self.kl_warmup else 1.0) * kl
        # a surrogate whose gradients at the reconstruction and at the losses' parameters are those computed above
        surrogate = (gradient * reconstruction).sum()
        for parameter, its_gradient in zip(parameters, of_parameters, strict=True):
            surrogate = surrogate + (its_gradient * parameter).sum()
        self.manual_backward(fraction * (loss + surrogate - surrogate.detach()))
        return target, reconstruction.detach(), metrics | {"kl": kl, "loss": loss}

    def _adaptive_weight(self, features: Tensor, by_reconstruction: Tensor, by_generator: Tensor) -> Tensor:
        """The ratio of the two gradients' norms at the decoder's last layer, over all processes."""
        # not by autograd: when sharded, the full weight has been freed by now
        last_layer = self.autoencoder.decoder.conv_out
        shape, padding = last_layer.weight.shape, cast(int, last_layer.padding)  # a tuple, which the function takes as well
        both = (gradient.to(features) for gradient in (by_reconstruction, by_generator))
        gradients = [conv2d_weight(features, shape, gradient, padding=padding).float() for gradient in both]
        first, second = mean_over_processes(torch.stack(gradients))
        return adaptive_weight(first, second, self.adversary.max_adaptive_weight)

    def _discriminator_gradients(self, pairs: list[tuple[Tensor, Tensor]], step: int) -> dict[str, Tensor]:
        """The discriminator's gradients on (target, reconstruction) of each micro-batch. Returns the metrics."""
        self.optimiser_and_schedule(1, counted=False)[0].zero_grad()
        totals = torch.zeros(2, device=self.device)  # loss and accuracy
        for (target, reconstruction), fraction in self.micro_batches(pairs, [len(target) for target, _ in pairs]):
            loss, accuracy = self.adversary.discriminator_loss(target, reconstruction, step)
            (fraction * loss).backward()  # not manual_backward, with which DDP would expect the autoencoder's gradients
            totals += fraction * torch.stack([loss.detach(), accuracy])
        if self.trainer.world_size > 1:
            self._average_gradients(self._discriminator_parameters)
        return {"train/d": totals[0], "train/d_accuracy": totals[1]}

    def _average_gradients(self, parameters: Sequence[nn.Parameter]) -> None:
        """Replace gradients by their means over all processes, in one exchange."""
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        flat = mean_over_processes(torch.cat([gradient.flatten() for gradient in gradients]))
        means = flat.split([gradient.numel() for gradient in gradients])
        torch._foreach_copy_(gradients, [mean.view_as(gradient) for mean, gradient in zip(means, gradients, strict=True)])

    # -- setup -------------------------------------------------------------------------------------------------------

    def batch_noise(self) -> PosteriorNoise:
        assert self.seed is not None
        return PosteriorNoise(self.seed, self.autoencoder.config["latent_channels"], self.factor, self.compute_dtype)

    @property
    def token_side(self) -> int:
        return self.factor

    def averaged(self) -> nn.Module:
        return self.autoencoder

    def _levels(self) -> list[nn.Module]:
        """The autoencoder's blocks at each resolution."""
        encoder, decoder = self.autoencoder.encoder, self.autoencoder.decoder
        return [*encoder.down_blocks, encoder.mid_block, decoder.mid_block, *decoder.up_blocks]

    def _compile(self, data: ShardDataModule) -> None:
        """Compile what takes time: the networks' blocks, and at full resolution the norms before their last layers."""
        encoder, decoder = self.autoencoder.encoder, self.autoencoder.decoder
        whole, scaled = data.validation_whole, self.equivariance.probability > 0
        compile_modules([*encoder.down_blocks, encoder.mid_block, encoder.conv_norm_out], any_size=whole)
        behind_latents = [decoder.mid_block, *decoder.up_blocks, decoder.conv_norm_out]
        losses = [self.perceptual.network, self.adversary.discriminator]
        compile_modules([*behind_latents, *losses], any_size=whole or scaled)

    def blocks(self) -> list[nn.Module]:
        network = self.autoencoder
        # every weight is in one of these: the autoencoder itself returns a posterior, whose tensors FSDP does not find
        between = [layer for layer in (network.quant_conv, network.post_quant_conv) if layer is not None]
        return [*self._levels(), network.encoder, network.decoder, *between]

    def setup(self, stage: str) -> None:
        if self.channels_last and isinstance(self.trainer.strategy, ModelParallelStrategy):
            raise UsageError("channels_last cannot be used with fsdp; set it to false, or train with ddp")
        if 0 <= self.trainer.max_steps <= self.adversary.start:
            raise UsageError(
                f"the adversary's start {self.adversary.start} is not before max_steps {self.trainer.max_steps}: the "
                "discriminator would never train; lower it or raise max_steps"
            )
        super().setup(stage)
        if self.compiles:
            self._compile(datamodule_of(self.trainer))
        # DDP, which is built next, exchanges gradients of parameters that are trained by then, in every backward pass
        discriminator = self.adversary.discriminator
        self._discriminator_parameters = [parameter for parameter in discriminator.parameters() if parameter.requires_grad]
        discriminator.requires_grad_(False)

    def prepare(self, data: ShardDataModule) -> None:
        require_format(data, IMAGE_SHARDS, "stage one", "pack images: ldm shards pack")
        assert isinstance(data.train_set, ImageDataset)
        sizes = image_sizes(data.train_set, self.factor)
        if not isinstance(sizes, BadSample):
            self._require_sizes(sizes)
        attempts = (data.validation_set.attempt(index) for index in range(len(data.validation_set)))
        good = islice((sample for sample in attempts if not isinstance(sample, BadSample)), PREVIEW_IMAGES)
        self._preview_images = [torch.from_numpy(sample["image"].copy())[None] for sample in good]
        self._train_set, self._batch_size = data.train_set, data.batch_size

    def _require_sizes(self, sizes: Sequence[tuple[int, int]]) -> None:
        """Refuse images of sizes (height, width) that a network cannot take."""
        height, width = max(sizes, key=max)
        sample_size = self.autoencoder.config["sample_size"]
        if self.autoencoder.use_tiling and max(height, width) > sample_size:
            raise UsageError(
                f"tiling would cut training images of {width} x {height} into tiles; raise the autoencoder's sample_size "
                f"{sample_size} to their size"
            )
        side = min(map(min, sizes))
        smallest = min(side, SMALLEST_SIDE) if self.equivariance.probability else side
        image = torch.zeros(1, 3, smallest, smallest)
        try:
            with torch.no_grad():
                self.perceptual(image, image)
                self.adversary.generator_loss(image)
        except (RuntimeError, UsageError) as error:
            raise UsageError(
                f"LPIPS or the discriminator cannot take images of {smallest} pixels ({first_line(error)}); give larger ones "
                "(image_size), or a discriminator of fewer layers"
            ) from error

    def configure_optimizers(self) -> tuple[list[Optimizer], list[LRScheduler]]:
        num_steps = self.trainer.max_steps
        for parameter in self._discriminator_parameters:
            parameter.requires_grad_()
        pairs = [
            self.optimiser.build(self.trained(), num_steps, self._levels(), self.compute_dtype),
            self.discriminator_optimiser.build(
                self.adversary.discriminator, num_steps if num_steps < 0 else num_steps - self.adversary.start
            ),
        ]
        optimisers = [optimiser for optimiser, _ in pairs]
        self.keep_settings(optimisers)
        return optimisers, [schedule for _, schedule in pairs]

    def on_fit_start(self) -> None:
        super().on_fit_start()
        self.print(f"perceptual loss: {self.perceptual.description}")

    # -- validation, previews, export --------------------------------------------------------------------------------

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        images = trim(pixels_to_images(batch["image"]), self.factor)
        posterior = encode(self.autoencoder, images)
        reconstruction = decode(self.autoencoder, posterior.mode()).float().clamp(-1, 1)
        self.psnr(reconstruction, images)
        self.ssim(reconstruction, images)
        self.health.update(posterior)
        if self.fid is not None:
            self.fid.update(images, real=True)
            self.fid.update(reconstruction, real=False)
        self.log_dict(
            {"val/psnr": self.psnr, "val/ssim": self.ssim, "val/lpips": self.perceptual(reconstruction, images)},
            batch_size=len(images),
        )

    def on_validation_epoch_end(self) -> None:
        """Log the health of the latents and FID; then the guard adjusts the adversarial loss."""
        self.log_dict({f"val/{name}": value for name, value in health_scalars(self.health.compute()).items()})
        self.health.reset()
        if self.fid is not None:
            self.log(f"val/{self.fid.name}", self.fid.compute())
            self.fid.reset()
        metrics = self.trainer.callback_metrics
        guard, step = self.adversary.guard, self.global_step
        # on GPUs the processes' values may differ in the last digits; the guard must act alike on all
        psnr, lpips = self.trainer.strategy.broadcast((float(metrics["val/psnr"]), float(metrics["val/lpips"])))
        message = guard.update(psnr, lpips, self.adversary.ramp(step) > 0)
        if message:
            rank_zero_info(f"step {step}: {message}")
        self.log("val/g_level", guard.level)

    def preview(self) -> list[tuple[str, list[Image.Image]]]:
        originals = [trim(pixels_to_images(pixels.to(self.device)), self.factor) for pixels in self._preview_images]
        rows = {"original": originals, "reconstruction": [reconstruct(self.autoencoder, images) for images in originals]}
        return [(name, [image for images in row for image in images_to_pil(images)]) for name, row in rows.items()]

    def save(self, folder: Path) -> None:
        """Write the ``AutoencoderKL`` directory, with the latents' mean and standard deviation per channel."""
        if self.autoencoder.encoder.conv_in.weight.requires_grad:  # a frozen encoder keeps the statistics that it has
            set_latent_statistics(self.autoencoder, *measure_statistics(self.autoencoder, self._train_set, self._batch_size))
        network = copy.deepcopy(self.autoencoder)
        # safetensors stores contiguous tensors only; diffusers declares no type for its own `to`
        nn.Module.to(network, memory_format=torch.contiguous_format)
        network.save_pretrained(folder)

    def is_absent(self, name: str) -> bool:
        return name.startswith(("perceptual.", "fid."))
