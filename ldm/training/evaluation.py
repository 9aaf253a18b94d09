"""Metrics of generated images in training: every so many steps, with the averaged weights, from the same captions and noise."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, cast

from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from ldm.data.datamodule import datamodule_of
from ldm.diffusion.scheduler import sampler_name
from ldm.errors import UsageError
from ldm.evaluation.features import load_feature_network
from ldm.evaluation.image_sets import ImageSet, Scorer, embeds_of, open_shards
from ldm.evaluation.results import AGREEMENT, METRICS, METRICS_OF_TEXTS, Reference, Results, metric_names, record_of
from ldm.files import write_json
from ldm.latents.compute import Process
from ldm.progress import Progress
from ldm.training.fsdp import is_sharded

if TYPE_CHECKING:
    from ldm.training.denoiser import DenoiserTraining

# folder in a run folder for the metrics of each evaluation, with their protocol
EVALUATIONS = "evaluations"
MOST = 1000  # images unless it is said how many


@dataclass
class Evaluation:
    """Metrics of images that are generated in training, against real images.

    Attributes:
        shards: image shards, best of a validation set; images are generated from their captions, and compared with theirs.
        every: steps between evaluations; a multiple of those between validations.
        networks: feature networks: inception, dinov2, clip, alex-random, vgg-random, a hub name or a path.
        metrics: which to log of each network: fid, kid, cmmd, precision, recall, density, coverage, vendi, clipscore,
            retrieval. Default: all.
        count: how many images. Default: as many as there are, up to 1,000.
        steps: denoising steps.
        guidance: guidance scale; 1 is none.
        seed: of the choice of images, and of the first image's noise.
        batch_size: images at a time and process.
    """

    shards: str
    every: int
    networks: list[str] = field(default_factory=lambda: ["inception", "clip"])
    metrics: list[str] | None = None
    count: int | None = None
    steps: int = 30
    guidance: float = 3.0
    seed: int = 0
    batch_size: int = 32

    def __post_init__(self) -> None:
        for name in ("every", "count", "steps", "batch_size"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise UsageError(f"{name} of the evaluation is {value}; give 1 or more")
        if not self.networks or self.metrics == []:
            raise UsageError("the evaluation has no networks or no metrics; give one or more, or leave it out")
        known = (*METRICS, *METRICS_OF_TEXTS, *AGREEMENT)
        for name in self.metrics or ():
            if name not in known:
                raise UsageError(f"the evaluation has no metric {name}; give some of {', '.join(known)}")

    @property
    def forward_passes(self) -> int:
        """Of the denoiser, for an image."""
        return self.steps * (1 if self.guidance == 1 else 2)


class Evaluate(Callback):
    """Runs the evaluation of a denoiser's training, at validations, where the average is applied.

    Logs ``val/METRIC_NETWORK`` and ``time/evaluation_seconds``, and writes the metrics with their whole protocol to
    ``evaluations/step-00010000.json``. Captions and noise are the same each time. The processes share the batches; all of them
    compute the metrics. Training does not notice: no global random number is used.
    """

    def __init__(self, asked: Evaluation) -> None:
        self.asked = asked
        self._embeds: dict[tuple[str, ...], dict[str, Tensor]] = {}

    @property
    def names(self) -> set[str]:
        """Of metrics that may be logged."""
        found = metric_names(self.scorer.networks, with_captions=not self.unconditional)
        return {f"val/{name}" for name in found if self.asked.metrics is None or name.split("_")[0] in self.asked.metrics}

    # -- before the first step ---------------------------------------------------------------------------------------

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Compute the features of the real images. Raises UsageError for what cannot be evaluated."""
        self._require_due(trainer)
        asked, module = self.asked, _denoiser(pl_module)
        self.unconditional = module.encoders.text_encoders[0].is_unconditional
        self.dataset = open_shards(asked.shards, need_captions=not self.unconditional)
        if (count := asked.count or min(MOST, len(self.dataset))) > len(self.dataset):
            raise UsageError(
                f"the evaluation is of {count} images, but {asked.shards} holds {len(self.dataset)}; give that or less"
            )
        networks = [load_feature_network(name, trainer.strategy.root_device) for name in asked.networks]
        known = {name.split("_")[0] for name in metric_names(networks, with_captions=not self.unconditional)}
        if lacking := {*(asked.metrics or ())} - known:
            raise UsageError(f"the evaluation's {min(lacking)} needs a network and a model of images and text; leave it out")
        process = Process(trainer.global_rank, trainer.world_size, trainer.local_rank, trainer.world_size)
        self.scorer, sizes = Scorer(networks, process, asked.batch_size), module.pipeline().trained_sizes
        with self._networks_on_device(), Progress("scoring real images", quiet=process.rank > 0) as progress:
            self.reference = Reference.of_shards(self.scorer, self.dataset, sizes, count, asked.seed, progress.update)
        images = len(self.reference.images) * asked.forward_passes / 3  # a step runs forward, and backward for twice as long
        steps = images / datamodule_of(trainer).mean_batch_size / trainer.world_size
        rank_zero_info(f"the evaluation every {asked.every} steps computes about as much as {steps:.3g} steps of training")

    def _require_due(self, trainer: Trainer) -> None:
        """Raise UsageError where an evaluation would never come, or not every so many steps."""
        every, validated = self.asked.every, trainer.val_check_interval
        if not isinstance(validated, int) or not trainer.limit_val_batches:
            raise UsageError("the evaluation is part of validations, but the run has none; validate every so many steps")
        if every % validated:
            raise UsageError(f"the evaluation is every {every} steps, validation every {validated}; give a multiple of that")
        if 0 <= trainer.max_steps < every:
            raise UsageError(f"the evaluation is every {every} steps, but the run has {trainer.max_steps}; give fewer")

    @contextmanager
    def _networks_on_device(self) -> Iterator[None]:
        """Training needs the device's memory."""
        for network in self.scorer.networks:
            network.to(self.scorer.device)
        try:
            yield
        finally:
            for network in self.scorer.networks:
                network.cpu()

    # -- an evaluation -----------------------------------------------------------------------------------------------

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn == "fit" and trainer.global_step % self.asked.every == 0:
            start, module = time.perf_counter(), _denoiser(pl_module)
            generated = self.generate(trainer, module, len(self.reference.images))
            results = self.reference.compare(generated)
            self._write(trainer, module, generated, results)
            metrics = {f"val/{metric.name}": metric.value for metric in results.metrics}
            seconds = {"time/evaluation_seconds": time.perf_counter() - start}
            module.log_dict({name: value for name, value in metrics.items() if name in self.names} | seconds)

    def generate(self, trainer: Trainer, module: DenoiserTraining, count: int) -> ImageSet:
        """The first ``count`` images, by the network's present weights; all processes call it."""
        asked, real, pipeline = self.asked, self.reference.images.part(0, count), module.pipeline_on_device()
        captions, settings = [caption or "" for caption in real.captions], {"num_inference_steps": asked.steps}
        precision = trainer.precision_plugin.forward_context() if is_sharded(module.averaged()) else nullcontext()
        with self._networks_on_device(), precision:
            images = self.scorer.generated_images(
                pipeline,
                captions,
                real.sizes,
                asked.seed,
                on_progress=lambda done, total: module.pause(),
                embed=lambda texts: self._embedded(module, texts),
                guidance_scale=asked.guidance,
                **settings,
            )
        return images.without_captions() if self.unconditional else images

    def _embedded(self, module: DenoiserTraining, texts: Sequence[str]) -> dict[str, Tensor]:
        """The condition of captions and the null condition; encoded once, where the text encoder is, and kept on the host."""
        key = tuple(texts)
        if key not in self._embeds:
            pipeline = module.pipeline()
            null = {f"negative_{name}": value for name, value in embeds_of(pipeline, [""]).items()}
            self._embeds[key] = {name: value.cpu() for name, value in (embeds_of(pipeline, texts) | null).items()}
        return self._embeds[key]

    def _write(self, trainer: Trainer, module: DenoiserTraining, generated: ImageSet, results: Results) -> None:
        if trainer.is_global_zero:
            folder, step = Path(trainer.default_root_dir), trainer.global_step
            made_by = {"run": folder.resolve().name, "step": step, "scheduler": sampler_name(module.scheduler)}
            made_by |= {"sampler": type(module.scheduler).__name__, "device": module.device.type}
            made_by |= {"steps": self.asked.steps, "guidance": self.asked.guidance}
            source = self.dataset.sources[0]
            record = record_of(results, generated, self.reference, source, self.asked.seed, made_by)
            write_json(folder / EVALUATIONS / f"step-{step:08d}.json", record)


def evaluation_of(trainer: Trainer) -> Evaluate | None:
    """The run's callback, where it has one."""
    callbacks: list[Callback] = trainer.callbacks  # pyright: ignore[reportAttributeAccessIssue]  set outside of the class
    return next((callback for callback in callbacks if isinstance(callback, Evaluate)), None)


def _denoiser(module: LightningModule) -> DenoiserTraining:
    """The training of a denoiser, which alone makes this callback."""
    return cast("DenoiserTraining", module)
