"""Samples by number, whatever shards they lie in and however few of these may be open."""

import os
import pickle

import pytest

from ldm.data import shard_dataset as module
from ldm.data.decode import DecodeError
from ldm.data.image_dataset import ImageDataset
from ldm.data.plan import PlannedSample
from ldm.data.quarantine import BadSample
from ldm.data.sources import open_source
from ldm.errors import LdmError
from tests.samples import write_numbered


def keys(found):
    return [sample["key"] for sample in found]


@pytest.fixture
def opened(monkeypatch):
    """Names of the shards that are opened, and of those whose headers are read, in order."""
    log = {"opened": [], "indexed": []}
    reopen, open_shard = module.ShardSource.path, ImageDataset.open_shard
    monkeypatch.setattr(module.ShardSource, "path", lambda self, number: log["opened"].append(number) or reopen(self, number))
    monkeypatch.setattr(
        ImageDataset,
        "open_shard",
        lambda self, path, entry, key_dot: log["indexed"].append(entry.name) or open_shard(self, path, entry, key_dot),
    )
    return log


def test_a_number_means_the_same_sample_in_any_order_and_empty_shards_hold_none(tmp_path):
    dataset = ImageDataset(write_numbered(tmp_path / "x", [3, 0, 1, 0, 0, 4]))
    assert len(dataset) == 8
    for index in (0, 7, 3, 2, 4, 3, 6, 1, 5):
        assert dataset[index]["key"] == f"{index:02d}"
    assert [dataset.locate(index) for index in (0, 2, 3, 4, 7)] == [(0, 0), (0, 2), (2, 0), (5, 0), (5, 3)]
    for index in (-1, 8):
        for look in (dataset.locate, dataset.attempt, dataset.__getitem__):
            with pytest.raises(IndexError):
                look(index)


def test_several_sources_follow_one_another(tmp_path):
    folders = [write_numbered(tmp_path / name, counts) for name, counts in (("a", [2, 1]), ("b", [3]))]
    dataset = ImageDataset([open_source(folder) for folder in folders])
    assert keys(dataset[index] for index in range(6)) == ["00", "01", "02", "00", "01", "02"]
    (tmp_path / "b" / "x-00000.tar").unlink()
    with pytest.raises(LdmError, match=rf"{tmp_path / 'b'}: x-00000.tar is listed in the manifest but missing"):
        ImageDataset([open_source(folder) for folder in folders])


def test_few_shards_are_open_and_each_is_walked_over_once(tmp_path, monkeypatch, opened):
    monkeypatch.setattr(ImageDataset, "open_shards", 2)
    dataset = ImageDataset(write_numbered(tmp_path / "x", [2] * 6))
    before = len(os.listdir("/proc/self/fd"))
    for index in (0, 1, 2, 0, 4, 1, 6, 8, 10, 3, 5, 7, 0, 11):
        assert dataset[index]["key"] == f"{index:02d}"
        assert len(os.listdir("/proc/self/fd")) <= before + 2
    assert opened["indexed"] == [f"x-{shard:05d}.tar" for shard in (0, 1, 2, 3, 4, 5)]
    # the one used longest ago goes: 0 stays open while 1 makes room for 2
    assert opened["opened"] == [0, 1, 2, 3, 4, 5, 1, 2, 3, 0, 5]


def test_what_is_known_of_shards_is_bounded_too(tmp_path, monkeypatch, opened):
    monkeypatch.setattr(ImageDataset, "open_shards", 1)
    monkeypatch.setattr(module, "KNOWN_SHARDS", 2)
    dataset = ImageDataset(write_numbered(tmp_path / "x", [1] * 8))
    for index in (*range(8), *range(8)):
        assert dataset[index]["key"] == f"{index:02d}"
        assert len(dataset._known) <= 3
    assert len(opened["indexed"]) > 8  # the headers of forgotten shards are read again


