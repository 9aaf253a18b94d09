"""A small world of every artifact, made by the real commands, and a way to see that a command ends well whatever it reads."""

from __future__ import annotations

import contextlib
import resource
import shutil
import signal
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import NamedTuple

import pytest

from ldm.cli import main
from ldm.terminal import printable
from tests.tiny import TinyRuns

from .mutations import Damage

SECONDS = 60  # a command that takes longer hangs; each takes about one
GIGABYTES = 4
# of an export and of generated images, with which the same command goes on
RESUMABLE = {".export", "run.json"}


class Hang(BaseException):
    """A command that did not end."""


class Ended(NamedTuple):
    """How a command ended."""

    code: int
    out: str
    err: str


@pytest.fixture(scope="session")
def world(tiny_runs: TinyRuns, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with shards, an autoencoder, latents, a finished run of each stage, a pipeline, generated images."""
    folder = tmp_path_factory.mktemp("world")
    for name in ("shards", "autoencoder", "latents"):
        shutil.copytree(tiny_runs.folder / name, folder / name)
    runs = TinyRuns(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)  # paths in the artifacts are relative, so that copies of the world are closed
        for stage in ("autoencoder", "denoiser"):
            command = runs.command(stage, f"runs/{stage}", steps=4, validate_every=4)
            main([argument.replace(f"{folder}/", "") for argument in command[3:]])
        main(["sample", "runs/denoiser/pipeline", "a ring", "--out", "images", "--count", "2", "--steps", "2"])
        shutil.copytree("runs/denoiser/pipeline", "pipeline")
        main(["report", "runs/denoiser"])
    return folder


@pytest.fixture
def here(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """Makes a fresh copy of parts of the world, the current folder for the test."""

    def copy(*names: str) -> Path:
        folder = tmp_path / "here"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        for name in names:
            shutil.copytree(world / name, folder / name, symlinks=True)
        monkeypatch.chdir(folder)
        return folder

    return copy


@contextlib.contextmanager
def limited(seconds: int) -> Iterator[None]:
    """Raise :class:`Hang` in the block after so many seconds, and give it at most ``GIGABYTES`` more memory."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise Hang("".join(traceback.format_stack(frame)[-4:]))

    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    resource.setrlimit(resource.RLIMIT_AS, (used + GIGABYTES * 2**30, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def how_it_ends(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> Ended:
    """Run a command in this process. Raises whatever is no orderly end."""
    capsys.readouterr()
    code = 0
    try:
        with limited(SECONDS):
            main(arguments)
    except SystemExit as leave:
        code = leave.code if isinstance(leave.code, int) else 1
    captured = capsys.readouterr()
    return Ended(code, captured.out, captured.err)


def faults_of(arguments: list[str], capsys: pytest.CaptureFixture[str], out: Path | None = None) -> list[str]:
    """What is wrong with how a command ends, if anything: it may succeed, or say why not in one line.

    Args:
        out: a folder that the command makes; it must be absent or complete afterwards.
    """
    try:
        ended = how_it_ends(arguments, capsys)
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt):
            raise
        capsys.readouterr()
        where = traceback.extract_tb(error.__traceback__)[-1]
        return [f"{type(error).__name__}: {str(error)[:300]} ({where.filename}:{where.lineno})"]
    faults = []
    said = [line for line in ended.err.splitlines() if line.strip()]
    if "Traceback" in ended.err + ended.out:
        faults.append("prints a traceback")
    if ended.code not in (0, 1, 2):
        faults.append(f"exit code {ended.code}")
    if ended.code and not (said and said[-1].startswith("ldm")):
        faults.append(f"exit code {ended.code} without a line: {said[-1:]}")
    if any(printable(line) != line for line in (ended.err + ended.out).translate({9: " ", 13: "\n"}).splitlines()):
        faults.append("prints control characters")
    if any(line == "ldm: all is well" for line in said):
        faults.append("a line is forged")
    if said and max(map(len, said)) > 2000:
        faults.append(f"a line of {max(map(len, said))} characters")
    left = {path.name for path in out.iterdir()} if ended.code and out is not None and out.exists() else set()
    if left - RESUMABLE and "skipped.jsonl" not in left:  # a run that skipped what was not finite did train
        faults.append(f"left {sorted(left)}")
    faults += [f"left {path}" for path in Path.cwd().rglob("*.tmp")]
    return faults


def check(
    file: Path,
    damages: list[Damage],
    arguments: list[str],
    capsys: pytest.CaptureFixture[str],
    fresh: Callable[[], object],
    out: Path | None = None,
    every: bool = True,
) -> None:
    """Run a command once for each damage to ``file``, on a fresh copy of the world, and collect what goes wrong."""
    wrong: list[str] = []
    for name, damage in damages:
        fresh()
        if file.is_dir() and not file.is_symlink():
            shutil.rmtree(file)
        else:
            file.unlink(missing_ok=True)
        damage(file)
        wrong += [f"{file.name} {name}: {fault}" for fault in faults_of(arguments, capsys, out)]
    assert not wrong, f"{len(wrong)} of {len(damages)}:\n" + "\n".join(wrong)
