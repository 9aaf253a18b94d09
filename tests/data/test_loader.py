"""The training loader: its position, resuming, errors, signals, memory."""

import json
import multiprocessing
import os
import pickle
import re
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from itertools import chain, islice
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ldm.data.datamodule import ShardDataModule
from ldm.data.image_dataset import ImageDataset
from ldm.data.loader import ShardLoader, _Batches, _ignore_signals, batch_loader
from ldm.data.manifest import IMAGE_SHARDS, Manifest
from ldm.data.plan import Plan, PlannedSample, Position
from ldm.data.sources import ShardSource
from ldm.data.writer import ShardWriter, encode_png
from ldm.errors import LdmError, UsageError
from tests.samples import encoded, write_numbered

SIZES = (5, 1, 4, 7)
TOTAL = sum(SIZES)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Seventeen images in four uneven shards."""
    return write_numbered(tmp_path_factory.mktemp("shards"), SIZES)


def make(folder, batch_size=3, rank=0, world_size=1, seed=0, groups=None, **settings):
    dataset = ImageDataset(folder)
    plan = Plan(tuple(entry.samples for entry in dataset.sources[0].manifest.shards), seed=seed, groups=groups)
    return ShardLoader(dataset, plan, batch_size, rank, world_size, **settings)


def keys(loader, count):
    return [batch["key"] for batch in islice(loader, count)]


@pytest.mark.parametrize("workers", [0, 2])
def test_stopped_anywhere_and_resumed_elsewhere_the_batches_are_those_of_an_uninterrupted_run(folder, workers):
    whole = keys(make(folder), 20)
    for cuts in ((1, 2), (5, 6), (6, 11)) if workers else ((0, 3), (1, 1), (5, 6), (6, 7), (11, 2)):
        seen, state = [], None
        for cut in (*cuts, 20 - sum(cuts)):
            loader = make(folder, seed=99, workers=workers) if state else make(folder, workers=workers)
            if state:
                loader.load_state_dict(json.loads(json.dumps(state)))  # nothing but names and numbers
            seen += keys(loader, cut)
            state = loader.state_dict()
        assert seen == whole


@pytest.mark.parametrize("workers", [0, 2])
def test_samples_that_wait_for_their_groups_batch_are_in_the_state(folder, workers):
    groups = np.arange(TOTAL) % 3 - np.where(np.arange(TOTAL) == 16, 2, 0)  # 6, 5, 5, and one that is left out
    settings = {"batch_size": [3, 2, 4], "groups": groups}
    whole = keys(make(folder, **settings), 20)
    assert all(len({int(key) % 3 for key in batch}) == 1 and "16" not in batch for batch in whole)
    seen, waiting, state = [], [], {}
    for cut in (2, 5, 13):
        loader = make(folder, workers=workers, **settings)
        if seen:
            loader.load_state_dict(state)
        seen += keys(loader, cut)
        state = json.loads(json.dumps(loader.state_dict()))
        waiting.append(len(state.get("waiting", [])))
    assert seen == whole and any(waiting)
    loader.load_state_dict(state | {"data": "others", "waiting": [[0, 0]]})
    assert loader.position == Position(state["epoch"] + 1, 0)
    for broken, words in (
        ([[TOTAL, 3]], "names sample 17 of 17"),
        ([[0]], "at least 2"),
        ([[-1, 0]], "greater than or equal to 0"),
    ):
        with pytest.raises(LdmError, match=words):
            loader.load_state_dict(state | {"waiting": broken})


def test_a_new_iteration_continues_at_the_current_position(folder):
    loader = make(folder)
    assert keys(loader, 4) + keys(loader, 9) == keys(make(folder), 13)


@pytest.mark.parametrize("workers", [0, 2])
def test_with_confirmation_only_what_was_consumed_counts(folder, workers):
    """A trainer fetches a batch ahead, and the workers more: these are not lost when it is killed."""
    loader = make(folder, workers=workers, confirm=True)
    batches = iter(loader)
    first, second = next(batches), next(batches)
    assert loader.state_dict()["samples_consumed"] == 0
    loader.consumed(first["position"])
    assert loader.state_dict() == make(folder).state_dict() | {"samples_consumed": 3}
    resumed = make(folder)
    resumed.load_state_dict(loader.state_dict())
    assert keys(resumed, 1) == [second["key"]]


def test_positions_count_epochs(folder):
    found = [batch["position"] for batch in islice(make(folder, world_size=2), 9)]
    assert found == [Position(draws // TOTAL, draws % TOTAL) for draws in range(6, 60, 6)]


@pytest.mark.parametrize("world_size", [1, 2, 3, 5])
def test_ranks_take_equally_many_batches_and_share_each_epoch(folder, world_size):
    steps = 2 * TOTAL  # so that all ranks together end with an epoch: each has batches of one
    ranks = [keys(make(folder, 1, rank, world_size), steps) for rank in range(world_size)]
    draws = [key for step in zip(*ranks, strict=True) for batch in step for key in batch]
    for epoch in range(2 * world_size):
        assert sorted(draws[epoch * TOTAL : (epoch + 1) * TOTAL]) == [f"{number:02d}" for number in range(TOTAL)]


@pytest.mark.parametrize(("before", "after"), [((2, 3), (3, 1)), ((1, 4), (2, 2)), ((3, 2), (1, 1))])
def test_the_state_is_that_of_all_ranks_and_fits_any_number_of_them(folder, before, after):
    (batch_size, world_size), drawn, states = before, [], []
    for rank in range(world_size):
        loader = make(folder, batch_size, rank, world_size)
        drawn += keys(loader, 2)
        states.append(loader.state_dict())
    assert all(state == states[0] for state in states)
    batch_size, world_size = after
    left = TOTAL - 2 * before[0] * before[1]
    for rank in range(world_size):
        loader = make(folder, batch_size, rank, world_size)
        loader.load_state_dict(states[-1 - rank % len(states)])
        drawn += keys(loader, left // (batch_size * world_size))
    # what was left came once; the rest of it is less than a batch of all
    found = list(chain.from_iterable(drawn))
    assert len(set(found)) == len(found) > TOTAL - batch_size * world_size


def test_other_data_begin_an_epoch(folder, caplog):
    loader = make(folder, data_hash="a")
    keys(loader, 4)
    state = loader.state_dict()
    assert state == {"seed": 0, "epoch": 0, "samples_consumed": 12, "data": "a"}
    same, other = make(folder, data_hash="a"), make(folder, data_hash="b")
    same.load_state_dict(state)
    assert same.position == Position(0, 12) and not caplog.text
    other.load_state_dict(state)
    assert other.position == Position(1, 0) and "the training data changed since the checkpoint" in caplog.text


def test_too_few_samples_for_all_ranks_are_refused(folder):
    with pytest.raises(UsageError, match=r"17 samples do not fill one batch of 18"):
        make(folder, 6, 0, 3)


class Broken(ImageDataset):
    """Raises an error that the user can fix, or a defect."""

    error: Exception

    def batch(self, draws, empty=torch.empty):
        raise self.error


@pytest.mark.parametrize("workers", [0, 2])
def test_an_error_in_a_worker_keeps_its_message_and_the_workers_end_at_once(folder, workers, monkeypatch):
    # as long as torch waits for each worker that it lost sight of
    monkeypatch.setattr("torch.utils.data._utils.MP_STATUS_CHECK_INTERVAL", 60)
    dataset = Broken(folder)
    for error in (LdmError("x.tar does not exist; restore it"), UsageError("give another")):
        dataset.error = error
        start = time.monotonic()
        with pytest.raises(type(error)) as raised:
            next(iter(ShardLoader(dataset, Plan(SIZES), 3, workers=workers)))
        assert str(raised.value) == str(error) and type(raised.value) is type(error)
        raised = None
        assert time.monotonic() - start < 60


def test_a_defect_is_raised_with_its_traceback(folder):
    dataset = Broken(folder)
    dataset.error = ValueError("a defect")
    with pytest.raises(ValueError, match="a defect") as raised:
        next(iter(batch_loader(dataset, [[0, 1]])))
    assert raised.traceback[-1].name == "batch"


class Stalling(ImageDataset):
    """Stops at draw 6 of a run, as if its storage did not answer."""

    seconds = 600

    def batch(self, draws, empty=torch.empty):
        if isinstance(draws[0], PlannedSample) and draws[0].number >= 6:
            time.sleep(self.seconds)
        return super().batch(draws, empty)


def test_a_worker_that_stalls_is_reported_with_the_shards_it_was_reading(folder, monkeypatch):
    # as long as torch waits for a worker before it ends it
    monkeypatch.setattr("torch.utils.data._utils.MP_STATUS_CHECK_INTERVAL", 0.2)
    batches = iter(ShardLoader(Stalling(folder), Plan(SIZES), 3, 1, 2, workers=1, max_wait=2))
    next(batches)
    start = time.monotonic()
    with pytest.raises(LdmError, match=r"loader of rank 1 has stalled: no batch for 2 s, .*max_wait_seconds$") as raised:
        next(batches)
    assert 1 < time.monotonic() - start < 20
    asked = [draw.sample for draw in list(islice(Plan(SIZES).batches(3, 1, 2), 2))[1]]
    shards = {Stalling(folder).locate(sample)[0] for sample in asked}
    names = [str(folder / f"x-{shard:05d}.tar") for shard in shards]
    assert sum(name in str(raised.value) for name in names) == min(len(names), 3)
    raised = batches = None
    for worker in multiprocessing.active_children():
        worker.join(10)
    assert not multiprocessing.active_children()


STALL = """
import os, sys, time
from pathlib import Path
from ldm.data.image_dataset import ImageDataset
from ldm.data.loader import ShardLoader
from ldm.data.plan import Plan

