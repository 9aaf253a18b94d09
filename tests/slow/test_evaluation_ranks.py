"""Several processes evaluate a pipeline: the metrics are those of one process."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from ldm.data.writer import write_images
from ldm.models.text_encoder import TextEncoder
from ldm.shapes.scenes import generate

from .warm import run

pytestmark = pytest.mark.slow


def test_two_processes_write_the_metrics_of_one(make_pipeline: Callable, tiny_text_encoder: str, tmp_path: Path) -> None:
    make_pipeline(words=TextEncoder.load(tiny_text_encoder)).save_pretrained(tmp_path / "pipeline")
    write_images(tmp_path / "shards", "shapes", generate(26, 32, seed=0))
    command = ["python", "-m", "ldm", "evaluate", "pipeline", f"{tmp_path}/pipeline", "--shards", f"{tmp_path}/shards"]
    command += ["--network", "alex-random", "--size", "32", "--steps", "1", "--batch-size", "3", "--json"]
    records = []
    for processes in (1, 2):
        (tmp_path / str(processes)).mkdir()
        status, said = run([*command, f"{tmp_path}/{processes}.json"], tmp_path / str(processes), processes)
        assert status == 0, said
        assert said.count("metric") == 1  # one process prints
        records.append(json.loads((tmp_path / f"{processes}.json").read_text()))
    assert records[0] == records[1] and records[0]["protocol"]["generated"] == 26
    sweep = ["python", "-m", "ldm", "sweep", *command[5:-3], "--batch-size", "3", "--guidance", "1,2", "--scheduler", "euler"]
    for processes in (1, 2):
        status, said = run([*sweep, "--out", f"{tmp_path}/{processes}/sweep"], tmp_path / str(processes), processes)
        assert status == 0, said
    first, second = ((tmp_path / each / "sweep").rglob("*.*") for each in "12")
    for one, other in zip(sorted(first), sorted(second), strict=True):
        assert one.name == other.name and one.read_bytes() == other.read_bytes(), one
