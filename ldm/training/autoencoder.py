"""Stage one: a KL autoencoder against a patch discriminator.

Steps are counted in *batches trained* everywhere. Lightning's ``global_step`` counts every optimiser's steps; here it counts
the autoencoder's alone, because the discriminator's optimiser is stepped outside Lightning's bookkeeping. A batch that is
trained in several pieces (``accumulate``) is one step.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.strategies import ParallelStrategy
from lightning.pytorch.utilities import rank_zero_info
from PIL import Image
from torch import Tensor, nn
from torchmetrics.image import PeakSignalNoiseRatio, StructuralSimilarityIndexMeasure

from ldm.data.datamodule import ShardDataModule
from ldm.data.manifest import IMAGE_SHARDS
from ldm.data.quarantine import BadSample
from ldm.errors import LdmError, UsageError, first_line
from ldm.evaluate import trim
from ldm.losses import Equivariance, LearnedVariance, PerceptualLoss, ReconstructionLoss, adaptive_weight, kl_per_pixel_value
from ldm.losses.equivariance import SMALLEST_SIDE
from ldm.metrics import LatentHealth, ReconstructionFID, health_scalars
from ldm.models.autoencoder import AutoencoderConfig, images_to_pictures, pixels_to_images, reconstruct, set_latent_statistics
from ldm.training.adversary import Adversary
from ldm.training.base import OptimiserConfig, Stage

log = logging.getLogger(__name__)

PREVIEW_PICTURES = 8
# as many as tell a channel's mean and spread to a percent or two; the export of latents measures the whole set
STATISTICS_PICTURES = 2048
# not in checkpoints: made again from their descriptions
FROZEN = ("perceptual.", "fid.")


class AutoencoderTraining(Stage):
    """Reconstruction + LPIPS + KL, and a discriminator that comes in late, slowly and under guard."""

    command, product, takes_turns = "autoencoder", "autoencoder", True

    def __init__(
        self,
        autoencoder: AutoencoderConfig,
        adversary: Adversary,
        reconstruction: ReconstructionLoss,
        perceptual: PerceptualLoss,
        optimiser: OptimiserConfig,
        discriminator_optimiser: OptimiserConfig,
        equivariance: Equivariance | None = None,
        perceptual_weight: float = 1.0,
        kl_weight: float = 1e-6,
        kl_warmup: int = 0,
        learn_variance: bool = False,
        accumulate: int = 1,
        max_skipped: int = 10,
        fid_trunk: str | None = None,
        channels_last: bool = False,
        ema_decay: float = 0.9999,
    ):
        """
        Args:
            autoencoder: the network, from scratch or from a directory.
            adversary: the discriminator, its loss, timetable and guard.
            reconstruction, perceptual: the losses.
            optimiser: of the autoencoder.
            discriminator_optimiser: of the discriminator.
            equivariance: latents that turn and shrink as pictures do (default: not asked for).
            perceptual_weight: of LPIPS against the reconstruction loss.
            kl_weight: of the KL in nats per pixel value.
            kl_warmup: batches over which the KL's weight rises from 0.
            learn_variance: learn what reconstruction and LPIPS together weigh against the KL.
            accumulate: pieces that a batch is trained in, one after another, to save memory.
            max_skipped: batches in a row whose gradients are not finite, before the run stops; each is skipped.
            fid_trunk: measure the reconstructions' FID at validation too: inception, alex-random, vgg-random or the path of a
                checkpoint; see :class:`ldm.metrics.ReconstructionFID`.
            channels_last: memory order of the networks: faster on GPUs and for large networks on CPUs, slower for tiny ones.
            ema_decay: of the average of the autoencoder's weights.
        """
        super().__init__()
        self.automatic_optimization = False
        self.factor = autoencoder.factor
        self.autoencoder = autoencoder.build()
        self.adversary = adversary
        self.reconstruction, self.perceptual = reconstruction, perceptual
        self.equivariance = equivariance or Equivariance(0)
        self.variance = LearnedVariance() if learn_variance else None
        self.optimiser, self.discriminator_optimiser = optimiser, discriminator_optimiser
        self.perceptual_weight, self.kl_weight, self.kl_warmup = perceptual_weight, kl_weight, kl_warmup
        self.accumulate, self.max_skipped = accumulate, max_skipped
        self._skipped, self._skipped_in_a_row = 0, {}
        self.psnr = PeakSignalNoiseRatio(data_range=(-1.0, 1.0), dim=(1, 2, 3), reduction="elementwise_mean")
        self.ssim = StructuralSimilarityIndexMeasure(data_range=(-1.0, 1.0))
        self.health = LatentHealth(self.autoencoder.config.latent_channels)
        self.fid = ReconstructionFID(fid_trunk) if fid_trunk else None
        if channels_last:
            for network in (self.autoencoder, self.adversary.discriminator, self.perceptual):
                network.to(memory_format=torch.channels_last)
        self.start_average(ema_decay)

    # -- a step ------------------------------------------------------------------------------------------------------

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        step, images = self.global_step, pixels_to_images(batch["image"])
        pieces = images.chunk(self.accumulate)
        judged = self._train_autoencoder(pieces, step)
        if judged is not None and self.adversary.trains(step):
            self._train_discriminator(judged, step)

    def _train_autoencoder(self, pieces: tuple[Tensor, ...], step: int) -> list[tuple[Tensor, Tensor]] | None:
        """One step of the autoencoder; returns what was asked for and what came, piece by piece, or None if it was skipped."""
        optimiser, _ = self.optimizers()
        optimiser.zero_grad()
        judged, figures = [], []
        for piece, share in self._shares(pieces):
            target, reconstruction, logged = self._autoencoder_backward(piece, share, step)
            judged.append((target, reconstruction))
            figures.append({name: share * value.detach() for name, value in logged.items()})
        norm = nn.utils.clip_grad_norm_(self._trained().parameters(), self.optimiser.max_grad_norm)
        if not self._is_finite(norm, "autoencoder"):
            optimiser.zero_grad()
            return None
        optimiser.step()
        schedule, _ = self.lr_schedulers()
        schedule.step()
        self.average.update()
        summed = {f"train/{name}": sum(piece[name] for piece in figures) for name in figures[0]}
        self.log_dict(summed | {"train/grad_norm": norm, "train/lr": schedule.get_last_lr()[0]})
        return judged

    def _autoencoder_backward(self, images: Tensor, share: float, step: int) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Gradients of one piece, ``share`` of the batch: (what the decoder was asked for, what it gave, figures).

        LPIPS and the discriminator are walked back once, to the reconstruction; at the decoder's last layer the two gradients
        are compared there, and their sum goes on through the decoder.
        """
        posterior = self.autoencoder.encode(images).latent_dist
        target, latents = self.equivariance(images, posterior.sample())
        reconstruction = self.autoencoder.decode(latents).sample.float()
        leaf = reconstruction.detach().requires_grad_()
        faithful, perceptual = self.reconstruction(leaf, target), self.perceptual(leaf, target)
        error = faithful + self.perceptual_weight * perceptual
        (gradient,) = torch.autograd.grad(error, leaf)
        figures = {"rec": faithful, "lpips": perceptual}
        loss = error.detach()
        if self.variance is not None:
            loss = self.variance(loss)
            gradient = gradient * torch.exp(-self.variance.log_variance.detach())
            figures["log_variance"] = self.variance.log_variance
        if (ramp := self.adversary.ramp(step)) > 0:
            generator = self.adversary.generator_loss(leaf)
            (by_generator,) = torch.autograd.grad(generator, leaf)
            weight = self.adversary.weight * ramp * self.adversary.guard.level
            weight = weight * self._adaptive_weight(reconstruction, gradient, by_generator)
            gradient = gradient + weight * by_generator
            figures |= {"g": generator, "g_weight": weight, "g_level": self.adversary.guard.level}
            loss = loss + weight * generator.detach()
        kl = kl_per_pixel_value(posterior, images)
        loss = loss + self.kl_weight * (min(step / self.kl_warmup, 1.0) if self.kl_warmup else 1.0) * kl
        # its value is the loss; its gradient at the reconstruction is the one just put together
        towards = (gradient * reconstruction).sum()
        self.manual_backward(share * (loss + towards - towards.detach()))
        return target, reconstruction.detach(), figures | {"kl": kl, "loss": loss}

    def _adaptive_weight(self, reconstruction: Tensor, by_reconstruction: Tensor, by_generator: Tensor) -> Tensor:
        """How much larger the first gradient is at the decoder's last layer, over all processes."""
        last_layer = self.autoencoder.decoder.conv_out.weight
        gradients = torch.stack(
            [
                torch.autograd.grad(reconstruction, last_layer, gradient, retain_graph=True)[0]
                for gradient in (by_reconstruction, by_generator)
            ]
        )
        return adaptive_weight(*self.trainer.strategy.reduce(gradients, reduce_op="mean"), self.adversary.max_adaptive_weight)

    def _train_discriminator(self, judged: list[tuple[Tensor, Tensor]], step: int) -> None:
        """One step of the discriminator on what the decoder was asked for and what it gave."""
        # use_pl_optimizer=False: a step that Lightning does not count, so that max_steps means batches
        _, optimiser = self.optimizers(use_pl_optimizer=False)
        optimiser.zero_grad()
        losses, accuracies = [], []
        for (target, reconstruction), share in self._shares(judged):
            loss, accuracy = self.adversary.discriminator_loss(target, reconstruction, step)
            self.manual_backward(share * loss)
            losses.append(share * loss.detach())
            accuracies.append(share * accuracy)
        norm = nn.utils.clip_grad_norm_(self.adversary.discriminator.parameters(), self.discriminator_optimiser.max_grad_norm)
        if not self._is_finite(norm, "discriminator"):
            optimiser.zero_grad()
            return
        optimiser.step()
        _, schedule = self.lr_schedulers()
        schedule.step()
        accuracy = self.trainer.strategy.reduce(sum(accuracies), reduce_op="mean")
        self.adversary.guard.watch_discriminator(accuracy)
        self.log_dict({"train/d": sum(losses), "train/d_accuracy": accuracy})

    def _shares(self, pieces: Sequence[Any]) -> Iterator[tuple[Any, float]]:
        """Every piece with its share of the batch. Processes exchange gradients at the last one alone."""
        sizes = [len(piece[0] if isinstance(piece, tuple) else piece) for piece in pieces]
        strategy = self.trainer.strategy
        for number, (piece, size) in enumerate(zip(pieces, sizes, strict=True), 1):
            alone = number < len(pieces) and isinstance(strategy, ParallelStrategy)
            with strategy.block_backward_sync() if alone else nullcontext():
                yield piece, size / sum(sizes)

    def _is_finite(self, norm: Tensor, player: str) -> bool:
        """Whether a player may step. Gradients are those of all processes by now, so all of them decide alike."""
        if torch.isfinite(norm):
            self._skipped_in_a_row[player] = 0
            return True
        self._skipped += 1
        self._skipped_in_a_row[player] = in_a_row = self._skipped_in_a_row.get(player, 0) + 1
        self.log("train/skipped", float(self._skipped))
        log.warning("the %s's gradients of step %d are not finite: skipped (%d in a row)", player, self.global_step, in_a_row)
        if in_a_row > self.max_skipped:
            raise LdmError(
                f"the {player}'s gradients were not finite {in_a_row} times in a row, at step {self.global_step}; go on from "
                "an earlier checkpoint with a lower learning_rate, or raise model.max_skipped"
            )
        return False

    # -- what it starts from -----------------------------------------------------------------------------------------

    def averaged(self) -> nn.Module:
        return self.autoencoder

    def setup(self, stage: str) -> None:
        """Refuse what cannot go well, before the first step."""
        precision, num_steps = str(self.trainer.precision), self.trainer.max_steps
        if "16" in precision and not precision.startswith("bf16"):
            raise UsageError(f"trainer.precision {precision}: gradients of the game overflow fp16; give bf16-mixed or 32-true")
        if precision == "bf16-true":
            raise UsageError("trainer.precision bf16-true keeps no fp32 weights, and small steps are lost; give bf16-mixed")
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
                f"pictures of {size[1]} x {size[0]} are not multiples of {self.factor}, by which the autoencoder shrinks them; "
                "set data.image_size to one"
            )
        if self.autoencoder.use_tiling and None not in size and max(size) > self.autoencoder.config.sample_size:
            raise UsageError(
                f"model.autoencoder.tiling would tile training pictures of {size[1]} x {size[0]}; raise "
                f"model.autoencoder.sample_size {self.autoencoder.config.sample_size} to their size"
            )
        if None not in size:
            self._try_smallest(min(size))
        if self.accumulate > data.batch_size:
            raise UsageError(f"model.accumulate {self.accumulate} is more than data.batch_size {data.batch_size}; lower it")
        few = (data.validation_set.attempt(index) for index in range(len(data.validation_set)))
        good = islice((sample for sample in few if not isinstance(sample, BadSample)), PREVIEW_PICTURES)
        self._shown = [torch.from_numpy(sample["image"].copy())[None] for sample in good]
        self._train_set, self._batch_size = data.train_set, data.batch_size

    def _try_smallest(self, side: int) -> None:
        """Whether LPIPS and the discriminator can look at pictures as small as they come; the latter is not asked for long."""
        smallest = min(side, SMALLEST_SIDE) if self.equivariance.probability else side
        picture = torch.zeros(1, 3, smallest, smallest)
        try:
            with torch.no_grad():
                self.perceptual(picture, picture)
                self.adversary.generator_loss(picture)
        except (RuntimeError, UsageError) as error:
            raise UsageError(
                f"LPIPS or the discriminator cannot look at pictures of {smallest} pixels ({first_line(error)}); give larger "
                "ones (data.image_size), or a discriminator of fewer layers"
            ) from error

    def configure_optimizers(self) -> tuple[list, list]:
        num_steps = self.trainer.max_steps
        pairs = [
            self.optimiser.build(self._trained(), num_steps),
            self.discriminator_optimiser.build(self.adversary.discriminator, num_steps - self.adversary.start),
        ]
        return [optimiser for optimiser, _ in pairs], [schedule for _, schedule in pairs]

    def _trained(self) -> nn.Module:
        """What the first optimiser moves."""
        return self.autoencoder if self.variance is None else nn.ModuleList([self.autoencoder, self.variance])

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
        """Latents' health and FID, and the guard's judgement."""
        self.log_dict({f"val/{name}": value for name, value in health_scalars(self.health.compute()).items()})
        self.health.reset()
        if self.fid is not None:
            self.log(f"val/{self.fid.name}", self.fid.compute())
            self.fid.reset()
        figures = self.trainer.callback_metrics
        guard, step = self.adversary.guard, self.global_step
        said = guard.judge(float(figures["val/psnr"]), float(figures["val/lpips"]), self.adversary.ramp(step) > 0)
        if said:
            rank_zero_info(f"step {step}: {said}")
        self.log("val/g_level", guard.level)

    def reconstruct(self, images: Tensor) -> Tensor:
        """Through the posterior's mode and back, (B, 3, H, W) in [−1, 1]."""
        return reconstruct(self.autoencoder, images)

    def preview(self) -> list[tuple[str, list[Image.Image]]]:
        originals = [trim(pixels_to_images(pixels.to(self.device)), self.factor) for pixels in self._shown]
        return [
            (name, [picture for images in row for picture in images_to_pictures(images)])
            for name, row in (("original", originals), ("reconstruction", map(self.reconstruct, originals)))
        ]

    def save(self, folder: Path) -> None:
        """Write the ``AutoencoderKL`` directory, with the latents' mean and standard deviation per channel."""
        if self.autoencoder.encoder.conv_in.weight.requires_grad:  # frozen, its latents are what their directory says
            health = self.latent_health()
            set_latent_statistics(self.autoencoder, health["mean"].tolist(), health["std"].tolist())
        # safetensors holds no tensor in another order
        copy.deepcopy(self.autoencoder).to(memory_format=torch.contiguous_format).save_pretrained(folder)

    def latent_health(self) -> dict[str, Tensor]:
        """Of the latents of training pictures from all over the set; see :class:`ldm.metrics.LatentHealth`."""
        health = LatentHealth(self.autoencoder.config.latent_channels, sync_on_compute=False).to(self.device)
        number = min(len(self._train_set), STATISTICS_PICTURES)
        for few in torch.linspace(0, len(self._train_set) - 1, number).long().split(self._batch_size):
            images = pixels_to_images(self._train_set.batch(few.tolist())["image"].to(self.device))
            health.update(self.autoencoder.encode(images).latent_dist)
        return health.compute()

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        checkpoint["state_dict"] = {k: v for k, v in checkpoint["state_dict"].items() if not k.startswith(FROZEN)}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(checkpoint)
        frozen = {k: v for k, v in self.state_dict().items() if k.startswith(FROZEN)}
        checkpoint["state_dict"] = frozen | checkpoint["state_dict"]