dataset = ImageDataset(Path(sys.argv[1]))
os.pread = lambda *_: time.sleep(600)  # a storage that does not answer
next(iter(ShardLoader(dataset, Plan((5, 1, 4, 7)), 3, max_wait=1)))
"""


def test_a_training_process_that_stalls_while_reading_ends_with_the_same_line(folder):
    command = [sys.executable, "-c", STALL, folder]
    root = Path(__file__).parents[2]
    done = subprocess.run(command, capture_output=True, text=True, cwd=root, timeout=60)
    assert done.returncode == 1
    assert re.fullmatch(r"ldm: the loader of rank 0 has stalled: no batch for 1 s, to be read from .*\.tar.*\n", done.stderr)


class Asked(LdmError):
    """As a run's end on a signal."""

    exit_code = 143


@pytest.mark.parametrize("workers", [0, 1])
def test_a_wait_for_a_batch_ends_when_the_run_is_asked_to_stop(folder, workers, monkeypatch):
    monkeypatch.setattr("torch.utils.data._utils.MP_STATUS_CHECK_INTERVAL", 0.2)
    asked, exits = [], []
    if not workers:
        monkeypatch.setattr("os._exit", lambda code: exits.append(code) or sys.exit())

    def on_wait():
        asked.append(1)
        if len(asked) == 2:
            raise Asked("stopped")

    dataset = Stalling(folder)
    dataset.seconds = 600 if workers else 4
    batches = iter(ShardLoader(dataset, Plan(SIZES), 3, 1, 2, workers=workers, max_wait=600, on_wait=on_wait))
    next(batches)
    if workers:
        with pytest.raises(Asked, match="stopped"):
            next(batches)
    else:
        next(batches)
        assert exits == [143]


