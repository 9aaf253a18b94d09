"""``fit --dry-run``: memory, time and disk of a run from a few of its steps, before hours are spent on it.

The run's configuration is fitted in a hidden folder beside ``--out``, which is removed afterwards: steps of every kind, a
validation, a preview and a checkpoint. ``--find-batch`` finds the largest batch instead.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from lightning import Callback, Trainer
from lightning.pytorch.cli import LightningArgumentParser

from ldm.errors import UsageError
from ldm.runs.callbacks import ModelFlops, ProgressLine
from ldm.runs.dry_run.estimate import show_costs, total_of
from ldm.runs.dry_run.find_batch import FindBatch, show_batches
from ldm.runs.dry_run.measure import Measure, step_kinds
from ldm.runs.fit import FitCLI
from ldm.runs.lightning_private import is_rank_zero


class DryRunCLI(FitCLI):
    """``fit --dry-run`` and ``fit --find-batch``."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        super().add_arguments_to_parser(parser)
        what = "run a few steps, a validation, a preview and a checkpoint; print the memory, time and disk of the whole run"
        parser.add_argument("--dry-run", action="store_true", help=what)
        parser.add_argument(
            "--find-batch",
            action="store_true",
            help="find the largest data.batch_size that fits, of samples of the largest size",
        )

    def before_instantiate_classes(self) -> None:
        """After the checks of ``fit``, turn the run to a temporary folder."""
        super().before_instantiate_classes()
        options = self.options
        if options.trainer.max_steps < 1:
            raise UsageError(f"trainer.max_steps is {options.trainer.max_steps}; give the steps of the whole run")
        out = Path(options.out).absolute()
        self.place = next(parent for parent in out.parents if parent.is_dir())
        trial = self.place / f".{out.name}.dry-run"
        if is_rank_zero():
            shutil.rmtree(trial, ignore_errors=True)
            self.held.callback(shutil.rmtree, trial, ignore_errors=True)  # before the folders that the lock made
        options.out = options.trainer.default_root_dir = str(trial)
        options.export = None
        options.trainer.logger = False  # no W&B run
        if options.find_batch:
            if options.data.max_tokens is not None:
                raise UsageError("--find-batch finds data.batch_size; leave out data.max_tokens")
            options.data.batch_size = options.model.accumulate
            options.trainer.limit_val_batches = 0
            if "evaluation" in options.model:
                options.model.evaluation = None

    def instantiate_trainer(self, **settings: Any) -> Trainer:
        trainer = super().instantiate_trainer(**settings)
        callbacks: list[Callback] = trainer.callbacks  # pyright: ignore[reportAttributeAccessIssue]  set outside of the class
        kinds = step_kinds(self.model, trainer.max_steps)
        if self.options.find_batch:
            self.finder = FindBatch(kinds[-1])
            callbacks[:] = [self.finder]
        else:
            self.measure = Measure(kinds)
            callbacks[:] = [self.measure, *(each for each in callbacks if not isinstance(each, (ModelFlops, ProgressLine)))]
        return trainer

    def after_fit(self) -> None:
        if not self.trainer.is_global_zero:
            return
        if self.options.find_batch:
            show_batches(self.finder)
        else:
            measured = self.measure.measured
            total = total_of(self.model, self.trainer, measured, Path(self.options.out))
            show_costs(self.model, self.trainer, measured, total, shutil.disk_usage(self.place).free, self.place)
