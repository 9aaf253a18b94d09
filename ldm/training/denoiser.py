"""Stage two: a denoiser on frozen latents, captions dropped now and then so that guidance can be had."""

from __future__ import annotations

from pathlib import Path as FilePath
from types import SimpleNamespace

import torch
from diffusers.models.modeling_utils import ModelMixin
from PIL import Image
from torch import Tensor, nn

from ldm.data.datamodule import ShardDataModule
from ldm.data.latents import common_info
from ldm.diffusion.guidance import Condition
from ldm.diffusion.objective import DenoisingObjective
from ldm.diffusion.path import Path
from ldm.diffusion.prediction import Prediction
from ldm.diffusion.scheduler import matching_scheduler
from ldm.diffusion.timesteps import TimestepSampler
from ldm.errors import UsageError
from ldm.latents.encode import load_matching
from ldm.models.autoencoder import normalise_latents, set_latent_statistics
from ldm.models.text import TextEncoder
from ldm.pipeline import LatentDiffusionPipeline
from ldm.training.base import OptimiserConfig, Stage


class DenoiserTraining(Stage):
    """The objective on normalised latents. What ``fit`` leaves behind is a whole pipeline directory."""

    command, product = "denoiser", "pipeline"

    def __init__(
        self,
        denoiser: ModelMixin,
        autoencoder: str,
        path: Path,
        prediction: Prediction,
        timesteps: TimestepSampler,
        optimiser: OptimiserConfig,
        ema_decay: float = 0.9999,
        preview_prompts: list[str] | None = None,
        preview_steps: int = 30,
        preview_guidance: float = 3.0,
    ):
        """
        Args:
            denoiser: called as diffusers' ``PixArtTransformer2DModel``.
            autoencoder: the directory that the latents were made with; it decodes previews and goes into the pipeline.
            path, prediction, timesteps: the diffusion; see :mod:`ldm.diffusion`.
            optimiser: of the denoiser.
            ema_decay: of the average of the denoiser's weights.
            preview_prompts: drawn at every validation, always from the same noise.
            preview_steps: sampling steps of a preview.
            preview_guidance: guidance scale of a preview.
        """
        super().__init__()
        self.denoiser = denoiser
        self.autoencoder_path = FilePath(autoencoder)
        self.objective = DenoisingObjective(path, prediction, timesteps)
        self.scheduler = matching_scheduler(path, prediction)
        self.optimiser = optimiser
        self.preview_prompts = preview_prompts or []
        self.preview_steps, self.preview_guidance = preview_steps, preview_guidance
        self.start_average(ema_decay)

    def averaged(self) -> nn.Module:
        return self.denoiser

    def prepare(self, data: ShardDataModule) -> None:
        """Load what the latents were made with, and refuse anything else."""
        info = common_info(data.train_set.sources)
        common_info((*data.train_set.sources, *data.validation_set.sources))
        folder = data.train_set.sources[0].spec
        autoencoder = load_matching(self.autoencoder_path, data.train_set.sources[0])
        if info.latent_shape is None:
            sizes = ", ".join(f"{width} x {height}" for _, height, width in info.latent_shapes)
            raise UsageError(f"{folder} holds latents of several sizes ({sizes}); export with --image-size to train on one")
        channels, height, width = info.latent_shape
        config = self.denoiser.config
        for name, has, needs in (
            ("in_channels", config.in_channels, channels),
            ("sample_size", config.sample_size, max(height, width)),
        ):
            if has != needs:
                raise UsageError(f"model.denoiser.{name} is {has}, but the latents of {folder} need {needs}; change it")
        text = info.text_encoders[data.text_encoder]
        text_width = config.get("text_width", config.get("caption_channels"))
        if text_width != text.width:
            raise UsageError(
                f"model.denoiser takes text of width {text_width}, but {folder} was exported with {text.name} of width "
                f"{text.width}; change model.denoiser.init_args.text_width"
            )
        set_latent_statistics(autoencoder, info.latents_mean, info.latents_std)
        text_encoder = TextEncoder.load(text.name)
        if text_encoder.hash != text.hash:
            raise UsageError(
                f"{folder} was exported with text encoder {text.hash[:12]}, but {text.name} is {text_encoder.hash[:12]} now; "
                "put back the one it was exported with, or export again"
            )
        # in a namespace: frozen parts belong neither in checkpoints nor in the optimiser
        trained_on = {"autoencoder": info.autoencoder, "text_encoder": text.hash, "latent_shape": list(info.latent_shape)}
        self.frozen = SimpleNamespace(autoencoder=autoencoder, text_encoder=text_encoder, trained_on=trained_on)

    def configure_optimizers(self) -> dict:
        optimiser, schedule = self.optimiser.build(self.denoiser, self.trainer.max_steps)
        return {"optimizer": optimiser, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        z = batch["mean"].float()
        if "std" in batch:  # otherwise modes were exported
            z = z + batch["std"].float() * torch.randn_like(z)
        x0 = normalise_latents(self.frozen.autoencoder, z)
        # captions dropped now and then come from the loader as the encoded empty one
        loss = self.objective(self.denoiser, x0, _condition(batch)).loss.mean()
        self.log("train/loss", loss)
        return loss

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        norm = nn.utils.clip_grad_norm_(self.denoiser.parameters(), self.optimiser.max_grad_norm)
        self.log_dict({"train/grad_norm": norm, "train/lr": optimizer.param_groups[0]["lr"]})

    def on_train_batch_end(self, outputs: object, batch: object, batch_idx: int) -> None:
        self.average.update()

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        """The loss at evenly spread times on fixed noise: comparable from one validation to the next."""
        x0 = normalise_latents(self.frozen.autoencoder, batch["mean"].float())
        generator = torch.Generator().manual_seed(batch_idx)
        eps = torch.randn(x0.shape, generator=generator).to(x0)
        t = ((torch.arange(len(x0)) + 0.5) / len(x0)).to(x0)
        loss = self.objective(self.denoiser, x0, _condition(batch), t, eps).loss
        self.log("val/loss", loss.mean(), batch_size=len(x0))

    def pipeline(self) -> LatentDiffusionPipeline:
        """The model as a pipeline, sharing the weights that the network carries now."""
        frozen = self.frozen
        return LatentDiffusionPipeline(
            vae=frozen.autoencoder,
            text_encoder=frozen.text_encoder.model,
            tokenizer=frozen.text_encoder.tokenizer,
            transformer=self.denoiser,
            scheduler=self.scheduler,
            trained_on=frozen.trained_on,
        )

    def preview(self) -> list[tuple[str, list[Image.Image]]]:
        if not self.preview_prompts:
            return []
        pipeline = self.pipeline().to(self.device)
        pipeline.set_progress_bar_config(disable=True)
        pictures = pipeline(
            self.preview_prompts,
            num_inference_steps=self.preview_steps,
            guidance_scale=self.preview_guidance,
            generator=[torch.Generator().manual_seed(seed) for seed in range(len(self.preview_prompts))],
        ).images
        return [(prompt, [picture]) for prompt, picture in zip(self.preview_prompts, pictures, strict=True)]

    def save(self, folder: FilePath) -> None:
        self.pipeline().save_pretrained(folder)


def _condition(batch: dict[str, Tensor]) -> Condition:
    """The captions' embeddings of a batch of latents, as they are stored."""
    return Condition(batch["text"].float(), batch["text_mask"])
