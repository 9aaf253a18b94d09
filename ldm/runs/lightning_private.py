"""Every private attribute of Lightning that ldm uses, each behind a small function that says why.

``tests/runs/test_lightning_private.py`` tests what each of them does in the installed version.
"""

from __future__ import annotations

import signal
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from lightning import Trainer
from lightning.fabric.utilities.load import _load_distributed_checkpoint
from lightning.pytorch.loops import evaluation_loop, training_epoch_loop
from lightning.pytorch.strategies import DDPStrategy, Strategy
from lightning.pytorch.trainer.connectors import checkpoint_connector
from lightning.pytorch.utilities import rank_zero_only


def is_rank_zero() -> bool:
    """Whether this is the first process, before there is a trainer: an attribute that Lightning sets on a function."""
    return rank_zero_only.rank == 0  # pyright: ignore[reportFunctionMemberAccess]


def is_restoring(error: BaseException) -> bool:
    """Whether an error comes from putting a checkpoint's content back, not from training: Lightning's functions tell."""
    frames = traceback.walk_tb(error.__traceback__)
    names = [frame.f_code.co_name for frame, _ in frames if frame.f_globals.get("__name__") == checkpoint_connector.__name__]
    return any("restore" in name or name == "resume_start" for name in names)


def accumulates(trainer: Trainer) -> bool:
    """Whether the optimiser step of this batch is still to come; callbacks have no public way to ask."""
    return trainer.fit_loop._should_accumulate()


def validation_is_due(trainer: Trainer) -> bool:
    """Whether a validation follows this batch; a checkpoint of the same step waits for it."""
    fetcher = trainer.fit_loop._data_fetcher
    assert fetcher is not None, "training has not started"
    return trainer.fit_loop.epoch_loop._should_check_val_fx(fetcher)


def skip_next_validation(trainer: Trainer) -> None:
    """Skip the validation that is due after this batch."""
    trainer.fit_loop.epoch_loop._skip_next_val = True


def current_hook(trainer: Trainer) -> str | None:
    """The name of the hook that Lightning is in, which tells whether the validation of a step is over."""
    return trainer.lightning_module._current_fx_name


def validate_first(trainer: Trainer) -> None:
    """Begin a resumed run with the validation of the step that it resumes from.

    Lightning assumes that the validation of a checkpoint of ``on_train_batch_end`` is over, and continues one that the
    checkpoint interrupted. This sets the state of a validation of which no batch is done.
    """
    loop = trainer.fit_loop.epoch_loop
    if not validation_is_due(trainer):  # under these settings
        return
    if loop.restarted_on_train_batch_end:
        loop.batch_progress.increment_completed()
    loop._restart_stage = training_epoch_loop.RestartStage.RESTARTED_ON_LAST
    loop.val_loop._restart_stage = evaluation_loop.RestartStage.RESTARTED_MID_EVALUATION
    loop.val_loop.batch_progress.reset_on_run()


def wrap_batches(trainer: Trainer, wrap: Callable[[Iterator[Any]], Iterator[Any]]) -> None:
    """Replace the iterator that batches come from, from ``on_train_start`` on.

    Around the loader itself, the time that Lightning takes to move a batch to the device would count as waiting for data.
    """
    fetcher = trainer.fit_loop._data_fetcher
    assert fetcher is not None and fetcher.iterator is not None, "training has not started"
    fetcher.iterator = wrap(fetcher.iterator)


def log_interval(trainer: Trainer) -> int:
    """``log_every_n_steps``: public, but set outside of Trainer's class, where a type checker does not find it."""
    return trainer.log_every_n_steps  # pyright: ignore[reportAttributeAccessIssue]


def log_step_metrics(trainer: Trainer) -> None:
    """Log the metrics of the current batch, which Lightning would do only after ``on_train_batch_end``."""
    trainer._logger_connector.update_train_step_metrics()


def without_sigterm_exchange(trainer: Trainer) -> None:
    """Spare every step the broadcast in which Lightning agrees on a SIGTERM, for which the host waits.

    Its own handler, which alone sets what is broadcast, is not in force during training.
    """
    trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor = _nothing


def _nothing() -> None:
    pass


def ignore_after_training(trainer: Trainer, *signals: signal.Signals) -> None:
    """Ignore these signals once Lightning restores the handlers from before training.

    If they were ignored later, a launcher's signal could end the process while it prints its last message.
    """
    handlers = trainer._signal_connector._original_handlers
    handlers |= dict.fromkeys(signals, signal.SIG_IGN)


def set_ddp_options(strategy: DDPStrategy, **options: Any) -> None:
    """Set arguments of ``DistributedDataParallel`` on a built strategy: a config that names a strategy holds all its defaults,
    so that ldm's cannot be given as defaults."""
    strategy._ddp_kwargs |= options


def writes_shards(strategy: Strategy) -> bool:
    """Whether every process writes its shards of a checkpoint."""
    return getattr(strategy, "_save_distributed_checkpoint", False)


def load_sharded_checkpoint(folder: Path) -> dict[str, Any]:
    """A whole checkpoint of ``ModelParallelStrategy``, on the host: ``state_dict``, ``optimizer_0`` … by the names of
    parameters, and what is not sharded. The format is Lightning's, so Lightning reads it."""
    return _load_distributed_checkpoint(folder)