def test_a_copy_in_another_process_opens_its_own_files(tmp_path):
    dataset = ImageDataset(write_numbered(tmp_path / "x", [2, 2]))
    assert dataset[0]["key"] == "00" and dataset[3]["key"] == "03"
    before = len(os.listdir("/proc/self/fd"))
    copy = pickle.loads(pickle.dumps(dataset))
    assert len(os.listdir("/proc/self/fd")) == before
    assert keys(copy[index] for index in range(4)) == ["00", "01", "02", "03"]
    assert len(os.listdir("/proc/self/fd")) == before + 2


def test_the_place_of_a_bad_sample_is_taken_by_the_next_good_one(tmp_path):
    folder = write_numbered(tmp_path / "x", [3, 3], bad=(1, 2, 3, 5))
    dataset = ImageDataset(folder)
    found = dataset.__getitems__([PlannedSample(0, 0), PlannedSample(1, 1), PlannedSample(3, 2), PlannedSample(5, 3), 4])
    assert keys(found) == ["00", "04", "04", "00", "04"]  # after the last one comes the first
    reason = "not a JPEG, PNG or WebP image"
    bad = {number: BadSample(str(folder / f"x-{number // 3:05d}.tar"), f"{number:02d}", reason) for number in (1, 2, 3, 5)}
    assert [sample["bad"] for sample in found] == [[], [bad[1], bad[2], bad[3]], [bad[3]], [bad[5]], []]
    assert dataset.attempt(1) == bad[1] and dataset[0].keys() == {"image", "caption", "key"}
    with pytest.raises(LdmError, match=rf"{folder}/x-00000.tar: 01 {reason}; `ldm shards check --deep` names all such"):
        dataset[1]


def test_what_is_random_follows_the_draw_not_the_sample_that_was_meant(tmp_path, monkeypatch):
    """So that a fixed sample changes no other."""
    dataset = ImageDataset(write_numbered(tmp_path / "x", [4], bad=(1,)))
    decode, seen = dataset.decode, []
    monkeypatch.setattr(dataset, "decode", lambda raw, draw, out: seen.append((raw[0].key, draw)) or decode(raw, draw))
    dataset.__getitems__([PlannedSample(1, 70), PlannedSample(3, 71)])
    assert sorted(seen) == [("01", 70), ("02", 70), ("03", 71)]


def test_too_many_bad_ones_in_a_row_end_the_search(tmp_path):
    dataset = ImageDataset(write_numbered(tmp_path / "x", [5, 5], bad=range(2, 8)))
    assert keys(dataset.__getitems__([2])) == ["08"]
    dataset.max_in_a_row = 5
    with pytest.raises(LdmError) as error:
        dataset.__getitems__([2])
    expected = f"6 samples in a row cannot be used, the last one {tmp_path}/x/x-00001.tar: 07 not a JPEG, PNG or WebP image; "
    assert str(error.value).startswith(expected)
    assert "`ldm shards check`" in str(error.value) and str(error.value).endswith("or raise max_bad_in_a_row")
    every = ImageDataset(write_numbered(tmp_path / "all", [3], bad=range(3)))
    with pytest.raises(LdmError, match=r"^3 samples in a row cannot be used"):  # and not for ever
        every.__getitems__([1])


def test_a_shard_beyond_reading_stops_the_reading_and_is_named(tmp_path):
    folder = write_numbered(tmp_path / "x", [2, 2])
    dataset = ImageDataset(folder)
    (folder / "x-00001.tar").unlink()
    for look in (dataset.attempt, dataset.__getitem__, lambda index: dataset.__getitems__([index])):
        assert look(1)
        with pytest.raises(LdmError, match=r"x-00001.tar does not exist; restore it"):
            look(2)
    # a record is made of it all the same, by row
    assert dataset.bad(3, DecodeError("is lost")) == BadSample(str(folder / "x-00001.tar"), "#1", "is lost")
