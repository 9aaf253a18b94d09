"""Stage one: a KL autoencoder against a patch discriminator.

Read :meth:`AutoencoderTraining.training_step` first. A step is one batch, however many micro-batches it is split into.
Lightning's ``global_step`` counts the steps of every optimiser; here it counts the autoencoder's alone, because the
discriminator's optimiser is stepped outside Lightning's bookkeeping.
"""

from __future__ import annotations

import copy
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.utilities import rank_zero_info
from PIL import Image
from torch import Tensor, nn
from torch.nn.grad import conv2d_weight
from torchmetrics.image import PeakSignalNoiseRatio, StructuralSimilarityIndexMeasure

from ldm.data.datamodule import ShardDataModule
from ldm.data.manifest import IMAGE_SHARDS
from ldm.data.plan import PlannedSample
from ldm.data.quarantine import BadSample
from ldm.errors import UsageError, first_line
from ldm.evaluation.evaluate import trim
from ldm.evaluation.metrics import LatentHealth, ReconstructionFID, health_scalars
from ldm.losses import Equivariance, LearnedVariance, PerceptualLoss, ReconstructionLoss, adaptive_weight, kl_per_pixel_value
from ldm.losses.auxiliary import names_of
from ldm.losses.equivariance import SMALLEST_SIDE
from ldm.losses.reconstruction import WeightedLoss
from ldm.models.autoencoder import AutoencoderConfig, images_to_pil, pixels_to_images, reconstruct, set_latent_statistics
from ldm.training.adversarial import AdversarialTraining
from ldm.training.base import TrainingModule
from ldm.training.encoders import measure_statistics
from ldm.training.fsdp import is_sharded, whole
from ldm.training.nonfinite import SkippedSteps
from ldm.training.optimiser import MuonConfig, OptimiserConfig
from ldm.training.randomness import draw_generators, step_generator

PREVIEW_IMAGES = 8
# not in checkpoints: made again from their descriptions
FROZEN = ("perceptual.", "fid.")


