"""The pipeline that a command evaluates, how it samples, and the shards that it is compared with, as the options say."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from ldm.errors import UsageError
from ldm.progress import Progress

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ldm.data.buckets import Size
    from ldm.data.image_dataset import ImageDataset
    from ldm.diffusion.sampler import Sampler
    from ldm.evaluation.image_sets import ImageSet, OnProgress, Scorer
    from ldm.evaluation.results import Reference
    from ldm.latents.compute import Process

MAX_COUNT = 10**7
DEFAULT_COUNT, BATCH_SIZE = 1000, 32


def add_sampling(parser: argparse.ArgumentParser) -> None:
    """Options of :class:`EvaluatedPipeline`."""
    sampling = parser.add_argument_group("sampling")
    sampling.add_argument("--size", metavar="WxH", help="in pixels, or one number (default: the sizes that it was trained on)")
    sampling.add_argument("--steps", type=int, help="of the scheduler (default: those recommended for the model, else 30)")
    sampling.add_argument("--guidance", type=float, help="guidance scale; 1 is none (default: that recommended, else 3)")
    sampling.add_argument("--scheduler", metavar="NAME", help="such as euler (default: the pipeline's)")
    sampling.add_argument("--seed", type=int, default=0, help="of the choice of images, and of the first image's noise")


def require_count(name: str, number: int) -> None:
    if not 1 <= number <= MAX_COUNT:
        raise UsageError(f"--{name} is {number}; give 1 to {MAX_COUNT:,}")


def check_sampling(options: argparse.Namespace) -> None:
    """Raise UsageError for what no model can take."""
    if not 0 <= options.seed < 2**32:
        raise UsageError(f"--seed is {options.seed}; give 0 to {2**32 - 1}")
    if options.steps is not None:
        require_count("steps", options.steps)


class EvaluatedPipeline:
    """A pipeline and how it samples, as the options say.

    Attributes:
        sizes: height and width of its images.
        settings: ``steps`` and ``guidance``; the pipeline has the scheduler.
        recommended: the names of the settings that were not given, and that the model recommends.
    """

    def __init__(self, options: argparse.Namespace, process: Process) -> None:
        """Raises UsageError for a size or a scheduler that the model cannot take."""
        from ldm.inference.prompts import parse_size
        from ldm.pipeline import load_pipeline

        self.options = options
        self.pipeline = load_pipeline(options.model, process.device())
        self.pipeline.set_progress_bar_config(disable=True)
        self.sample_with(options.scheduler, options.steps, options.guidance)
        self.sizes = tuple(self.pipeline.trained_sizes)
        if options.size is not None:
            width, height = parse_size(options.size)
            self.pipeline.latent_shape(1, height, width)
            self.sizes = ((height, width),)

    def sample_with(self, scheduler: str | None, steps: int | None, guidance: float | None) -> Sampler:
        """Take these settings; those that are None are the recommended ones, or the built-in ones where there are none.

        Returns:
            The sampler, of as many function evaluations as an image takes without guidance.

        Raises:
            UsageError: for a scheduler that the model cannot take, or steps that the scheduler cannot.
        """
        from ldm.diffusion.scheduler import make_scheduler
        from ldm.pipeline import GUIDANCE, STEPS

        recommended = self.pipeline.recommended_settings(scheduler)
        if scheduler is not None:
            self.pipeline.scheduler = make_scheduler(scheduler, *self.pipeline.diffusion)
        given = {"scheduler": scheduler, "steps": steps, "guidance": guidance}
        given = {name: value for name, value in given.items() if value is not None}
        self.recommended = [name for name in recommended if name not in given]
        chosen = {"steps": STEPS, "guidance": GUIDANCE} | recommended | given
        self.settings = {name: chosen[name] for name in ("steps", "guidance")}
        return self.pipeline.make_sampler(self.settings["steps"])

    def generate(self, scorer: Scorer, real: ImageSet, on_progress: OnProgress | None = None, first: int = 0) -> ImageSet:
        """Images of the captions of real ones, and of their sizes; the first of them has the number ``first``, which its seed
        depends on."""
        settings = {"num_inference_steps": self.settings["steps"], "guidance_scale": self.settings["guidance"]}
        captions = [caption or "" for caption in real.captions]
        images = scorer.generated_images(
            self.pipeline, captions, real.sizes, self.options.seed + first, on_progress, **settings
        )
        return images.without_captions() if self.pipeline.is_unconditional else images

    def protocol(self) -> dict[str, Any]:
        """The model, its fingerprint, and how it sampled."""
        from dataclasses import asdict

        from ldm.inference.metadata import provenance_of

        made_by = asdict(provenance_of(self.pipeline, self.options.model))
        named = ("model", "model_hash", "scheduler", "sampler", "dtype", "device", "ldm")
        recommended = {"recommended": self.recommended} if self.recommended else {}
        return {name: made_by[name] for name in named} | self.settings | recommended


def open_shards(shards: str, need_captions: bool, count: int | None = None) -> ImageDataset:
    """Raises UsageError for shards that do not hold what is asked for: captions, and ``count`` images."""
    from ldm.evaluation import image_sets

    dataset = image_sets.open_shards(shards, need_captions)
    if count is not None and count > len(dataset):
        raise UsageError(f"--count is {count}, but {shards} holds {len(dataset)} images; give that or less")
    return dataset


def real_reference(scorer: Scorer, dataset: ImageDataset, sizes: Sequence[Size], count: int, seed: int) -> Reference:
    """``count`` images of the shards, taken at random, of these sizes; and as many others, for the metrics of real images."""
    from ldm.evaluation.results import Reference

    with Progress("scoring real images", quiet=scorer.process.rank > 0) as progress:
        return Reference.of_shards(scorer, dataset, sizes, count, seed, progress.update)
