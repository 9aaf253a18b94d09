"""What images share is prepared once, however many are generated; and a sampler comes by one entry of the table."""

from collections import Counter

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FlowMatchHeunDiscreteScheduler
from transformers import PreTrainedTokenizerBase

import ldm.pipeline as pipelines
from ldm.cli import main
from ldm.diffusion.path import RectifiedFlow, VarianceExploding
from ldm.diffusion.prediction import Preconditioned
from ldm.diffusion.sampler import Sampler
from ldm.diffusion.scheduler import SAMPLERS, SamplerSpec, adds_noise, make_scheduler, sampler_name, samplers_for
from ldm.inference.generate import ImageGenerator
from ldm.inference.metadata import a1111_parameters, provenance_of, read_png
from ldm.inference.settings import GenerationSettings


@pytest.fixture
def counts(monkeypatch):
    """How often the tokenizer is called, path and prediction are read from JSON, and samplers and schedulers are made."""
    counted = Counter()

    def count(owner, name, what):
        original = getattr(owner, name)

        def counting(*given, **named):
            counted[what] += 1
            return original(*given, **named)

        monkeypatch.setattr(owner, name, counting)

    count(PreTrainedTokenizerBase, "__call__", "tokenizer")
    count(pipelines, "diffusion_from", "diffusion")
    count(Sampler, "__init__", "sampler")
    count(FlowMatchHeunDiscreteScheduler, "__init__", "scheduler")
    return counted


def test_one_call_of_the_pipeline_prepares_once(pipeline, counts):
    images = pipeline("a red ring", num_inference_steps=2, num_images_per_prompt=4).images
    # prompts, their words one by one to find unknown ones, and negative prompts
    assert len(images) == 4 and counts == {"tokenizer": 3, "diffusion": 1, "sampler": 1}


def test_four_seeds_of_a_prompt_prepare_once(pipeline, counts):
    encoded = []
    pipeline.text_encoder.register_forward_hook(lambda *_: encoded.append(1))
    settings = [GenerationSettings("a red ring", seed=seed, steps=2, scheduler="heun") for seed in range(4)]
    generator = ImageGenerator(pipeline)
    generator.check(settings[0])
    images = [made.image for made in generator.generate(settings)]
    assert len({np.asarray(image).tobytes() for image in images}) == 4
    assert counts == {"tokenizer": 2, "diffusion": 1, "sampler": 1, "scheduler": 1}
    assert len(encoded) == 2  # the prompt, and the empty one


def test_the_command_prepares_once_and_names_the_scheduler_of_every_image(pipeline, counts, tmp_path):
    pipeline.save_pretrained(tmp_path / "pipeline")
    arguments = ["--count", "4", "--steps", "2", "--scheduler", "heun", "--device", "cpu"]
    main(["sample", str(tmp_path / "pipeline"), "a red ring", *arguments, "--out", str(tmp_path / "out")])
    assert counts == {"tokenizer": 2, "diffusion": 1, "sampler": 1, "scheduler": 1}
    assert [read_png(path)[1].scheduler for path in (tmp_path / "out").glob("[0-9]*.png")] == ["heun"] * 4


def test_a_sampler_that_has_been_used_starts_anew(pipeline):
    """Multistep solvers remember the predictions of a run."""
    sampler = pipeline.make_sampler(4, scheduler=make_scheduler("unipc", *pipeline.diffusion))
    first, again = (
        pipeline("a ring", sampler=sampler, generator=torch.Generator().manual_seed(0), output_type="latent").images
        for _ in range(2)
    )
    assert torch.equal(first, again)


class LateEuler(FlowMatchEulerDiscreteScheduler):
    """A scheduler from outside the package."""


def test_a_sampler_is_added_from_outside_by_one_entry_of_the_table(pipeline, tmp_path, monkeypatch):
    monkeypatch.setitem(
        SAMPLERS, "late", SamplerSpec("Late Euler", {RectifiedFlow: LateEuler}, {"shift": 3.0}, adds_noise=True)
    )
    assert "late" in samplers_for(*pipeline.diffusion) and "late" not in samplers_for(VarianceExploding(), Preconditioned())
    scheduler = make_scheduler("late", *pipeline.diffusion)
    assert (type(scheduler), scheduler.config.shift, sampler_name(scheduler)) == (LateEuler, 3.0, "late")
    assert adds_noise(scheduler)
    settings = [GenerationSettings("a ring", steps=2, scheduler=name) for name in ("late", "euler")]
    late, plain = (np.asarray(made.image) for made in ImageGenerator(pipeline).generate(settings))
    assert not np.array_equal(late, plain)
    pipeline.save_pretrained(tmp_path)
    provenance = provenance_of(pipeline, tmp_path).of_scheduler(scheduler)
    assert "Sampler: Late Euler" in a1111_parameters(settings[0], provenance)
