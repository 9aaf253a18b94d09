"""The scripts of ``tools/bench`` run. Their ratios are not checked, since times depend on the machine."""

from __future__ import annotations

import math
import runpy
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.gpu.launch import needs_pretended_gpu, on_pretended_gpu
from tests.slow.warm import run

BENCH = Path(__file__).parents[2] / "tools" / "bench"
SCRIPTS = sorted(path.name for path in BENCH.glob("*.py") if '__name__ == "__main__"' in path.read_text())
# the fastest ones; the others take minutes
RUN = ["autoencoder.py", "convergence.py", "data.py", "latents.py", "training.py"]


@pytest.mark.parametrize("script", sorted({*SCRIPTS} - {*RUN}))
def test_its_imports_and_help(script: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.syspath_prepend(BENCH)  # as of a script
    monkeypatch.setattr(sys, "argv", [script, "--help"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(BENCH / script), run_name="__main__")
    assert not ended.value.code and "--quick" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize("script", RUN)
def test_quick_prints_ratios(script: str, tmp_path: Path) -> None:
    status, said = run([sys.executable, str(BENCH / script), "--quick"], tmp_path, seconds=580)
    assert status == 0, said[-4000:]
    ratios = [line.split() for line in said.splitlines() if line.startswith("ratio ")]
    assert ratios
    for _, _, *values in ratios:
        median, least, most = map(float, values)
        assert 0 < least <= median <= most and math.isfinite(most)


def test_the_model_of_exchanged_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    """A ring sends the gradients twice, FSDP half as much again; one process sends nothing."""
    monkeypatch.syspath_prepend(BENCH)  # as of a script
    scaling = runpy.run_path(str(BENCH / "scaling.py"))
    exchanged, efficiency = scaling["exchanged_bytes"], scaling["expected_efficiency"]
    assert exchanged(1e9, 1) == exchanged(1e9, 1, sharded=True) == 0 and efficiency(1.0, 1e9, 1, 1e9) == 1
    assert exchanged(1e9, 2) == 1e9 and exchanged(1e9, 1000) == pytest.approx(2e9, rel=0.01)
    assert exchanged(1e9, 8, sharded=True) == 1.5 * exchanged(1e9, 8)
    assert efficiency(1.0, 1e9, 2, 1e9) == 0.5


def test_a_wait_is_named_by_the_line_that_asks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(BENCH)
    modes: list[str] = []
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", modes.append)
    parts = runpy.run_path(str(BENCH / "timeline.py"))["StepParts"](steps=1)
    parts._count_waits()
    for _ in range(3):
        warnings.warn("called a synchronizing CUDA operation", stacklevel=1)
    warnings.warn("something else", stacklevel=1)
    parts._counting.close()
    (place,) = parts.waits
    assert modes == ["warn", "default"] and place.startswith("tests/slow/test_benches.py:") and parts.waits[place] == 3


def parts_of_steps(counts: Any) -> list[dict[str, float]]:
    """Of both stages, on a pretended GPU."""
    sys.path.insert(0, str(BENCH))
    training = runpy.run_path(str(BENCH / "training.py"))
    with tempfile.TemporaryDirectory() as folder:
        bench = training["Bench"](Path(folder), tiny=True, steps=3, processes=1)
        bench.make_data()
        rows = [next(row for row in training["QUICK"] if row.kind == kind) for kind in ("denoiser", "autoencoder")]
        return [bench.train(row).parts for row in rows]


@pytest.mark.slow
@needs_pretended_gpu
def test_every_part_of_a_step_is_between_two_events() -> None:
    """Between two events of a pretended GPU there is a millisecond."""
    two, one = on_pretended_gpu(parts_of_steps)
    assert {part: two[part] for part in ("data", "forward", "backward", "optimiser", "averages")} == pytest.approx(
        {"data": 1e-3, "forward": 1e-3, "backward": 1e-3, "optimiser": 1e-3, "averages": 1e-3}
    )
    # at the reconstruction by both losses, through the autoencoder, through the discriminator
    assert one["forward"] == one["backward"] == pytest.approx(4e-3) and one["optimiser"] == pytest.approx(2e-3)
