"""Dry runs of both stages: the table, no files left behind, and the largest batch."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from ldm.errors import UsageError
from ldm.runs.dry_run.command import DryRunCLI
from ldm.runs.dry_run.estimate import Total, flops_text, warnings_of
from ldm.runs.dry_run.find_batch import Trial, find_largest, largest_by_line, repeated
from ldm.runs.dry_run.flops import ImageFlops
from ldm.training.autoencoder import AutoencoderTraining
from ldm.training.denoiser import DenoiserTraining
from tests.tiny import TinyRuns

RECIPES = Path(__file__).parents[2] / "configs" / "shapes"
STEPS, BATCH = 12, 2  # fewer steps than a dry run takes


@pytest.fixture
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("COLUMNS", "200")
    return tmp_path


def common(out: Path) -> list[str]:
    return [
        *("--out", str(out), "--trainer.accelerator", "cpu", "--trainer.devices", "1", "--trainer.precision", "32-true"),
        *("--trainer.max_steps", str(STEPS), "--trainer.val_check_interval", "4", "--trainer.log_every_n_steps", "1"),
        *("--data.batch_size", str(BATCH), "--data.validation_samples", "4"),
    ]


def denoiser(latents: tuple[Path, Path], out: Path, *options: str) -> DryRunCLI:
    own = [
        *("--data.train", str(latents[1]), "--data.validation", str(latents[1])),
        *("--model.autoencoder", str(latents[0]), "--model.preview_steps", "2", "--model.preview_prompts", "[a ring]"),
        *("--model.denoiser.init_args.sample_size", "16", "--model.denoiser.init_args.width", "16"),
        *("--model.denoiser.init_args.num_layers", "2", "--model.denoiser.init_args.num_attention_heads", "2"),
        *("--model.denoiser.init_args.caption_channels", "8"),
    ]
    return DryRunCLI(DenoiserTraining, ["fit", "--config", f"{RECIPES}/denoiser.yaml", *common(out), *own, *options])


def autoencoder(shards: Path, out: Path, *options: str) -> DryRunCLI:
    own = [
        *("--data.train", str(shards), "--data.validation", str(shards)),
        *("--model.autoencoder.block_out_channels", "[8, 16]", "--model.autoencoder.sample_size", "32"),
        *("--model.adversary.discriminator.init_args.width", "8", "--model.adversary.discriminator.init_args.num_layers", "1"),
        *("--model.adversary.start", "8", "--model.adversary.discriminator_warmup", "2"),
    ]
    return DryRunCLI(AutoencoderTraining, ["fit", "--config", f"{RECIPES}/autoencoder.yaml", *common(out), *own, *options])


def test_stage_two_and_a_disk_that_is_too_small(
    latents: tuple[Path, Path], tiny_runs: TinyRuns, runs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    averages = ["--model.power_averages", '{"sigma_rel": [0.1], "snapshot_every": 2}', *tiny_runs.evaluation()]
    cli = denoiser(latents, runs / "not" / "yet" / "run", "--dry-run", *averages)
    assert list(runs.iterdir()) == []
    shown, measured = capsys.readouterr().out, cli.measure.measured
    number = sum(parameter.numel() for parameter in cli.model.averaged().parameters())
    assert f"{number:,}" in shown and "text encoder" in shown and "snapshots" in shown and "data.validation" in shown
    assert "3 of them, from its first batch" in shown and measured.evaluation_seconds > 0
    (kind,) = measured.kinds
    assert kind.steps == STEPS == cli.trainer.max_steps
    assert kind.flops == pytest.approx(3 * kind.flops_forward, rel=0.05)  # no gradient to the latents, hence the rest
    # on the CPU, captions are cut to their longest in the batch
    assert ImageFlops(cli.model).count(cli.datamodule) == pytest.approx(kind.flops / BATCH, rel=0.1)
    assert kind.seconds > 0 and 0 <= kind.waiting < 1 and kind.peak_bytes > 1e8
    assert measured.validation_seconds > 0 and measured.preview_seconds > 0 and measured.checkpoint_seconds > 0
    # weights, two moments, of Muon's matrices one, and two averages are in it
    matrices = sum(matrix.numel() for group in cli.trainer.optimizers[0].param_groups[1:] for matrix in group["params"])
    assert 0 < matrices < number and (5 * number - matrices) * 4 < measured.checkpoint_bytes

    def lines(free: int, **bytes_of: int) -> list[str]:
        total = Total(0.0, 0, 0, {name: (size, "") for name, size in bytes_of.items()})
        return [line for line in warnings_of(cli.trainer, measured, total, free, runs) if "disk" in line]

    assert lines(1000, checkpoints=900, logs=100) == []
    (line,) = lines(1000, checkpoints=900, logs=101)
    assert "checkpoints most of all" in line and "keep_last" in line


def test_stage_one_has_steps_with_and_without_the_adversary_whatever_the_schedule_says(
    image_shards: Path, runs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cli = autoencoder(image_shards, runs / "run", "--dry-run")
    assert list(runs.iterdir()) == []
    alone, adversarial = cli.measure.measured.kinds
    assert (alone.steps, adversarial.steps) == (8, STEPS - 8)
    assert adversarial.flops > alone.flops
    # without the gradient of a convolution for the adaptive weight
    assert ImageFlops(cli.model).count(cli.datamodule) == pytest.approx(adversarial.flops / BATCH, rel=0.02)
    assert {parameter.device.type for parameter in cli.model.parameters()} == {"cpu"}
    assert "adversarial step" in capsys.readouterr().out


def test_a_batch_in_micro_batches_is_one_step(latents: tuple[Path, Path], runs: Path) -> None:
    cli = denoiser(latents, runs / "run", "--dry-run", "--model.accumulate", "2")
    (kind,) = cli.measure.measured.kinds
    assert kind.steps == STEPS and cli.trainer.global_step >= 5
    assert cli.trainer.fit_loop.epoch_loop.total_batch_idx + 1 == cli.trainer.global_step


def test_errors_of_the_run_are_raised_and_nothing_stays(latents: tuple[Path, Path], runs: Path) -> None:
    with pytest.raises(UsageError, match=r"trainer\.accumulate_grad_batches 2: .* split it with model.accumulate"):
        denoiser(latents, runs / "run", "--dry-run", "--trainer.accumulate_grad_batches", "2")
    with pytest.raises(UsageError, match="caption_channels"):
        denoiser(latents, runs / "run", "--dry-run", "--model.denoiser.init_args.caption_channels", "9")
    (runs / "taken").mkdir()
    (runs / "taken" / "work").touch()
    with pytest.raises(UsageError, match="taken"):
        denoiser(latents, runs / "taken", "--dry-run")
    assert [path.name for path in runs.iterdir()] == ["taken"]


@pytest.mark.parametrize("stage", ["autoencoder", "denoiser"])
def test_the_largest_batch_is_found_with_its_line(
    stage: str,
    latents: tuple[Path, Path],
    image_shards: Path,
    tiny_runs: TinyRuns,
    runs: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    if stage == "denoiser":
        cli = denoiser(latents, runs / "run", "--find-batch", "--model.accumulate", "2", *tiny_runs.evaluation())
    else:
        cli = autoencoder(image_shards, runs / "run", "--find-batch", "--model.accumulate", "2")
    sizes = [trial.size for trial in cli.finder.fits]
    assert sizes[0] == 2 and sizes == sorted(sizes)
    assert sizes[-1] == 10  # all samples that there are
    assert "batch_size: 10" in capsys.readouterr().out
    assert list(runs.iterdir()) == []


@pytest.mark.parametrize("option", ["--dry-run", "--find-batch"])
def test_memory_is_that_of_the_largest_size(
    latents: tuple[Path, Path], three_sizes: Path, runs: Path, monkeypatch: pytest.MonkeyPatch, option: str
) -> None:
    seen, loss_terms = [], DenoiserTraining.loss_terms

    def seeing(module: DenoiserTraining, batch: dict) -> dict:
        seen.append(tuple(batch["mean"].shape))
        return loss_terms(module, batch)

    monkeypatch.setattr(DenoiserTraining, "loss_terms", seeing)
    denoiser((latents[0], three_sizes), runs / "run", option)
    if option == "--dry-run":  # after the timed steps
        assert seen[-2] == (BATCH, 4, 16, 16) and len({shape[2:] for shape in seen}) > 1
    else:  # of which the data have three; the step that was begun ends the run
        assert {shape[1:] for shape in seen[:-1]} == {(4, 16, 16)} and max(shape[0] for shape in seen) > 3


def growing(fixed: float, each: float, limit: float, tried: list[int]) -> Callable[[int], Trial | None]:
    """A machine whose memory grows linearly with the batch, up to ``limit``."""

    def attempt(size: int) -> Trial | None:
        tried.append(size)
        return Trial(size, int(fixed + each * size), 0.001 * size) if fixed + each * size <= limit else None

    return attempt


def test_the_line_finds_the_largest_batch_without_running_out() -> None:
    tried: list[int] = []
    fits, predicted = find_largest(growing(1000, 10, 5000, tried), 1, 100_000, 5000)
    assert fits[-1].size == 400 and predicted == 400
    assert max(tried) == 400  # nothing was tried that did not fit


def test_it_bisects_where_memory_ends_before_the_prediction() -> None:
    """A GPU with fragmented memory holds less than its size."""
    fits, _ = find_largest(growing(1000, 10, 4000, []), 1, 100_000, 5000)
    assert 300 - 300 // 16 <= fits[-1].size <= 300


def test_steps_that_take_too_long_are_not_tried() -> None:
    tried: list[int] = []
    fits, predicted = find_largest(growing(0, 10, math.inf, tried), 1, 10**9, 1e9)
    assert 15_000 < fits[-1].size <= 30_000 and max(tried) == fits[-1].size
    assert predicted == 1e8


def test_not_even_one_fits() -> None:
    assert find_largest(growing(1000, 10, 500, []), 1, 100, 500)[0] == []


def test_all_samples_are_enough() -> None:
    assert find_largest(growing(0, 1, math.inf, []), 1, 24, 1e9)[0][-1].size == 24


def test_flat_memory_has_no_end() -> None:
    assert largest_by_line(Trial(1, 100, 1.0), Trial(2, 100, 1.0), 1000) == math.inf


def test_a_batch_is_repeated_whole() -> None:
    batch = {"mean": torch.arange(3), "draws": ["a", "b", "c"], "size": 32}
    larger = repeated(batch, 7)
    assert larger["mean"].tolist() == [0, 1, 2, 0, 1, 2, 0]
    assert larger["draws"] == list("abcabca") and larger["size"] == 32
    assert repeated(batch, 2)["draws"] == ["a", "b"]


def test_units() -> None:
    assert [flops_text(number) for number in (2.5e6, 3e9, 1.4e12, 2e15)] == ["2.5 MFLOP", "3 GFLOP", "1.4 TFLOP", "2 PFLOP"]
