"""Processes that share out the shards of an export: none twice, none left, whoever dies."""

import errno
import fcntl
import multiprocessing
import signal
from itertools import chain, cycle

import pytest

from ldm.data.manifest import MANIFEST_NAME
from ldm.errors import LdmError, UsageError
from ldm.files import write_json
from ldm.latents import claims as claims_module
from ldm.latents.claims import WORK_NAME, Claims, require_place
from tests.samples import contents


def finish_next(claims, record=None):
    """Claim a shard and finish it at once."""
    number = claims.take()
    assert number is not None
    claims.finish(number, record or {})


REQUEST = {"autoencoder": "abc", "flips": False, "text_encoders": [{"name": "minilm"}]}


@pytest.fixture
def elsewhere(tmp_path):
    """The function that runs another with claims of its own in a process that then lives until it is killed."""
    context, started = multiprocessing.get_context("fork"), []

    def run(work):
        done = context.Event()

        def process():
            claims = Claims(tmp_path / "out", REQUEST, 3)
            work(claims)
            done.set()
            signal.pause()

        started.append(context.Process(target=process, daemon=True))
        started[-1].start()
        assert done.wait(20)
        return started[-1]

    yield run
    for process in started:
        process.kill()
        process.join()


@pytest.mark.parametrize("shards", [1, 3, 5])
@pytest.mark.parametrize("world_size", [1, 2, 3, 7])
def test_every_shard_is_made_once_each_process_beginning_with_its_own(tmp_path, shards, world_size):
    processes = [Claims(tmp_path, REQUEST, shards, rank, world_size) for rank in range(world_size)]
    made = [[] for _ in processes]
    working = set(range(world_size))
    for rank in cycle(range(world_size)):
        if rank in working and (number := processes[rank].take()) is not None:
            made[rank].append(number)
            processes[rank].finish(number, {"number": number})
        else:
            working.discard(rank)
        if not working:
            break
    assert sorted(chain.from_iterable(made)) == list(range(shards))
    for rank, numbers in enumerate(made):
        own = [number % world_size == rank for number in numbers]
        assert own == sorted(own, reverse=True)
        assert own[:1] == [True] or rank >= shards
    for claims in processes:
        assert not claims.missing() and claims.take() is None
        assert claims.records() == [{"number": number} for number in range(shards)]


def test_a_shard_is_held_by_the_living_and_let_go_by_the_dead(tmp_path, elsewhere):
    other = elsewhere(lambda claims: claims.take())
    mine = Claims(tmp_path / "out", REQUEST, 3)
    assert [mine.take(), mine.take(), mine.take()] == [1, 2, None]
    assert mine.missing() == [0, 1, 2]  # taken is not finished
    other.kill()
    other.join()
    assert mine.take() == 0
    for number in range(3):
        mine.finish(number, {})
    assert mine.missing() == [] and mine.take() is None


def test_what_a_dead_process_finished_stays_finished(tmp_path, elsewhere):
    def work(claims):
        finish_next(claims, {"samples": 7})
        claims.take()

    other = elsewhere(work)
    other.kill()
    other.join()
    mine = Claims(tmp_path / "out", REQUEST, 3)
    assert mine.missing() == [1, 2] and mine.records() == [{"samples": 7}]


def test_letting_go_keeps_what_is_finished_and_frees_the_rest(tmp_path, elsewhere):
    mine = Claims(tmp_path / "out", REQUEST, 3)
    finish_next(mine)
    mine.take()
    mine.release()
    elsewhere(finish_next)
    assert mine.missing() == [2]


def test_a_shard_finished_between_the_look_and_the_lock_is_not_made_again(tmp_path, monkeypatch):
    mine, other = (Claims(tmp_path, REQUEST, 2, rank, 2) for rank in range(2))
    looked = mine.missing()
    finish_next(other)
    monkeypatch.setattr(mine, "missing", lambda: looked)
    assert mine.take() == 0 and mine.take() is None


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("autoencoder", "abd", "autoencoder: abc, not abd"),
        ("flips", True, "flips: False, not True"),
        ("text_encoders", [], r"text encoders: \[.*minilm.*\], not \[\]"),
    ],
)
def test_another_request_is_refused_and_changes_nothing(tmp_path, name, value, said):
    mine = Claims(tmp_path / "out", REQUEST, 3)
    finish_next(mine)
    before = contents(tmp_path)
    with pytest.raises(UsageError, match=rf"out holds an unfinished export with other settings \({said}\)") as error:
        Claims(tmp_path / "out", REQUEST | {name: value}, 3)
    assert "\n" not in str(error.value) and contents(tmp_path) == before


