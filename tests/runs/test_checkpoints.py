"""Checkpoints: complete or absent, found again, the right ones kept, and resumed runs equal to uninterrupted ones."""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.loggers.logger import DummyLogger
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, distributed, nn
from torch.distributed.checkpoint import save as save_shards
from torch.utils.data import DataLoader, TensorDataset

from ldm.errors import LdmError, UsageError
from ldm.files import sha256_file
from ldm.runs.checkpoints import files
from ldm.runs.checkpoints.callback import Checkpoints, checkpoints_of
from ldm.runs.checkpoints.files import (
    FORMAT_VERSION,
    VERSION_KEY,
    checkpoint_summary,
    latest_checkpoint,
    load_checkpoint,
    point,
    sidecar,
)
from ldm.runs.checkpoints.io import VerifiedCheckpointIO
from ldm.runs.checkpoints.sharded import sharded_checkpoint
from ldm.runs.faults import explained
from ldm.runs.layout import checkpoint_name, checkpoints_in, step_of
from ldm.runs.lightning_private import skip_next_validation
from tests.tiny import Do, make_trainer

STEPS, VALIDATE_EVERY = 10, 4


# -- a tiny training -------------------------------------------------------------------------------------------------------


class Numbers:
    """0, 1, 2, …, endless; its state is the number after the last one trained."""

    position = 0

    def __iter__(self) -> Iterator[int]:
        number = self.position
        while True:
            yield number
            number += 1

    def state_dict(self) -> dict[str, int]:
        return {"position": self.position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.position = state["position"]


class Tiny(LightningModule):
    """Each validation scales the loss, as the GAN guard does: if one is skipped or repeated, the weights differ."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.network, self.level = nn.Linear(4, 4), 1.0
        self.losses: Iterator[float] = iter(())  # of validation, where a test gives them
        self.numbers, self.events = Numbers(), []

    def train_dataloader(self) -> Numbers:
        return self.numbers

    def val_dataloader(self) -> DataLoader:
        return DataLoader(TensorDataset(torch.eye(4)), batch_size=2)

    def training_step(self, number: int, batch_idx: int) -> Tensor:
        self.numbers.position = number + 1
        self.events.append(("train", number, batch_idx))
        loss = self.level * (self.network(torch.full((1, 4), number / 10)) - 1).square().mean()
        self.log("train/loss", loss)
        return loss

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.log("val/loss", next(self.losses, self.network(batch[0]).square().mean()), on_epoch=True)

    def on_validation_epoch_end(self) -> None:
        self.events.append(("validation", self.global_step))
        self.level *= 0.5

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["level"] = self.level

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.level = checkpoint["level"]

    def configure_optimizers(self) -> OptimizerLRScheduler:
        optimiser = torch.optim.AdamW(self.parameters(), lr=0.1)
        schedule = torch.optim.lr_scheduler.StepLR(optimiser, 2)
        return {"optimizer": optimiser, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class Rows(DummyLogger):
    """Keeps what it logs."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[tuple[int, dict[str, float]]] = []

    def log_metrics(self, metrics: dict[str, float], step: int) -> None:
        self.rows.append((step, metrics))


class Stopped(Exception):
    """Ends training without any clean-up, like a kill."""


def stop_at_once(trainer: Trainer) -> None:
    raise Stopped


def save_and_stop(trainer: Trainer) -> None:
    """Like a preemption: save without waiting for a validation, and end after this step."""
    checkpoints_of(trainer).save_now(trainer)
    skip_next_validation(trainer)
    trainer.should_stop = True


def fit(
    folder: Path,
    *callbacks: Callback,
    resume: bool | Path = False,
    checkpoints: dict[str, Any] | None = None,
    losses: list[float] | None = None,
    **trainer: Any,
) -> tuple[Tiny, list[tuple[int, dict[str, float]]]]:
    """The trained module, and the logged rows."""
    module, rows = Tiny(), Rows()
    module.losses = iter([loss for loss in losses or [] for _ in range(2)])  # two batches each
    settings: dict[str, Any] = {"steps": STEPS, "val_check_interval": VALIDATE_EVERY, "logger": rows} | trainer
    watching = [*callbacks, Checkpoints(**checkpoints or {})]
    run = make_trainer(folder, log_every_n_steps=1, callbacks=watching, enable_checkpointing=True, **settings)
    path = resume if isinstance(resume, Path) else latest_checkpoint(folder / "checkpoints") if resume else None
    with contextlib.suppress(Stopped):
        run.fit(module, ckpt_path=path)
    return module, rows.rows


def steps(folder: Path) -> list[int]:
    """Steps of the checkpoints, all of which must be whole."""
    found = checkpoints_in(folder / "checkpoints")
    assert all(load_checkpoint(path)["global_step"] == step_of(path) for path in found)
    return [step_of(path) for path in found]


def leftovers(folder: Path) -> list[str]:
    """Files that are neither a checkpoint, nor its sha256, nor a link."""
    kept = {path.name for path in checkpoints_in(folder)}
    return sorted(
        path.name
        for path in folder.iterdir()
        if path.name.removesuffix(".sha256") not in kept and path.name not in ("last.ckpt", "best.ckpt")
    )


def saved(folder: Path, *numbers: int) -> list[Path]:
    """Checkpoints as a run leaves them."""
    paths = [folder / checkpoint_name(number) for number in numbers]
    for path, number in zip(paths, numbers, strict=True):
        VerifiedCheckpointIO().save_checkpoint({"global_step": number, "weights": torch.randn(1000)}, path)
        point(folder / "last.ckpt", path)
    return paths


def flip_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def fill_disk(path: Path) -> None:
    """The next write of this checkpoint ends up on a full disk."""
    path.with_name(f".{path.name}.{os.getpid()}.tmp").symlink_to("/dev/full")


# -- files -----------------------------------------------------------------------------------------------------------------


def test_a_checkpoint_comes_back_and_sha256sum_agrees(tmp_path: Path) -> None:
    checkpoint = {"weights": torch.randn(3, 5), "global_step": 7, "names": ["a"], "state": {"level": 0.5}}
    VerifiedCheckpointIO().save_checkpoint(checkpoint, tmp_path / "step=00000007.ckpt")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step=00000007.ckpt", "step=00000007.ckpt.sha256"]
    subprocess.run(["sha256sum", "--check", "--strict", "step=00000007.ckpt.sha256"], cwd=tmp_path, check=True)
    # weights_only=False asked for does not make it so
    loaded = VerifiedCheckpointIO().load_checkpoint(tmp_path / "step=00000007.ckpt", weights_only=False)
    assert loaded["weights"].equal(checkpoint["weights"]) and {**loaded, "weights": 0} == {**checkpoint, "weights": 0}
    VerifiedCheckpointIO().remove_checkpoint(tmp_path / "step=00000007.ckpt")
    assert not [*tmp_path.iterdir()]


def test_what_is_no_plain_value_is_not_loaded(tmp_path: Path) -> None:
    path = tmp_path / checkpoint_name(1)
    VerifiedCheckpointIO().save_checkpoint({"code": os.system}, path)
    with pytest.raises(UsageError, match="is not a checkpoint of a run") as said:
        load_checkpoint(path)
    assert str(path) in str(said.value) and "\n" not in str(said.value)


@pytest.mark.parametrize(
    "content",
    [
        [1, 2],
        {},
        {"global_step": "ten"},
        {"global_step": -1},
        {"global_step": 10**30},
        {"global_step": 1, "lr_schedulers": [{"base_lrs": [float("nan")], "_last_lr": [0.1]}]},
        {"global_step": 1, "random": [None]},
        {"global_step": 1, "skipped": {"total": None, "in_a_row": {}}},
        {"global_step": 1, "latent_statistics": [[float("inf")], [1.0]]},
        {"global_step": 1, "format_version": "1"},
    ],
)
def test_a_checkpoint_of_wrong_values_is_named(content: Any, tmp_path: Path) -> None:
    path = tmp_path / checkpoint_name(1)
    torch.save(content, path)
    with pytest.raises(LdmError) as said:
        load_checkpoint(path)
    assert str(path) in str(said.value) and str(said.value).isprintable()


def test_what_is_no_checkpoint_of_ours_is_never_to_be_removed(tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.png").write_bytes(b"image")
    (tmp_path / "cat.png").write_bytes(b"image")
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / checkpoint_name(1)).write_bytes(b"image")
    sidecar(tmp_path / checkpoint_name(1)).write_bytes(b"\xff\n\n")
    (tmp_path / checkpoint_name(2)).write_bytes(b"image")
    sidecar(tmp_path / checkpoint_name(2)).mkdir()
    for name in ("photos", "cat.png", "pipe", "none", checkpoint_name(1), checkpoint_name(2), "nul\0"):
        with pytest.raises(UsageError, match="--resume latest") as said:
            load_checkpoint(tmp_path / name)
        assert "remove" not in str(said.value) and "delete" not in str(said.value)


@pytest.mark.parametrize("part", ["callbacks", "loops", "optimizer_states", "lr_schedulers", "state_dict"])
def test_a_checkpoint_that_cannot_be_restored_is_one_line(part: str, tmp_path: Path) -> None:
    fit(tmp_path, steps=2)
    path = tmp_path / "checkpoints" / checkpoint_name(2)
    content = torch.load(path, weights_only=True)
    torch.save(content | {part: {} if part in ("state_dict", "loops") else 5}, path)
    sidecar(path).unlink()
    trainer = make_trainer(tmp_path, 4, callbacks=[Checkpoints()], enable_checkpointing=True)
    with pytest.raises(LdmError) as said, explained(trainer):
        trainer.fit(Tiny(), ckpt_path=path)
    assert str(path) in str(said.value) and "\n" not in str(said.value)


@pytest.mark.parametrize("harm", ["flipped byte", "cut", "gone", "cut without sha256"])
def test_a_broken_latest_is_named_and_the_one_before_is_taken(
    harm: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    first, second = saved(tmp_path, 1, 2)
    if harm == "flipped byte":
        flip_byte(second)
    elif harm == "gone":
        second.unlink()
    else:
        second.write_bytes(second.read_bytes()[:-100])
        if harm == "cut without sha256":
            sidecar(second).unlink()
    with pytest.raises(UsageError) as said:
        load_checkpoint(second)
    assert str(second) in str(said.value) and "--resume latest" in str(said.value) and "\n" not in str(said.value)
    with caplog.at_level(logging.WARNING, "ldm"):
        assert latest_checkpoint(tmp_path) == first
    assert [record.getMessage().startswith(str(second)) for record in caplog.records] == [True] * (harm != "gone")


def test_no_whole_checkpoint_at_all_is_said(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="there is no checkpoint"):
        latest_checkpoint(tmp_path)
    flip_byte(*saved(tmp_path, 3))
    with pytest.raises(UsageError, match="none of its 1 checkpoints is whole"):
        latest_checkpoint(tmp_path)


def test_one_without_a_sha256_is_taken_as_it_is(tmp_path: Path) -> None:
    (path,) = saved(tmp_path, 5)
    sidecar(path).unlink()
    assert latest_checkpoint(tmp_path) == path and load_checkpoint(path)["global_step"] == 5


def test_the_latest_is_the_last_that_was_written_and_not_one_of_a_course_gone_back_from(tmp_path: Path) -> None:
    saved(tmp_path, 1, 2, 9)
    (mine,) = saved(tmp_path, 3)  # after resuming from 2
    assert latest_checkpoint(tmp_path) == mine
    (tmp_path / "last.ckpt").unlink()
    assert step_of(latest_checkpoint(tmp_path)) == 9


def test_on_a_full_disk_the_one_before_stays_and_one_line_says_what_is_needed(tmp_path: Path) -> None:
    (first,) = saved(tmp_path, 1)
    for number, tensors in ((2, {"weights": torch.randn(100_000)}), (1, {"small": 1})):
        path = tmp_path / checkpoint_name(number)
        fill_disk(path)
        with pytest.raises(LdmError, match="No space left on device") as said:
            VerifiedCheckpointIO().save_checkpoint(tensors, path)
        assert said.value.exit_code == 1 and "\n" not in str(said.value)
        assert str(path) in str(said.value) and "make room" in str(said.value)
        if number == 2:
            size = int(str(said.value).split("it takes ")[1].split(" bytes")[0].replace(",", ""))
            assert 400_000 < size < 410_000
        assert latest_checkpoint(tmp_path) == first and not leftovers(tmp_path)
        assert load_checkpoint(first)["global_step"] == 1  # its sha256 is still its own


def test_a_sharded_checkpoint_is_a_folder_that_is_whole_or_not_there(tmp_path: Path) -> None:
    path, weights = tmp_path / checkpoint_name(4), {"weights": torch.randn(100)}
    for _ in range(2):  # again over itself
        with sharded_checkpoint(path) as folder:
            save_shards(weights, checkpoint_id=folder, no_dist=True)
            torch.save({"global_step": 4}, folder / "meta.pt")
            assert folder != path
    subprocess.run(["sha256sum", "--check", "--strict", sidecar(path).name], cwd=tmp_path, check=True)
    assert latest_checkpoint(tmp_path) == path and load_checkpoint(path) == {"global_step": 4}

    with pytest.raises(LdmError, match=r"could not be written \(No space"), sharded_checkpoint(tmp_path / "new.ckpt") as folder:
        folder.mkdir()
        (folder / "meta.pt").symlink_to("/dev/full")
        (folder / "meta.pt").write_bytes(b"much")
    assert sorted(entry.name for entry in tmp_path.iterdir()) == [path.name, sidecar(path).name]

    for spoil in (lambda: next(path.glob("*.distcp")).unlink(), lambda: (path / "more").touch()):
        shutil.copytree(path, tmp_path / "copy")
        spoil()
        with pytest.raises(UsageError, match="does not hold the files"):
            load_checkpoint(path)
        shutil.rmtree(path)
        (tmp_path / "copy").rename(path)
    flip_byte(next(path.glob("*.distcp")))
    with pytest.raises(UsageError, match="is broken"):
        load_checkpoint(path)
    VerifiedCheckpointIO().remove_checkpoint(path)
    assert not [*tmp_path.iterdir()]


def test_a_checkpoint_of_a_newer_ldm_is_refused_by_name_and_one_without_a_version_is_read(tmp_path: Path) -> None:
    fit(tmp_path / "run", steps=1)
    content = load_checkpoint(tmp_path / "run" / "checkpoints" / "last.ckpt")
    assert content.pop(VERSION_KEY) == FORMAT_VERSION
    path = tmp_path / checkpoint_name(1)
    VerifiedCheckpointIO().save_checkpoint(content, path)
    assert load_checkpoint(path)["global_step"] == 1
    VerifiedCheckpointIO().save_checkpoint({**content, VERSION_KEY: FORMAT_VERSION + 1}, path)
    with pytest.raises(LdmError, match=rf"{path}: the checkpoint has format version 2, .*reads up to 1; install the newer ldm"):
        load_checkpoint(path)


def test_to_resume_a_checkpoint_is_hashed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where it is chosen; not where it is described, nor where it is loaded."""
    fit(tmp_path, steps=2)
    hashed: list[Path] = []
    monkeypatch.setattr(files, "sha256_file", lambda path: hashed.append(path) or sha256_file(path))
    last = latest_checkpoint(tmp_path / "checkpoints")
    assert load_checkpoint(last, mmap=True)["global_step"] == 2
    fit(tmp_path, resume=last, steps=2)
    assert hashed == [last]


def verify(rank: int, folder: Path) -> None:
    """One of two processes, each with its own guess at the latest checkpoint."""
    hashed: list[Path] = []
    files.sha256_file = lambda path: hashed.append(path) or sha256_file(path)
    distributed.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=2)
    for first, broken in ((1, False), (2, True)):
        try:
            path = files.require_whole_together(folder / checkpoint_name(first if rank == 0 else 2))
            said = path.name
        except UsageError as error:
            assert broken
            said = str(error)
        (folder / f"said-{rank}-{first}").write_text(said)
    (folder / f"hashed-{rank}").write_text(str(len(hashed)))
    distributed.destroy_process_group()


def test_of_two_processes_the_first_alone_hashes_and_both_take_its_checkpoint_or_its_error(tmp_path: Path) -> None:
    _, second = saved(tmp_path, 1, 2)
    flip_byte(second)
    torch.multiprocessing.spawn(verify, (tmp_path,), nprocs=2)
    said = {number: [(tmp_path / f"said-{rank}-{number}").read_text() for rank in (0, 1)] for number in (1, 2)}
    assert said[1] == [checkpoint_name(1)] * 2
    assert said[2][0] == said[2][1] and f"{second} is broken" in said[2][0]
    assert [(tmp_path / f"hashed-{rank}").read_text() for rank in (0, 1)] == ["2", "0"]


# -- resumed runs ----------------------------------------------------------------------------------------------------------


def same(module: Tiny, other: Tiny) -> bool:
    return all(a.equal(b) for a, b in zip(module.parameters(), other.parameters(), strict=True)) and module.level == other.level


@pytest.mark.parametrize(
    "stop",
    [
        Do("on_train_batch_end", 3, save_and_stop),
        Do("on_train_batch_end", 4, save_and_stop),  # before the validation of this step
        Do("on_train_batch_start", 4, stop_at_once),  # after that, and the checkpoint of it
        Do("on_train_batch_end", 5, save_and_stop),
        Do("on_train_batch_end", STEPS, save_and_stop),
    ],
    ids=["between", "owing the validation", "after the validation", "right after", "at the end"],
)
@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_resumed_run_equals_an_uninterrupted_one(stop: Callback, accumulate: int, tmp_path: Path) -> None:
    """Weights, what validation changed, the order of training and validation, and the logged rows."""
    settings: dict[str, Any] = {"accumulate_grad_batches": accumulate, "val_check_interval": VALIDATE_EVERY * accumulate}
    whole, rows = fit(tmp_path / "whole", **settings)
    first, rows_first = fit(tmp_path / "run", stop, **settings)
    second, rows_second = fit(tmp_path / "run", resume=True, **settings)
    assert same(whole, second) and len(second.events) < len(whole.events)
    assert first.events + second.events == whole.events
    assert rows_first + rows_second == rows


def test_it_may_stop_twice_in_a_row_without_a_step_between(tmp_path: Path) -> None:
    whole, rows = fit(tmp_path / "whole")
    parts = [
        fit(tmp_path / "run", Do("on_train_batch_end", 4, save_and_stop)),
        fit(tmp_path / "run", Do("on_validation_start", 4, stop_at_once), resume=True),  # still owing it
        fit(tmp_path / "run", Do("on_train_batch_end", 8, save_and_stop), resume=True),
        fit(tmp_path / "run", resume=True),
    ]
    assert same(whole, parts[-1][0])
    assert [event for module, _ in parts for event in module.events] == whole.events
    assert [row for _, part in parts for row in part] == rows


def test_a_validation_interrupted_by_a_checkpoint_is_repeated_whole(tmp_path: Path) -> None:
    def save(trainer: Trainer) -> None:
        checkpoints_of(trainer).save_now(trainer)
        raise Stopped

    whole, rows = fit(tmp_path / "whole")
    first, rows_first = fit(tmp_path / "run", Do("on_validation_batch_end", 4, save))
    second, rows_second = fit(tmp_path / "run", resume=True)
    assert same(whole, second) and first.events + second.events == whole.events
    assert rows_first + rows_second == rows


def test_the_last_step_is_saved_once_and_can_be_resumed_from(tmp_path: Path) -> None:
    written: list[int] = []
    whole, rows = fit(tmp_path / "whole", steps=14)
    settings: dict[str, Any] = {"checkpoints": {"every_steps": 3}}

    def again(trainer: Trainer) -> None:
        written.append(checkpoints_of(trainer).save_now(trainer).stat().st_ino)

    first, rows_first = fit(tmp_path / "run", Do("on_train_end", STEPS, again), **settings)
    assert steps(tmp_path / "run") == [9, 10]
    assert written == [(tmp_path / "run" / "checkpoints" / checkpoint_name(10)).stat().st_ino]
    second, rows_second = fit(tmp_path / "run", resume=True, steps=14, **settings)
    assert same(whole, second) and first.events + second.events == whole.events and rows_first + rows_second == rows


# -- which ones stay -------------------------------------------------------------------------------------------------------


def test_the_newest_stay_and_last_points_to_the_newest(tmp_path: Path) -> None:
    fit(tmp_path, checkpoints={"every_steps": 2, "keep_last": 3})
    assert steps(tmp_path) == [6, 8, 10]
    assert os.readlink(tmp_path / "checkpoints" / "last.ckpt") == checkpoint_name(10)
    assert load_checkpoint(tmp_path / "checkpoints" / "last.ckpt")["global_step"] == 10
    assert not leftovers(tmp_path / "checkpoints")


@pytest.mark.parametrize("mode, best", [("min", 6), ("max", 2)])
def test_the_best_is_kept_also_after_resuming(mode: str, best: int, tmp_path: Path) -> None:
    losses = [5.0, 3.0, 1.0, 4.0, float("nan")]
    settings = {"checkpoints": {"keep_last": 1, "best": "val/loss", "best_mode": mode}, "val_check_interval": 2}
    fit(tmp_path, losses=losses[:3], steps=6, **settings)
    link = tmp_path / "checkpoints" / "best.ckpt"
    assert os.readlink(link) == checkpoint_name(best)
    fit(tmp_path, resume=True, losses=losses[3:], **settings)
    assert os.readlink(link) == checkpoint_name(best) and steps(tmp_path) == [best, 10]


def test_a_better_one_is_saved_between_routine_ones_and_an_unknown_figure_is_refused(tmp_path: Path) -> None:
    settings = {"every_steps": 100, "keep_last": 1, "best": "val/loss"}
    fit(tmp_path / "run", checkpoints=settings, losses=[5.0, 3.0, 4.0, 6.0, 7.0], val_check_interval=2)
    assert steps(tmp_path / "run") == [4, 10]
    with pytest.raises(UsageError, match=r"checkpoints\.best val/psnr is no metric of validation; give one of val/loss"):
        fit(tmp_path / "other", checkpoints={"best": "val/psnr"})


def test_one_is_kept_every_so_many_minutes_also_across_resumes(tmp_path: Path) -> None:
    def wait(trainer: Trainer) -> None:
        time.sleep(0.7)

    settings: dict[str, Any] = {"checkpoints": {"every_steps": 2, "keep_last": 1, "every_minutes": 1 / 60}}
    fit(tmp_path, *(Do("on_train_batch_start", step, wait) for step in (2, 4)), steps=6, **settings)
    assert steps(tmp_path) == [5, 6]  # 1.4 seconds have gone by at the end of step 5
    fit(tmp_path, *(Do("on_train_batch_start", step, wait) for step in (8, 9)), resume=True, steps=12, **settings)
    assert steps(tmp_path) == [5, 10, 12]


def test_checkpoints_of_later_steps_are_not_removed_after_resuming_earlier(tmp_path: Path) -> None:
    fit(tmp_path, checkpoints={"every_steps": 2, "keep_last": 5})
    folder = tmp_path / "checkpoints"
    fit(tmp_path, resume=folder / checkpoint_name(4), steps=7, checkpoints={"every_steps": 1, "keep_last": 1})
    assert steps(tmp_path) == [7, 8, 10] and step_of(latest_checkpoint(folder)) == 7


def test_a_broken_one_does_not_count_among_the_newest(tmp_path: Path) -> None:
    fit(tmp_path, steps=8, checkpoints={"every_steps": 2})
    flip_byte(tmp_path / "checkpoints" / checkpoint_name(8))
    fit(tmp_path, resume=True, checkpoints={"every_steps": 5})
    assert steps(tmp_path) == [6, 10]


def test_what_killed_writers_left_is_removed_at_the_next_start(tmp_path: Path) -> None:
    fit(tmp_path, steps=4)
    folder = tmp_path / "checkpoints"
    for name in (".step=00000006.ckpt.123.tmp", ".last.ckpt.5.tmp", "step=00000006.ckpt.sha256"):
        (folder / name).write_text("half")
    (folder / ".step=00000007.ckpt.tmp").mkdir()
    (folder / ".step=00000007.ckpt.tmp" / "0_0.distcp").touch()
    (folder / "notes.txt").write_text("mine")
    fit(tmp_path, resume=True, steps=5)
    assert leftovers(folder) == ["notes.txt"] and steps(tmp_path) == [4, 5]


# -- in the background -----------------------------------------------------------------------------------------------------


def test_in_the_background_the_same_is_written(tmp_path: Path) -> None:
    settings = {"every_steps": 2, "keep_last": 2, "best": "val/loss"}
    for name, background in (("front", False), ("back", True)):
        fit(tmp_path / name, checkpoints=settings | {"background": background}, losses=[2.0, 1.0])
    front, back = (
        [load_checkpoint(path) for path in checkpoints_in(tmp_path / name / "checkpoints")] for name in ("front", "back")
    )
    assert [state["global_step"] for state in front] == [state["global_step"] for state in back] == [8, 10]
    for one, other in zip(front, back, strict=True):
        assert all(one["state_dict"][name].equal(weight) for name, weight in other["state_dict"].items())
        assert one["loops"] == other["loops"] and one["lr_schedulers"] == other["lr_schedulers"]
    assert os.readlink(tmp_path / "back" / "checkpoints" / "last.ckpt") == checkpoint_name(10)


def test_an_error_in_the_background_stops_the_run_within_a_step(tmp_path: Path) -> None:
    reached: list[int] = []

    def full(trainer: Trainer) -> None:
        fill_disk(tmp_path / "checkpoints" / checkpoint_name(4))

    def slowly(trainer: Trainer) -> None:
        reached.append(trainer.global_step)
        end = time.monotonic() + 10
        while checkpoints_of(trainer)._io.is_writing and time.monotonic() < end:
            time.sleep(0.01)

    look = [Do("on_train_batch_start", step, slowly) for step in range(3, STEPS)]
    with pytest.raises(LdmError, match="No space left on device"):
        fit(tmp_path, *look, Do("on_train_batch_start", 3, full), checkpoints={"every_steps": 2, "background": True})
    assert reached == [3, 4] and steps(tmp_path) == [2] and not leftovers(tmp_path / "checkpoints")
    assert step_of(latest_checkpoint(tmp_path / "checkpoints")) == 2


def test_the_process_does_not_go_before_the_write_did(tmp_path: Path) -> None:
    fit(tmp_path, Do("on_train_batch_start", 4, stop_at_once), checkpoints={"every_steps": 2, "background": True})
    assert steps(tmp_path) == [2, 4] and os.readlink(tmp_path / "checkpoints" / "last.ckpt") == checkpoint_name(4)


# -- messages and errors ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("setting", [{"every_steps": 0}, {"every_minutes": -1.0}, {"keep_last": 0}])
def test_settings_that_make_no_sense_are_refused(setting: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=f"checkpoints.{next(iter(setting))} is"):
        Checkpoints(**setting)


def test_a_description_has_the_step_rates_average_place_and_random_states() -> None:
    place: dict[str, Any] = {"seed": 0, "epoch": 3, "samples_consumed": 4096, "data": ""}
    checkpoint = {
        "global_step": 12345,
        "lr_schedulers": [{"base_lrs": [1e-3], "_last_lr": [1e-4]}, {"base_lrs": [1e-3], "_last_lr": [2e-4]}],
        "average": {"optimization_step": 12000},
        "loops": {"fit_loop": {"state_dict": {"combined_loader": [place]}}},
        "random": [{}, {}],
    }
    assert checkpoint_summary(checkpoint) == (
        "step 12,345, learning rates 0.0001 and 0.0002, weights averaged over 12,000 steps\n"
        "data: epoch 3, 4,096 samples of it consumed, random states of 2 processes"
    )
    place["waiting"] = [[5, 4090], [2, 4095]]
    assert "4,096 samples of it consumed, 2 waiting for a batch of their size, random" in checkpoint_summary(checkpoint)
    assert checkpoint_summary({"global_step": 1}) == "step 1\nno random states"