def test_a_worker_that_is_killed_is_named_at_once(folder, monkeypatch):
    batches = iter(ShardLoader(Stalling(folder), Plan(SIZES), 3, 1, 2, workers=1, max_wait=600))
    next(batches)
    (worker,) = multiprocessing.active_children()
    timer = threading.Timer(1, os.kill, (worker.pid, signal.SIGKILL))
    timer.start()
    start = time.monotonic()
    with pytest.raises(LdmError, match=r"a loader worker ended \(.*; a worker killed by the system .* lower workers"):
        next(batches)
    assert time.monotonic() - start < 30


def test_too_little_shared_memory_is_refused_before_workers_start(folder, monkeypatch):
    monkeypatch.setattr("ldm.data.loader._free_shared_memory", lambda: 2**20)
    dataset = ImageDataset(folder, image_size=128)
    plan = Plan(SIZES)
    words = r"4 loader workers need 3 MiB for .*: /dev/shm has [\d,]+ MiB, .*--shm-size=2g\), or set workers to 1 or less$"
    with pytest.raises(LdmError, match=words):
        next(iter(ShardLoader(dataset, plan, 6, workers=4)))
    assert not multiprocessing.active_children()
    next(iter(ShardLoader(dataset, plan, 6)))


class Full(ImageDataset):
    """As where the last bytes of shared memory are gone: ``torch`` says so when it allocates them."""

    def batch(self, draws, empty=torch.empty):
        raise RuntimeError("unable to allocate shared memory(shm) for file </torch_1_2_3>: No space left on device (28)")


