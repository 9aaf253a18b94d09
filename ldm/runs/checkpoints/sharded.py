"""Checkpoints that every process writes its part of: a folder of torch.distributed.checkpoint, whole or not there."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from torch import distributed
from torch.distributed.checkpoint.api import CheckpointException

from ldm.errors import LdmError, first_line
from ldm.files import fsync_folder, sha256_file
from ldm.runs.checkpoints.files import disk_error, files_of, raise_together, remove_checkpoint, write_sidecar


@contextmanager
def sharded_checkpoint(path: Path) -> Iterator[Path]:
    """Yield the folder for all processes to write a sharded checkpoint into; at the end it is hashed and renamed to ``path``.

    Every process calls it with the same ``path``, on a file system that they share.

    Raises:
        LdmError: on every process, where any of them could not write; nothing half-written is left.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    is_first = not distributed.is_initialized() or distributed.get_rank() == 0
    error: LdmError | None = None
    try:
        if is_first:
            shutil.rmtree(temporary, ignore_errors=True)
        raise_together(None)  # nobody begins before that
        try:
            yield temporary
        except (CheckpointException, OSError, RuntimeError) as failure:
            error = _explain(path, failure)
        raise_together(error)
        if is_first:
            try:
                _seal(temporary, path)
            except OSError as failure:
                error = disk_error(path, failure)
        raise_together(error)
    finally:
        if is_first:
            shutil.rmtree(temporary, ignore_errors=True)


def _explain(path: Path, failure: BaseException) -> LdmError:
    """torch says what each process failed with; a disk's error says more than another's."""
    failures = [cause for cause, _ in failure.failures.values()] if isinstance(failure, CheckpointException) else [failure]
    cause = next((cause for cause in failures if isinstance(cause, OSError)), failures[0])
    if isinstance(cause, OSError):
        return disk_error(path, cause)
    return LdmError(f"{path} could not be written ({first_line(cause)}); see that there is room, then go on: --resume latest")


def _seal(temporary: Path, path: Path) -> None:
    """Put the hashes of a folder's files beside, and rename it to ``path``."""
    files = files_of(temporary)
    for file in files.values():
        with open(file, "rb") as written:
            os.fsync(written.fileno())
    fsync_folder(temporary)
    hashes = {name.replace(temporary.name, path.name, 1): sha256_file(file) for name, file in files.items()}
    if path.exists():
        remove_checkpoint(path)
    write_sidecar(path, hashes)
    os.rename(temporary, path)
    fsync_folder(path.parent)
