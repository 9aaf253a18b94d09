"""What one process of a run wants and all must do together."""

from __future__ import annotations

from lightning import Trainer

from ldm.training.base import TrainingModule
from ldm.training.step import Request


def agreed(trainer: Trainer, request: Request, mine: bool) -> bool:
    """Whether a process asks for this; every process calls it at the end of a batch, and all get the same answer.

    In training it costs nothing: the request travels with the vector that every step exchanges, so that processes learn it one
    or two steps later. Asking again before the answer is heard twice.
    """
    module = trainer.lightning_module
    if trainer.validating or not isinstance(module, TrainingModule):
        return trainer.strategy.reduce_boolean_decision(mine, all=False)
    if mine:
        module.ask(request)
    return module.asked(request)