class AutoencoderTraining(TrainingModule):
    """Reconstruction + LPIPS + KL, and a discriminator that starts late, is weighted in slowly, and is guarded."""

    command, artifact, find_unused_parameters = "autoencoder", "autoencoder", True

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
    ):
        """
        Args:
            autoencoder: the network, from scratch or from a directory.
            adversary: the discriminator, its loss, timetable and guard.
            reconstruction, perceptual: the losses.
            optimiser: of the autoencoder.
            discriminator_optimiser: of the discriminator.
            equivariance: latents that turn and shrink as images do (default: not asked for).
            reconstruction_losses: further losses between reconstruction and target, each with its weight.
            perceptual_weight: of LPIPS against the reconstruction loss.
            kl_weight: of the KL in nats per pixel value.
            kl_warmup: batches over which the KL's weight rises from 0.
            learn_variance: learn what reconstruction and LPIPS together weigh against the KL.
            accumulate: micro-batches that a batch is split into, to save memory; the step stays that of the whole batch.
            max_skipped: batches in a row whose loss or gradients are not finite, before the run stops; each is skipped.
            fid_trunk: measure the reconstructions' FID at validation too: inception, alex-random, vgg-random or the path of a
                checkpoint; see :class:`ldm.evaluation.metrics.ReconstructionFID`.
            channels_last: memory order of the networks: faster on GPUs and for large networks on CPUs, slower for tiny ones.
            gradient_checkpointing: compute every block of the autoencoder twice, to keep less in memory.
            compile: compile every block with ``torch.compile``: minutes at first, faster from then on.
            ema_decay: of the average of the autoencoder's weights.
        """
        super().__init__()
        self.automatic_optimization = False
        self.factor = autoencoder.factor
        self.autoencoder = autoencoder.build()
        self.adversary = adversary
        self.reconstruction, self.perceptual = reconstruction, perceptual
        self.equivariance = equivariance or Equivariance(0)
        self.reconstruction_losses = reconstruction_losses or []
        self.reconstruction_modules = nn.ModuleList([each.loss for each in self.reconstruction_losses])
        self.variance = LearnedVariance() if learn_variance else None
        self.optimiser, self.discriminator_optimiser = optimiser, discriminator_optimiser
        self.perceptual_weight, self.kl_weight, self.kl_warmup = perceptual_weight, kl_weight, kl_warmup
        self.accumulate = accumulate
        self.skips = SkippedSteps(max_skipped)
        # every process validates on the same samples, and each has all of the figure
        own = {"sync_on_compute": False}
        self.psnr = PeakSignalNoiseRatio(data_range=(-1.0, 1.0), dim=(1, 2, 3), reduction="elementwise_mean", **own)
        self.ssim = StructuralSimilarityIndexMeasure(data_range=(-1.0, 1.0), **own)
        self.health = LatentHealth(self.autoencoder.config.latent_channels, **own)
        self.fid = ReconstructionFID(fid_trunk) if fid_trunk else None
        self.channels_last = channels_last
        if channels_last:
            for network in (self.autoencoder, self.adversary.discriminator, self.perceptual):
                network.to(memory_format=torch.channels_last)
        if gradient_checkpointing:
            self.autoencoder.enable_gradient_checkpointing()
        if compile:
            for block in self._levels():
                block.compile()
        self.start_average(ema_decay)

    # -- a step ------------------------------------------------------------------------------------------------------

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        """One step of the autoencoder on one batch, and from ``adversary.start`` on one of the discriminator."""
        # the number of this step, from 0
        step, images = self.global_step, pixels_to_images(batch["image"])
        pairs = self._train_autoencoder(images, batch["draws"], step)
        if pairs is not None and self.adversary.trains(step):
            self._train_discriminator(pairs, batch["draws"], step)

    def _train_autoencoder(self, images: Tensor, draws: list[PlannedSample], step: int) -> list[tuple[Tensor, Tensor]] | None:
        """One step of the autoencoder. Returns (target, reconstruction) of each micro-batch, or None if it was skipped."""
        optimiser, _ = self.optimizers()
        optimiser.zero_grad()
        generators, turns = draw_generators(self.seed, draws), step_generator(self.seed, step)
        pairs, metrics = [], []
        parts = images.chunk(self.accumulate)
        for part, share in self.micro_batches(parts, [len(part) for part in parts]):
            own, generators = generators[: len(part)], generators[len(part) :]
            target, reconstruction, logged = self._autoencoder_backward(part, share, step, own, turns)
            pairs.append((target, reconstruction))
            metrics.append({name: share * value.detach() for name, value in logged.items()})
        norm = whole(nn.utils.clip_grad_norm_(self._trained().parameters(), self.optimiser.max_grad_norm))
        summed = {f"train/{name}": torch.stack([part[name] for part in metrics]).sum(0) for name in metrics[0]}
        mean = self.log_step(summed)
        schedule, _ = self.lr_schedulers()
        self.log_dict({"train/grad_norm": norm, "train/lr": schedule.get_last_lr()[0]})
        if not self.step_or_skip(optimiser, schedule, norm + mean["train/loss"], "autoencoder", draws):
            return None
        self.average.update()
        return pairs

    def _autoencoder_backward(
        self, images: Tensor, share: float, step: int, generators: list[torch.Generator], turns: torch.Generator
    ) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Gradients of one micro-batch, ``share`` of the batch: (target, reconstruction, metrics).

        Each latent is sampled by a generator of its own; ``turns`` chooses the transformation of the equivariance for all.

        The losses' networks and the discriminator are differentiated once, down to the reconstruction. At the decoder's last
        layer the two gradients are compared, and their sum is propagated through the autoencoder.
        """
        posterior = self.autoencoder.encode(images).latent_dist
        target, latents = self.equivariance(images, posterior.sample(generators), turns)
        before_last: list[Tensor] = []  # layer, (B, C, H, W)
        last_layer = self.autoencoder.decoder.conv_out
        with last_layer.register_forward_pre_hook(lambda _, given: before_last.append(given[0].detach())):
            reconstruction = self.autoencoder.decode(latents).sample.float()
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
        # its value is the loss; its gradients at the reconstruction and at the losses' parameters are those from above
        towards = (gradient * reconstruction).sum()
        for parameter, its_gradient in zip(parameters, of_parameters, strict=True):
            towards = towards + (its_gradient * parameter).sum()
        self.manual_backward(share * (loss + towards - towards.detach()))
        return target, reconstruction.detach(), metrics | {"kl": kl, "loss": loss}

    def _adaptive_weight(self, features: Tensor, by_reconstruction: Tensor, by_generator: Tensor) -> Tensor:
        """How much larger the first gradient is at the decoder's last layer, over all processes."""
        # not by autograd: sharded, the weight that was used is gone by now
        last_layer = self.autoencoder.decoder.conv_out
        gradients = torch.stack(
            [
                conv2d_weight(features, last_layer.weight.shape, gradient.to(features), padding=last_layer.padding).float()
                for gradient in (by_reconstruction, by_generator)
            ]
        )
        return adaptive_weight(*self.trainer.strategy.reduce(gradients, reduce_op="mean"), self.adversary.max_adaptive_weight)

    def _train_discriminator(self, pairs: list[tuple[Tensor, Tensor]], draws: list[PlannedSample], step: int) -> None:
        """One step of the discriminator on (target, reconstruction) of each micro-batch."""
        # use_pl_optimizer=False: a step that Lightning does not count, so that max_steps means batches
        _, optimiser = self.optimizers(use_pl_optimizer=False)
        optimiser.zero_grad()
        losses, accuracies = [], []
        for (target, reconstruction), share in self.micro_batches(pairs, [len(target) for target, _ in pairs]):
            loss, accuracy = self.adversary.discriminator_loss(target, reconstruction, step)
            self.manual_backward(share * loss)
            losses.append(share * loss.detach())
            accuracies.append(share * accuracy)
        discriminator = self.adversary.discriminator
        if is_sharded(self.autoencoder):  # the discriminator is not, and nobody else sees to its gradients
            for parameter in discriminator.parameters():
                parameter.grad = self.trainer.strategy.reduce(parameter.grad, reduce_op="mean")
        norm = nn.utils.clip_grad_norm_(discriminator.parameters(), self.discriminator_optimiser.max_grad_norm)
        mean = self.log_step({"train/d": sum(losses), "train/d_accuracy": sum(accuracies)})
        for average in self.adversary.lecam.buffers():  # moved by each process's own logits, and linear in them
            average.copy_(self.trainer.strategy.reduce(average, reduce_op="mean"))
        _, schedule = self.lr_schedulers()
        if self.step_or_skip(optimiser, schedule, norm + mean["train/d"], "discriminator", draws):
            self.adversary.guard.watch_discriminator(mean["train/d_accuracy"])

    # -- what it starts from -----------------------------------------------------------------------------------------

    def averaged(self) -> nn.Module:
        return self.autoencoder

    def _levels(self) -> list[nn.Module]:
        """Of the autoencoder, one for each size and the middle."""
        encoder, decoder = self.autoencoder.encoder, self.autoencoder.decoder
        return [*encoder.down_blocks, encoder.mid_block, decoder.mid_block, *decoder.up_blocks]

    def blocks(self) -> list[nn.Module]:
        network = self.autoencoder
        # none is left to the whole, which hands out a posterior: FSDP does not see into that, and would not gather for its sake
        between = [layer for layer in (network.quant_conv, network.post_quant_conv) if layer is not None]
        return [*self._levels(), network.encoder, network.decoder, *between]

    def setup(self, stage: str) -> None:
        """Refuse what cannot go well, before the first step."""
        precision, num_steps = str(self.trainer.precision), self.trainer.max_steps
        if "16" in precision and not precision.startswith("bf16"):
            raise UsageError(f"trainer.precision {precision}: adversarial gradients overflow fp16; give bf16-mixed or 32-true")
        if precision == "bf16-true":
            raise UsageError("trainer.precision bf16-true keeps no fp32 weights, and small steps are lost; give bf16-mixed")
        if isinstance(self.trainer.strategy, ModelParallelStrategy):
            trained_losses = any(True for _ in self.reconstruction_modules.parameters())
            for name, given in (
                ("learn_variance", self.variance is not None),
                ("channels_last", self.channels_last),
                ("reconstruction_losses with parameters", trained_losses),
            ):
                if given:
                    raise UsageError(f"model.{name} does not go with trainer.strategy fsdp; leave it out, or train with ddp")
        if not 0 <= self.adversary.start < num_steps:
            raise UsageError(
                f"model.adversary.start {self.adversary.start} is not before trainer.max_steps {num_steps}: the "
                "discriminator would never train; lower it or raise max_steps"
            )
        super().setup(stage)

    def prepare(self, data: ShardDataModule) -> None:
        for source in (*data.train_set.sources, *data.validation_set.sources):
            if source.manifest.format != IMAGE_SHARDS:
                raise UsageError(f"{source.spec} holds {source.manifest.format}; stage one needs {IMAGE_SHARDS}")
        first = data.train_set.attempt(0)
        size = [data.train_set.image_size] * 2 if isinstance(first, BadSample) else first["image"].shape[1:]
        if any(side is not None and side % self.factor for side in size):
            raise UsageError(
                f"images of {size[1]} x {size[0]} are not multiples of {self.factor}, by which the autoencoder shrinks them; "
                "set data.image_size to one"
            )
        if self.autoencoder.use_tiling and None not in size and max(size) > self.autoencoder.config.sample_size:
            raise UsageError(
                f"model.autoencoder.tiling would tile training images of {size[1]} x {size[0]}; raise "
                f"model.autoencoder.sample_size {self.autoencoder.config.sample_size} to their size"
            )
        if None not in size:
            self._try_smallest(min(size))
        few = (data.validation_set.attempt(index) for index in range(len(data.validation_set)))
        good = islice((sample for sample in few if not isinstance(sample, BadSample)), PREVIEW_IMAGES)
        self._shown = [torch.from_numpy(sample["image"].copy())[None] for sample in good]
        self._train_set, self._batch_size = data.train_set, data.batch_size

    def _try_smallest(self, side: int) -> None:
        """Whether LPIPS and the discriminator can look at images as small as they come; the latter is not asked for long."""
        smallest = min(side, SMALLEST_SIDE) if self.equivariance.probability else side
        image = torch.zeros(1, 3, smallest, smallest)
        try:
            with torch.no_grad():
                self.perceptual(image, image)
                self.adversary.generator_loss(image)
        except (RuntimeError, UsageError) as error:
            raise UsageError(
                f"LPIPS or the discriminator cannot look at images of {smallest} pixels ({first_line(error)}); give larger "
                "ones (data.image_size), or a discriminator of fewer layers"
            ) from error

    def configure_optimizers(self) -> tuple[list, list]:
        num_steps = self.trainer.max_steps
        pairs = [
            self.optimiser.build(self._trained(), num_steps, self._levels(), self.compute_dtype),
            self.discriminator_optimiser.build(self.adversary.discriminator, num_steps - self.adversary.start),
        ]
        return [optimiser for optimiser, _ in pairs], [schedule for _, schedule in pairs]

    def _trained(self) -> nn.Module:
        """What the first optimiser trains."""
        beside = [] if self.variance is None else [self.variance]
        beside += [loss for loss in self.reconstruction_modules if any(True for _ in loss.parameters())]
        return nn.ModuleList([self.autoencoder, *beside]) if beside else self.autoencoder

    def on_fit_start(self) -> None:
        super().on_fit_start()
        self.print(f"perceptual loss: {self.perceptual.description}")

    # -- what is seen of it ------------------------------------------------------------------------------------------

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        images = trim(pixels_to_images(batch["image"]), self.factor)
        posterior = self.autoencoder.encode(images).latent_dist
        reconstruction = self.autoencoder.decode(posterior.mode()).sample.float().clamp(-1, 1)
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
        """Latents' health and FID; then the guard adjusts the adversarial loss."""
        self.log_dict({f"val/{name}": value for name, value in health_scalars(self.health.compute()).items()})
        self.health.reset()
        if self.fid is not None:
            self.log(f"val/{self.fid.name}", self.fid.compute())
            self.fid.reset()
        metrics = self.trainer.callback_metrics
        guard, step = self.adversary.guard, self.global_step
        # the first process's: on a GPU another's may differ in the last digits, and so might what the guard does
        seen = self.trainer.strategy.broadcast((float(metrics["val/psnr"]), float(metrics["val/lpips"])))
        message = guard.update(*seen, self.adversary.ramp(step) > 0)
        if message:
            rank_zero_info(f"step {step}: {message}")
        self.log("val/g_level", guard.level)

    def reconstruct(self, images: Tensor) -> Tensor:
        """Through the posterior's mode and back, (B, 3, H, W) in [−1, 1]."""
        return reconstruct(self.autoencoder, images)

    def preview(self) -> list[tuple[str, list[Image.Image]]]:
        originals = [trim(pixels_to_images(pixels.to(self.device)), self.factor) for pixels in self._shown]
        return [
            (name, [image for images in row for image in images_to_pil(images)])
            for name, row in (("original", originals), ("reconstruction", map(self.reconstruct, originals)))
        ]

    def save(self, folder: Path) -> None:
        """Write the ``AutoencoderKL`` directory, with the latents' mean and standard deviation per channel."""
        if self.autoencoder.encoder.conv_in.weight.requires_grad:  # a frozen one keeps its directory's
            set_latent_statistics(self.autoencoder, *measure_statistics(self.autoencoder, self._train_set, self._batch_size))
        # safetensors holds no tensor in another order
        copy.deepcopy(self.autoencoder).to(memory_format=torch.contiguous_format).save_pretrained(folder)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        checkpoint["state_dict"] = {k: v for k, v in checkpoint["state_dict"].items() if not k.startswith(FROZEN)}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(checkpoint)
        if "state_dict" in checkpoint:  # sharded, they are in their places by now
            frozen = {k: v for k, v in self.state_dict().items() if k.startswith(FROZEN)}
            checkpoint["state_dict"] = frozen | checkpoint["state_dict"]
