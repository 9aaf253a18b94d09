"""What one process of a run wants and all must do together."""

from __future__ import annotations

from typing import Any

from lightning import Trainer
from lightning.pytorch.callbacks import Timer

from ldm.training.base import TrainingModule
from ldm.training.step import Request


def agreed(trainer: Trainer, request: Request, mine: bool) -> bool:
    """Whether a process asks for this; every process calls it at the end of a batch, and all get the same answer.

    In training it costs nothing: the request travels with the vector that every step exchanges, so that processes learn it one
    or two steps later. Asking again before the answer gives a second one.
    """
    module = trainer.lightning_module
    if trainer.validating or not isinstance(module, TrainingModule):
        return trainer.strategy.reduce_boolean_decision(mine, all=False)
    if mine:
        module.ask(request)
    return module.asked(request)


def agree_on_time(timer: Timer) -> None:
    """Let the processes agree by :func:`agreed` that the time of a run is over. Lightning's timer broadcasts it in every step,
    for which the host waits."""

    def on_train_batch_end(trainer: Trainer, *_: Any, **__: Any) -> None:
        left = timer.time_remaining()
        if left is not None and agreed(trainer, Request.END_OF_TIME, left <= 0):
            trainer.should_stop = True

    timer.on_train_batch_end = on_train_batch_end
