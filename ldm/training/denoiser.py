"""Stage two: a denoiser on latents, with some captions dropped for classifier-free guidance.

Read :meth:`DenoiserTraining.training_step` first: latents and captions from a batch, the loss of
:mod:`ldm.diffusion.objective`, auxiliary losses, one step of the optimiser.
"""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import torch
from diffusers.models.modeling_utils import ModelMixin
from diffusers.utils.torch_utils import randn_tensor
from lightning.pytorch.strategies import ModelParallelStrategy
from PIL import Image
from torch import Tensor, nn

from ldm.data.datamodule import ShardDataModule
from ldm.diffusion.conditioning import Condition
from ldm.diffusion.guidance import ClassifierFree, Guidance
from ldm.diffusion.objective import DenoisingObjective
from ldm.diffusion.path import ProbabilityPath
from ldm.diffusion.prediction import Prediction
from ldm.diffusion.scheduler import diffusion_config, matching_scheduler
from ldm.diffusion.timesteps import TimestepSampler
from ldm.diffusion.weighting import Weighting
from ldm.errors import UsageError
from ldm.losses.auxiliary import AuxiliaryLoss, names_of
from ldm.models.dit import transformer_blocks
from ldm.pipeline import LatentDiffusionPipeline
from ldm.training.base import TrainingModule, require_weights
from ldm.training.ema import PowerAverages
from ldm.training.encoders import Statistics, frozen_for_images, frozen_for_latents
from ldm.training.fsdp import whole
from ldm.training.nonfinite import SkippedSteps
from ldm.training.optimiser import MuonConfig
from ldm.training.randomness import draw_generators

# of t, in which the validation loss is counted
NUM_BINS = 10


