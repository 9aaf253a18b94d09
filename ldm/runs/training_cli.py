"""LightningCLI for the training modules: the options that every command on a run's config parses."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from jsonargparse import Namespace
from lightning import LightningModule, Trainer
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback

from ldm.data.datamodule import ShardDataModule
from ldm.errors import UsageError
from ldm.runs.checkpoints.callback import Checkpoints
from ldm.runs.config import config_errors, limit_yaml, require_config_files
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


class SaveConfig(SaveConfigCallback):
    """Saves the config when training begins; one that a resumed run refuses must not replace the one that ran."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        pass

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().setup(trainer, pl_module, "fit")


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
            save_config_callback=SaveConfig,
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
        what = "of fp32 matrix products and convolutions on GPUs: high or medium use TF32, which is faster and less exact"
        parser.add_argument("--matmul_precision", type=Literal["highest", "high", "medium"], default="highest", help=what)
        parser.add_lightning_class_args(Checkpoints, "checkpoints")

    @property
    def options(self) -> Any:
        """The parsed options of ``fit``."""
        return self.config[self.config.subcommand]

    @property
    def folder(self) -> RunFolder:
        return RunFolder(Path(self.options.out))

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        limit_yaml()
        require_config_files(self.arguments)
        with config_errors("the options cannot be read"):
            super().parse_arguments(parser, args)
        for name in ("trainer", "data", "model", "checkpoints"):
            if not isinstance(section := self.options[name], Namespace):
                raise UsageError(f"{name} is {section!r}; give its options as a mapping")

    def _parse_ckpt_path(self) -> None:
        """Lightning would unpickle --ckpt_path here, unverified, for hyper-parameters that ldm does not keep there."""

    def instantiate_classes(self) -> None:
        with config_errors("the config cannot be built"):
            super().instantiate_classes()
