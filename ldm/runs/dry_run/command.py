"""``fit --dry-run``: what a run will ask for, from a few of its own steps, before hours are spent on it.

The run's own configuration is fitted in a hidden folder beside ``--out``, which is removed: every kind of step it has, a
validation, a preview and a checkpoint, as they will be. ``--find-batch`` looks for the largest batch instead.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from lightning import Trainer
from lightning.pytorch.cli import LightningArgumentParser
from lightning.pytorch.utilities import rank_zero_only

from ldm.errors import UsageError
from ldm.runs.callbacks import ModelFlops, ProgressLine
from ldm.runs.dry_run.estimate import show_costs, total_of
from ldm.runs.dry_run.find_batch import FindBatch, show_batches
from ldm.runs.dry_run.rehearsal import Measure, kinds_of
from ldm.runs.fit import FitCLI
from ldm.training.base import TrainingModule


class DryRunCLI(FitCLI):
    """``fit --dry-run`` and ``fit --find-batch``."""

    def __init__(self, stage: type[TrainingModule], arguments: list[str]):
        self.trial: Path | None = None
        try:
            super().__init__(stage, arguments)
        finally:
            if self.trial is not None and rank_zero_only.rank == 0:
                shutil.rmtree(self.trial, ignore_errors=True)

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        super().add_arguments_to_parser(parser)
        what = "a few steps, a validation, a preview and a checkpoint; say what the run will cost, and leave nothing behind"
        parser.add_argument("--dry-run", action="store_true", help=what)
        parser.add_argument("--find-batch", action="store_true", help="the same for the largest data.batch_size that fits")

    def before_instantiate_classes(self) -> None:
        """All that ``fit`` asks of the options; then they are turned to a folder that will not stay."""
        super().before_instantiate_classes()
        options = self.options
        if options.trainer.max_steps < 1:
            raise UsageError(f"trainer.max_steps is {options.trainer.max_steps}; give the steps of the whole run")
        out = Path(options.out).absolute()
        self.place = next(parent for parent in out.parents if parent.is_dir())
        self.trial = self.place / f".{out.name}.dry-run"
        if rank_zero_only.rank == 0:
            shutil.rmtree(self.trial, ignore_errors=True)
        options.out = options.trainer.default_root_dir = str(self.trial)
        options.export = None
        options.trainer.logger = False  # W&B is not told of it
        if options.find_batch:
            options.data.batch_size = options.model.accumulate
            options.trainer.limit_val_batches = 0

    def instantiate_trainer(self, **settings: Any) -> Trainer:
        trainer = super().instantiate_trainer(**settings)
        kinds = kinds_of(self.model, trainer.max_steps)
        if self.options.find_batch:
            self.finder = FindBatch(kinds[-1])
            trainer.callbacks[:] = [self.finder]
        else:
            self.measure = Measure(kinds)
            others = [each for each in trainer.callbacks if not isinstance(each, (ModelFlops, ProgressLine))]
            trainer.callbacks[:] = [self.measure, *others]
        return trainer

    def after_fit(self) -> None:
        if not self.trainer.is_global_zero:
            return
        if self.options.find_batch:
            show_batches(self.finder)
        else:
            measured = self.measure.measured
            total = total_of(self.model, self.trainer, measured, self.trial)
            show_costs(self.model, self.trainer, measured, total, shutil.disk_usage(self.place).free, self.place)
