"""Checkpoints as files: complete or absent, with a sha256 beside each, in the format of sha256sum.

A checkpoint is one file, or, sharded, a folder of torch.distributed.checkpoint. ``step=00000123.ckpt.sha256`` is written
before the checkpoint is renamed to its name, so that a checkpoint without one is of an older ldm, and not half-written.
"""

from __future__ import annotations

import errno
import hashlib
import logging
import os
import shutil
import zipfile
from pathlib import Path
from typing import IO, Annotated, Any, NotRequired, cast

import torch
from pydantic import Field, FiniteFloat
from torch import distributed
from typing_extensions import TypedDict

from ldm.errors import LdmError, UsageError, first_line
from ldm.files import atomic_file, check_type, fsync_folder, read_bytes, require_version, sha256_file
from ldm.runs.layout import LAST_CHECKPOINT, Count, checkpoints_in, step_of
from ldm.runs.lightning_private import is_rank_zero

log = logging.getLogger(__name__)

SIDECAR = ".sha256"
MAX_SIDECAR_BYTES = 64 * 2**20
#: version of a checkpoint's content; a newer one is refused
FORMAT_VERSION, VERSION_KEY = 1, "format_version"
# files of a sharded checkpoint: what is not sharded (Lightning's name), and the index of the shards (torch's)
UNSHARDED, INDEX = "meta.pt", ".metadata"

ANOTHER = "give another one: --resume latest takes the newest that is whole, and export takes --checkpoint"

FIXES = {
    errno.ENOSPC: "make room there",
    errno.EDQUOT: "make room there, or raise the quota",
    errno.EFBIG: "raise the limit on the size of files (ulimit -f)",
    errno.EIO: "check the disk",
}


class _Schedule(TypedDict):
    """The state of a learning-rate schedule."""

    base_lrs: Annotated[list[FiniteFloat], Field(min_length=1)]
    _last_lr: Annotated[list[FiniteFloat], Field(min_length=1)]


class _Skipped(TypedDict):
    """Of :class:`ldm.training.nonfinite.SkippedSteps`."""

    total: Count
    in_a_row: dict[str, Count]


class Content(TypedDict):
    """What is read of a checkpoint before the run is restored from it, and numbers that would be believed."""

    global_step: Count
    lr_schedulers: NotRequired[list[_Schedule]]
    state_dict: NotRequired[dict[str, Any]]
    random: NotRequired[list[dict[str, Any]] | None]
    seed: NotRequired[Annotated[int, Field(ge=0, lt=2**64)] | None]
    skipped: NotRequired[_Skipped]
    num_images_seen: NotRequired[Count]
    latent_statistics: NotRequired[list[list[FiniteFloat]] | None]
    trained_on: NotRequired[dict[str, Any]]
    diffusion: NotRequired[dict[str, Any]]


class _Place(TypedDict):
    """Of :class:`ldm.data.loader`'s state."""

    seed: int
    epoch: Count
    samples_consumed: Count
    waiting: NotRequired[list[list[Count]]]


class _LoopState(TypedDict):
    """Of Lightning's loop."""

    combined_loader: NotRequired[list[_Place]]


class _FitLoop(TypedDict):
    """Of Lightning's loop."""

    state_dict: _LoopState


class _Loops(TypedDict):
    """Of Lightning's loops."""

    fit_loop: _FitLoop


class _Average(TypedDict):
    """Of :class:`ldm.training.ema.Average`."""

    optimization_step: NotRequired[Count]


class Summary(Content):
    """What :func:`checkpoint_summary` says."""

    loops: NotRequired[_Loops]
    average: NotRequired[_Average]


def sidecar(path: Path) -> Path:
    """Where a checkpoint's sha256 is."""
    return path.with_name(path.name + SIDECAR)


class _HashingWriter:
    """The file that :func:`torch.save` writes to; hashes and counts the bytes.

    An error of the disk is kept until the end: torch would raise its own error without the cause.
    """

    def __init__(self, file: IO[bytes]):
        self.file, self.digest, self.size = file, hashlib.sha256(), 0
        self.error: OSError | None = None

    def write(self, data: bytes) -> int:
        size = memoryview(data).nbytes
        self.size += size
        if self.error is None:
            try:
                self.file.write(data)
                self.digest.update(data)
            except OSError as error:
                self.error = error
        return size

    def flush(self) -> None:
        """:func:`write_checkpoint` flushes the file."""


