"""The scripts of ``tools/bench`` run. Their ratios are not checked, since times depend on the machine."""

from __future__ import annotations

import math
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

BENCH = Path(__file__).parents[2] / "tools" / "bench"
SCRIPTS = sorted(path.name for path in BENCH.glob("*.py") if '__name__ == "__main__"' in path.read_text())
# the fastest ones; the others take minutes
RUN = ["autoencoder.py", "convergence.py", "data.py", "latents.py"]


def printed(script: str, option: str, folder: Path) -> str:
    """Standard output of a script that succeeds."""
    command = [sys.executable, str(BENCH / script), option]
    ended = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=580)
    assert ended.returncode == 0, ended.stdout[-1000:] + ended.stderr[-3000:]
    return ended.stdout


@pytest.mark.slow
@pytest.mark.parametrize("script", sorted({*SCRIPTS} - {*RUN}))
def test_its_imports_and_help(script: str, tmp_path: Path) -> None:
    assert "--quick" in printed(script, "--help", tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("script", RUN)
def test_quick_prints_ratios(script: str, tmp_path: Path) -> None:
    ratios = [line.split() for line in printed(script, "--quick", tmp_path).splitlines() if line.startswith("ratio ")]
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
