"""Images generated from prompts and scored."""

from collections.abc import Callable
from pathlib import Path

import pytest

from ldm.cli import main


def test_images_are_scored_at_the_size_asked_for(
    make_pipeline: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    make_pipeline().save_pretrained(tmp_path)
    seen = []
    monkeypatch.setattr(
        "ldm.evaluation.prompts.score",
        lambda images, prompts: seen.extend(image.shape for image in images) or {"readable": 0.5},
    )
    main(["evaluate", "pipeline", str(tmp_path), "--prompts", "2", "--steps", "1", "--size", "20x12"])
    assert seen == [(12, 20, 3)] * 2 and "0.5000" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main(["evaluate", "pipeline", str(tmp_path), "--prompts", "2", "--size", "21x12"])
    assert "an image of 21x12 cannot be generated: give multiples of 4 pixels" in capsys.readouterr().err
