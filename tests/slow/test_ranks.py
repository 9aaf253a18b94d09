"""Two real processes train on uneven shards: equal steps, no sample twice, and one process resumes where they stopped.

The processes are this file as a script in torchrun's environment; see :func:`main`.
"""

from __future__ import annotations

import json
import os
import sys
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from PIL import Image

from ldm.data.datamodule import ShardDataModule
from ldm.data.manifest import IMAGE_SHARDS, Manifest
from ldm.data.writer import ShardWriter, encode_png

SIZES = (5, 1, 8, 3, 2, 7, 4)


class Recorder(LightningModule):
    """Trains one weight, and records the samples of each process."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.seen: list[list[str]] = []
        self.validated: list[str] = []

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> torch.Tensor:
        self.seen.append(batch["key"])
        return self.weight * batch["image"].float().mean()

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        self.validated += batch["key"]

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.1)


def fit(
    train: str | Path,
    out: str | Path,
    steps: int,
    batch_size: int,
    devices: int = 1,
    resume: str | Path | None = None,
    validate: bool = False,
    **settings: Any,
) -> Recorder:
    """Train and save a checkpoint at the end. The trainer keeps its default ``use_distributed_sampler``: on."""
    recorder = Recorder()
    saver = ModelCheckpoint(out, filename="last", every_n_train_steps=steps, save_on_train_epoch_end=False)
    trainer = Trainer(
        accelerator="cpu", devices=devices, strategy="ddp" if devices > 1 else "auto", max_steps=steps, max_epochs=-1,
        logger=False, enable_progress_bar=False, enable_model_summary=False, default_root_dir=out, num_sanity_val_steps=0,
        check_val_every_n_epoch=None, val_check_interval=steps, limit_val_batches=None if validate else 0, callbacks=[saver],
    )  # fmt: skip
    data = ShardDataModule(str(train), str(train), batch_size, seed=5, **settings)
    trainer.fit(recorder, data, ckpt_path=resume, weights_only=True)
    return recorder


def main() -> None:
    """On each process: the runs that a file lists, one after another; the samples of each go into its folder."""
    rank = int(os.environ["RANK"])
    for run in json.loads(Path(sys.argv[1]).read_text()):
        recorder = fit(**run, devices=2)
        record = {"seen": recorder.seen, "validated": recorder.validated}
        Path(run["out"], f"rank{rank}.json").write_text(json.dumps(record))


def write(folder: Path, sizes: tuple[int, ...], bad: tuple[int, ...] = ()) -> Path:
    """Shards of these numbers of images; the images numbered ``bad`` are invalid."""
    folder.mkdir()
    entries, numbers = [], iter(range(sum(sizes)))
    for shard, size in enumerate(sizes):
        with ShardWriter(folder, "x", first_index=shard) as writer:
            for _, number in zip(range(size), numbers, strict=False):
                image = encode_png(Image.new("RGB", (4, 4), (number, 0, 0))) if number not in bad else b"none"
                writer.write(f"{number:02d}", {"png": image})
        entries += writer.entries
    Manifest(IMAGE_SHARDS, tuple(entries)).save(folder)
    return folder


def torchrun(folder: Path, runs: list[dict[str, Any]]) -> None:
    """All runs on two processes; a hang fails."""
    (folder / "runs.json").write_text(json.dumps(runs, default=str))
    from .warm import run  # not in the processes themselves, where this file is a script

    status, said = run([sys.executable, __file__, str(folder / "runs.json")], folder, processes=2)
    assert status == 0, said[-5000:]


def given(folder: Path, what: str = "seen") -> list[Any]:
    """The samples of each of the two processes."""
    return [json.loads((folder / f"rank{rank}.json").read_text())[what] for rank in range(2)]


def in_order(folder: Path) -> list[str]:
    """The keys of both processes in the planned order: by step, then by rank."""
    first, second = given(folder)
    return list(chain.from_iterable(chain(*pair) for pair in zip(first, second, strict=True)))


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All runs of two processes, which start once because starting takes most of the time."""
    folder = tmp_path_factory.mktemp("ranks")
    runs = []
    for count in range(1, 8):
        train = write(folder / f"shards{count}", SIZES[:count])
        batch_size = 1 if count < 3 else 2
        runs.append({"train": train, "out": folder / f"uneven{count}", "steps": sum(SIZES[:count]), "batch_size": batch_size})
    common = {"train": folder / "shards7", "batch_size": 2}
    fit(out=folder / "one", steps=4, **common)  # eight of thirty, by one process
    runs.append({"out": folder / "one-then-two", "steps": 4 + 11, "resume": folder / "one" / "last.ckpt", **common})
    runs.append({"out": folder / "two", "steps": 4, **common})
    runs.append({"out": folder / "validated", "steps": 2, "validate": True, **common})
    bad = {"train": write(folder / "bad", SIZES, bad=(3, 20)), "max_bad_share": 2 / 30}
    runs.append({"out": folder / "quarantined", "steps": 45, "workers": 1, **common, **bad})
    torchrun(folder, runs)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("count", range(1, 8))
def test_uneven_shards_give_equal_steps_and_every_sample_once_per_epoch(ran: Path, count: int) -> None:
    total = sum(SIZES[:count])
    first, second = given(ran / f"uneven{count}")
    assert len(first) == len(second) == total and {len(batch) for batch in first + second} == {1 if count < 3 else 2}
    draws = in_order(ran / f"uneven{count}")
    epochs = len(draws) // total
    assert epochs in (2, 4) and len(draws) % total == 0
    for epoch in range(epochs):
        # every sample once, on one of the processes
        assert sorted(draws[epoch * total : (epoch + 1) * total]) == [f"{number:02d}" for number in range(total)]


@pytest.mark.slow
def test_two_processes_resume_the_run_of_one(ran: Path) -> None:
    before = fit(ran / "shards7", ran / "one-again", 4, 2).seen
    draws = [*chain.from_iterable(before), *in_order(ran / "one-then-two")]
    assert len(draws) == 8 + 11 * 4
    assert sorted(draws[:30]) == [f"{number:02d}" for number in range(30)] and len(set(draws[30:])) == 22


@pytest.mark.slow
def test_one_process_resumes_the_run_of_two(ran: Path) -> None:
    after = fit(ran / "shards7", ran / "two-then-one", 4 + 22, 2, resume=ran / "two" / "last.ckpt").seen
    draws = [*in_order(ran / "two"), *chain.from_iterable(after)]
    assert len(draws) == 16 + 44
    for epoch in range(2):
        assert sorted(draws[epoch * 30 : epoch * 30 + 30]) == [f"{number:02d}" for number in range(30)]


@pytest.mark.slow
def test_both_processes_record_bad_samples_and_stay_in_step(ran: Path) -> None:
    """Over the epochs each process meets all of them, and skips them."""
    first, second = given(ran / "quarantined")
    assert len(first) == len(second) == 45 and {len(batch) for batch in first + second} == {2}
    assert {"03", "20"}.isdisjoint(chain.from_iterable(first + second))
    for name in ("quarantine.jsonl", "1-quarantine.jsonl"):
        records = [json.loads(line) for line in (ran / "quarantined" / name).read_text().splitlines()]
        assert sorted(record["key"] for record in records) == ["03", "20"]


@pytest.mark.slow
def test_every_process_validates_on_the_same_samples(ran: Path) -> None:
    """So that no metric depends on the number of processes; Lightning by default would distribute the samples."""
    assert given(ran / "validated", "validated") == [[f"{number:02d}" for number in range(30)]] * 2


if __name__ == "__main__":
    main()
