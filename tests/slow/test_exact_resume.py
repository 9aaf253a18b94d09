"""A run that is killed and resumed equals one that is not: weights, optimisers, averages, guard, metrics and images."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from safetensors.torch import load_file

from ldm.data.buckets import Buckets
from ldm.data.image_dataset import ImageDataset
from ldm.data.latent_schema import sample_shapes
from ldm.data.sources import open_source
from ldm.data.writer import write_images
from ldm.latents.export import export_latents
from ldm.shapes.scenes import generate
from tests.tiny import TinyRuns

from .test_many_processes import metrics
from .warm import DDP, run

STEPS, KILLS = 8, 5
# a checkpoint at every step, loader processes, micro-batches
COMMON = ["--checkpoints.every_steps", "1", "--data.workers", "1"]
OWN = {
    "autoencoder": [
        *("--model.accumulate", "2", "--model.adversary.lecam.weight", "0.1"),
        *("--model.equivariance.probability", "0.5", "--model.learn_variance", "true"),
    ],
    "denoiser": ["--model.accumulate", "2", "--model.power_averages.sigma_rel", "[0.1]"],
    "matcher": ["--model.accumulate", "2"],
}


def leaves(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """Everything in a checkpoint by its path."""
    if isinstance(value, dict):
        for key in value:
            yield from leaves(value[key], f"{name}/{key}")
    elif isinstance(value, list | tuple):
        for index, each in enumerate(value):
            yield from leaves(each, f"{name}/{index}")
    else:
        yield name, value


def state(out: Path) -> dict[str, Any]:
    """What the last checkpoint holds, except for times."""
    checkpoint = torch.load(out / "checkpoints" / "last.ckpt", weights_only=True)
    timeless = {"ProgressLine", "Checkpoints"}
    checkpoint["callbacks"] = {name: kept for name, kept in checkpoint["callbacks"].items() if name not in timeless}
    return dict(leaves(checkpoint))


def assert_equal(mine: dict[str, Any], theirs: dict[str, Any], when: str = "") -> None:
    assert mine.keys() == theirs.keys()
    for name, value in theirs.items():
        same = torch.equal(mine[name], value) if isinstance(value, torch.Tensor) else mine[name] == value
        assert same, f"{name}: {mine[name]} {when}, {value} without"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stage", "processes"), [("autoencoder", 1), ("autoencoder", 2), ("denoiser", 1), ("denoiser", 2), ("matcher", 1)]
)
def test_killed_at_random_steps_and_resumed(tiny_runs: TinyRuns, tmp_path: Path, stage: str, processes: int) -> None:
    kills = sorted(random.Random(f"{stage} {processes}").sample(range(1, STEPS), KILLS))
    killer = [
        *("--trainer.callbacks+=tests.slow.injected.SignalAt", f"--trainer.callbacks.init_args.steps={kills}"),
        *("--resume", "latest"),
    ]

    def command(out: Path, *options: str) -> list[str]:
        made = tiny_runs.command(
            stage, out, "--data.batch_size", str(4 // processes), *COMMON, *OWN[stage], *options,
            steps=STEPS, validate_every=STEPS // 2,
        )  # fmt: skip
        return [*made, *DDP] if processes == 2 else made

    status, said = run(command(tmp_path / "whole"), tmp_path, processes)
    assert status == 0, said
    for number in range(KILLS + 1):
        status, said = run(command(tmp_path / "killed", *killer), tmp_path, processes)
        assert (status == 0) == (number == KILLS), f"start {number + 1} ended with {status}:\n{said[-3000:]}"
    assert "random states of" in said  # what --resume tells

    killed, whole = state(tmp_path / "killed"), state(tmp_path / "whole")
    assert whole["/global_step"] == STEPS  # of two optimisers, too
    assert_equal(killed, whole, f"after kills at {kills}")
    assert metrics(tmp_path / "killed") == metrics(tmp_path / "whole")
    if stage == "autoencoder":  # the adversarial loss took part, and the export has the latents' statistics
        assert sum(row.get("train/g_weight", 0) > 0 for row in metrics(tmp_path / "whole")) > 2
        assert AutoencoderKL.from_pretrained(tmp_path / "whole/autoencoder").config["latents_std"]
    for file in (tmp_path / "whole").rglob("*"):  # the exported directory, and every preview
        relative = file.relative_to(tmp_path / "whole")
        if file.suffix == ".png":
            assert (tmp_path / "killed" / relative).read_bytes() == file.read_bytes(), relative
        elif file.suffix == ".safetensors":  # its header has no fixed order
            assert_equal(load_file(tmp_path / "killed" / relative), load_file(file))


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["autoencoder", "denoiser"])
def test_three_sizes_on_two_processes_killed_at_random_steps_and_resumed(
    tiny_runs: TinyRuns, tiny_text_encoder: str, tmp_path: Path, stage: str
) -> None:
    """A step is of one size on both; each sample comes once an epoch, or waits; bits are those of a run without a kill."""
    cuts = [np.s_[:, :]] * 12 + [np.s_[:32, :]] * 8 + [np.s_[:, 16:48]] * 4
    images = [(key, pixels[cut], text) for (key, pixels, text), cut in zip(generate(24, 64, seed=1), cuts, strict=True)]
    write_images(tmp_path / "shards", "shapes", images, samples_per_shard=10)
    train, buckets = tmp_path / "shards", Buckets((48,), 16)
    crop = ["--data.crop", "bucket", "--data.buckets", "[48]", "--data.bucket_step", "16"]
    groups = ImageDataset(train, buckets=buckets).groups
    if stage == "denoiser":
        train, crop = tmp_path / "latents", []
        export_latents(tiny_runs.folder / "autoencoder", tmp_path / "shards", train, tiny_text_encoder, buckets=buckets)
        groups = sample_shapes([open_source(train)])
    assert groups is not None and sorted(np.unique(groups, return_counts=True)[1]) == [4, 8, 12]

    def command(out: Path, *options: str) -> list[str]:
        data = ["--data.train", str(train), "--data.validation", str(train), "--data.batch_size", "2", *crop]
        recorder = ["--trainer.callbacks+=tests.slow.injected.RecordDraws"]
        return [*tiny_runs.command(stage, out, *COMMON, *data, *recorder, *options, steps=9, validate_every=9), *DDP]

    kills = [2, 5]
    killer = ["--trainer.callbacks+=tests.slow.injected.SignalAt", f"--trainer.callbacks.init_args.steps={kills}"]
    status, said = run(command(tmp_path / "whole"), tmp_path, 2)
    assert status == 0, said
    for number in range(len(kills) + 1):
        status, said = run(command(tmp_path / "killed", *killer, "--resume", "latest"), tmp_path, 2)
        assert (status == 0) == (number == len(kills)), f"start {number + 1} ended with {status}:\n{said[-3000:]}"
    assert_equal(state(tmp_path / "killed"), state(tmp_path / "whole"), f"after kills at {kills}")
    assert metrics(tmp_path / "killed") == metrics(tmp_path / "whole")

    draws: list[list[int]] = []
    for step in range(9):
        files = [f"draws-{step}-{rank}.json" for rank in range(2)]
        ranks = [json.loads((tmp_path / "killed" / file).read_text()) for file in files]
        assert ranks == [json.loads((tmp_path / "whole" / file).read_text()) for file in files]
        together = [draw for rank in ranks for draw in rank]
        assert len(together) == 4 and len(np.unique(groups[[sample for sample, _ in together]])) == 1
        draws += together
    checkpoint = torch.load(tmp_path / "killed" / "checkpoints" / "last.ckpt", weights_only=True)
    (place,) = checkpoint["loops"]["fit_loop"]["state_dict"]["combined_loader"]
    draws += place.get("waiting", [])
    assert sorted(number for _, number in draws) == [*range(24 * place["epoch"] + place["samples_consumed"])]
    assert sorted(sample for sample, number in draws if number < 24) == [*range(24)]


@pytest.mark.slow
def test_a_checkpoint_of_another_optimiser_is_refused_with_the_fix(tiny_runs: TinyRuns, tmp_path: Path) -> None:
    status, said = run(tiny_runs.command("denoiser", tmp_path / "run", steps=2), tmp_path)
    assert status == 0, said
    adamw = ["--resume", "latest", "--model.optimiser.muon_learning_rate", "null"]
    status, said = run(tiny_runs.command("denoiser", tmp_path / "run", *adamw, steps=4), tmp_path)
    assert status == 2 and said.count("\n") == 1, said
    assert "was trained with Muon: give --model.optimiser.muon_learning_rate 0.004 to resume from it" in said
