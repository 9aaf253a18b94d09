"""Stage one: a KL autoencoder against a patch discriminator.

Steps are counted in *batches trained* everywhere. Lightning's ``global_step`` counts every optimiser's steps; here it counts
the autoencoder's alone, because the discriminator's optimiser is stepped outside Lightning's bookkeeping.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from PIL import Image
from torch import Tensor, nn
from torchmetrics.image import PeakSignalNoiseRatio, StructuralSimilarityIndexMeasure

from ldm.data.manifest import IMAGE_SHARDS
from ldm.errors import UsageError
from ldm.losses import AdversarialLoss, PerceptualLoss, ReconstructionLoss, adaptive_weight, kl_per_pixel_value
from ldm.models.autoencoder import AutoencoderConfig, images_to_pictures, pixels_to_images, reconstruct
from ldm.training.base import OptimiserConfig, Stage

PREVIEW_PICTURES = 8


class AutoencoderTraining(Stage):
    """Reconstruction + LPIPS + KL, and from ``discriminator_start`` on the adversarial game.

    The discriminator first trains ``adversarial_delay`` batches on its own; then its weight on the decoder rises linearly over
    ``adversarial_warmup`` batches. A discriminator that knows nothing yet has only noise to teach.
    """

    command, product = "autoencoder", "autoencoder"

    def __init__(
        self,
        autoencoder: AutoencoderConfig,
        discriminator: nn.Module,
        reconstruction: ReconstructionLoss,
        perceptual: PerceptualLoss,
        adversarial: AdversarialLoss,
        optimiser: OptimiserConfig,
        discriminator_optimiser: OptimiserConfig,
        perceptual_weight: float = 1.0,
        kl_weight: float = 1e-6,
        adversarial_weight: float = 0.5,
        discriminator_start: int = 50_000,
        adversarial_delay: int = 1_000,
        adversarial_warmup: int = 5_000,
        max_adaptive_weight: float = 1e4,
        ema_decay: float = 0.9999,
    ):
        """
        Args:
            autoencoder: sizes of the network.
            discriminator: pictures -> logits, larger for real.
            reconstruction, perceptual, adversarial: the losses.
            optimiser: of the autoencoder.
            discriminator_optimiser: of the discriminator.
            perceptual_weight: of LPIPS against the reconstruction loss.
            kl_weight: of the KL in nats per pixel value.
            adversarial_weight: of the adversarial loss, after its gradient was made as large as the reconstruction's.
            discriminator_start: batch at which the discriminator begins to train.
            adversarial_delay: batches that it trains before it is heard.
            adversarial_warmup: batches over which its weight then rises.
            max_adaptive_weight: bound on the factor between the two gradients.
            ema_decay: of the average of the autoencoder's weights.
        """
        super().__init__()
        self.automatic_optimization = False
        self.factor = autoencoder.factor
        self.autoencoder = autoencoder.build()
        self.discriminator = discriminator
        self.reconstruction, self.perceptual, self.adversarial = reconstruction, perceptual, adversarial
        self.optimiser, self.discriminator_optimiser = optimiser, discriminator_optimiser
        self.perceptual_weight, self.kl_weight, self.adversarial_weight = (
            perceptual_weight,
            kl_weight,
            adversarial_weight,
        )
        self.discriminator_start = discriminator_start
        self.adversarial_delay, self.adversarial_warmup = adversarial_delay, adversarial_warmup
        self.max_adaptive_weight = max_adaptive_weight
        self.psnr = PeakSignalNoiseRatio(data_range=(-1.0, 1.0), dim=(1, 2, 3), reduction="elementwise_mean")
        self.ssim = StructuralSimilarityIndexMeasure(data_range=(-1.0, 1.0))
        self.start_average(ema_decay)

    def averaged(self) -> nn.Module:
        return self.autoencoder

    def setup(self, stage: str) -> None:
        """Refuse anything but pictures."""
        data = self.trainer.datamodule
        for source in (*data.train_set.sources, *data.validation_set.sources):
            if source.manifest.format != IMAGE_SHARDS:
                raise UsageError(f"{source.spec} holds {source.manifest.format}; stage one needs {IMAGE_SHARDS}")

    def configure_optimizers(self) -> tuple[list, list]:
        num_steps = self.trainer.max_steps
        if not 0 <= self.discriminator_start < num_steps:
            raise UsageError(
                f"model.discriminator_start {self.discriminator_start} is not before trainer.max_steps {num_steps}: the "
                "discriminator would never train; lower it or raise max_steps"
            )
        pairs = [
            self.optimiser.build(self.autoencoder, num_steps),
            self.discriminator_optimiser.build(self.discriminator, num_steps - self.discriminator_start),
        ]
        return [optimiser for optimiser, _ in pairs], [schedule for _, schedule in pairs]

    def on_fit_start(self) -> None:
        super().on_fit_start()
        self.print(f"perceptual loss: {self.perceptual.description}")

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        images = pixels_to_images(batch["image"])
        if images.shape[-1] % self.factor or images.shape[-2] % self.factor:
            raise UsageError(f"pictures of {tuple(images.shape[-2:])} are not multiples of the autoencoder's {self.factor}")
        step = self.global_step
        reconstruction = self._train_autoencoder(images, step)
        if step >= self.discriminator_start:
            self._train_discriminator(images, reconstruction.detach())

    def _train_autoencoder(self, images: Tensor, step: int) -> Tensor:
        """One step of the autoencoder; returns the reconstruction."""
        optimiser, _ = self.optimizers()
        schedule, _ = self.lr_schedulers()
        posterior = self.autoencoder.encode(images).latent_dist
        reconstruction = self.autoencoder.decode(posterior.sample()).sample.float()
        faithful = self.reconstruction(reconstruction, images)
        perceptual = self.perceptual(reconstruction, images)
        kl = kl_per_pixel_value(posterior, images)
        faithful_and_alike = faithful + self.perceptual_weight * perceptual
        loss = faithful_and_alike + self.kl_weight * kl
        figures = {"rec": faithful, "lpips": perceptual, "kl": kl}
        if (ramp := self.adversarial_ramp(step)) > 0:
            # the discriminator judges here and learns nothing: neither its parameters nor its spectral norms' estimates move
            self.discriminator.eval().requires_grad_(False)
            generator = self.adversarial.generator(self.discriminator(reconstruction))
            self.discriminator.train().requires_grad_(True)
            last_layer = self.autoencoder.decoder.conv_out.weight
            weight = adaptive_weight(faithful_and_alike, generator, last_layer).clamp(max=self.max_adaptive_weight)
            loss = loss + self.adversarial_weight * ramp * weight * generator
            figures |= {"g": generator, "g_weight": self.adversarial_weight * ramp * weight}
        optimiser.zero_grad()
        self.manual_backward(loss)
        norm = nn.utils.clip_grad_norm_(self.autoencoder.parameters(), self.optimiser.max_grad_norm)
        optimiser.step()
        schedule.step()
        self.average.update()
        self.log_dict(
            {f"train/{name}": value for name, value in figures.items()}
            | {"train/loss": loss, "train/grad_norm": norm, "train/lr": schedule.get_last_lr()[0]}
        )
        return reconstruction

    def adversarial_ramp(self, step: int) -> float:
        """How much of the adversarial weight is in force at this batch, 0 to 1."""
        heard = step - self.discriminator_start - self.adversarial_delay
        return min(max(heard / max(self.adversarial_warmup, 1), 0.0), 1.0)

    def _train_discriminator(self, images: Tensor, reconstruction: Tensor) -> None:
        """One step of the discriminator on real pictures and detached reconstructions."""
        # use_pl_optimizer=False: a step that Lightning does not count, so that max_steps means batches
        _, optimiser = self.optimizers(use_pl_optimizer=False)
        _, schedule = self.lr_schedulers()
        real, fake = self.discriminator(images).float(), self.discriminator(reconstruction).float()
        loss = self.adversarial.discriminator(real, fake)
        optimiser.zero_grad()
        self.manual_backward(loss)
        nn.utils.clip_grad_norm_(self.discriminator.parameters(), self.discriminator_optimiser.max_grad_norm)
        optimiser.step()
        schedule.step()
        accuracy = ((real > 0).float().mean() + (fake < 0).float().mean()) / 2
        self.log_dict({"train/d": loss, "train/d_accuracy": accuracy})

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        images = pixels_to_images(batch["image"])
        reconstruction = self.reconstruct(images)
        self.psnr(reconstruction, images)
        self.ssim(reconstruction, images)
        self.log_dict(
            {"val/psnr": self.psnr, "val/ssim": self.ssim, "val/lpips": self.perceptual(reconstruction, images)},
            batch_size=len(images),
        )
        if batch_idx == 0:
            self._shown = images[:PREVIEW_PICTURES]

    def reconstruct(self, images: Tensor) -> Tensor:
        """Through the posterior's mode and back, (B, 3, H, W) in [−1, 1]."""
        return reconstruct(self.autoencoder, images)

    def preview(self) -> list[tuple[str, list[Image.Image]]]:
        return [
            ("original", images_to_pictures(self._shown)),
            ("reconstruction", images_to_pictures(self.reconstruct(self._shown))),
        ]

    def save(self, folder: Path) -> None:
        self.autoencoder.save_pretrained(folder)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        # frozen, and made again from its description
        checkpoint["state_dict"] = {k: v for k, v in checkpoint["state_dict"].items() if not k.startswith("perceptual.")}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(checkpoint)
        trunk = {f"perceptual.{k}": v for k, v in self.perceptual.state_dict().items()}
        checkpoint["state_dict"] = trunk | checkpoint["state_dict"]
