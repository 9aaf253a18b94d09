"""Steps that are left out because their loss or gradients are not finite."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning import Trainer

from ldm.data.plan import PlannedSample
from ldm.errors import LdmError

log = logging.getLogger(__name__)

#: of a run's folder: a line for each step left out, with the keys of its samples; of other processes ``1-skipped.jsonl`` …
SKIPPED_NAME = "skipped.jsonl"


class SkippedSteps:
    """Counts the steps left out, writes down what they were to be trained on, and stops a run that has too many in a row.

    All processes must be told of the same step, as they are where losses and gradients are theirs together.
    """

    def __init__(self, max_in_a_row: int):
        self.max_in_a_row = max_in_a_row
        self.total = 0
        self.in_a_row: dict[str, int] = {}

    def took(self, player: str) -> None:
        """A step of this player that was not left out."""
        self.in_a_row[player] = 0

    def left_out(self, player: str, trainer: Trainer, draws: Sequence[PlannedSample]) -> None:
        """One that was. Raises :class:`LdmError` where it is one too many."""
        self.total += 1
        self.in_a_row[player] = in_a_row = self.in_a_row.get(player, 0) + 1
        rank, step = trainer.global_rank, trainer.global_step
        file = Path(trainer.default_root_dir, SKIPPED_NAME if rank == 0 else f"{rank}-{SKIPPED_NAME}")
        dataset = trainer.datamodule.train_set
        samples = [dict(zip(("shard", "key"), dataset.name_of(draw.sample), strict=True)) for draw in draws]
        file.parent.mkdir(parents=True, exist_ok=True)
        with open(file, "a", encoding="utf-8") as lines:
            lines.write(json.dumps({"step": step, "player": player, "samples": samples}) + "\n")
        if rank == 0:  # the others' is the same
            log.warning("the %s's loss or gradients of step %d are not finite: skipped (%d in a row)", player, step, in_a_row)
        if in_a_row > self.max_in_a_row:
            raise LdmError(
                f"the {player}'s loss or gradients were not finite {in_a_row} times in a row, at step {step}; look at "
                f"the samples in {file} (ldm shards check --deep, ldm latents check), go on from an earlier checkpoint with a "
                "lower learning_rate, or raise model.max_skipped"
            )

    def state_dict(self) -> dict[str, Any]:
        return {"total": self.total, "in_a_row": dict(self.in_a_row)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.total, self.in_a_row = state["total"], dict(state["in_a_row"])
