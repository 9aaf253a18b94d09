"""Ablations of tiny trainings: those that are compared are the same as ever, and share what they are said to share."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file

from ldm.ablation import page
from ldm.ablation.ablation import Ablation
from ldm.ablation.look import LookRecord
from ldm.ablation.variants import Variant
from ldm.cli import main
from ldm.errors import LdmError, UsageError
from tests.tiny import TinyRuns, write_config

STEPS = 10
CHANGES: dict[str, dict[str, Any]] = {
    "log": {"trainer": {"log_every_n_steps": 3}},  # changes nothing
    "uniform": {"model": {"timesteps": {"class_path": "ldm.diffusion.timesteps.LogitNormal"}, "ema_decay": 0.5}},
}


class Stopped(Exception):
    """In the place of Ctrl-C between two looks."""


@pytest.fixture(scope="module")
def configs(tiny_runs: TinyRuns, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``base.yaml``, a whole config, and short ones that change it."""
    folder = tmp_path_factory.mktemp("configs")
    latents = tiny_runs.folder / "autoencoder", tiny_runs.folder / "latents"
    trainer = {"max_steps": STEPS, "log_every_n_steps": 1, "devices": 1}
    write_config(folder / "base.yaml", latents, trainer, preview_prompts=["a ring"], preview_steps=2)
    for name, change in CHANGES.items():
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(change))
    (folder / "empty.yaml").write_text("model: {}\n")
    return folder


def command(configs: Path, out: Path, *words: str, names: Sequence[str] = ("empty", "log", "uniform")) -> list[str]:
    files = [str(configs / f"{name}.yaml") for name in names]
    return ["ablate", *files, "--config", str(configs / "base.yaml"), "--out", str(out), "--looks", "2", *words]


