"""``fit`` as one run: its folder, its trainer, and the plain directory that it leaves behind."""

from __future__ import annotations

import logging
import pickle
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch
from jsonargparse import Namespace
from lightning import Trainer
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.utilities import rank_zero_only

from ldm.data.datamodule import ShardDataModule
from ldm.data.sources import open_source
from ldm.errors import LdmError, UsageError, first_line
from ldm.files import atomic_folder, require_new_folder
from ldm.machine import bf16_pays
from ldm.runs.callbacks import AverageSnapshots, ModelFlops, PreviewGrid, ProgressLine
from ldm.runs.checkpoints.callback import Checkpoints
from ldm.runs.checkpoints.files import (
    candidates,
    checkpoint_summary,
    latest_checkpoint,
    load_checkpoint,
    read_checkpoint,
    require_whole,
)
from ldm.runs.checkpoints.sharded import read_sharded
from ldm.runs.faults import explained
from ldm.runs.layout import RunFolder, is_checkpoint, step_of
from ldm.runs.lightning_private import set_ddp_options
from ldm.runs.logging import loggers, recorded
from ldm.runs.preemption import Preemption
from ldm.runs.strategies import FullySharded
from ldm.runs.torchrun import run_under_torchrun
from ldm.training.base import TrainingModule
from ldm.training.fsdp import is_sharded

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
    ".*FSDP2-wrapped module .* returned a view tensor.*",  # nothing is done to it in place
    ".*available.*val_check_interval.*",
    ".*You defined a `validation_step` but have no `val_dataloader`.*",
)


LATEST = "latest"