class DenoiserTraining(TrainingModule):
    """The objective on normalised latents. What ``fit`` leaves behind is a whole pipeline directory."""

    command, artifact = "denoiser", "pipeline"

    def __init__(
        self,
        denoiser: ModelMixin,
        autoencoder: str,
        path: ProbabilityPath,
        prediction: Prediction,
        timesteps: TimestepSampler,
        optimiser: MuonConfig,
        weighting: Weighting | None = None,
        auxiliary_losses: list[AuxiliaryLoss] | None = None,
        accumulate: int = 1,
        ema_decay: float = 0.9999,
        power_averages: PowerAverages | None = None,
        online: bool = False,
        text_encoder: str | None = None,
        gradient_checkpointing: bool = False,
        compile: bool = False,
        preview_prompts: list[str] | None = None,
        preview_steps: int = 30,
        preview_guidance: float | Guidance = 3.0,
        max_skipped: int = 10,
    ):
        """
        Args:
            denoiser: called as diffusers' ``PixArtTransformer2DModel``.
            autoencoder: the directory that the latents were made with; it decodes previews and goes into the pipeline.
            path, prediction, timesteps: the diffusion; see :mod:`ldm.diffusion`.
            optimiser: of the denoiser.
            weighting: of the squared error by t; without one, all times count equally.
            auxiliary_losses: further terms of the loss, computed from prediction, target or activations of the denoiser.
            accumulate: micro-batches that a batch is split into, to save memory; the step stays that of the whole batch.
            ema_decay: of the exponential average of the denoiser's weights. It is what is validated, previewed and exported,
                unless ``power_averages`` names another as its product.
            power_averages: kept beside it and stored, so that an average of any length can be had after training.
            online: train on image shards: images and captions are encoded at each step, in fp32 as they are exported by
                default. The latents' statistics are the autoencoder directory's; where it has none they are measured on 2,048
                training images before the first step, and kept in the checkpoints and in the pipeline.
            text_encoder: of captions, online (default: minilm); latents say themselves what theirs went through.
            gradient_checkpointing: compute every block twice, to keep less in memory.
            compile: compile every block with ``torch.compile``: minutes at first, faster from then on.
            preview_prompts: drawn before the first step and at every validation, always from the same noise.
            preview_steps: sampling steps of a preview.
            preview_guidance: guidance scale of a preview, or any rule of :mod:`ldm.diffusion.guidance`.
            max_skipped: steps in a row whose loss or gradients are not finite, before the run stops; each is skipped.
        """
        super().__init__()
        self.automatic_optimization = False
        self.denoiser = denoiser
        self.autoencoder_path = Path(autoencoder)
        self.objective = DenoisingObjective(path, prediction, timesteps, weighting)
        self.scheduler = matching_scheduler(path, prediction)
        self.optimiser = optimiser
        if text_encoder is not None and not online:
            raise UsageError("model.text_encoder is for model.online; latents say what theirs went through: leave it out")
        self.online, self.text_encoder = online, text_encoder or "minilm"
        self.statistics: Statistics | None = None  # of the latents online, from a checkpoint
        if gradient_checkpointing:
            denoiser.enable_gradient_checkpointing()
        self.compiles = compile
        self.preview_prompts = preview_prompts or []
        self.preview_steps = preview_steps
        self.preview_guidance = preview_guidance if isinstance(preview_guidance, Guidance) else ClassifierFree(preview_guidance)
        self.start_average(ema_decay, power_averages)
        self.accumulate, self.skips = accumulate, SkippedSteps(max_skipped)
        self.auxiliary_losses = nn.ModuleList(auxiliary_losses or [])
        self._activations = sorted({number for loss in self.auxiliary_losses for number in loss.blocks})
        self.num_images_seen = 0

    # -- a step ------------------------------------------------------------------------------------------------------

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        """One step of the optimiser on one batch."""
        optimiser, schedule = self.optimizers(), self.lr_schedulers()
        optimiser.zero_grad()
        parts = split_batch(batch, self.accumulate)
        metrics: dict[str, Tensor] = {}
        for micro_batch, share in self.micro_batches(parts, [len(part["draws"]) for part in parts]):
            terms = self.losses(micro_batch)
            self.manual_backward(share * terms["train/loss"])
            for name, term in terms.items():
                metrics[name] = metrics.get(name, 0.0) + share * term.detach()
        norm = whole(nn.utils.clip_grad_norm_(self._trained().parameters(), self.optimiser.max_grad_norm))
        means = self.log_step(metrics)
        self.num_images_seen += len(batch["draws"]) * self.trainer.world_size
        self.log_dict({"num_images_seen": float(self.num_images_seen), "train/grad_norm": norm})
        self.log("train/lr", schedule.get_last_lr()[0])
        # of all processes' losses and gradients, so that all of them decide alike
        if self.step_or_skip(optimiser, schedule, norm + means["train/loss"], "denoiser", batch["draws"]):
            self.average.update()

    def losses(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """The loss of a micro-batch as ``train/loss``, and its auxiliary terms by name."""
        generators = draw_generators(self.seed, batch["draws"])
        x0, condition = self.encode(batch, generators)
        output = self.objective(self.denoiser, x0, condition, generator=generators, blocks=self._activations)
        loss, terms = output.loss.mean(), {}
        for name, auxiliary in zip(names_of(self.auxiliary_losses), self.auxiliary_losses, strict=True):
            terms[f"train/{name}"] = term = auxiliary(output.activations, batch, output)
            loss = loss + auxiliary.weight * term
        return {"train/loss": loss} | terms

    def encode(self, batch: dict[str, Any], draw: list[torch.Generator] | None = None) -> tuple[Tensor, Condition]:
        """Normalised latents (B, C, h, w) and the captions' condition.

        Latents are drawn from their posteriors, each by its generator, or are the modes where there are none.

        A caption that is dropped comes from the loader as the empty one: its embedding with latents, "" with images.
        """
        if self.online:
            batch = self.frozen.encode(batch)
        z = batch["mean"].float()
        if draw is not None and "std" in batch:  # otherwise modes were exported
            z = z + batch["std"].float() * randn_tensor(z.shape, draw, z.device)
        return self.frozen.normalizer.normalize(z), Condition(batch["text"].float(), batch["text_mask"])

    def configure_optimizers(self) -> dict:
        blocks = () if self.optimiser.muon_learning_rate is None else self.blocks()
        optimiser, schedule = self.optimiser.build(self._trained(), self.trainer.max_steps, blocks, self.compute_dtype)
        return {"optimizer": optimiser, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def _trained(self) -> nn.Module:
        """The denoiser, and auxiliary losses that have parameters."""
        with_parameters = [loss for loss in self.auxiliary_losses if any(True for _ in loss.parameters())]
        return nn.ModuleList([self.denoiser, *with_parameters]) if with_parameters else self.denoiser

    # -- what it starts from -----------------------------------------------------------------------------------------

    def averaged(self) -> nn.Module:
        return self.denoiser

    def setup(self, stage: str) -> None:
        precision = str(self.trainer.precision)
        if precision not in ("32-true", "bf16-mixed"):
            raise UsageError(f"trainer.precision {precision}: stage two keeps fp32 weights; give bf16-mixed or 32-true")
        self._require_activations()
        super().setup(stage)
        self.frozen.to(self.trainer.strategy.root_device, networks=self.online)
        if self.compiles:
            for block in self.blocks():
                block.compile()

    def _require_activations(self) -> None:
        """Refuse auxiliary losses that this denoiser or strategy cannot serve."""
        for loss in self.auxiliary_losses:
            name = type(loss).__name__
            if isinstance(self.trainer.strategy, ModelParallelStrategy) and any(True for _ in loss.parameters()):
                raise UsageError(f"model.auxiliary_losses {name} has parameters, which fsdp does not shard; train with ddp")
            if not loss.blocks:
                continue
            if "return_activations" not in inspect.signature(self.denoiser.forward).parameters:
                raise UsageError(
                    f"model.auxiliary_losses {name} asks for activations, which {type(self.denoiser).__name__} lacks; "
                    "leave the loss out, or train an ldm.models.dit.DiT"
                )
            number_of_blocks = len(self.blocks())
            if not all(0 <= number < number_of_blocks for number in loss.blocks):
                raise UsageError(
                    f"model.auxiliary_losses {name} asks for the blocks {list(loss.blocks)}; give numbers from 0 to "
                    f"{number_of_blocks - 1}"
                )

    def blocks(self) -> list[nn.Module]:
        """Of the denoiser: each is compiled, and under FSDP gathered, by itself."""
        return transformer_blocks(self.denoiser)

    def prepare(self, data: ShardDataModule) -> None:
        """Load the frozen networks, and refuse what does not go together."""
        config = self.denoiser.config
        if self.online:
            device = self.trainer.strategy.root_device if self.statistics is None else torch.device("cpu")
            self.frozen = frozen_for_images(data, self.autoencoder_path, self.text_encoder, config, self.statistics, device)
        else:
            self.frozen = frozen_for_latents(data, self.autoencoder_path, config)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        checkpoint["num_images_seen"] = self.num_images_seen
        if self.online:
            checkpoint["latent_statistics"] = [list(values) for values in self.frozen.statistics]

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        if "state_dict" in checkpoint:  # sharded, they are in their places by now
            prefix = "denoiser."
            saved = checkpoint["state_dict"].items()
            weights = {name.removeprefix(prefix): weight for name, weight in saved if name.startswith(prefix)}
            require_weights(self.denoiser, weights, "the checkpoint")
        super().on_load_checkpoint(checkpoint)
        self.num_images_seen = checkpoint["num_images_seen"]
        if self.online:
            self.statistics = checkpoint["latent_statistics"]
            if hasattr(self, "frozen"):  # a trainer prepares before it loads
                self.frozen.set_statistics(*self.statistics)

    # -- what is seen of it ------------------------------------------------------------------------------------------

    def on_validation_epoch_start(self) -> None:
        self._measured: list[tuple[Tensor, Tensor]] = []

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        x0, condition = self.encode(batch)
        t, eps = fixed_noise(sum(len(t) for t, _ in self._measured), x0)
        self._measured.append((t, self.objective(self.denoiser, x0, condition, t, eps).unweighted))

    def on_validation_epoch_end(self) -> None:
        """The loss over all samples and by tenths of t, unweighted: comparable from one validation to the next."""
        t, loss = (torch.cat(values) for values in zip(*self._measured, strict=True))
        figures = {"val/loss": loss.mean(), "num_images_seen": float(self.num_images_seen)}
        bins = (t * NUM_BINS).long().clamp(max=NUM_BINS - 1)
        for number in bins.unique().tolist():
            figures[f"val/loss_bin_{number:02d}"] = loss[bins == number].mean()
        self.log_dict(figures)

    def pipeline(self) -> LatentDiffusionPipeline:
        """The model as a pipeline, sharing the weights that the network carries now."""
        frozen = self.frozen
        return LatentDiffusionPipeline(
            vae=frozen.autoencoder,
            text_encoder=frozen.text_encoder.model,
            tokenizer=frozen.text_encoder.tokenizer,
            transformer=self.denoiser,
            scheduler=self.scheduler,
            diffusion=diffusion_config(self.objective.path, self.objective.prediction),
            trained_on=frozen.trained_on,
        )

    def preview(self) -> list[tuple[str, list[Image.Image]]]:
        if not self.preview_prompts:
            return []
        pipeline = self.pipeline().to(self.device)
        pipeline.set_progress_bar_config(disable=True)
        images = pipeline(
            self.preview_prompts,
            num_inference_steps=self.preview_steps,
            guidance=self.preview_guidance,
            generator=[torch.Generator().manual_seed(seed) for seed in range(len(self.preview_prompts))],
        ).images
        return [(prompt, [image]) for prompt, image in zip(self.preview_prompts, images, strict=True)]

    def save(self, folder: Path) -> None:
        self.pipeline().save_pretrained(folder)


def split_batch(batch: dict[str, Any], parts: int) -> list[dict[str, Any]]:
    """A batch of tensors and lists as micro-batches, at most so many."""
    total = len(batch["draws"])
    size = -(-total // parts)
    return [
        {
            name: value[start : start + size] if isinstance(value, (Tensor, list)) and len(value) == total else value
            for name, value in batch.items()
        }
        for start in range(0, total, size)
    ]


def fixed_noise(first: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """Times (B,) and noise like ``like`` (B, C, h, w) of validation samples number ``first`` and on.

    They depend on a sample's number alone, so that neither batch size nor what came before changes a loss. The times are
    multiples of the golden ratio modulo 1, which any number of samples spreads evenly over [0, 1).
    """
    numbers = range(first, first + len(like))
    eps = [torch.randn(like.shape[1:], generator=torch.Generator().manual_seed(number)) for number in numbers]
    t = (torch.tensor(numbers, dtype=torch.float64) + 0.5) * (5**0.5 - 1) / 2 % 1
    return t.to(like), torch.stack(eps).to(like)
