"""LightningCLI for the training modules: the options that every command on a run's config parses."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from lightning import Trainer
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI

from ldm.data.datamodule import ShardDataModule
from ldm.errors import LdmError
from ldm.runs.checkpoints.callback import Checkpoints
from ldm.runs.layout import RunFolder
from ldm.training.base import TrainingModule

# The loader is endless and the trainer counts steps, so Lightning's hints about epochs and workers mislead here.
EXPECTED_WARNINGS = (
    ".*LightningCLI's args parameter.*",
    ".*The parameter 'pretrained' is deprecated.*",
    ".*Arguments other than a weight enum.*",
    ".*in eval mode at the start of training.*",  # LPIPS, frozen
    ".*does not have many workers.*",
    ".*Checkpoint directory .* exists and is not empty.*",
    ".*LeafSpec.*",
    ".*sync_dist=True.*",  # every process validates on the same samples
    ".*GPU available but not used.*",
    ".*FSDP2-wrapped module .* returned a view tensor.*",  # nothing modifies it in place
    ".*available.*val_check_interval.*",
    ".*You defined a `validation_step` but have no `val_dataloader`.*",
)


class TrainingCLI(LightningCLI):
    """Parses the options of ``fit`` and builds the module, the data and the trainer."""

    model: TrainingModule
    datamodule: ShardDataModule
    trainer: Trainer

    def __init__(self, module_class: type[TrainingModule], arguments: Sequence[str]):
        self.module_class, self.arguments = module_class, arguments
        for message in EXPECTED_WARNINGS:
            warnings.filterwarnings("ignore", message)
        logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
        logging.getLogger("lightning.fabric").setLevel(logging.WARNING)
        super().__init__(
            module_class,
            ShardDataModule,
            args=list(arguments),
            seed_everything_default=0,
            save_config_kwargs={"overwrite": True},
            auto_configure_optimizers=False,
            parser_kwargs={"prog": f"ldm {module_class.command}", "exit_on_error": False},
            # the loader never ends: a run has so many steps, and validates every so many
            trainer_defaults={"max_epochs": -1, "max_steps": 1000, "check_val_every_n_epoch": None},
        )

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        return {"fit": {"model", "train_dataloaders", "val_dataloaders", "datamodule"}}

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_argument("--out", required=True, type=str, help="new folder of the run: config, logs, previews, checkpoints")
        parser.add_argument("--export", type=str, help="folder of the exported model (default: inside OUT)")
        parser.add_argument("--title", type=str, help="title of the progress line")
        what = "resume the run in OUT: latest (its newest whole checkpoint; without one the run starts anew) or a path"
        parser.add_argument("--resume", type=str, help=what)
        what = "of fp32 matrix products on GPUs: high or medium use TF32, which is faster and less exact"
        parser.add_argument("--matmul_precision", type=Literal["highest", "high", "medium"], default="highest", help=what)
        parser.add_lightning_class_args(Checkpoints, "checkpoints")

    @property
    def options(self) -> Any:
        """The parsed options of ``fit``."""
        return self.config[self.config.subcommand]

    @property
    def folder(self) -> RunFolder:
        return RunFolder(Path(self.options.out))

    def instantiate_classes(self) -> None:
        """Raise an error of a class as its own line; jsonargparse wraps it in many."""
        try:
            super().instantiate_classes()
        except ValueError as error:
            cause: BaseException | None = error
            while cause is not None and not isinstance(cause, LdmError):
                cause = cause.__cause__ or cause.__context__
            if cause is None:
                raise
            raise cause from None
        self.datamodule.reads_captions = self.module_class.reads_captions