class FitCLI(LightningCLI):
    """LightningCLI for a :class:`TrainingModule`, with ``--out``: where the run and its product go."""

    def __init__(self, stage: type[TrainingModule], arguments: list[str]):
        self.arguments = arguments
        for message in EXPECTED_WARNINGS:
            warnings.filterwarnings("ignore", message)
        logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
        logging.getLogger("lightning.fabric").setLevel(logging.WARNING)
        super().__init__(
            stage,
            ShardDataModule,
            args=arguments,
            seed_everything_default=0,
            save_config_kwargs={"overwrite": True},
            auto_configure_optimizers=False,
            parser_kwargs={"prog": f"ldm {stage.command}", "exit_on_error": False},
            # the loader never ends: a run is so many steps, and validation comes every so many
            trainer_defaults={"max_epochs": -1, "max_steps": 1000, "check_val_every_n_epoch": None},
        )

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        return {"fit": {"model", "train_dataloaders", "val_dataloaders", "datamodule"}}

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_argument("--out", required=True, type=str, help="new folder of the run: config, logs, previews, checkpoints")
        parser.add_argument("--export", type=str, help="where the plain directory goes at the end (default: inside OUT)")
        parser.add_argument("--title", type=str, help="what the line of progress says")
        what = "go on with the run in OUT: latest (its newest whole checkpoint; where there is none, from nothing) or a path"
        parser.add_argument("--resume", type=str, help=what)
        what = "of fp32 matrix products on GPUs: high or medium for TF32, faster and less exact"
        parser.add_argument("--matmul_precision", type=Literal["highest", "high", "medium"], default="highest", help=what)
        parser.add_lightning_class_args(Checkpoints, "checkpoints")

    @property
    def options(self) -> Any:
        """The parsed options of ``fit``."""
        return self.config[self.config.subcommand]

    @property
    def folder(self) -> RunFolder:
        """Of the run."""
        return RunFolder(Path(self.options.out))

    @property
    def product(self) -> Path:
        """Where the plain directory goes."""
        return Path(self.options.export or Path(self.options.out) / self._model_class.artifact)

    def before_instantiate_classes(self) -> None:
        options = self.options
        run_under_torchrun([self._model_class.command, *self.arguments], options.trainer)
        self._find_checkpoint()
        self.fresh = self.checkpoint is None
        self.made_folder = not Path(options.out).exists() or not any(Path(options.out).iterdir())
        # the first process alone: by the time another one looks, the folder is already this run's
        if rank_zero_only.rank == 0:
            require_new_folder(self.product, "what the run makes")
            if self.fresh and not (options.resume and self.folder.logs.is_dir()):
                require_new_folder(options.out, "the run")
            elif not self.fresh and not self.folder.checkpoints_folder.is_dir():
                raise UsageError(f"{options.out} is not the folder of a run; give the one that the checkpoint is of as --out")
        for split in ("train", "validation"):
            given = options.data[split]
            for path in [given] if isinstance(given, str) else [source.path for source in given]:
                try:
                    open_source(path)
                except UsageError as error:
                    raise UsageError(f"data.{split}: {error}") from None
        if not isinstance(options.trainer.val_check_interval, int | float | None):
            raise UsageError(
                f"trainer.val_check_interval {options.trainer.val_check_interval}: the clocks of processes differ; give a "
                "number of batches"
            )
        if options.trainer.accumulate_grad_batches != 1:
            raise UsageError(
                f"trainer.accumulate_grad_batches {options.trainer.accumulate_grad_batches}: give the whole batch as "
                "data.batch_size and split it with model.accumulate"
            )
        if options.trainer.max_epochs not in (None, -1):
            raise UsageError("trainer.max_epochs: the loader never ends; say with trainer.max_steps how many batches to train")
        if str(options.trainer.precision) in ("16", "16-mixed", "16-true") and not torch.cuda.is_available():
            # Lightning would take bf16 in its place and say so in passing
            raise UsageError(f"trainer.precision {options.trainer.precision}: a CPU has no fp16; give bf16-mixed or 32-true")
        if options.trainer.precision is None:
            options.trainer.precision = "bf16-mixed" if bf16_pays() else "32-true"
        if options.trainer.strategy in ("fsdp", "fsdp2"):
            options.trainer.strategy = Namespace(class_path=class_path(FullySharded), init_args=Namespace())
        torch.set_float32_matmul_precision(options.matmul_precision)
        options.trainer.default_root_dir = options.out

    def _find_checkpoint(self) -> None:
        """What to resume from, by ``--resume`` or ``--ckpt_path``, and how many steps that has; None where there is nothing.

        The first process alone chooses and verifies; the others take its choice when the checkpoint is loaded.
        """
        options, first = self.options, rank_zero_only.rank == 0
        folder = self.folder.checkpoints_folder
        self.checkpoint = options.ckpt_path and Path(options.ckpt_path)
        self.resumed_at: int | None = None
        if options.resume and self.checkpoint:
            raise UsageError("--resume and --ckpt_path both say what to resume from; give one")
        if options.resume and options.resume != LATEST:
            self.checkpoint = Path(options.resume)
            if not self.checkpoint.exists():
                raise UsageError(f"--resume {self.checkpoint} does not exist; give latest, or one of {folder}")
        elif options.resume and (found := candidates(folder)):
            self.checkpoint = found[-1]
        elif options.resume and first:
            print(f"{options.out}: no checkpoint to resume from yet; starting from nothing")
        if not self.checkpoint:
            return
        if options.resume:
            self._leave_where_finished(self.checkpoint)
        if first:
            if options.resume == LATEST:
                self.checkpoint = latest_checkpoint(folder)
            content = load_checkpoint(self.checkpoint, mmap=True)  # for a few values
            self.resumed_at = content["global_step"]
            self._require_its_optimiser(content)
            print(f"resuming from {self.checkpoint}: {checkpoint_summary(content)}")

    def _leave_where_finished(self, checkpoint: Path) -> None:
        """A job that is put in a queue again and again must find its end."""
        name = checkpoint.resolve()  # of last.ckpt
        step = step_of(name) if is_checkpoint(name) else read_checkpoint(checkpoint, mmap=True)["global_step"]
        if step >= self.options.trainer.max_steps and self.product.is_dir():
            print(f"{self.options.out} is finished: {self.product}")
            raise SystemExit(0)

    def _require_its_optimiser(self, checkpoint: dict[str, Any]) -> None:
        """Moments of one optimiser are none of the other's; torch would only say that their number is not the same."""
        asked = self.options.model.optimiser.muon_learning_rate is not None
        rates = checkpoint["lr_schedulers"][0]["base_lrs"]  # the second is Muon's
        if (len(rates) > 1) != asked:
            how, fix = ("without", "null") if asked else ("with", f"{rates[1]:g}")
            raise UsageError(
                f"{self.checkpoint} was trained {how} Muon: give --model.optimiser.muon_learning_rate {fix} to resume from it"
            )

    def _prepare_subcommand_kwargs(self, subcommand: str) -> dict[str, Any]:
        # not by ckpt_path in the config, which is kept: given again, it must not ask for an old checkpoint
        return super()._prepare_subcommand_kwargs(subcommand) | {"ckpt_path": self.checkpoint}

    def instantiate_classes(self) -> None:
        """A setting that its class refuses is said in the class's own words; jsonargparse would wrap them in many lines."""
        try:
            super().instantiate_classes()
        except ValueError as error:
            cause: BaseException | None = error
            while cause is not None and not isinstance(cause, LdmError):
                cause = cause.__cause__ or cause.__context__
            if cause is None:
                raise
            raise cause from None

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        out, settings = Path(self.options.out), self.config_init[self.config.subcommand].trainer
        model_flops = ModelFlops()
        trainer = super().instantiate_trainer(
            logger=loggers(out, settings.logger, self.resumed_at),
            callbacks=[
                *(settings.callbacks or []),
                Preemption(),
                model_flops,
                ProgressLine(self.options.title or self._model_class.artifact, model_flops),
                PreviewGrid(),
                AverageSnapshots(),
            ],
            enable_progress_bar=False,
            enable_model_summary=False,
            num_sanity_val_steps=0,
            # the plan deals samples to the ranks itself
            use_distributed_sampler=False,
        )
        if isinstance(trainer.strategy, DDPStrategy):
            # every process computes the same buffers by itself
            set_ddp_options(
                trainer.strategy, find_unused_parameters=self._model_class.find_unused_parameters, forward_sync_buffers=False
            )
        return trainer

    def _run_subcommand(self, subcommand: str) -> None:
        """A run that was refused before its first step leaves nothing behind, so that it can be asked for again."""
        command = ["ldm", self._model_class.command, *self.arguments]
        try:
            with recorded(self.trainer, self.model, command, self.resumed_at), explained(self.trainer):
                super()._run_subcommand(subcommand)
        except LdmError:
            if self.made_folder and self.trainer.is_global_zero and self.trainer.global_step == 0:
                shutil.rmtree(self.options.out, ignore_errors=True)
            raise

    def after_fit(self) -> None:
        """Write the last checkpoint and the plain directory, the latter with the averaged weights."""
        if not self.trainer.is_global_zero:
            return
        if is_sharded(self.model.averaged()):
            ExportCLI(self._model_class, Path(self.options.out), self.product)
        else:
            write_artifact(self.model, self.product)


