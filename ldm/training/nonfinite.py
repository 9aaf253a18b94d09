"""Steps that are skipped because their loss or gradients are not finite."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
from lightning import Trainer

from ldm.data.datamodule import datamodule_of
from ldm.errors import LdmError

log = logging.getLogger(__name__)

#: file in the run folder with a line for each skipped step; process 1 writes ``1-skipped.jsonl`` and so on
SKIPPED_NAME = "skipped.jsonl"


class SkippedSteps:
    """Counts skipped steps, records their samples, and stops a run after too many in a row.

    All processes skip the same steps, because they decide on losses and gradients that are reduced over all of them.
    """

    def __init__(self, max_in_a_row: int):
        self.max_in_a_row = max_in_a_row
        self.total = 0
        self.in_a_row: dict[str, int] = {}

    def count_taken(self, network: str) -> None:
        """Count a step that updated this network."""
        self.in_a_row[network] = 0

    def count_skipped(self, network: str, trainer: Trainer, step: int, draws: np.ndarray) -> None:
        """Count and record a step that did not, by its number from 0 and its draws (B, 2).

        Raises :class:`LdmError` if it is one too many.
        """
        self.total += 1
        self.in_a_row[network] = in_a_row = self.in_a_row.get(network, 0) + 1
        rank = trainer.global_rank
        file = Path(trainer.default_root_dir, SKIPPED_NAME if rank == 0 else f"{rank}-{SKIPPED_NAME}")
        dataset = datamodule_of(trainer).train_set
        names = [dict(zip(("shard", "key"), dataset.name_of(sample), strict=True)) for sample, _ in draws.tolist()]
        file.parent.mkdir(parents=True, exist_ok=True)
        with open(file, "a", encoding="utf-8") as lines:
            lines.write(json.dumps({"step": step, "network": network, "samples": names}) + "\n")
        if rank == 0:  # the others would say the same
            log.warning("the %s's loss or gradients of step %d are not finite: skipped (%d in a row)", network, step, in_a_row)
        if in_a_row > self.max_in_a_row:
            raise LdmError(
                f"the {network}'s loss or gradients were not finite {in_a_row} times in a row, at step {step}; check "
                f"the samples in {file} (ldm shards check --deep, ldm latents check), resume from an earlier checkpoint with a "
                "lower learning_rate, or raise max_skipped"
            )

    def state_dict(self) -> dict[str, Any]:
        return {"total": self.total, "in_a_row": dict(self.in_a_row)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.total, self.in_a_row = state["total"], dict(state["in_a_row"])
