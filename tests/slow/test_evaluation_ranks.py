"""Several processes evaluate a pipeline: the results are those of one process."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from ldm.data.writer import write_images
from ldm.models.text_encoder import TextEncoder
from ldm.shapes.scenes import generate

from .warm import run

pytestmark = pytest.mark.slow

SAMPLING = ["--network", "alex-random", "--size", "32", "--steps", "1"]


@pytest.fixture(scope="module")
def folder(make_pipeline: Callable, tiny_text_encoder: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ranks")
    make_pipeline(words=TextEncoder.load(tiny_text_encoder)).save_pretrained(folder / "pipeline")
    for seed, name in enumerate(("shards", "held-out")):
        write_images(folder / name, "shapes", generate(26, 32, seed=seed))
    return folder


@pytest.mark.parametrize(
    ("what", "options"),
    [
        ("pipeline", SAMPLING),
        ("memorisation", [*SAMPLING, "--held-out", "held-out"]),
        ("likelihood", ["--solver", "euler", "--steps", "2", "--levels", "2", "--count", "8"]),
    ],
)
def test_two_processes_write_the_results_of_one(what: str, options: list[str], folder: Path, tmp_path: Path) -> None:
    command = ["python", "-m", "ldm", "evaluate", what, f"{folder}/pipeline", "--shards", f"{folder}/shards"]
    command += [f"{folder}/{option}" if option == "held-out" else option for option in options]
    command += ["--batch-size", "3"]
    records = []
    for processes in (1, 2):
        out = tmp_path / str(processes)
        out.mkdir()
        status, said = run([*command, "--json", f"{out}/out.json", "--page", f"{out}/page.html"], out, processes)
        assert status == 0, said
        assert said.count("look at") == 1  # one process prints
        records.append((out / "out.json").read_bytes())
    assert records[0] == records[1]


def test_two_processes_write_the_sweep_of_one(folder: Path, tmp_path: Path) -> None:
    sweep = ["python", "-m", "ldm", "sweep", f"{folder}/pipeline", "--shards", f"{folder}/shards", "--network", "alex-random"]
    sweep += ["--size", "32", "--steps", "1", "--batch-size", "3", "--guidance", "1,2", "--scheduler", "euler"]
    for processes in (1, 2):
        (tmp_path / str(processes)).mkdir()
        status, said = run([*sweep, "--out", f"{tmp_path}/{processes}/sweep"], tmp_path / str(processes), processes)
        assert status == 0, said
    first, second = ((tmp_path / each / "sweep").rglob("*.*") for each in "12")
    for one, other in zip(sorted(first), sorted(second), strict=True):
        assert one.name == other.name and one.read_bytes() == other.read_bytes(), one