def write_checkpoint(checkpoint: dict[str, Any], path: Path) -> None:
    """Write a checkpoint and its sha256, and read it back; a previous one at ``path`` stays until this one is complete.

    Raises :class:`LdmError` if it could not be written; nothing half-written is left.
    """
    size = None
    try:
        with atomic_file(path, replaces_folder=True) as file:
            writer = _HashingWriter(file)
            torch.save(checkpoint, cast(IO[bytes], writer))  # of a file it calls no more than write and flush
            size = writer.size
            if writer.error is not None:
                raise writer.error
            file.flush()
            os.fsync(file.fileno())  # before the sha256
            if path.is_dir():  # a sharded one of the same step
                remove_checkpoint(path)
            write_sidecar(path, {path.name: writer.digest.hexdigest()})
        what = what_is_broken(path)
    except OSError as error:
        raise disk_error(path, error, size) from error
    if what:
        raise LdmError(f"{path} {what} although just written; check this machine's disk and memory")


def write_sidecar(path: Path, hashes: dict[str, str]) -> None:
    """Write the sha256 of a checkpoint's files beside it; ``hashes`` are by path relative to the checkpoint's parent."""
    with atomic_file(sidecar(path), "w") as file:
        file.writelines(f"{digest}  {name}\n" for name, digest in hashes.items())


def disk_error(path: Path, error: OSError, size: int | None = None) -> LdmError:
    """The error for a checkpoint that could not be written; ``size`` in bytes, if known."""
    why = f"{error.strerror or first_line(error)}{f', it takes {size:,} bytes' if size else ''}"
    fix = FIXES.get(error.errno or 0, "check that files can be written there")
    return LdmError(f"{path} could not be written ({why}); {fix}, then resume: --resume latest")


def load_checkpoint(path: Path, mmap: bool = False) -> dict[str, Any]:
    """The content of a verified checkpoint; of a sharded one what is not sharded. ``mmap``: weights are read when used.

    Raises :class:`UsageError` if it is broken, :class:`LdmError` if a newer ldm wrote it.
    """
    require_whole(path)
    return read_checkpoint(path, mmap)


def read_checkpoint(path: Path, mmap: bool = False) -> dict[str, Any]:
    """:func:`load_checkpoint` without verification."""
    try:
        file = path / UNSHARDED if path.is_dir() else path
        content = torch.load(file, map_location="cpu", weights_only=True, mmap=mmap)
    except Exception as error:  # bytes that are not torch's make its readers raise anything
        raise UsageError(f"{path} is not a checkpoint of a run ({first_line(error)}); {ANOTHER}") from error
    found = content.get(VERSION_KEY) if isinstance(content, dict) else None
    require_version(found, FORMAT_VERSION, f"{path}: the checkpoint")
    check_type(content, str(path), Content)
    return content


def require_run(content: dict[str, Any], path: Path) -> None:
    """Raise :class:`LdmError` unless a run can be resumed from this content, as far as its types say."""
    check_type(content, str(path), Summary)
    if missing := {"average", "loops", "lr_schedulers", "seed"} - {key for key in content if content[key] != []}:
        raise UsageError(f"{path} is not a checkpoint of a run, it lacks {', '.join(sorted(missing))}; {ANOTHER}")


def require_whole(path: Path) -> None:
    """Raise :class:`UsageError` for a broken checkpoint. One that this process has verified is not hashed again."""
    if what := _verify(path):
        raise UsageError(f"{path} {what}; {ANOTHER}")


def require_whole_together(path: Path) -> Path:
    """The first process's ``path``, which that process alone verifies. Every process calls it.

    Raises :class:`UsageError` for a broken checkpoint, on every process.
    """
    together = distributed.is_available() and distributed.is_initialized()
    verdict: list[Any] = [None if together and distributed.get_rank() else (path, _verify(path))]
    if together:
        distributed.broadcast_object_list(verdict, src=0)
    path, what = verdict[0]
    if what:
        raise UsageError(f"{path} {what}; {ANOTHER}")
    return path


# checkpoints that this process has verified: names, sizes and times of their files
_verified: dict[Path, tuple[tuple[str, int, int], ...]] = {}


def _verify(path: Path) -> str | None:
    """:func:`what_is_broken`, once for each checkpoint as long as its files do not change."""
    if what := _what_is_missing(path):
        return what
    path = path.resolve()
    files = [file for file in (*files_of(path).values(), sidecar(path)) if file.exists()]
    seen = tuple((str(file), stat.st_size, stat.st_mtime_ns) for file in files for stat in [file.stat()])
    if _verified.get(path) == seen:
        return None
    what = what_is_broken(path)
    if what is None:
        _verified[path] = seen
    return what


def what_is_broken(path: Path) -> str | None:
    """What is wrong with a checkpoint's bytes, worded to follow its name; None if nothing."""
    if what := _what_is_missing(path):
        return what
    path = path.resolve()  # last.ckpt is a link
    try:
        if not sidecar(path).exists():  # of an older ldm, where only truncation can be detected; or of nobody's
            return None if path.is_dir() or zipfile.is_zipfile(path) else "is not a whole checkpoint of a run"
        lines = read_bytes(sidecar(path), MAX_SIDECAR_BYTES).decode("utf-8", "replace").splitlines()
        hashes = {name: digest for digest, _, name in (line.partition("  ") for line in lines)}
        if set(hashes) != set(files_of(path)):
            return f"does not hold the files that {sidecar(path).name} lists"
        wrong = [name for name, digest in hashes.items() if sha256_file(path.parent / name) != digest]
    except (LdmError, OSError) as error:
        return f"cannot be verified ({first_line(error)})"
    return f"is broken: {', '.join(wrong)} is not of the sha256 in {sidecar(path).name}" if wrong else None


