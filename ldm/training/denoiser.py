"""Stage two: a denoiser on latents. Read :meth:`DenoiserTraining.training_step` first.

A step takes latents and captions from a batch, computes the loss of :mod:`ldm.diffusion.objective` and auxiliary losses, and
updates the weights. The data drops some captions, for classifier-free guidance.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import torch
from diffusers import PixArtTransformer2DModel
from diffusers.models.modeling_utils import ModelMixin
from lightning import Callback
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.utilities import rank_zero_info
from PIL import Image
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ldm.data.datamodule import ShardDataModule, datamodule_of
from ldm.data.plan import PlannedSample
from ldm.diffusion.conditioning import Condition, micro_conditions, takes_sizes
from ldm.diffusion.guidance import ClassifierFree, Guidance
from ldm.diffusion.objective import DenoisingObjective
from ldm.diffusion.path import ProbabilityPath
from ldm.diffusion.prediction import Prediction
from ldm.diffusion.scheduler import diffusion_config, matching_scheduler
from ldm.diffusion.timesteps import TimestepSampler
from ldm.diffusion.weighting import Weighting
from ldm.errors import UsageError
from ldm.losses.auxiliary import AuxiliaryLoss, names_of
from ldm.models.adapter_file import write_adapter, write_for_peft
from ldm.models.adapters import is_adapter_weight
from ldm.models.autoencoder import downsampling_factor
from ldm.models.compiling import Compile, compile_blocks
from ldm.models.text_encoder import TextEncoderConfig
from ldm.pipeline import TEXT_PARTS, LatentDiffusionPipeline, text_parts
from ldm.training.adapters import GRADIENT_SAMPLES, Adapter, AdapterConfig
from ldm.training.ema import PowerAverages
from ldm.training.encoded import EncodedTraining, by_time, fixed_noise, split_batch
from ldm.training.evaluation import Evaluate, Evaluation
from ldm.training.fp8 import require_fp8, to_fp8
from ldm.training.frozen_base import plain_tensors
from ldm.training.initial import InitialWeights
from ldm.training.nonfinite import SkippedSteps
from ldm.training.optimiser import MuonConfig
from ldm.training.randomness import DenoisingNoise
from ldm.training.step import Update

log = logging.getLogger(__name__)

# intervals of t for which the validation loss is logged
NUM_BINS = 10


class DenoiserTraining(EncodedTraining):
    """A denoiser, trained on normalised latents and exported as a pipeline directory."""

    command, artifact = "denoiser", "pipeline"
    weighs_samples = True

    def __init__(
        self,
        autoencoder: str,
        path: ProbabilityPath,
        prediction: Prediction,
        timesteps: TimestepSampler,
        optimiser: MuonConfig,
        denoiser: ModelMixin | None = None,
        init_from: str | None = None,
        init_weights: Literal["average", "trained"] = "average",
        freeze: list[str] | None = None,
        adapter: AdapterConfig | None = None,
        weighting: Weighting | None = None,
        auxiliary_losses: list[AuxiliaryLoss] | None = None,
        accumulate: int = 1,
        ema_decay: float = 0.9999,
        power_averages: PowerAverages | None = None,
        offload_average: bool = False,
        online: bool = False,
        online_precision: Literal["fp32", "bf16"] = "fp32",
        text_encoder: str | TextEncoderConfig | list[str | TextEncoderConfig] | None = None,
        gradient_checkpointing: bool = False,
        compile: Compile = False,
        fp8: bool = False,
        preview_prompts: list[str] | None = None,
        preview_steps: int = 30,
        preview_guidance: float | Guidance = 3.0,
        max_skipped: int = 10,
        evaluation: Evaluation | None = None,
    ):
        """
        Args:
            autoencoder: directory of the autoencoder that made the latents, or its name on the Hugging Face hub; it decodes
                previews and is part of the pipeline. ``identity``: the latents are pixels.
            path, prediction, timesteps: see :mod:`ldm.diffusion`.
            optimiser: of the denoiser.
            denoiser: with the signature of diffusers' ``PixArtTransformer2DModel``; with ``init_from``, it may be left out.
            init_from: weights to start from instead of random ones: a pipeline's directory, a run's folder or one of its
                checkpoints, the directory of a ``PixArtTransformer2DModel``, or a name on the Hugging Face hub. Without
                ``denoiser``, class and config are from there. Latents are normalised as they were for these weights. A resumed
                run reads its own checkpoint alone.
            init_weights: of a run, its averaged weights or those in training.
            freeze: weights that are not trained, by name; ``*`` stands for anything: ``blocks.0.*``, ``text_embed*``.
            adapter: train a low-rank adapter beside the weights of ``init_from``, which stay as they are. What is exported is a
                file of a few megabytes for that model: ``pytorch_lora_weights.safetensors``.
            weighting: of the squared error by t; without one, all times count equally.
            auxiliary_losses: further terms of the loss, computed from prediction, target or activations of the denoiser.
            accumulate: micro-batches that a batch is split into, to save memory; the step is still that of the whole batch.
            ema_decay: of the exponential average of the denoiser's weights, which is validated, previewed and exported unless
                ``power_averages`` selects another.
            power_averages: further averages, from whose snapshots an average of any length can be reconstructed after training.
            offload_average: keep all averages in the host's memory, which frees 4 bytes a weight and average on the GPU; each
                step copies them there and back. Not with FSDP.
            online: train on image shards, encoding images and captions at each step. Latents are normalised by the
                statistics in the autoencoder's directory; if it has none, they are measured on 2,048 training images before
                the first step and kept in checkpoints and in the pipeline.
            online_precision: of the computation with ``online``, as in an export: bf16 is faster on GPUs, and less exact.
            text_encoder: of captions: minilm, a directory or a hub name, a ``.txt`` file of class names for a label embedding,
                or none, for an unconditional model; several in a list, for a denoiser with as many ``caption_channels``. In
                place of a name ``{name: NAME, layer: -2, prefix: TEXT, max_tokens: 300}``, of which all but the name may be
                left out: :class:`ldm.models.text_encoder.TextEncoderConfig`. Default: those of the latent shards, where they
                were when they were exported; with ``online``, minilm.
            gradient_checkpointing: recompute the blocks' activations in the backward pass, to save memory.
            compile: compile every block and the last layers with ``torch.compile``, which takes minutes at the start.
                ``cuda_graphs``: every block, which is replayed as a CUDA graph, for batches so small that launching kernels
                takes longer than running them.
            fp8: multiply the matrices of every block in 8-bit floating point, by torchao, on GPUs that can; weights stay in
                fp32. It needs ``compile``, and pays for wide denoisers only.
            preview_prompts: images of these are generated before the first step and at every validation, from the same noise.
            preview_steps: denoising steps of a preview.
            preview_guidance: guidance scale of a preview, or any rule of :mod:`ldm.diffusion.guidance`.
            max_skipped: steps in a row with a loss or gradients that are not finite; each is skipped, one more stops the run.
            evaluation: metrics of images that are generated with the averaged weights: FID and others. Default: none.
        """
        super().__init__(autoencoder, online, online_precision, text_encoder)
        if denoiser is None:
            raise UsageError("there is no denoiser; give its class and config, or a model that has one as init_from")
        self.denoiser = denoiser
        self.init_from, self.init_weights = init_from, init_weights
        self.initial: InitialWeights | None = None
        self.frozen = freeze or []
        freeze_weights(denoiser, self.frozen)
        self.adapter_config = adapter
        self.adapter: Adapter | None = None  # from start_from on
        self.objective = DenoisingObjective(path, prediction, timesteps, weighting)
        self.scheduler = matching_scheduler(path, prediction)
        self.optimiser = optimiser
        if gradient_checkpointing:
            denoiser.enable_gradient_checkpointing()
        self.compile_choice: Compile = compile
        self.fp8 = fp8
        if adapter is not None:
            self.artifact = "adapter"
            self._require_a_base()
        self.preview_prompts = preview_prompts or []
        self._embeds: dict[str, Any] = {}  # of the preview prompts
        self.preview_steps = preview_steps
        self.preview_guidance = preview_guidance if isinstance(preview_guidance, Guidance) else ClassifierFree(preview_guidance)
        self.start_average(ema_decay, power_averages, offload_average)
        self.accumulate, self.skips = accumulate, SkippedSteps(max_skipped)
        # the cast gives the members of an nn.ModuleList their type
        self.auxiliary_losses = cast("list[AuxiliaryLoss]", nn.ModuleList(auxiliary_losses or []))
        self.losses = [*self.auxiliary_losses]
        self._blocks_with_activations = sorted({number for loss in self.auxiliary_losses for number in loss.blocks})
        self.num_images_seen = 0
        self.evaluation = evaluation

    # -- a step ------------------------------------------------------------------------------------------------------

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        """One step of the optimiser on one batch."""
        optimiser, schedule = self.optimiser_and_schedule()
        optimiser.zero_grad()
        parts = split_batch(batch, self.accumulate)
        metrics: dict[str, Tensor] = {}
        for micro_batch, fraction in self.micro_batches(parts, [len(part["draws"]) for part in parts]):
            terms = self.loss_terms(micro_batch)
            self.manual_backward(fraction * terms["train/loss"])
            for name, term in terms.items():
                metrics[name] = metrics.get(name, 0.0) + fraction * term.detach()
        self.num_images_seen += len(batch["draws"]) * self.trainer.world_size
        parameters, limit = self.trained().parameters(), self.optimiser.max_grad_norm
        update = Update("denoiser", optimiser, schedule, parameters, limit, loss="train/loss")
        self.finish_step(metrics, [update], batch["draws"], num_images_seen=float(self.num_images_seen))

    def loss_terms(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """The loss of a micro-batch as ``train/loss``, and its auxiliary terms by name."""
        x0, condition = self.encode(batch)
        output = self.objective(self.denoiser, x0, condition, batch["t"], batch["eps"], blocks=self._blocks_with_activations)
        loss, terms = (output.loss * batch.get("loss_weight", 1)).mean(), {}
        for name, auxiliary in zip(names_of(self.auxiliary_losses), self.auxiliary_losses, strict=True):
            terms[f"train/{name}"] = term = auxiliary(output.activations, batch, output)
            loss = loss + auxiliary.weight * term
        return {"train/loss": loss} | terms

    def encode(self, batch: dict[str, Any]) -> tuple[Tensor, Condition]:
        x0, condition = super().encode(batch)
        return x0, condition._replace(sizes=self._sizes(batch, x0))

    def _sizes(self, batch: dict[str, Any], z: Tensor) -> Tensor | None:
        """The micro-conditions of images whose latents are ``z`` (B, C, h, w), where the denoiser takes them."""
        if not self.reads_sizes:
            return None
        factor = downsampling_factor(self.encoders.autoencoder)
        return micro_conditions(batch["original_size"], batch["crop"], (z.shape[2] * factor, z.shape[3] * factor))

    # -- setup -------------------------------------------------------------------------------------------------------

    def batch_noise(self) -> DenoisingNoise:
        assert self.seed is not None
        channels, factor = self.encoders.latent_shapes[0][0], downsampling_factor(self.encoders.autoencoder)
        return DenoisingNoise(self.seed, channels, factor, self.objective.path, self.objective.timesteps)

    @property
    def reads_sizes(self) -> bool:
        """Whether the data are to give the original sizes and crops of images (micro-conditioning)."""
        return takes_sizes(self.denoiser)

    def averaged(self) -> nn.Module:
        return self.denoiser

    def _network_config(self) -> dict[str, Any]:
        adapter = {"adapter": self.adapter.settings()} if self.adapter else {}
        return super()._network_config() | ({"freeze": self.frozen} if self.frozen else {}) | adapter

    def is_absent(self, name: str) -> bool:
        """With an adapter, checkpoints hold that alone."""
        return self.adapter is not None and name.startswith("denoiser.") and not is_adapter_weight(name)

    def _require_a_base(self) -> None:
        """Refuse options that an adapter does not go together with."""
        if not self.init_from:
            raise UsageError("an adapter is trained beside a model's weights; give that model as init_from")
        if self.adapter_config and self.adapter_config.loraplus_lr_ratio and self.optimiser.muon_learning_rate is not None:
            raise UsageError("loraplus_lr_ratio is of AdamW's rates; leave out muon_learning_rate, or the ratio")
        if self.frozen or self.fp8:
            what = "freeze" if self.frozen else "fp8"
            raise UsageError(f"{what} cannot be used with an adapter, beside which all weights stay as they are; leave it out")

    def setup(self, stage: str) -> None:
        self._require_activations()
        if self.fp8:
            require_fp8(self.trainer.strategy.root_device, self.compute_dtype, bool(self.compile_choice))
        super().setup(stage)
        if self.adapter and self.adapter.begins_along_gradients and self.trainer.ckpt_path is None:
            self._begin_along_gradients(self.adapter, datamodule_of(self.trainer))
        if self.adapter:
            self._store_base(self.adapter)
        if self.fp8:
            to_fp8(self.blocks())
        if self.compile_choice:
            if self.compile_choice == "cuda_graphs" and isinstance(self.trainer.strategy, ModelParallelStrategy):
                raise UsageError(
                    "compile cuda_graphs cannot be used with fsdp, which moves the weights at every step; give true"
                )
            compile_blocks(self.denoiser, self.blocks(), self.compile_choice, self.trainer.strategy.root_device)

    def _store_base(self, adapter: Adapter) -> None:
        precision = adapter.config.base_precision
        if precision and isinstance(self.trainer.strategy, ModelParallelStrategy):
            raise UsageError(f"base_precision {precision} cannot be used with fsdp, which shards weights in fp32; leave it out")
        adapter.store_base()
        # each process has read them, and torchao's tensors cannot be sent
        frozen = [name for name, weight in self.named_parameters() if len(plain_tensors(weight)) > 1]
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(self, frozen)

    def _begin_along_gradients(self, adapter: Adapter, data: ShardDataModule) -> None:
        """Let the adapter begin along the gradient of the loss over some training samples, the same on all processes."""
        device, dataset = self.trainer.strategy.root_device, data.train_set
        nn.Module.to(self.denoiser, device)  # diffusers declares no type for its own
        number, self.seed = min(GRADIENT_SAMPLES, len(dataset)), torch.initial_seed() if self.seed is None else self.seed
        chosen = np.arange(number) * len(dataset) // number
        with adapter.gradients_of_base() as weights:
            for few in dataset.batches_of_one_size(chosen, data.batch_sizes(dataset)):
                draws = [PlannedSample(sample, sample) for sample in few]
                batch = dataset.batch(draws)
                batch = data.transfer_batch_to_device(batch | self.batch_noise()(batch, draws), device, 0)
                self.manual_backward(len(few) / number * self.loss_terms(batch)["train/loss"])
            gradients = {name: weight.grad for name, weight in weights.items() if weight.grad is not None}
        adapter.begin_along(gradients)
        self.start_average(*self._averaging)
        rank_zero_info(f"the adapter begins along the gradient of {number} training samples")

    def learning_rates(self) -> Mapping[str, float]:
        ratio = self.adapter_config.loraplus_lr_ratio if self.adapter_config else None
        return {} if ratio is None else {".lora_B.": ratio}

    def on_train_start(self) -> None:
        super().on_train_start()
        if self.init_from and self.initial is None and (self.global_step == 0 or self.adapter_config):
            raise UsageError(f"the weights of {self.init_from} were not loaded; train by ldm denoiser fit, or call start_from")

    def _require_activations(self) -> None:
        """Refuse auxiliary losses that ask for activations which the denoiser does not return."""
        for loss in filter(lambda loss: loss.blocks, self.auxiliary_losses):
            name = type(loss).__name__
            if "return_activations" not in inspect.signature(self.denoiser.forward).parameters:
                raise UsageError(
                    f"auxiliary_losses {name} needs activations, which {type(self.denoiser).__name__} does not return; "
                    "remove the loss, or train an ldm.models.dit.DiT"
                )
            number_of_blocks = len(self.blocks())
            if not all(0 <= number < number_of_blocks for number in loss.blocks):
                raise UsageError(
                    f"auxiliary_losses {name} asks for the blocks {list(loss.blocks)}; give numbers from 0 to "
                    f"{number_of_blocks - 1}"
                )

    def prepare(self, data: ShardDataModule) -> None:
        """Load the frozen encoders, and refuse data that do not fit them or the denoiser."""
        super().prepare(data)
        self.default_caption = data.default_caption
        if self.initial is not None and self.statistics is None:
            self.statistics = self.initial.statistics_for(self.encoders.trained_on, same=self.adapter is not None)
            if self.statistics is not None:
                self.encoders.set_statistics(*self.statistics)

    def start_from(self, initial: InitialWeights) -> str:
        """Start with these weights; called before training. Returns a line about them, see :meth:`InitialWeights.load`."""
        report, own = initial.load(self.denoiser), self._diffusion()
        self.initial = replace(initial, weights={})  # they are not kept
        if self.adapter_config is not None:
            initial.require_same(self.denoiser, own)
            self.adapter = Adapter(self.adapter_config, self.denoiser, initial.name, initial.weights)
            report += f"; {self.adapter.summary()}"
        elif initial.diffusion is not None and initial.diffusion != own:
            log.warning("%s was trained with %s, and this run trains with %s", initial.source, initial.diffusion, own)
        self.start_average(*self._averaging)
        return report

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        checkpoint["num_images_seen"] = self.num_images_seen
        checkpoint["diffusion"] = self._diffusion()
        if self.adapter:
            checkpoint["base"] = self.adapter.base

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        if self.adapter:
            self.adapter.require_same_base(checkpoint.get("base"))
        super().on_load_checkpoint(checkpoint)
        self.num_images_seen = checkpoint["num_images_seen"]
        if self.online or self.init_from:
            self.restore_statistics(checkpoint)

    # -- validation, previews, export --------------------------------------------------------------------------------

    def on_validation_epoch_start(self) -> None:
        self._measured: list[tuple[Tensor, Tensor]] = []

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        x0, condition = self.encode(batch)
        t, eps = fixed_noise(sum(len(t) for t, _ in self._measured), x0)
        self._measured.append((t, self.objective(self.denoiser, x0, condition, t, eps).unweighted))

    def on_validation_epoch_end(self) -> None:
        """Log the unweighted loss over all samples and for each interval of t, comparable from one validation to the next."""
        t, loss = (torch.cat(values) for values in zip(*self._measured, strict=True))
        metrics = {"val/loss": loss.mean(), "num_images_seen": float(self.num_images_seen)}
        self.log_dict(metrics | {f"val/loss_bin_{number:02d}": mean for number, mean in by_time(loss, t, NUM_BINS).items()})

    def _diffusion(self) -> dict[str, Any]:
        return diffusion_config(self.objective.path, self.objective.prediction, self.objective.timesteps)

    def pipeline(self) -> LatentDiffusionPipeline:
        """The model as a pipeline that shares the networks and their current weights."""
        return LatentDiffusionPipeline(
            vae=self.encoders.autoencoder,
            **text_parts(self.encoders.text_encoders),
            transformer=self.denoiser,
            scheduler=self.scheduler,
            diffusion=self._diffusion(),
            trained_on=self.encoders.trained_on,
        )

    def pipeline_on_device(self) -> LatentDiffusionPipeline:
        """The same on the device and silent, without text encoders: a T5-XXL would take 19 GB of it."""
        pipeline = self.pipeline()
        for part in TEXT_PARTS:
            setattr(pipeline, part, None)
        pipeline.to(self.device).set_progress_bar_config(disable=True)
        return pipeline

    def configure_callbacks(self) -> list[Callback]:
        return [] if self.evaluation is None else [Evaluate(self.evaluation)]

    def preview(self) -> list[tuple[str, list[Image.Image]]]:
        if not self.preview_prompts:
            return []
        embeds, pipeline = self._preview_embeds(), self.pipeline_on_device()

        def images() -> list[Image.Image]:
            generators = [torch.Generator().manual_seed(seed) for seed in range(len(self.preview_prompts))]
            settings = {"num_inference_steps": self.preview_steps, "guidance": self.preview_guidance}
            return pipeline(**embeds, **settings, generator=generators, return_dict=False)[0]

        columns = [images()]
        if self.adapter:
            with self.adapter.disabled():  # beside it the base's own
                columns.insert(0, images())
        return [(prompt, [*row]) for prompt, row in zip(self.preview_prompts, zip(*columns, strict=True), strict=True)]

    def _preview_embeds(self) -> dict[str, Any]:
        """What the pipeline takes in the place of ``preview_prompts``; encoded once, where the text encoder is."""
        if not self._embeds:
            names = ("prompt_embeds", "prompt_attention_mask", "negative_prompt_embeds", "negative_prompt_attention_mask")
            self._embeds = dict(zip(names, self.pipeline().encode_prompt(self.preview_prompts), strict=True))
        return self._embeds

    def save(self, folder: Path) -> None:
        if self.adapter:
            words = self.adapter.config.trigger_words
            if words is None:
                words = [self.default_caption] if self.default_caption else []
            tensors, config = self.adapter.exported()
            write_adapter(folder, tensors, config, self.adapter.record(self._training_settings(), words))
            if isinstance(self.denoiser, PixArtTransformer2DModel):
                write_for_peft(folder / "peft", tensors, config)
        else:
            self.pipeline().save_pretrained(folder)

    def _training_settings(self) -> dict[str, Any]:
        """Of the metadata of an adapter."""
        optimiser = self.optimiser
        return {
            "steps": self.average.step,
            "num_images_seen": self.num_images_seen,
            "learning_rate": optimiser.learning_rate,
            "schedule": optimiser.schedule,
            "optimiser": "AdamW" if optimiser.muon_learning_rate is None else "Muon",
            "max_grad_norm": optimiser.max_grad_norm,
            "ema_decay": self.average.exponential.decay,
            "seed": self.seed,
        }


def freeze_weights(network: nn.Module, patterns: Sequence[str]) -> None:
    """Exclude the weights whose names match one of ``patterns``, in which ``*`` stands for anything, from training.

    Raises :class:`UsageError` for a pattern that matches none, and where none is left to train.
    """
    for pattern in patterns:
        matching = [parameter for name, parameter in network.named_parameters() if fnmatchcase(name, pattern)]
        if not matching:
            parts = ", ".join(name for name, part in network.named_children() if any(True for _ in part.parameters()))
            raise UsageError(f"freeze {pattern} matches no weight; give names in {parts}, with * as in blocks.0.*")
        for parameter in matching:
            parameter.requires_grad_(False)
    if not any(parameter.requires_grad for parameter in network.parameters()):
        raise UsageError(f"freeze {', '.join(patterns)} matches all weights; leave some to train")
