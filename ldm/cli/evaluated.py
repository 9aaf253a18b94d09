"""The pipeline that a command evaluates, how it samples, and the shards that it is compared with, as the options say."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from ldm.errors import UsageError

if TYPE_CHECKING:
    from ldm.data.image_dataset import ImageDataset
    from ldm.evaluation.image_sets import ImageSet, OnProgress, Scorer
    from ldm.latents.compute import Process

MAX_COUNT = 10**7
STEPS, GUIDANCE = 30, 3.0


def add_sampling(parser: argparse.ArgumentParser) -> None:
    """Options of :class:`EvaluatedPipeline`."""
    sampling = parser.add_argument_group("sampling")
    sampling.add_argument("--size", metavar="WxH", help="in pixels, or one number (default: the sizes that it was trained on)")
    sampling.add_argument("--steps", type=int, help="of the scheduler (default: 30)")
    sampling.add_argument("--guidance", type=float, help="guidance scale; 1 is none (default: 3)")
    sampling.add_argument("--scheduler", metavar="NAME", help="such as euler (default: the pipeline's)")
    sampling.add_argument("--seed", type=int, default=0, help="of the choice of images, and of the first image's noise")


def require_count(name: str, number: int) -> None:
    if not 1 <= number <= MAX_COUNT:
        raise UsageError(f"--{name} is {number}; give 1 to {MAX_COUNT:,}")


class EvaluatedPipeline:
    """A pipeline and how it samples, as the options say."""

    def __init__(self, options: argparse.Namespace, process: Process) -> None:
        """Raises UsageError for a size or a scheduler that the model cannot take."""
        from ldm.diffusion.scheduler import make_scheduler
        from ldm.inference.prompts import parse_size
        from ldm.pipeline import load_pipeline

        self.options = options
        self.pipeline = load_pipeline(options.model, process.device())
        self.pipeline.set_progress_bar_config(disable=True)
        if options.scheduler is not None:
            self.pipeline.scheduler = make_scheduler(options.scheduler, *self.pipeline.diffusion)
        self.pipeline.make_sampler(options.steps)
        self.sizes = tuple(self.pipeline.trained_sizes)
        if options.size is not None:
            width, height = parse_size(options.size)
            self.pipeline.latent_shape(1, height, width)
            self.sizes = ((height, width),)

    def generate(self, scorer: Scorer, real: ImageSet, on_progress: OnProgress) -> ImageSet:
        """Images of the captions of real ones, and of their sizes."""
        settings = {"num_inference_steps": self.options.steps, "guidance_scale": self.options.guidance}
        captions = [caption or "" for caption in real.captions]
        images = scorer.generated_images(self.pipeline, captions, real.sizes, self.options.seed, on_progress, **settings)
        return images.without_captions() if self.pipeline.is_unconditional else images

    def protocol(self) -> dict[str, Any]:
        """The model, its fingerprint, and how it sampled."""
        from dataclasses import asdict

        from ldm.inference.metadata import provenance_of

        made_by = asdict(provenance_of(self.pipeline, self.options.model))
        named = ("model", "model_hash", "scheduler", "sampler", "dtype", "device", "ldm")
        return {name: made_by[name] for name in named} | {"steps": self.options.steps, "guidance": self.options.guidance}


def open_shards(options: argparse.Namespace, need_captions: bool) -> ImageDataset:
    """Raises UsageError for shards that do not hold what is asked for."""
    from ldm.data.image_dataset import ImageDataset

    dataset = ImageDataset(options.shards, require_captions=need_captions)
    if need_captions and dataset.sources[0].manifest.captioned is False:
        raise UsageError(f"{options.shards} has no captions, and the model generates from captions; give shards with captions")
    if options.images is None and options.count is not None and options.count > len(dataset):
        raise UsageError(f"--count is {options.count}, but {options.shards} holds {len(dataset)} images; give that or less")
    return dataset
