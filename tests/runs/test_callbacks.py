"""The speed that is shown and logged: what counts as waiting, what does not count, what a resumed run forgets."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning import Callback, LightningModule, Trainer
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from ldm.progress import WINDOW_SECONDS, Lap, Pace, Progress
from ldm.reporting.metrics_csv import read_metrics
from ldm.runs.callbacks import ModelFlops, ProgressLine, Stopwatch
from ldm.runs.logging import RunCSVLogger
from tests.tiny import make_trainer

LOADING, STEPPING, PAUSE = 0.03, 0.01, 1.0
IMAGES = 4


class SlowData(IterableDataset):
    def __iter__(self) -> Iterator[dict]:
        while True:
            time.sleep(LOADING)
            yield {"x": torch.ones(IMAGES, 1), "draws": list(range(IMAGES))}


class SlowModule(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(1, 1)

    def training_step(self, batch: dict, batch_idx: int) -> Tensor:
        time.sleep(STEPPING)
        loss = self.layer(batch["x"]).square().mean()
        self.log("train/loss", loss)
        return loss

    def validation_step(self, batch: dict, batch_idx: int) -> None:
        time.sleep(PAUSE)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 1e-3)


class SaveSlowly(Callback):
    """Saves every seven steps, slowly."""

    def on_train_batch_end(self, trainer: Trainer, *_: Any, **__: Any) -> None:
        if trainer.global_step % 7 == 3:
            trainer.save_checkpoint(Path(trainer.default_root_dir, f"{trainer.global_step}.ckpt"))
            time.sleep(PAUSE / 2)


def fit(folder: Path, steps: int, line: ProgressLine, resumed_at: int | None = None, **options: Any) -> None:
    options |= {"logger": RunCSVLogger(folder, resumed_at), "callbacks": [line, SaveSlowly()]}
    trainer = make_trainer(folder, steps, val_check_interval=5, limit_val_batches=1, log_every_n_steps=2, **options)
    loader = DataLoader(SlowData(), batch_size=None)
    checkpoint = None if resumed_at is None else folder / f"{resumed_at}.ckpt"
    trainer.fit(SlowModule(), loader, loader, ckpt_path=checkpoint)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trained")
    flops = ModelFlops()
    flops.flops_per_image, flops.peak_flops = 6.0, 1e6
    fit(folder, 12, ProgressLine("tiny", flops))
    return folder


def test_waiting_is_the_time_in_the_loader_alone(trained: Path) -> None:
    curves = read_metrics(trained / "logs" / "metrics.csv")
    for share, seconds in zip(curves["time/data_wait_share"][1], curves["time/step_seconds"][1], strict=True):
        # lower bounds hold on a busy machine; a tenth of tolerance, since the two values are not taken at the same time
        assert share * seconds >= 0.9 * LOADING and (1 - share) * seconds >= 0.9 * STEPPING


def test_neither_validation_nor_checkpoints_slow_the_rate(trained: Path) -> None:
    curves = read_metrics(trained / "logs" / "metrics.csv")
    seconds, rates = curves["time/step_seconds"][1], curves["time/images_per_second"][1]
    assert all(each >= LOADING + STEPPING for each in seconds)
    # with the pauses all steps would take as long as the run, however busy the machine is
    assert 12 * sum(seconds) / len(seconds) < curves["time/elapsed_seconds"][1][-1] - PAUSE
    assert rates == pytest.approx([IMAGES / each for each in seconds], rel=1e-3)
    assert curves["time/mfu"][1] == pytest.approx([rate * 6.0 / 1e6 for rate in rates], rel=1e-3)
    assert curves["time/elapsed_seconds"][1][-1] > 2 * PAUSE


def test_speed_stands_in_the_rows_of_the_metrics(trained: Path) -> None:
    curves = read_metrics(trained / "logs" / "metrics.csv")
    assert curves["time/images_per_second"][0] == curves["train/loss"][0] == [2, 4, 6, 8, 10, 12]


def test_a_resumed_run_keeps_its_time_and_counts_its_own_steps(trained: Path, capfd: pytest.CaptureFixture) -> None:
    before = read_metrics(trained / "logs" / "metrics.csv")["time/elapsed_seconds"][1]
    fit(trained, 14, ProgressLine("tiny"), resumed_at=10)
    curves = read_metrics(trained / "logs" / "metrics.csv")
    assert curves["time/elapsed_seconds"][0] == [2, 4, 6, 8, 10, 12, 14]
    # 10 steps in no time would be hundreds of images a second
    assert all(rate < IMAGES / LOADING for rate in curves["time/images_per_second"][1])
    assert curves["time/elapsed_seconds"][1][-1] > before[4]
    said = capfd.readouterr().err
    assert "tiny: 14/14 images/s" in said and "waiting" in said and "loss" in said and "left 0:00" in said


def test_batches_that_are_gathered_make_one_step(tmp_path: Path) -> None:
    fit(tmp_path, 4, ProgressLine("tiny"), accumulate_grad_batches=2)
    curves = read_metrics(tmp_path / "logs" / "metrics.csv")
    step, rate = curves["time/step_seconds"][1][-1], curves["time/images_per_second"][1][-1]
    assert step >= 2 * (LOADING + STEPPING) * 3 / 4 and rate < IMAGES / LOADING  # seven batches make 3.5 steps


def test_the_stopwatch_counts_failures_too() -> None:
    def one() -> Iterator[int]:
        time.sleep(0.01)
        yield 1
        time.sleep(0.01)
        raise ValueError

    watch = Stopwatch(one())
    assert next(watch) == 1 and watch.seconds >= 0.01
    with pytest.raises(ValueError):
        next(watch)
    assert watch.seconds >= 0.02


def test_the_pace_is_of_late_and_the_time_left_has_pauses_in_it() -> None:
    pace = Pace()
    assert pace.images_per_second is pace.step_seconds is pace.wait_share is pace.left(10) is None
    for _ in range(100):  # slow at first
        pace.add(Lap(seconds=2.0, steps=1, images=8, waited=1.0))
    for _ in range(int(WINDOW_SECONDS)):
        pace.add(Lap(seconds=1.0, steps=1, images=8, waited=0.25))
    assert pace.images_per_second == pytest.approx(8) and pace.step_seconds == pytest.approx(1)
    assert pace.wait_share == pytest.approx(0.25) and pace.left(10) == pytest.approx(10)
    pace.add(Lap(1.0, 1, 8, 0.25), pause=131.0)  # a second for each of the 131 steps
    assert pace.images_per_second == pytest.approx(8) and pace.left(10) == pytest.approx(20)


def test_one_step_longer_than_the_window_still_has_a_pace() -> None:
    pace = Pace()
    for _ in range(3):
        pace.add(Lap(3 * WINDOW_SECONDS, 1, 1, 0.0))
    assert pace.step_seconds == pytest.approx(3 * WINDOW_SECONDS)


def test_progress_reckons_from_where_it_began(capfd: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ldm.progress.LOG_EVERY_SECONDS", 0)
    with Progress("resumed", 1100) as progress:
        progress.update(1000)
        time.sleep(0.3)
        progress.update(1001, metrics={"loss": 0.123456, "waiting": "3%"})
    first, second = capfd.readouterr().err.splitlines()
    assert first == "resumed: 1000/1100"
    assert second.startswith("resumed: 1001/1100 loss 0.1235 waiting 3% left 0:") and second[-2:] >= "29"
