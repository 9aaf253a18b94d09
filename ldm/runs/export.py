"""The directory of a trained model, from a module in memory or from any checkpoint of a run."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from jsonargparse import ArgumentError, Namespace, set_parsing_settings
from jsonargparse._common import parsing_settings

from ldm.errors import LdmError, UsageError, first_line
from ldm.files import atomic_folder, require_new_folder
from ldm.machine import device_type
from ldm.runs.checkpoints.files import ANOTHER, read_checkpoint, require_whole
from ldm.runs.checkpoints.sharded import read_sharded
from ldm.runs.config import TRUSTED
from ldm.runs.initial import initial_weights
from ldm.runs.layout import RunFolder
from ldm.runs.lineage import write_lineage
from ldm.runs.training_cli import TrainingCLI
from ldm.terminal import printable, say
from ldm.training.base import TrainingModule
from ldm.training.denoiser import DenoiserTraining
from ldm.training.frozen_base import plain_tensors

#: writes something else than a module's ``save`` into an empty folder
Writer = Callable[[Any, Path], None]


def write_artifact(
    module: TrainingModule, out: Path, device: torch.device | str, run: RunFolder, step: int, write: Writer | None = None
) -> None:
    """Write the directory that other programs open, with the averaged weights and the record of what they were made from.

    Args:
        device: where what has to be computed is.
        run, step: that trained the module, and for how many steps.
        write: see :data:`Writer`.
    """
    module.to(device)  # after training Lightning moves it to the CPU, where previews of a card take hours
    with atomic_folder(out) as folder, module.average_applied():
        require_finite(module.averaged(), "the average")
        (write or type(module).save)(module, folder)
        write_lineage(folder, module.command, step, run.read_starts())
    say(f"{module.artifact}: {printable(out)}")


def require_finite(network: torch.nn.Module, what: str) -> None:
    """Raise :class:`LdmError` for a weight, made from ``what``, that is NaN or infinite: it makes black images."""
    parts = ((name, part) for name, weight in network.named_parameters() for part in plain_tensors(weight))
    broken = [name for name, part in parts if not part.isfinite().all()]
    if broken:
        raise LdmError(f"{what} has weights that are not finite ({', '.join(broken[:4])}); export an earlier checkpoint of it")


class SavedRun(TrainingCLI):
    """The module and data of a run, built from its config; nothing is trained, and its folder stays as it is."""

    def __init__(
        self,
        module_class: type[TrainingModule],
        run: Path,
        checkpoint: Path | None = None,
        trust: bool = False,
        moved: Mapping[str, str] | None = None,
    ):
        """
        Args:
            checkpoint: of the run (default: the last one).
            trust: build any class that the config names. Else those of :data:`TRUSTED` alone, because the config of a run from
                elsewhere could name any class of this machine, with any arguments.
            moved: entries of its config, such as ``model.autoencoder``, and where that is now.
        """
        folder = RunFolder(run)
        self.checkpoint = checkpoint or folder.last_checkpoint
        for needed in (folder.config, self.checkpoint):
            if not os.path.exists(needed):
                raise UsageError(f"{needed} does not exist; give the folder of a run: ldm {module_class.command} fit --out RUN")
        folder.read_config()  # refuses what is none
        places = [f"--{name}={value}" for name, value in (moved or {}).items()]
        with nullcontext() if trust else classes_of(TRUSTED, folder.config):
            super().__init__(module_class, ["fit", "--config", str(folder.config), *places])

    def before_instantiate_classes(self) -> None:
        """The trainer is not built, so its parts are not either."""
        self.options.trainer.update(Namespace(callbacks=None, logger=None, plugins=None, profiler=None, strategy=None))

    def instantiate_trainer(self, **kwargs: Any) -> Any:
        return None

    def _start_beside_the_base(self) -> None:
        """Load the weights of the model that an adapter is trained beside, which its checkpoints do not hold."""
        model = self.model
        if isinstance(model, DenoiserTraining) and model.adapter_config is not None:
            initial = initial_weights(str(model.init_from), str(model.autoencoder_path))
            model.start_from(initial.read(model.denoiser, model.init_weights))

    def _run_subcommand(self, subcommand: str) -> None:
        pass

    def load(self) -> TrainingModule:
        """The module with the verified checkpoint's weights and averages, ready to be saved."""
        require_whole(self.checkpoint)
        try:
            checkpoint = (read_sharded if self.checkpoint.is_dir() else read_checkpoint)(self.checkpoint)
            self._start_beside_the_base()
            self.step = checkpoint["global_step"]
            self.model.on_load_checkpoint(checkpoint)
            self.model.load_state_dict(checkpoint["state_dict"])
        except LdmError:
            raise
        except Exception as error:  # of a checkpoint that is not of this run, anything may be wrong
            why = f"{type(error).__name__}: {first_line(error)}"
            raise UsageError(f"{self.checkpoint} is not a whole checkpoint of this run ({why}); {ANOTHER}") from error
        self.datamodule.setup("fit")
        self.model.prepare(self.datamodule)
        return self.model


@contextmanager
def classes_of(packages: Sequence[str], config: Path) -> Iterator[None]:
    """Within this context jsonargparse imports nothing else for a config's values. Raises :class:`UsageError` naming it."""
    before = dict(parsing_settings)  # jsonargparse can add to its settings, but not take away
    set_parsing_settings(import_path_denylist=["*"], import_path_allowlist=[*packages])
    try:
        yield
    except (ArgumentError, ValueError) as error:
        named = re.search(r"Importing '([\w.]+)' is not allowed", str(error))
        if named is None:
            raise
        raise UsageError(
            f"{config} names {named[1]}, and only classes of {', '.join(packages)} are built from the config of a run, which "
            "may be a stranger's; give --trust if you trust it"
        ) from None
    finally:
        parsing_settings.update(before)


def export_run(
    module_class: type[TrainingModule],
    run: Path,
    out: Path,
    checkpoint: Path | None = None,
    write: Writer | None = None,
    trust: bool = False,
    moved: Mapping[str, str] | None = None,
) -> None:
    """Export a checkpoint of a run (default: the last one) into a new folder, built from the run's own config.

    ``trust``, ``moved``: as of :class:`SavedRun`. What has to be computed is on the device of the run's accelerator, on the
    CPU where this machine has none.
    """
    require_new_folder(out, "what is exported")
    saved = SavedRun(module_class, run, checkpoint, trust, moved)
    module, device = saved.load(), device_type(str(saved.options.trainer.accelerator))
    write_artifact(module, out, device, RunFolder(run), saved.step, write)