def test_full_shared_memory_is_the_error_of_the_run(folder):
    with pytest.raises(LdmError, match=r"found no room for a batch: /dev/shm has .*--shm-size=2g\), or set workers to 0"):
        next(iter(ShardLoader(Full(folder), Plan(SIZES), 3, workers=1)))


def test_a_batch_is_in_shared_memory_before_it_is_sent(folder, monkeypatch):
    """The thread that sends it would lose it where there is no room."""
    monkeypatch.setattr("ldm.data.loader.get_worker_info", lambda: True)
    batch = _Batches(ImageDataset(folder)).__getitem__([0, 1, 2])
    assert batch["image"].is_shared()


def test_without_a_limit_or_in_time_nothing_is_said(folder):
    assert keys(make(folder, max_wait=0.5), 6) == keys(make(folder, max_wait=0), 6)
    batches = iter(make(folder, max_wait=0.2))
    next(batches)
    time.sleep(1)  # the trainer's own time does not count
    next(batches)


def test_signals_sent_to_every_process_of_a_run_do_not_end_its_workers(folder, monkeypatch):
    """Not even a worker that is still starting."""
    late = "ldm.data.loader._ignore_signals"
    monkeypatch.setattr(late, lambda worker: [time.sleep(2 * worker), _ignore_signals(worker)])
    batches = iter(make(folder, workers=2))
    found = [next(batches)["key"]]
    workers = multiprocessing.active_children()
    assert len(workers) == 2
    for number in (signal.SIGINT, signal.SIGUSR1, signal.SIGTERM):
        for worker in workers:
            # from another process, as a cluster does it: to their parent they listen
            subprocess.run(["kill", f"-{int(number)}", str(worker.pid)], check=True)
    found += [next(batches)["key"] for _ in range(9)]
    assert found == keys(make(folder), 10)
    for worker in workers:
        worker.terminate()
        worker.join(10)
        assert worker.exitcode == 0


KILLED = """
import multiprocessing, os, sys
from pathlib import Path
from ldm.data.image_dataset import ImageDataset
from ldm.data.loader import ShardLoader
from ldm.data.plan import Plan

if __name__ == "__main__":
    multiprocessing.set_start_method(sys.argv[2])
    batches = iter(ShardLoader(ImageDataset(Path(sys.argv[1])), Plan((5, 1, 4, 7)), 3, workers=2))
    next(batches)
    print(*(worker.pid for worker in multiprocessing.active_children()), flush=True)
    os.kill(os.getpid(), 9)
"""


@pytest.mark.parametrize("start_method", ["fork", "forkserver"])
def test_workers_do_not_outlive_a_training_process_that_is_killed(folder, tmp_path, start_method):
    (tmp_path / "program.py").write_text(KILLED)
    command = [sys.executable, tmp_path / "program.py", folder, start_method]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    # into a file: workers that live on would hold a pipe open
    with (tmp_path / "said").open("w") as file:
        killed = subprocess.run(command, stdout=file, env=environment, timeout=60)
    assert killed.returncode == -signal.SIGKILL
    workers = [int(pid) for pid in (tmp_path / "said").read_text().split()]
    assert len(workers) == 2
    deadline = time.monotonic() + 30
    while any(Path(f"/proc/{pid}").exists() for pid in workers):
        assert time.monotonic() < deadline, "workers are still alive"
        time.sleep(0.1)


