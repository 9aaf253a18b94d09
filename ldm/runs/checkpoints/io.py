"""Lightning's checkpoint plugin over :mod:`ldm.runs.checkpoints.files`."""

from __future__ import annotations

import os
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from lightning.fabric.plugins import CheckpointIO
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor

from ldm.runs.checkpoints.files import read_checkpoint, remove_checkpoint, require_whole_together, write_checkpoint
from ldm.runs.checkpoints.sharded import read_sharded


class VerifiedCheckpointIO(CheckpointIO):
    """Reads and writes checkpoints; in the background, one write at a time.

    Lightning's AsyncCheckpointIO does not tell when a write is done, reports an error at the next write, and copies on the
    device, where memory is short; this one copies to the host.
    """

    def __init__(self, background: bool = False):
        """``background``: write in a thread, from a copy in host memory."""
        self.background = background
        self._executor: ThreadPoolExecutor | None = None
        self._write: Future[None] | None = None

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | os.PathLike, storage_options: Any = None) -> None:
        if not self.background:
            write_checkpoint(checkpoint, Path(path))
            return
        self.wait()
        copy = apply_to_collection(checkpoint, Tensor, lambda tensor: tensor.detach().to("cpu", copy=True))
        self._executor = self._executor or ThreadPoolExecutor(1, "checkpoint")
        self._write = self._executor.submit(write_checkpoint, copy, Path(path))

    @property
    def is_writing(self) -> bool:
        """Whether a background write is under way."""
        return self._write is not None and not self._write.done()

    def wait(self) -> None:
        """Wait for the background write. Raises its error."""
        write, self._write = self._write, None
        if write is not None:
            write.result()

    def load_checkpoint(
        self, path: str | os.PathLike, map_location: Any = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Load on the host, verified by the first process, weights and plain values only.

        A sharded checkpoint is returned as that of one process.
        """
        path = require_whole_together(Path(path))
        return read_sharded(path) if path.is_dir() else read_checkpoint(path)

    def remove_checkpoint(self, path: str | os.PathLike) -> None:
        remove_checkpoint(Path(path))

    def teardown(self) -> None:
        self.wait()
