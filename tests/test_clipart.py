"""The captioned set of Debian's drawings and stamps, from packages of three drawings and three stamps."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ldm.cli import main
from ldm.data.manifest import Manifest

TOOLS = Path(__file__).parents[1] / "tools"


@pytest.fixture(scope="module")
def clipart():
    sys.path.insert(0, str(TOOLS))
    spec = importlib.util.spec_from_file_location("clipart_tool", TOOLS / "clipart.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["clipart_tool"] = module  # where dataclasses look their module up
    try:
        spec.loader.exec_module(module)
        yield module
    finally:
        sys.path.remove(str(TOOLS))
        del sys.modules["clipart_tool"]


SVG = """<svg xmlns="http://www.w3.org/2000/svg" xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#"
 xmlns:dc="http://purl.org/dc/elements/1.1/" xmlns:cc="http://web.resource.org/cc/">
 <metadata><rdf:RDF><cc:Work>
  <dc:title>{title}</dc:title><dc:description>{description}</dc:description>
  <dc:subject><rdf:Bag>{keywords}</rdf:Bag></dc:subject>
  <dc:creator><cc:Agent><dc:title>Francesco Rossi</dc:title></cc:Agent></dc:creator>
 </cc:Work></rdf:RDF></metadata>{more}</svg>"""


def svg(title: str, description: str = "", keywords: tuple[str, ...] = (), more: str = "") -> str:
    items = "".join(f"<rdf:li>{word}</rdf:li>" for word in keywords)
    return SVG.format(title=title, description=description, keywords=items, more=more)


def square_on_nothing(file: Path, colour: tuple[int, int, int], page: tuple[int, int], box: tuple[int, int, int, int]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    image = Image.new("RGBA", page)
    image.paste((*colour, 255), box)
    image.save(file)


@pytest.fixture
def packages(tmp_path: Path) -> Path:
    """A folder in which the packages lie unpacked."""
    root = tmp_path / "debian"
    pngs, svgs = (root / f"openclipart-{kind}/usr/share/openclipart/{kind}" for kind in ("png", "svg"))
    stamps = root / "tuxpaint-stamps-default/usr/share/tuxpaint/stamps"
    drawn = {
        "animals/frog_francesco_r_01": svg("Clipart by A. B. - green_frog", "It sits.", ("animal", "hash", "", "frog")),
        "food/tea-1.5": svg("Tea", "HASH(0x862bbb8)", ("hot_drink",)),
        "food/linked": svg(
            "Gone", more='<image xlink:href="file:///home/me/a.png" xmlns:xlink="http://www.w3.org/1999/xlink"/>'
        ),
        "shapes/stars/star_31pt05step": svg("gramastar"),
        "food/tea_copy": svg("Copy of tea"),
        "food/empty": svg("Empty"),
    }
    for number, (name, text) in enumerate(drawn.items()):
        (svgs / name).parent.mkdir(parents=True, exist_ok=True)
        (svgs / f"{name}.svg").write_text(text)
        place = (40, 20, 140, 70) if "empty" not in name else (0, 0, 0, 0)
        square_on_nothing(pngs / f"{name}.png", (0, 200, 20 * number * ("copy" not in name)), (200, 200), place)
    (pngs / "food/tea_copy.png").write_bytes((pngs / "food/tea-1.5.png").read_bytes())
    (pngs / "food/link.png").symlink_to("tea-1.5.png")
    square_on_nothing(stamps / "cat.png", (90, 60, 30), (60, 90), (0, 0, 60, 90))
    (stamps / "cat.txt").write_text("A cat.\nfr.utf8=Un chat.\n")
    square_on_nothing(stamps / "cat_mirror.png", (90, 60, 31), (60, 90), (0, 0, 60, 90))
    (stamps / "dog.svg").write_text("<svg/>")
    return root


def test_visible_parts_on_white_with_captions_and_reasons_for_the_rest(clipart, packages: Path, tmp_path: Path, capsys):
    """Twice the same bytes; what is written can be packed, with all captions."""
    for out in ("set", "again"):
        command = [str(tmp_path / out), "--download", str(packages), "--size", "40", "--validation", "0"]
        assert clipart.main(command) == 0
    assert capsys.readouterr().out.startswith("3 images in ")
    files, again = (
        {str(file.relative_to(tmp_path / out)): file.read_bytes() for file in (tmp_path / out).rglob("*") if file.is_file()}
        for out in ("set", "again")
    )
    assert files == again
    captions = json.loads(files["train/openclipart/animals/frog_francesco_r_01.json"])["captions"]
    assert captions == ["green frog", "green frog, It sits, animal"]
    assert json.loads(files["train/openclipart/food/tea-1.5.json"])["captions"] == ["Tea", "Tea, hot drink"]
    assert files["train/tuxpaint/cat.txt"] == b"A cat.\n"
    with Image.open(tmp_path / "set/train/openclipart/animals/frog_francesco_r_01.png") as image:
        pixels = np.asarray(image)
    # 100 x 50 visible, and a margin of 4 pixels, scaled to 40
    assert image.mode == "RGB" and pixels.shape == (40, round(108 * 40 / 58), 3)
    assert (pixels[0] >= 250).all() and (pixels[20, 30] == (0, 200, 0)).all()
    rows = [json.loads(line) for line in files["left_out.jsonl"].splitlines()]
    reasons = {row["file"].rpartition("/")[2]: row["reason"].split()[0] for row in rows}
    assert reasons == {
        "linked": "links", "star_31pt05step": "one", "link": "a", "tea_copy": "the", "empty": "empty:", "cat_mirror": "no",
        "dog": "an",
    }  # fmt: skip
    main(["shards", "pack", str(tmp_path / "set/train"), str(tmp_path / "shards")])
    manifest = Manifest.load(tmp_path / "shards")
    assert manifest.samples == 3 and manifest.captioned


def test_a_title_is_in_one_part_whatever_its_number(clipart, tmp_path: Path):
    def part(caption: str, share: float = 0.5) -> bool:
        return clipart.Candidate("key", tmp_path, (caption,)).held_out(share)

    names = [f"animal {chr(97 + number % 26)}{chr(97 + number // 26)}" for number in range(200)]
    held_out = [part(name) for name in names]
    assert 60 < sum(held_out) < 140
    assert held_out == [part(f"{name.upper()} 03") for name in names]
    assert all(part(name, 0.6) for name, held in zip(names, held_out, strict=True) if held)  # a larger share keeps them


def test_collections_give_the_name_of_the_file_without_its_author(clipart):
    about = clipart.described(svg("Flat Icons", keywords=("computer", "theme")).encode())
    assert clipart.captions_of(about, "gg_away_francesco_ros_01", True) == ("gg away", "gg away, computer, theme")
    assert clipart.captions_of(about, "gg_away", False)[0] == "Flat Icons"
    assert clipart.captions_of(clipart.described(b"<svg/>"), "white_h_9", False) == ("white h 9",)


def test_what_is_missing_is_one_line_with_the_fix(clipart, tmp_path: Path, monkeypatch, capsys):
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: subprocess.CompletedProcess([], 100, "", "E: Unable to locate\n"))
    for arguments, said in (
        (["--download", str(tmp_path / "debian")], "(E: Unable to locate); run `apt-get update`"),
        (["--size", "1"], "--size must be 32 to 4096"),
        (["--validation", "2"], "--validation is a share"),
    ):
        assert clipart.main([str(tmp_path / "out"), *arguments]) != 0
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and said in error
    assert not (tmp_path / "out").exists()