def huge(folder, cache, shards=100_000):
    """A manifest of a hundred million samples far away. All shards have the same bytes, so the cache holds them all in one."""
    for place in (folder, cache):
        place.mkdir()
    with ShardWriter(cache, "x", samples_per_shard=None) as writer:
        image = encode_png(Image.new("RGB", (4, 4)))
        for number in range(1000):
            writer.write(f"{number:03d}", {"png": image})
    (entry,) = writer.entries
    (cache / entry.name).rename(cache / f"{entry.sha256}.tar")
    manifest = Manifest(IMAGE_SHARDS, (entry,), {"location": "https://nowhere.invalid/shards"})
    value = json.loads(manifest.save(folder).read_text())
    value["shards"] = [value["shards"][0] | {"name": f"{number:05d}.tar"} for number in range(shards)]
    value |= {"samples": 1000 * shards, "bytes": entry.bytes * shards}
    (folder / "manifest.json").write_text(json.dumps(value))
    return folder


def test_resuming_in_the_middle_of_a_huge_epoch_reads_only_the_shards_needed(folder, tmp_path, monkeypatch):
    asked = []
    path = ShardSource.path
    monkeypatch.setattr(ShardSource, "path", lambda self, number: asked.append(number) or path(self, number))
    data = ShardDataModule(
        str(huge(tmp_path / "huge", tmp_path / "cache")), str(folder), batch_size=32, cache=str(tmp_path / "cache"), seed=3
    )
    start = time.process_time()
    data.setup("fit")
    loader = data.train_dataloader()
    state = loader.state_dict() | {"epoch": 3, "samples_consumed": 50_000_000}
    loader.load_state_dict(state)
    batches = list(islice(loader, 3))
    seconds = time.process_time() - start
    assert loader.state_dict() == state | {"samples_consumed": 50_000_096}
    draws = [draw for batch in islice(loader.plan.batches(32, position=Position(3, 50_000_000)), 3) for draw in batch]
    assert [f"{draw.sample % 1000:03d}" for draw in draws] == [key for batch in batches for key in batch["key"]]
    assert draws[0].number == 350_000_000
    needed = {draw.sample // 1000 for draw in draws}
    assert set(asked) == needed and len(asked) == len(needed)
    assert seconds < 20  # five on a machine at rest, most of it for twenty megabytes of manifest


STREAM = """
import sys, multiprocessing
from itertools import islice
from ldm.data.datamodule import ShardDataModule

def kilobytes(pid):
    with open(f"/proc/{pid}/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("RssAnon"))

def resident():
    return kilobytes("self") + sum(kilobytes(child.pid) for child in multiprocessing.active_children())

folder = sys.argv[1]
data = ShardDataModule(folder, folder, batch_size=100, workers=2, shuffle_window=10_000)
data.setup("fit")
for number, batch in enumerate(islice(data.train_dataloader(), 400), start=1):
    assert len(batch["key"]) == 100
    if number in (100, 400):
        print(resident())
"""


@pytest.mark.slow
def test_memory_does_not_grow_with_the_samples_read(tmp_path):
    """Memory of the training process and its workers after 40,000 samples, of 40 shards in windows of ten, as after 10,000."""
    with ShardWriter(tmp_path, "x", samples_per_shard=None) as writer:
        image = encoded(Image.new("RGB", (16, 16), "red"), "JPEG")
        for number in range(1000):
            writer.write(f"{number:04d}", {"jpg": image, "txt": b"a red square"})
    (entry,) = writer.entries
    names = [f"{number:03d}.tar" for number in range(40)]
    for name in names:
        os.link(tmp_path / entry.name, tmp_path / name)
    (tmp_path / entry.name).unlink()
    Manifest(IMAGE_SHARDS, tuple(replace(entry, name=name) for name in names), {"captioned": 40_000}).save(tmp_path)
    said = subprocess.run(
        [sys.executable, "-c", STREAM, tmp_path],
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(__file__).parents[2],
        timeout=300,
    )
    before, after = map(int, said.stdout.split())
    print(f"{(after - before) / 1024:.1f} MB")
    assert (after - before) / 1024 < 20  # 650 bytes per sample


def test_an_error_can_be_sent_between_processes():
    error = pickle.loads(pickle.dumps(UsageError("give another")))
    assert type(error) is UsageError and str(error) == "give another"
