"""Recommended settings in the directory of a pipeline: written there, and left out of the fingerprint of the model."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, cast

from ldm.diffusion.scheduler import make_scheduler
from ldm.files import atomic_file, read_json
from ldm.pipeline import LatentDiffusionPipeline, Recommended

INDEX, SCHEDULER = "model_index.json", "scheduler/scheduler_config.json"


def recommend(
    pipeline: LatentDiffusionPipeline, path: str | os.PathLike, scheduler: str, steps: int, guidance: float
) -> Recommended:
    """Make these settings the defaults of the pipeline in directory ``path``, which ``pipeline`` was loaded from.

    ``scheduler/`` becomes that scheduler, so that any program which opens the directory samples with it; steps and guidance go
    into ``model_index.json``.
    """
    index = read_json(Path(path) / INDEX, dict[str, Any])
    before = index.get("recommended") or {"replaces": read_json(Path(path) / SCHEDULER)}
    made = make_scheduler(scheduler, *pipeline.diffusion)
    settings: Recommended = {
        "scheduler": scheduler,
        "steps": steps,
        "guidance": guidance,
        "replaces": before["replaces"],
    }
    index |= {"scheduler": ["diffusers", type(made).__name__], "recommended": settings}
    for name, data in ((SCHEDULER, made.to_json_string().encode()), (INDEX, _as_diffusers(index))):
        with atomic_file(Path(path) / name) as file:
            file.write(data)
    return settings


def files_before(index: dict[str, Any]) -> dict[str, bytes]:
    """The files that a recommendation changed, as they were before it; none where there is no recommendation."""
    found = index.get("recommended")
    if not isinstance(found, dict) or not isinstance(replaced := found.get("replaces"), dict):
        return {}
    rest = {name: value for name, value in index.items() if name != "recommended"}
    rest["scheduler"] = ["diffusers", replaced.get("_class_name")]
    return {INDEX: _as_diffusers(rest), SCHEDULER: _as_diffusers(cast(dict[str, Any], replaced))}


def _as_diffusers(config: dict[str, Any]) -> bytes:
    """JSON as diffusers writes its configs."""
    return (json.dumps(config, indent=2, sort_keys=True) + "\n").encode()
