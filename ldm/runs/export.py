"""The directory of a trained model, from a module in memory or from any checkpoint of a run."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from ldm.errors import UsageError, first_line
from ldm.files import atomic_folder, require_new_folder
from ldm.runs.checkpoints.files import read_checkpoint, require_whole
from ldm.runs.checkpoints.sharded import read_sharded
from ldm.runs.layout import RunFolder
from ldm.runs.training_cli import TrainingCLI
from ldm.training.base import TrainingModule

#: writes something else than a module's ``save`` into an empty folder
Writer = Callable[[Any, Path], None]


def write_artifact(module: TrainingModule, out: Path, write: Writer | None = None) -> None:
    """Write the directory that other programs open, with the averaged weights."""
    if torch.cuda.is_available():  # after training Lightning moves it to the CPU, where previews of a card take hours
        module.to("cuda")
    with atomic_folder(out) as folder, module.average_applied():
        (write or type(module).save)(module, folder)
    print(f"{module.artifact}: {out}")


class SavedRun(TrainingCLI):
    """The module and data of a run, built from its config; nothing is trained, and its folder stays as it is."""

    def __init__(self, module_class: type[TrainingModule], run: Path, checkpoint: Path | None = None):
        """``checkpoint``: of the run (default: the last one)."""
        self.checkpoint = checkpoint or RunFolder(run).last_checkpoint
        for needed in (RunFolder(run).config, self.checkpoint):
            if not needed.exists():
                raise UsageError(f"{needed} does not exist; give the folder of a run: ldm {module_class.command} fit --out RUN")
        super().__init__(module_class, ["fit", "--config", str(RunFolder(run).config)])

    def instantiate_trainer(self, **kwargs: Any) -> Any:
        return None

    def _run_subcommand(self, subcommand: str) -> None:
        pass

    def load(self) -> TrainingModule:
        """The module with the verified checkpoint's weights and averages, ready to be saved."""
        require_whole(self.checkpoint)
        try:
            checkpoint = (read_sharded if self.checkpoint.is_dir() else read_checkpoint)(self.checkpoint)
            self.model.on_load_checkpoint(checkpoint)
            self.model.load_state_dict(checkpoint["state_dict"])
        except (pickle.UnpicklingError, RuntimeError, EOFError, KeyError) as error:
            raise UsageError(f"{self.checkpoint} is not a whole checkpoint of this run: {first_line(error)}") from error
        self.datamodule.setup("fit")
        self.model.prepare(self.datamodule)
        return self.model


def export_run(
    module_class: type[TrainingModule], run: Path, out: Path, checkpoint: Path | None = None, write: Writer | None = None
) -> None:
    """Export a checkpoint of a run (default: the last one) into a new folder, built from the run's own config."""
    require_new_folder(out, "what is exported")
    write_artifact(SavedRun(module_class, run, checkpoint).load(), out, write)
