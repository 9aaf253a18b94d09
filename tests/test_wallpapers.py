"""Windows of Debian's wallpapers: pixels of the photograph, and none without texture."""

from __future__ import annotations

import runpy
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

TOOLS = Path(__file__).parents[1] / "tools"


def test_windows_are_pieces_of_the_photograph_with_texture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys):
    monkeypatch.syspath_prepend(TOOLS)  # as of a script
    tool = runpy.run_path(str(TOOLS / "wallpapers.py"))
    random = np.random.default_rng(0)
    pixels = np.full((100, 150, 3), 90, np.uint8)
    pixels[:, :64] = random.integers(0, 255, (100, 64, 3))
    found = dict(tool["windows"](Image.fromarray(pixels), 32))
    assert sorted(found) == [f"{top:04d}-{left:04d}" for top in (0, 32, 64) for left in (0, 32)]
    assert (np.asarray(found["0032-0032"]) == pixels[32:64, 32:64]).all()
    Image.fromarray(pixels).save(tmp_path / "photograph.png")
    files = dict.fromkeys(("Path", "Dune"), tmp_path / "photograph.png")
    assert tool["write_windows"](tmp_path / "out", files, 32) == {"train": 6, "validation": 6}
    assert {path.parent.name for path in (tmp_path / "out").rglob("Dune-*.png")} == {"validation"}
    (tmp_path / "mate-backgrounds/usr/share/backgrounds/mate/nature").mkdir(parents=True)
    for package in ("lomiri-wallpapers-16.04", "lomiri-wallpapers-20.04"):
        (tmp_path / package / "usr/share/backgrounds").mkdir(parents=True)
    assert tool["main"]([str(tmp_path / "new"), "--download", str(tmp_path)]) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "holds no Dragonfly_by_Bolly" in error and not (tmp_path / "new").exists()
