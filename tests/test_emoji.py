import importlib.util
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageFont, features

spec = importlib.util.spec_from_file_location("emoji_tool", Path(__file__).parents[1] / "tools" / "emoji.py")
assert spec is not None and spec.loader is not None
emoji = importlib.util.module_from_spec(spec)
spec.loader.exec_module(emoji)

needs_font = pytest.mark.skipif(not Path(emoji.FONT).exists(), reason="fonts-noto-color-emoji is not installed")


def test_a_missing_font_is_one_line_with_the_command_that_installs_it(tmp_path, capsys):
    assert emoji.main([str(tmp_path / "out"), "--font", str(tmp_path / "no.ttf")]) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "apt-get install fonts-noto-color-emoji" in error
    assert os.listdir(tmp_path) == []


def test_captions_are_unique_and_those_of_the_readme_are_there():
    captions = [caption for _, caption in [*emoji.single_characters(), *emoji.sequences()]]
    assert {"slice of pizza", "crescent moon", "red heart", "woman astronaut", "keycap three"} <= set(captions)
    imaged = [caption for character, caption in emoji.single_characters() if ord(character) >= 0x1F300]
    assert len(set(imaged)) == len(imaged)


@needs_font
def test_glyphs_lie_whole_in_the_middle_of_white():
    font = ImageFont.truetype(emoji.FONT, emoji.FONT_SIZE)
    image = np.asarray(emoji.draw("\U0001f355", font, 64)).astype(int)
    assert image.shape == (64, 64, 3)
    border = np.concatenate([image[0], image[-1], image[:, 0], image[:, -1]])
    assert border.min() == 255 and image.min() < 200
    rows, columns = np.nonzero(image.min(axis=2) < 250)
    assert abs(rows.min() + rows.max() - 63) <= 2 and abs(columns.min() + columns.max() - 63) <= 2
    assert emoji.draw("A", font, 64) is None  # the font has no letters
    assert emoji.draw("\U0001f3ca\u200d\U0001f680", font, 64) is None  # two images, not one


@needs_font
@pytest.mark.skipif(not features.check("raqm"), reason="Pillow without raqm")
def test_the_set_is_large_enough(tmp_path, capsys):
    assert emoji.main([str(tmp_path / "out"), "--size", "16"]) == 0
    images = sorted((tmp_path / "out").glob("*.png"))
    assert len(images) >= 1400 and capsys.readouterr().out.startswith(f"{len(images)} emoji")
    assert all(image.with_suffix(".txt").read_text().strip() for image in images)
    assert Image.open(images[0]).size == (16, 16)
