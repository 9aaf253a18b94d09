"""Samples that cannot be used are put on record once, replaced in their batch, and too many of them end the run."""

import json
import logging
import re
from collections import Counter
from itertools import islice

import pytest
import torch
from lightning import LightningModule, Trainer

from ldm.data.datamodule import ShardDataModule
from ldm.data.quarantine import QUARANTINE_NAME, BadSample, Quarantine, read_quarantine, too_many_in_a_row
from ldm.errors import LdmError
from tests.samples import write_numbered

REASON = "not a JPEG, PNG or WebP image"


def bad(number, shard="x.tar"):
    return BadSample(shard, str(number), "is broken")


def lines(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_each_is_counted_and_put_on_record_once(tmp_path):
    file = tmp_path / "run" / QUARANTINE_NAME
    quarantine = Quarantine(10, max_share=1.0, file=file)
    quarantine.add([[], [], []])
    assert len(quarantine) == 0 and not file.exists()
    quarantine.add([[], [bad(1), bad(2)], [], [bad(1)]])
    quarantine.add([[bad(2), bad(1, "y.tar")], []])
    assert quarantine.known == {bad(1), bad(2), bad(1, "y.tar")}
    assert lines(file) == [
        {"shard": s, "key": k, "reason": "is broken"} for s, k in (("x.tar", "1"), ("x.tar", "2"), ("y.tar", "1"))
    ]
    Quarantine(10, 1.0, file=file).add([[BadSample("z.tar", "ключ", "has no image")]])
    assert lines(file)[3:] == [{"shard": "z.tar", "key": "ключ", "reason": "has no image"}]  # what stood there stays


def test_a_share_of_the_samples_is_borne_and_one_more_is_not():
    quarantine = Quarantine(200, max_share=0.01)
    for _ in range(3):
        quarantine.add([[bad(1)], [], [bad(2)]])  # two of 200, however often they come
    with pytest.raises(LdmError) as error:
        quarantine.add([[], [bad(3)]])
    assert str(error.value) == (
        "3 of 200 samples cannot be used, more than 1.00%, the last one x.tar: 3 is broken; repair or remove them "
        "(`ldm shards check --deep` names them all), or raise max_bad_share"
    )
    with pytest.raises(LdmError, match=r"more than 0.00%"):
        Quarantine(200, max_share=0.0).add([[bad(1)]])
    Quarantine(3, max_share=1.0).add([[bad(1)], [bad(2)], [bad(3)]])


def test_so_many_in_a_row_are_borne_and_one_more_is_not():
    quarantine = Quarantine(1000, max_share=1.0, max_in_a_row=4)
    quarantine.add([[bad(1), bad(2), bad(3), bad(4)], [bad(2), bad(3), bad(4)]])  # the same row, entered twice
    quarantine.add([[bad(6)], [bad(7)], []])  # four draws, ended by a good one
    quarantine.add([[bad(9)], [bad(10)], [bad(11)], [bad(12)]])
    expected = (
        "5 samples in a row cannot be used, the last one x.tar: 13 is broken; repair or remove the shard "
        "(`ldm shards check` names what is wrong), or raise max_bad_in_a_row"
    )
    assert str(too_many_in_a_row(5, bad(13))) == expected
    with pytest.raises(LdmError) as error:
        quarantine.add([[bad(13)]])
    assert str(error.value) == expected
    with pytest.raises(LdmError) as error:
        Quarantine(1000, 1.0, 4).add([[], [bad(9), bad(10), bad(11), bad(12), bad(13)]])
    assert str(error.value) == expected


def test_where_nobody_can_set_the_limits_no_key_is_named():
    for tried in ([[bad(number)] for number in range(9)], [[bad(1)], [], [bad(2)]]):
        with pytest.raises(LdmError) as error:
            Quarantine(100, 0.01, 5, adjustable=False).add(tried)
        assert "raise" not in str(error.value) and "repair or remove" in str(error.value)


def test_the_log_names_the_first_few_and_says_where_the_others_are(tmp_path, caplog):
    quarantine = Quarantine(100, max_share=1.0, file=tmp_path / "q.jsonl")
    with caplog.at_level(logging.WARNING):
        for number in range(9):
            quarantine.add([[bad(number)]])
    said = [record.getMessage() for record in caplog.records]
    assert said == [f"skipped x.tar: {number} is broken" for number in range(5)] + [
        f"more samples are skipped; {tmp_path / 'q.jsonl'} lists them"
    ]


# in a run

BAD = (3, 10, 11)


@pytest.fixture
def folder(tmp_path):
    """Twenty images in two shards, three of which are none."""
    return write_numbered(tmp_path / "shards", [10, 10], BAD)


class Recorder(LightningModule):
    """Trains nothing; writes down what it is given."""

    def __init__(self):
        super().__init__()
        self.weight, self.seen, self.validated = torch.nn.Parameter(torch.zeros(())), [], []

    def training_step(self, batch, batch_idx):
        self.seen.append(batch["key"])
        return self.weight * 0.0

    def validation_step(self, batch, batch_idx):
        self.validated.append(batch["key"])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


def fit(folder, out, steps=15, validate=False, **settings):
    """Three epochs of 20 in batches of 4."""
    recorder = Recorder()
    data = ShardDataModule(str(folder), str(folder), batch_size=4, **settings)
    trainer = Trainer(
        max_steps=steps,
        max_epochs=-1,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=out,
        num_sanity_val_steps=0,
        limit_val_batches=None if validate else 0,
        check_val_every_n_epoch=None,
        val_check_interval=steps,
    )
    trainer.fit(recorder, data)
    return recorder


@pytest.mark.parametrize("workers", [0, 2])
def test_a_run_goes_on_without_them_and_has_each_on_record_once(folder, tmp_path, workers):
    recorder = fit(folder, tmp_path / "run", workers=workers, max_bad_share=0.15)
    assert [len(batch) for batch in recorder.seen] == [4] * 15
    found = lines(tmp_path / "run" / QUARANTINE_NAME)
    assert sorted(found, key=lambda line: line["key"]) == [
        {"shard": f"{folder}/x-{number // 10:05d}.tar", "key": f"{number:02d}", "reason": REASON} for number in BAD
    ]
    # good ones three times; the one after a bad one in its place as well: 4 for 3, 12 for 10 and 11
    expected = Counter({f"{number:02d}": 3 for number in range(20) if number not in BAD}) + Counter({"04": 3, "12": 6})
    assert Counter(key for batch in recorder.seen for key in batch) == expected


@pytest.mark.parametrize("workers", [0, 2])
def test_a_run_with_more_than_the_share_stops_in_one_line(folder, tmp_path, workers):
    with pytest.raises(LdmError) as error:
        fit(folder, tmp_path / "run", workers=workers, max_bad_share=0.1)
    expected = (
        f"3 of 20 samples cannot be used, more than 10.00%, the last one {re.escape(str(folder))}/x-0000[01].tar: "
        rf"(03|10|11) {REASON}; repair .*, or raise max_bad_share"
    )
    assert re.fullmatch(expected, str(error.value))
    assert len(lines(tmp_path / "run" / QUARANTINE_NAME)) == 3


@pytest.mark.parametrize("workers", [0, 2])
def test_a_run_with_too_many_in_a_row_stops_in_one_line(folder, tmp_path, workers):
    """In a worker the search itself is given up; torch would put a traceback of many lines around its words."""
    with pytest.raises(LdmError) as error:
        fit(folder, tmp_path / "run", workers=workers, max_bad_share=1.0, max_bad_in_a_row=1)
    expected = f"2 samples in a row cannot be used, the last one {re.escape(str(folder))}/x-00001.tar: 11 {REASON}; "
    assert re.fullmatch(rf"{expected}repair .*, or raise max_bad_in_a_row", str(error.value))


def test_a_shard_that_was_cut_is_borne_where_the_limits_say_so(tmp_path):
    """As many samples as the limit allows are tried in search of a good one, also where it is more than by default."""
    folder = write_numbered(tmp_path / "shards", [130], range(121))
    for limit, fits in ((119, False), (10_000, True)):
        data = ShardDataModule(str(folder), str(folder), batch_size=10, max_bad_share=1.0, max_bad_in_a_row=limit)
        data.setup("fit")
        if fits:
            assert all(len(batch["key"]) == 10 for batch in islice(data.train_dataloader(), 13))
            assert data.loader is not None and len(data.loader.quarantine) == 121
        else:
            with pytest.raises(LdmError, match=r"120 samples in a row .* raise max_bad_in_a_row"):
                list(islice(data.train_dataloader(), 13))


def test_ranks_that_each_come_across_all_of_them_in_time_bear_the_share_of_all(tmp_path, folder, monkeypatch):
    """One in twenty is within a tenth, and so it stays when a rank has seen two epochs' halves."""
    loaders = []
    for rank in range(2):
        data = ShardDataModule(str(folder), str(folder), batch_size=2, max_bad_share=0.15)
        data.setup("fit")
        monkeypatch.setattr(data, "trainer", FakeTrainer(rank, tmp_path))
        loaders.append(data.train_dataloader())
    for batches in zip(*(islice(loader, 60) for loader in loaders), strict=True):
        assert all(len(batch["key"]) == 2 for batch in batches)
    found = [lines(tmp_path / name) for name in (QUARANTINE_NAME, f"1-{QUARANTINE_NAME}")]
    assert [len(records) for records in found] == [3, 3]


class FakeTrainer:
    """Stands for one of two processes: what the data module asks of a trainer."""

    world_size = 2
    lightning_module = None

    def __init__(self, rank, folder):
        self.global_rank, self.default_root_dir = rank, str(folder)
        self.strategy = self
        self.root_device = torch.device("cpu")


@pytest.mark.parametrize("workers", [0, 2])
def test_validation_counts_them_too(folder, tmp_path, workers):
    train = write_numbered(tmp_path / "whole", [8])

    def validate(**limits):
        data = ShardDataModule(str(train), str(folder), batch_size=4, workers=workers, **limits)
        recorder = Recorder()
        trainer = Trainer(
            accelerator="cpu", logger=False, enable_progress_bar=False, enable_checkpointing=False, default_root_dir=tmp_path
        )
        trainer.validate(recorder, data, verbose=False)
        return data, [key for batch in recorder.validated for key in batch]

    data, keys = validate(max_bad_share=0.15)
    assert {sample.key for sample in data.validation_quarantine.known} == {f"{number:02d}" for number in BAD}
    # as many as were asked for, always the same
    assert keys == [f"{4 if n == 3 else 12 if n in (10, 11) else n:02d}" for n in range(20)]
    with pytest.raises(LdmError, match=r"3 of 20 samples cannot be used, .*x-00001.tar: 11 .* raise max_bad_share"):
        validate(max_bad_share=0.1)
    with pytest.raises(LdmError, match=r"^2 samples in a row .*x-00001.tar: 11 .* raise max_bad_in_a_row$"):
        validate(max_bad_share=1.0, max_bad_in_a_row=1)
    # a share of those that are looked at: one of eight is more than a tenth, though not of twenty
    with pytest.raises(LdmError, match=r"1 of 8 samples cannot be used"):
        validate(max_bad_share=0.1, validation_samples=8)


def test_half_lines_are_counted_and_closed_by_the_next_process(tmp_path):
    file = tmp_path / QUARANTINE_NAME
    file.write_text('{"shard": "a.tar", "key": "0", "reason": "is broken"}\n{"shard": "a.t')
    assert read_quarantine(file) == ([BadSample("a.tar", "0", "is broken")], 1)
    Quarantine(10, max_share=1.0, file=file, quiet=True).add([[bad(1)]])
    assert read_quarantine(file) == ([BadSample("a.tar", "0", "is broken"), bad(1)], 1)
    file.write_bytes(b"\xff\n[1]\n" + b"[" * 10**5 + b"\n")
    assert read_quarantine(file) == ([], 3)