def _what_is_missing(path: Path) -> str | None:
    """Why a path is no checkpoint at all, by names alone: it may be the root of a disk, or a pipe."""
    if not os.path.exists(path):
        return "does not exist"
    whole = all((path / name).is_file() for name in (UNSHARDED, INDEX)) if path.is_dir() else path.is_file()
    return None if whole else "is not a whole checkpoint of a run"


def files_of(path: Path) -> dict[str, Path]:
    """A checkpoint's files by path relative to its parent."""
    files = (file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]
    return {file.relative_to(path.parent).as_posix(): file for file in sorted(files)}


def remove_checkpoint(path: Path) -> None:
    """Remove a checkpoint and then its sha256."""
    if path.is_dir():  # renamed first, so that no reader sees half of it
        shutil.rmtree(path.rename(path.with_name(f".{path.name}.removed.tmp")))
    else:
        path.unlink(missing_ok=True)
    sidecar(path).unlink(missing_ok=True)


def remove_leftovers(folder: Path) -> None:
    """Remove what killed writers left in a folder that nobody else writes to."""
    for path in [*folder.glob(".*.tmp")]:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()
    for path in folder.glob(f"step=*.ckpt{SIDECAR}"):
        if not path.with_name(path.name.removesuffix(SIDECAR)).exists():
            path.unlink()


def point(link: Path, target: Path) -> None:
    """Atomically make ``link`` a relative link to its neighbour ``target``."""
    temporary = link.with_name(f".{link.name}.{os.getpid()}.tmp")
    temporary.unlink(missing_ok=True)
    temporary.symlink_to(target.name)
    os.replace(temporary, link)
    fsync_folder(link.parent)


def candidates(folder: Path) -> list[Path]:
    """The checkpoints that ``--resume latest`` chooses from, the oldest first: those up to ``last.ckpt``, not verified.

    Later steps are from before the run was resumed from an earlier checkpoint.
    """
    found = checkpoints_in(folder)
    last = (folder / LAST_CHECKPOINT).resolve()
    if last.name in [path.name for path in found]:
        found = [path for path in found if step_of(path) <= step_of(last)]
    return found


def latest_checkpoint(folder: Path) -> Path:
    """The newest whole one of :func:`candidates`. A warning names each broken one.

    Raises :class:`UsageError` if there is none.
    """
    found = candidates(folder)
    for path in reversed(found):
        what = _verify(path)
        if what is None:
            return path
        if is_rank_zero():
            log.warning("%s %s; trying the one before", path, what)
    none = f"none of its {len(found)} checkpoints is whole" if found else "there is no checkpoint"
    raise UsageError(f"{folder}: {none}; start the run anew, without --resume")


def raise_together(error: LdmError | None) -> None:
    """Raise an error that any process has on all of them. Every process calls it, with its error or None."""
    said: list[str | None] = [None if error is None else str(error)]
    if distributed.is_available() and distributed.is_initialized():
        said = [None] * distributed.get_world_size()
        distributed.all_gather_object(said, None if error is None else str(error))
    first = next((text for text in said if text is not None), None)
    if first is not None:
        raise error or LdmError(first)


def checkpoint_summary(checkpoint: dict[str, Any]) -> str:
    """What a checkpoint holds, in two lines."""
    content = check_type(checkpoint, "the checkpoint", Summary)
    rates = [f"{schedule['_last_lr'][0]:.3g}" for schedule in content.get("lr_schedulers", [])]
    updates = content.get("average", {}).get("optimization_step")
    loaders = content["loops"]["fit_loop"]["state_dict"].get("combined_loader", []) if "loops" in content else []
    random = content.get("random")
    whole = [f"step {content['global_step']:,}"]
    if rates:
        whole.append(f"learning rate{'s' if len(rates) > 1 else ''} {' and '.join(rates)}")
    if updates is not None:
        whole.append(f"weights averaged over {updates:,} steps")
    rest = []
    for place in loaders:
        rest.append(f"data: epoch {place['epoch']:,}, {place['samples_consumed']:,} samples of it consumed")
        if waiting := place.get("waiting"):
            rest.append(f"{len(waiting):,} waiting for a batch of their size")
    states = "no random states" if not random else f"random states of {len(random)} process{'es' if len(random) > 1 else ''}"
    return f"{', '.join(whole)}\n{', '.join([*rest, states])}"