@pytest.mark.parametrize("holds", ["a file", "a folder", "a hidden file", MANIFEST_NAME])
def test_other_work_is_refused_and_left_as_it_is(tmp_path, holds):
    out = tmp_path / "out"
    if holds == "a folder":
        (out / holds).mkdir(parents=True)
    else:
        out.mkdir()
        (out / holds).touch()
    with pytest.raises(UsageError, match="already holds other work"):
        Claims(out, REQUEST, 3)
    assert [path.name for path in out.iterdir()] == [holds]


def test_a_file_is_no_folder(tmp_path):
    (tmp_path / "out").touch()
    with pytest.raises(UsageError, match="is a file; give a new folder"):
        Claims(tmp_path / "out", REQUEST, 3)


def test_a_name_that_cannot_be_made_is_one_line(tmp_path):
    for name in ("a" * 300, "a\0b", "\ud800"):
        with pytest.raises(UsageError, match="cannot be made"):
            require_place(tmp_path / name)


def test_a_process_killed_before_its_request_stood_leaves_a_folder_to_begin_in(tmp_path):
    work = tmp_path / "out" / WORK_NAME
    work.mkdir(parents=True)
    (work / "claim.lock").touch()
    (work / ".request.json.1.tmp").write_text('{"autoenc')
    assert Claims(tmp_path / "out", REQUEST, 3).missing() == [0, 1, 2]


def test_a_record_that_is_being_written_is_none(tmp_path):
    mine = Claims(tmp_path, REQUEST, 2)
    (mine.work / ".00000.json.1.tmp").write_text("{")
    assert mine.missing() == [0, 1] and mine.records() == []


def test_two_that_begin_at_once_both_work_on_it(tmp_path, monkeypatch):
    """The other one claims the folder just when this one has seen that it is new."""

    def require_new_folder(path, what, in_place):
        monkeypatch.undo()
        Claims(tmp_path / "out", REQUEST, 3)
        return claims_module.require_new_folder(path, what)

    monkeypatch.setattr(claims_module, "require_new_folder", require_new_folder)
    assert Claims(tmp_path / "out", REQUEST, 3).missing() == [0, 1, 2]


def test_when_all_is_done_nothing_is_left_to_do_and_the_work_folder_goes(tmp_path):
    mine, other = (Claims(tmp_path, REQUEST, 2, rank, 2) for rank in range(2))
    for claims in (mine, other):
        finish_next(claims)
    assert not mine.is_done
    (tmp_path / MANIFEST_NAME).touch()
    mine.release()
    assert mine.is_done and other.is_done and not mine.work.exists()
    # the other one looks once more, and tidies up behind itself
    assert other.take() is None
    other.release()
    assert [path.name for path in tmp_path.iterdir()] == [MANIFEST_NAME]


def test_a_finished_folder_that_was_not_tidied_up_is_tidied_and_done(tmp_path):
    Claims(tmp_path / "out", REQUEST, 3)
    write_json(tmp_path / "out" / MANIFEST_NAME, {"request": REQUEST})
    claims = Claims(tmp_path / "out", REQUEST, 3)
    assert claims.is_done and claims.take() is None
    claims.release()
    assert [path.name for path in (tmp_path / "out").iterdir()] == [MANIFEST_NAME]
    with pytest.raises(UsageError, match="holds a finished export with other settings"):
        Claims(tmp_path / "out", REQUEST | {next(iter(REQUEST)): "other"}, 3)


def test_without_locks_of_the_file_system_the_files_are_the_locks(tmp_path, monkeypatch, recwarn):
    def flock(descriptor, operation):
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", flock)
    first, second = (Claims(tmp_path / "out", REQUEST, 2) for _ in range(2))
    assert {first.take(), second.take()} == {0, 1} and first.take() is None
    assert not [warning for warning in recwarn if "flock" in str(warning.message)]


def test_an_empty_folder_may_be_a_mount_point(tmp_path, monkeypatch):
    (tmp_path / "out").mkdir()
    monkeypatch.setattr("pathlib.Path.is_mount", lambda path: path == tmp_path / "out")
    assert Claims(tmp_path / "out", REQUEST, 1).take() == 0


@pytest.mark.parametrize("content", [b"", b"null", b"[]", b"{", b"[" * 10**5])
def test_broken_requests_and_records_say_what_to_remove(tmp_path, content):
    claims = Claims(tmp_path / "out", REQUEST, 1)
    finish_next(claims)
    (tmp_path / "out" / WORK_NAME / "00000.json").write_bytes(content)
    with pytest.raises(LdmError, match=r"00000.json.*or remove that file and run the same command again"):
        claims.records(dict[str, int])
    (tmp_path / "out" / WORK_NAME / "request.json").write_bytes(content)
    with pytest.raises(LdmError, match=r"request.json.*or remove .*out to start over"):
        Claims(tmp_path / "out", REQUEST, 1)