def class_path(given: type) -> str:
    """As a config names it."""
    return f"{given.__module__}.{given.__qualname__}"


def write_artifact(model: TrainingModule, out: Path, write: Callable[[TrainingModule, Path], None] | None = None) -> None:
    """The plain directory that other programs open, with the averaged weights."""
    if torch.cuda.is_available():  # after training Lightning puts it back on the CPU, where its latents would take hours
        model.to("cuda")
    with atomic_folder(out) as folder, model.average_applied():
        (write or type(model).save)(model, folder)
    print(f"{model.artifact}: {out}")


class ExportCLI(FitCLI):
    """The plain directory of any checkpoint of a run, made from the run's own configuration."""

    def __init__(
        self,
        stage: type[TrainingModule],
        run: Path,
        out: Path,
        checkpoint: Path | None = None,
        write: Callable[[TrainingModule, Path], None] | None = None,
    ):
        """
        Args:
            stage: what the run trained.
            run: its folder.
            out: a new folder for what comes out.
            checkpoint: of the run (default: the last one).
            write: writes something else than the stage's own product into an empty folder.

        Raises:
            UsageError: where these do not serve.
        """
        self.destination = require_new_folder(out, "what is exported")
        self.checkpoint = checkpoint or RunFolder(run).last_checkpoint
        self.write = write
        for needed in (RunFolder(run).config, self.checkpoint):
            if not needed.exists():
                raise UsageError(f"{needed} does not exist; give the folder of a run: ldm {stage.command} fit --out RUN")
        super().__init__(stage, ["fit", "--config", str(RunFolder(run).config)])

    def before_instantiate_classes(self) -> None:
        """Nothing of the run's folder is written to."""

    def instantiate_trainer(self, **kwargs: Any) -> None:
        """There is nothing to train."""

    def read(self) -> dict[str, Any]:
        """The checkpoint, verified; of a sharded one the whole."""
        require_whole(self.checkpoint)
        return (read_sharded if self.checkpoint.is_dir() else read_checkpoint)(self.checkpoint)

    def _run_subcommand(self, subcommand: str) -> None:
        try:
            checkpoint = self.read()
            self.model.on_load_checkpoint(checkpoint)
            self.model.load_state_dict(checkpoint["state_dict"])
        except (pickle.UnpicklingError, RuntimeError, EOFError, KeyError) as error:
            raise UsageError(f"{self.checkpoint} is not a whole checkpoint of this run: {first_line(error)}") from error
        self.datamodule.setup("fit")
        self.model.prepare(self.datamodule)
        write_artifact(self.model, self.destination, self.write)