@pytest.fixture(scope="module")
def ablation(configs: Path, tiny_runs: TinyRuns, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished ablation of three variants, which was interrupted after its first look."""
    out = tmp_path_factory.mktemp("ablation") / "out"
    images = ["--shards", f"{tiny_runs.folder}/shards", "--network", "alex-random", "--count", "8", "--steps", "1"]
    words = command(configs, out, "--no-stop", *images)

    def stop(ablation: Any) -> None:
        raise Stopped

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Stopped):
        patch.setattr(page, "write_page", stop)
        main(words)
    assert not (out / "ablation.html").exists() and len([*(out / "looks").glob("*.json")]) == 3
    main(words)
    return out


@pytest.fixture(scope="module")
def results(ablation: Path) -> dict[str, Any]:
    return json.loads((ablation / "results.json").read_text())


def test_a_variant_is_trained_as_it_is_by_itself(ablation: Path, configs: Path, tmp_path: Path) -> None:
    """Stopped at each look and resumed, and measured there, with others between: the same weights, bit for bit."""
    main(["denoiser", "fit", "--config", str(configs / "base.yaml"), "--out", str(tmp_path / "run")])
    there = ablation / "runs" / "empty-0" / "pipeline"
    for file in ("transformer/diffusion_pytorch_model.safetensors", "vae/diffusion_pytorch_model.safetensors"):
        ours, theirs = load_file(there / file), load_file(tmp_path / "run" / "pipeline" / file)
        assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_a_change_that_changes_nothing_makes_no_difference_and_others_are_named(results: dict[str, Any]) -> None:
    log, uniform = (results["comparisons"][name] for name in ("log", "uniform"))
    assert [look["images"] for look in log["looks"]] == [20, 40]
    for look in log["looks"]:
        assert look["difference"] == look["low"] == look["high"] == 0
    assert log["answer"] == "no difference above 5.0% after 40 images" and log["clear_at_images"] is None
    assert log["metrics"].keys() == results["variants"]["log"]["looks"][0]["metrics"].keys() >= {"fid_alex_random"}
    assert all(each == {"difference": 0, "low": 0, "high": 0} for each in log["metrics"].values())
    assert log["paired"] == {"samples": True, "times": True, "noise": True, "captions": True}
    # drawn before the noise, other times leave other noise
    assert uniform["paired"] == {"samples": True, "times": False, "noise": False, "captions": True}
    assert uniform["looks"][1]["difference"] != 0


def test_results_are_those_of_the_looks(ablation: Path, results: dict[str, Any]) -> None:
    files = sorted((ablation / "looks").glob("*.json"))
    first, second = (json.loads((ablation / "looks" / f"{name}-0-00000010.json").read_text()) for name in ("empty", "uniform"))
    ratios = np.log(np.array(second["errors"]) / np.array(first["errors"]))
    look = results["comparisons"]["uniform"]["looks"][1]
    assert len(files) == 6 and look["difference"] == pytest.approx(ratios.mean())
    assert look["low"] < look["difference"] < look["high"] and len(look["levels"]) == 3
    variant = results["variants"]["uniform"]
    assert variant["looks"][1]["x0_error"] == pytest.approx(math.exp(np.log(second["errors"]).mean()))
    fid = results["comparisons"]["uniform"]["metrics"]["fid_alex_random"]
    baseline = results["variants"]["empty"]["looks"][1]["metrics"]["fid_alex_random"]
    assert fid["difference"] == pytest.approx(variant["looks"][1]["metrics"]["fid_alex_random"] - baseline)
    assert fid["low"] < fid["difference"] < fid["high"]
    seconds = variant["seconds_per_step"]
    assert 0 < seconds["least"] <= seconds["median"] <= seconds["most"]
    assert variant["looks"][1]["seconds"] == pytest.approx(10 * seconds["least"])
    assert results["comparisons"]["uniform"]["equal_seconds"]["seconds"] > 0


def test_the_page_names_what_differs_and_shows_previews(ablation: Path) -> None:
    said = (ablation / "ablation.html").read_text()
    assert "model.ema_decay" in said and "Previews, from the same prompts" in said and "FID (alex_random)" in said


def test_the_folder_of_another_ablation_is_refused(ablation: Path, configs: Path, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as ended:
        main(command(configs, ablation, "--no-stop", names=("empty", "log")))
    assert ended.value.code == 2 and "holds an ablation with other variants; give a new --out" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("names", "words", "said"),
    [
        (["empty"], [], "compares two variants or more"),
        (["empty", "log"], ["--trainer.log_every_n_steps", "2"], "log and empty are the same"),
        (["empty", "log"], ["--trainer.devices", "2"], "give trainer.devices 1"),
        (["empty"], ["--vary", "data.batch_size", "4", "8"], "different numbers of images (batch_size=4 40, batch_size=8 80)"),
        (
            ["empty"],
            ["--vary", "data.validation_samples", "16", "24"],
            "data.validation_samples of validation_samples=24 is 24",
        ),
        (["empty"], ["--vary", "model.nonsense", "1", "2"], "nonsense"),
        (["empty", "log"], ["--data.validation_samples", "12"], "empty: 12 validation samples are too few"),
        (["empty", "nowhere"], [], "nowhere.yaml cannot be read"),
        (["empty", "empty"], [], "two variants are called"),
        (["empty"], ["--vary", "model.ema_decay"], "--vary model.ema_decay has no values"),
        (["empty", "log"], ["--looks", "20"], "empty has 10 steps for 20 looks"),
        (["empty", "log"], ["--count", "9"], "--count is of the metrics of generated images; give --shards, too"),
        (["empty", "log"], ["--shards", "shards", "--count", "0"], "--count is 0"),
        (["empty", "log"], ["--shards", "shards", "--guidance", "nan"], "--guidance is nan"),
        (["empty", "log"], ["--trainer.max_steps"], "--trainer.max_steps has no value"),
        (["empty", "log"], ["--margin", "1"], "--margin is 1"),
        (
            ["empty", "log"],
            ["--model.evaluation.shards", "shards", "--model.evaluation.every", "10"],
            "measures images at its own looks, and not by model.evaluation",
        ),
    ],
)
def test_what_cannot_be_compared_is_refused_in_one_line(
    names: list[str], words: list[str], said: str, configs: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(command(configs, tmp_path / "out", *words, names=names))
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("ldm:")]
    assert ended.value.code == 2 and len(errors) == 1 and said in errors[0]
    assert not (tmp_path / "out").exists()


class Made(Ablation):
    """An ablation of trainings that are made up: of each variant its error relative to the baseline's, and seconds per step."""

    def __init__(self, out: Path, made: dict[str, tuple[float, float]], seeds: int, looks: int, **settings: Any):
        config = {"seed_everything": 0, "data.seed": 0}
        variants = [Variant(name, (), config | {"model.made": name}, 80, 4, 1) for name in made]
        self.made, self.trained, self.samples = made, [], dict.fromkeys(made, 1.0)
        super().__init__(out, variants, [(look + 1) / looks for look in range(looks)], seeds, **settings)

    def _train(self, variant: Variant, seed: int, number: int) -> LookRecord:
        if variant.name == "broken" and number == 1:
            raise LdmError("it diverged")
        self.trained.append((variant.name, seed, number))
        (factor, seconds), step = self.made[variant.name], self.steps[variant.name][number]
        hard = np.random.default_rng(0).lognormal(0, 1, 64) / step
        noise = np.random.default_rng([seed, *variant.name.encode()]).normal(0, 0.02, 64)
        errors = (factor * hard * np.exp(noise)).tolist()
        return LookRecord(
            step=step,
            images=4 * step,
            seconds_per_step=seconds * (1 + number),
            errors=errors,
            samples=[self.samples[variant.name]] * 64,
            val_loss=1.0,
            paired={"samples": "a", "times": variant.name},
            metrics={"accuracy": factor + seed},
        )


def test_variants_take_turns_and_end_when_their_answer_is_clear(tmp_path: Path) -> None:
    made = {"base": (1.0, 1.0), "better": (0.8, 2.0), "same": (1.0, 0.5), "broken": (1.0, 1.0)}
    ablation, shown = Made(tmp_path / "out", made, seeds=3, looks=4), []
    ablation.run(lambda each: shown.append(len(each.baseline.records)))
    assert shown == [1, 2, 3, 4] and len(ablation.series["better"].records) == 2
    first = [(name, seed) for name, seed, number in ablation.trained if number == 0]
    forwards = [*made]
    assert first == [(name, seed) for seed in range(3) for name in (forwards if seed % 2 == 0 else forwards[::-1])]
    assert [name for name, seed, number in ablation.trained if (seed, number) == (0, 3)] == ["same", "base"]
    better, same, broken = ablation.comparisons()
    assert better.clear == 1 and same.clear is None and "clear after 160" in ablation.answer(better)
    assert better.looks[1].overall.value == pytest.approx(math.log(0.8), abs=0.02) and better.looks[1].overall.freedom == 2
    assert ablation.answer(better).startswith("the error of x0 is 2") and "% smaller (" in ablation.answer(better)
    assert len(broken.looks) == 1 and ablation.series["broken"].failed == "it diverged"
    assert better.paired == {"samples": True, "times": False}
    # the fastest part counts: after 40 s the baseline is at half of its images, where the error is half as large
    assert ablation.series["better"].seconds == [40, 80] and ablation.baseline.seconds == [20, 40, 60, 80]
    assert better.equal_seconds is not None and better.equal_seconds[0] == 40
    assert better.equal_seconds[1].overall.value == pytest.approx(math.log(0.8 * 2), abs=0.02)
    assert same.equal_seconds is not None and same.equal_seconds[0] == 40
    assert ablation.series["better"].metrics(0) == pytest.approx({"accuracy": 1.8})
    page.write_page(ablation)
    said = (tmp_path / "out" / "ablation.html").read_text()
    assert "3 seeds" in said and "given up: it diverged" in said


def test_what_is_not_clear_is_trained_to_the_end_and_other_samples_are_refused(tmp_path: Path) -> None:
    ablation = Made(tmp_path / "one", {"base": (1.0, 1.0), "better": (0.8, 1.0)}, 1, 4, stops=False)
    ablation.run(lambda each: None)
    assert len(ablation.series["better"].records) == 4 and ablation.comparisons()[0].clear == 1
    shown: list[int] = []
    Made(tmp_path / "alone", {"base": (1.0, 1.0)}, 1, 2).run(lambda each: shown.append(len(each.comparisons())))
    assert shown == [0, 0]
    other = Made(tmp_path / "other", {"base": (1.0, 1.0), "better": (0.8, 1.0)}, 1, 1)
    other.samples["base"] = 1.1
    with pytest.raises(UsageError, match="the validation samples of better are other latents"):
        other.run(lambda each: None)
