import io
import json
import os
import sys
import unicodedata
from base64 import b64encode

import datasets
import numpy as np
import pyarrow
import pytest
from PIL import Image
from pyarrow import parquet

from ldm.cli import main
from ldm.data.manifest import Manifest
from ldm.data.pack import sources as pack_sources
from ldm.data.pack.packer import pack
from ldm.data.pack.sources import FolderSource, open_pack_source, sorted_files
from ldm.data.shards import ShardReader
from ldm.errors import UsageError


def make_image(path, size=(6, 4), caption=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, "red").save(path)
    if caption is not None:
        path.with_suffix(".txt").write_text(caption)


@pytest.fixture
def src(tmp_path):
    for name in ("b.png", "a/z.png", "c.final.png"):
        make_image(tmp_path / "src" / name)
    return tmp_path / "src"


def packed(out):
    """File -> all its captions, in the order of the shards."""
    found = {}
    for entry in Manifest.load(out).shards:
        for sample in ShardReader(out / entry.name):
            about = json.loads(sample.files["json"])
            first = sample.files["txt"].decode()
            found[about["file"]] = about.get("captions", [first])
            assert found[about["file"]][0] == first
    return found


def quarantine(out):
    return {r["file"]: r["reason"] for r in map(json.loads, (out / "quarantine.jsonl").read_text().splitlines())}


# folders


@pytest.mark.parametrize("at_once", [1, 2, 3, 100_000])
def test_the_walk_is_sorted_whatever_fits_into_memory(tmp_path, monkeypatch, at_once):
    monkeypatch.setattr(pack_sources, "_NAMES_AT_ONCE", at_once)
    names = ["b", "a/x", "a/y", "a-b", "a.b", "ab/c/d", "B", "ab/c.d", "line\nbreak", os.fsdecode(b"caf\xe9"), "é/é", "a b"]
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "empty").mkdir()
    for name in (".hidden", "a/.hidden", ".folder/x"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert list(sorted_files(tmp_path)) == sorted(names)


def test_links_are_followed_and_circles_are_left(tmp_path):
    make_image(tmp_path / "elsewhere" / "deep" / "x.png", caption="linked folder")
    src = tmp_path / "src"
    make_image(src / "a" / "y.png", caption="plain")
    (src / "file.png").symlink_to(tmp_path / "elsewhere" / "deep" / "x.png")
    (src / "file.txt").write_text("linked file")
    (src / "folder").symlink_to(tmp_path / "elsewhere")
    (src / "a" / "up").symlink_to(src)
    (src / "here").symlink_to(".")
    (src / "self.png").symlink_to("self.png")
    (tmp_path / "elsewhere" / "back").symlink_to(src)
    result = pack(src, tmp_path / "out")
    assert packed(tmp_path / "out") == {
        "a/y.png": ["plain"],
        "file.png": ["linked file"],
        "folder/deep/x.png": ["linked folder"],
    }
    assert result.found == 4 and "not a regular file" in quarantine(tmp_path / "out")["self.png"]


def test_file_names_that_are_not_unicode_are_packed(src, tmp_path):
    make_image(src / os.fsdecode(b"caf\xe9.png"), caption="odd")
    assert pack(src, tmp_path / "out").packed == 1
    assert packed(tmp_path / "out") == {r"caf\xe9.png": ["odd"]}


def test_a_folder_that_cannot_be_read_is_named(src, tmp_path, monkeypatch):
    def scandir(folder):
        if str(folder).endswith("a"):
            raise PermissionError(13, "Permission denied", str(folder))
        return real(folder)

    real = os.scandir
    monkeypatch.setattr(os, "scandir", scandir)
    with pytest.raises(UsageError, match=f"{src / 'a'} cannot be read"):
        pack(src, tmp_path / "out")


def test_captions_from_json_beside_the_image(src, tmp_path):
    img2dataset = {"caption": "from the web", "url": "https://example.org/1.png", "status": "success", "exif": "{}"}
    (src / "a" / "z.json").write_text(json.dumps(img2dataset))
    (src / "b.json").write_text(json.dumps({"captions": ["one", "two", ""]}))
    (src / "c.final.json").write_text(json.dumps({"caption": "of no use"}))
    (src / "c.final.txt").write_text("the text goes first")
    for name, text in {
        "no.json": '{"title": "x"}',
        "list.json": '["x"]',
        "number.json": '{"caption": 3}',
        "bad.json": "{",
    }.items():
        make_image(src / name.replace("json", "png"))
        (src / name).write_text(text)
    pack(src, tmp_path / "out")
    assert packed(tmp_path / "out") == {
        "a/z.png": ["from the web"],
        "b.png": ["one", "two"],
        "c.final.png": ["the text goes first"],
    }
    reasons = quarantine(tmp_path / "out")
    assert reasons.keys() == {"no.png", "list.png", "number.png", "bad.png"}
    assert "neither" in reasons["no.png"] and "not an object" in reasons["list.png"] and "not a text" in reasons["number.png"]


# tables

ROWS = [("b.png", "first"), ("a/z.png", "second, with comma")]


def write_table(path, columns):
    """The same columns as any of the three kinds; lists become JSON in CSV."""
    if path.suffix == ".parquet":
        parquet.write_table(pyarrow.table(columns), path)
        return path
    rows = [dict(zip(columns, cells, strict=True)) for cells in zip(*columns.values(), strict=True)]
    if path.suffix == ".jsonl":
        path.write_text("\ufeff" + "\n\n".join(map(json.dumps, rows)) + "\n")
        return path
    lines = [",".join(columns)]
    for row in rows:
        cells = ["" if cell is None else json.dumps(cell) if isinstance(cell, list) else cell for cell in row.values()]
        lines.append(",".join('"' + cell.replace('"', '""') + '"' for cell in cells))
    path.write_text("\n".join(lines))
    return path


KINDS = pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet"])


@KINDS
def test_a_table_says_what_is_packed_in_which_order(src, tmp_path, kind):
    columns = {"other": ["1", "2"], "caption": [caption for _, caption in ROWS], "file": ["./b.png", "a/z.png"]}
    table = write_table(tmp_path / f"captions.{kind}", columns)
    (src / "b.txt").write_text("not asked for")
    result = pack(src, tmp_path / "out", captions=table)
    assert (result.packed, result.found) == (2, 2)
    assert list(packed(tmp_path / "out").items()) == [(file, [caption]) for file, caption in ROWS]


@KINDS
def test_several_captions_of_a_table(src, tmp_path, kind):
    captions = [["red", "rouge"], ["one"], []]
    columns = {"file": ["b.png", "a/z.png", "c.final.png"], "caption": captions, "alt": ["[rot", None, "[1]"]}
    table = write_table(tmp_path / f"captions.{kind}", columns)
    pack(src, tmp_path / "one", captions=table)
    assert packed(tmp_path / "one") == {"b.png": ["red", "rouge"], "a/z.png": ["one"]}
    assert quarantine(tmp_path / "one") == {"c.final.png": "empty caption"}
    pack(src, tmp_path / "both", captions=table, caption_columns=["alt", "caption"])
    assert packed(tmp_path / "both") == {"b.png": ["[rot", "red", "rouge"], "a/z.png": ["one"], "c.final.png": ["[1]"]}


@KINDS
def test_columns_of_other_names(src, tmp_path, kind):
    table = write_table(tmp_path / f"captions.{kind}", {"path": ["b.png"], "words": ["red"]})
    pack(src, tmp_path / "out", captions=table, image_column="path", caption_columns=["words"])
    assert packed(tmp_path / "out") == {"b.png": ["red"]}
    with pytest.raises(UsageError, match=r"lacks the column file and caption \(found: path, words\)"):
        pack(src, tmp_path / "again", captions=table)


def test_images_in_a_table_that_cannot_be_used_are_quarantined(src, tmp_path):
    (src / "b.png").write_text("no image")
    (src / "note.md").write_text("no image either")
    table = write_table(tmp_path / "c.csv", {"file": ["a/z.png", "b.png", "note.md"], "caption": ["x", "x", "x"]})
    pack(src, tmp_path / "out", captions=table)
    reasons = quarantine(tmp_path / "out")
    assert reasons.keys() == {"b.png", "note.md"} and reasons["note.md"] == "not an allowed format"


def test_names_that_only_share_a_hash_are_no_twins(src, tmp_path, monkeypatch):
    monkeypatch.setattr(pack_sources, "hash_of", lambda name: 7)
    names = ["b.png", "a/z.png", "c.final.png"]
    table = write_table(tmp_path / "c.csv", {"file": names, "caption": names})
    assert open_pack_source(src, table).survey()[0] == 3


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("c.csv", "path,caption\nb.png,x\n", "lacks the column file (found: path, caption)"),
        ("c.csv", "", "lacks the column file and caption (found: none)"),
        ("c.csv", "file,caption\n", "holds no row"),
        ("c.csv", "file,caption\n,x\n", 'c.csv, line 2: "file" must be the path of an image'),
        ("c.csv", "file,caption\nb.png,x\nq.png,x\nr.png,y\n", "names q.png, which is not in"),
        ("c.csv", "file,caption\nb.png,x\na/z.png,x\n./b.png,y\n", "line 4: b.png is named twice"),
        ("c.csv", "file,caption\n../x.png,x\n", "must be a path relative to"),
        ("c.csv", "file,caption\n/etc/passwd,x\n", "must be a path relative to"),
        ("c.csv", b"file,caption\nb.png,caf\xe9\n", "cannot be read"),
        ("c.jsonl", "{]\n", "c.jsonl, line 1: is not JSON"),
        ("c.jsonl", "[1]\n", "c.jsonl, line 1: is not a JSON object"),
        ("c.jsonl", "[" * 100_000, "c.jsonl, line 1: is not JSON"),
        ("c.jsonl", '{"n": ' + "9" * 5000 + "}", "c.jsonl, line 1: is not JSON"),
        ("c.jsonl", '{"file": "b.png", "file": "a/z.png", "caption": "x"}', "line 1: is not JSON (a key comes twice)"),
        ("c.jsonl", '{"file": "b.png"}\n', "c.jsonl, line 1: lacks the column caption (found: file)"),
        ("c.csv", "file,caption,caption\nb.png,x,y\n", "has the column caption twice"),
        ("c.jsonl", '{"file": "b.png", "caption": 3}\n', '"caption" must be a text or a list of texts, not 3'),
        ("c.jsonl", '{"file": "b.png", "caption": ["x", null]}\n', '"caption" must be a text or a list of texts'),
        ("c.parquet", "no parquet", "arquet"),
        ("c.xlsx", "", "must end in .csv, .tsv, .jsonl or .parquet"),
        ("none.csv", None, "No such file"),
    ],
)
def test_a_caption_file_that_cannot_be_followed_is_one_line_and_nothing_is_written(src, tmp_path, name, text, words):
    if text is not None:
        (tmp_path / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    before = sorted(os.listdir(tmp_path))
    with pytest.raises(UsageError) as error:
        pack(src, tmp_path / "out", captions=tmp_path / name)
    assert words in str(error.value) and name in str(error.value) and "\n" not in str(error.value)
    assert sorted(os.listdir(tmp_path)) == before


# data sets


def images(count):
    files = []
    for seed in range(count):
        buffer = io.BytesIO()
        noise = np.random.default_rng(seed).integers(0, 256, (4, 6, 3), dtype=np.uint8)
        Image.fromarray(noise).save(buffer, "PNG")
        files.append({"bytes": buffer.getvalue(), "path": f"{seed}.png"})
    return files


def dataset(rows, image="image", caption="caption", captions=None, kind=None):
    captions = captions or [f"row {number}" for number in range(rows)]
    made = datasets.Dataset.from_dict({image: images(rows), caption: captions, "extra": [0] * rows})
    return made.cast_column(image, kind or datasets.Image())


def test_a_dataset_on_disk(tmp_path):
    dataset(5).save_to_disk(tmp_path / "src", num_shards=2)
    result = pack(tmp_path / "src", tmp_path / "out", keep_bytes=True, shard_size=2, workers=3)
    assert (result.packed, result.found) == (5, 5)
    assert packed(tmp_path / "out") == {f"{number:09d}": [f"row {number}"] for number in range(5)}
    kept = [s.files["png"] for e in result.manifest.shards for s in ShardReader(tmp_path / "out" / e.name)]
    assert kept == [image["bytes"] for image in images(5)]


def test_splits_of_a_dataset(tmp_path):
    made = datasets.DatasetDict({"train": dataset(3), "test": dataset(2, captions=["", "last"])})
    made.with_format("numpy").save_to_disk(tmp_path / "src")
    result = pack(tmp_path / "src", tmp_path / "out")
    assert (result.packed, result.quarantined, result.found) == (4, 1, 5)
    assert list(packed(tmp_path / "out")) == ["train/000000000", "train/000000001", "train/000000002", "test/000000001"]
    assert quarantine(tmp_path / "out") == {"test/000000000": "empty caption"}
    assert pack(tmp_path / "src" / "test", tmp_path / "split").found == 2


def test_columns_of_a_dataset(tmp_path):
    dataset(2, "jpg", "text", [["one", "two"], ["three"]]).save_to_disk(tmp_path / "usual")
    pack(tmp_path / "usual", tmp_path / "1")
    assert packed(tmp_path / "1") == {"000000000": ["one", "two"], "000000001": ["three"]}
    dataset(2, "photo", "words").save_to_disk(tmp_path / "odd")
    with pytest.raises(UsageError, match=r"lacks the column image or .* \(found: photo, words, extra\); .*image_column"):
        pack(tmp_path / "odd", tmp_path / "2")
    with pytest.raises(UsageError, match=r"lacks the column images .*image_column"):
        pack(tmp_path / "odd", tmp_path / "2", image_column="images")
    with pytest.raises(UsageError, match=r"lacks the column caption or .*caption_columns"):
        pack(tmp_path / "odd", tmp_path / "2", image_column="photo")
    pack(tmp_path / "odd", tmp_path / "2", image_column="photo", caption_columns=["words"])
    assert packed(tmp_path / "2") == {"000000000": ["row 0"], "000000001": ["row 1"]}


def test_rows_of_a_dataset_without_an_image_are_quarantined(tmp_path):
    rows = {"image": [images(1)[0]["bytes"], None, b"no image"], "caption": ["x"] * 3}
    datasets.Dataset.from_dict(rows).save_to_disk(tmp_path / "src")
    result = pack(tmp_path / "src", tmp_path / "out")
    assert (result.packed, result.quarantined) == (1, 2)
    assert quarantine(tmp_path / "out")["000000001"] == 'no bytes of an image in "image"'


def test_a_dataset_of_other_things_or_of_nothing_is_refused(tmp_path):
    datasets.Dataset.from_dict({"image": [1, 2], "caption": ["a", "b"]}).save_to_disk(tmp_path / "numbers")
    with pytest.raises(UsageError, match="none of the 2"):
        pack(tmp_path / "numbers", tmp_path / "out")
    datasets.DatasetDict({}).save_to_disk(tmp_path / "nothing")
    with pytest.raises(UsageError, match="holds no row"):
        pack(tmp_path / "nothing", tmp_path / "out")
    dataset(1).save_to_disk(tmp_path / "damaged")
    (tmp_path / "damaged" / "data-00000-of-00001.arrow").write_bytes(b"no arrow")
    with pytest.raises(UsageError, match="cannot be loaded by datasets") as error:
        pack(tmp_path / "damaged", tmp_path / "out")
    assert str(tmp_path / "damaged") in str(error.value) and "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()


def test_an_unfinished_pack_of_a_dataset_goes_on_and_sees_a_change(tmp_path):
    def stop(done, found):
        if done == 3:
            raise KeyboardInterrupt

    dataset(5).save_to_disk(tmp_path / "src")
    pack(tmp_path / "src", tmp_path / "whole", shard_size=1)
    for out in ("out", "changed"):
        with pytest.raises(KeyboardInterrupt):
            pack(tmp_path / "src", tmp_path / out, shard_size=1, on_progress=stop)
    pack(tmp_path / "src", tmp_path / "out", shard_size=1)
    for path in (tmp_path / "whole").iterdir():
        assert path.read_bytes() == (tmp_path / "out" / path.name).read_bytes()
    arrow = next((tmp_path / "src").glob("*.arrow"))
    os.utime(arrow, (1, 1))
    with pytest.raises(UsageError, match="has changed since"):
        pack(tmp_path / "src", tmp_path / "changed", shard_size=1)


# a source of one's own

ALBUM = '''
import base64, json
from ldm.data.decode import DecodeError
from ldm.data.pack.sources import ImageSource, Item, LoadedImage

class Album(ImageSource):
    """A JSON file of images in base64."""

    def items(self):
        self.album = json.loads(self.src.read_text())
        return map(Item, self.album)

    def load(self, item):
        entry = self.album[item.key]
        if "image" not in entry:
            raise DecodeError("is an empty page")
        return LoadedImage(base64.b64decode(entry["image"]), entry["captions"], {"year": entry["year"]})
'''


def test_a_class_from_outside_the_package_is_a_source(tmp_path, monkeypatch, capsys):
    (tmp_path / "family_album.py").write_text(ALBUM)
    monkeypatch.syspath_prepend(tmp_path)
    from family_album import Album  # pyright: ignore[reportMissingImports]  written just now

    pages = {f"page {n}": {"image": b64encode(image["bytes"]).decode(), "captions": [f"in {1990 + n}", "us"], "year": 1990 + n}
             for n, image in enumerate(images(3))}  # fmt: skip
    (tmp_path / "album.json").write_text(json.dumps(pages | {"page 3": {}}))
    result = pack(Album(tmp_path / "album.json"), tmp_path / "out", keep_bytes=True)
    assert (result.packed, result.quarantined) == (3, 1) and quarantine(tmp_path / "out") == {"page 3": "is an empty page"}
    assert packed(tmp_path / "out") == {name: page["captions"] for name, page in pages.items()}
    samples = list(ShardReader(tmp_path / "out" / "images-00000.tar"))
    assert [json.loads(sample.files["json"])["year"] for sample in samples] == [1990, 1991, 1992]
    assert [sample.image for sample in samples] == [image["bytes"] for image in images(3)]

    command = ["shards", "pack", str(tmp_path / "album.json"), str(tmp_path / "again"), "--keep-bytes", "--source-class"]
    main([*command, "family_album.Album"])
    assert (tmp_path / "again" / "manifest.json").read_bytes() == (tmp_path / "out" / "manifest.json").read_bytes()
    for wrong in ("family_album.None", "nowhere.Album", "Album", "pathlib.Path"):
        with pytest.raises(SystemExit):
            main([*command, wrong])
        assert f"--source-class {wrong}" in capsys.readouterr().err


def test_extras_never_replace_what_packing_writes(tmp_path):
    class Renaming(FolderSource):
        def load(self, item):
            return super().load(item)._replace(extras={"width": 3})

    make_image(tmp_path / "src" / "a.png", caption="a")
    with pytest.raises(UsageError, match="extras called width, which packing writes itself"):
        pack(Renaming(tmp_path / "src"), tmp_path / "out")
    with pytest.raises(UsageError, match="read by Renaming, which takes neither"):
        pack(Renaming(tmp_path / "src"), tmp_path / "out", captions="x.csv")


@pytest.mark.parametrize("package", ["pyarrow", "datasets"])
def test_a_missing_package_is_named(src, tmp_path, monkeypatch, package):
    (tmp_path / "c.parquet").write_bytes(b"")
    (src / "dataset_dict.json").write_text("{}")
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(UsageError, match=f"pip install {package}"):
        pack(src, tmp_path / "out", captions=tmp_path / "c.parquet" if package == "pyarrow" else None)


# strict tables


@pytest.mark.parametrize(
    ("text", "good", "bad"),
    [
        ("b.png,a red ring, on a table\na/z.png,x\n", ["a/z.png"], {2: "has 3 cells, the header has 2"}),
        ("b.png\na/z.png,x\n", ["a/z.png"], {2: "has 1 cells"}),
        ('b.png,"a red ring\na/z.png,x\nc.final.png,y\n', ["a/z.png", "c.final.png"], {2: "unexpected end"}),
        ('b.png,"a red ring\na/z.png,"x"\nc.final.png,"y"\n', ["a/z.png", "c.final.png"], {2: "check its quotes"}),
        ('b.png,"a red ring\na/z.png,x"\nc.final.png,y\n', ["c.final.png"], {2: "before line 3", 3: "without its partner"}),
        ('b.png,"a red ring\na/z.png,x, y"\nc.final.png,y\n', ["c.final.png"], {2: "before line 3", 3: "partner"}),
        ('b.png,"a red ring" and more\na/z.png,x\n', ["a/z.png"], {2: "check its quotes"}),
        ('b.png,"two\nlines"\na/z.png,5" wide\n', ["b.png", "a/z.png"], {}),
        ("b.png,x\n\n../up.png,x\n/etc/x.png,x\na\0.png,x\n", ["b.png"], {4: "relative", 5: "relative", 6: "relative"}),
    ],
)
@pytest.mark.parametrize("kind", ["csv", "tsv"])
def test_a_malformed_row_is_quarantined_by_its_line_and_no_other_row_is_lost(src, tmp_path, kind, text, good, bad):
    text = "file,caption\n" + text
    (tmp_path / f"c.{kind}").write_text(text if kind == "csv" else text.replace(",", "\t"))
    result = pack(src, tmp_path / "out", captions=tmp_path / f"c.{kind}")
    assert list(packed(tmp_path / "out")) == good
    reasons = quarantine(tmp_path / "out")
    assert reasons.keys() == {f"c.{kind}, line {line}" for line in bad}
    assert all(words in reasons[f"c.{kind}, line {line}"] for line, words in bad.items())
    assert result.packed + result.quarantined == result.found == len(good) + len(bad)


def test_malformed_rows_of_other_tables_are_quarantined(src, tmp_path):
    rows = [
        '{"file": "b.png", "caption": "x"}',
        "{",
        "",
        '{"file": 3, "caption": "x"}',
        '{"file": "c.final.png", "caption": 3}',
        '{"file": "\\ud800.png", "caption": "x"}',
        '{"file": "a/z.png", "caption": NaN}',
    ]
    (tmp_path / "c.jsonl").write_text("\n".join(rows))
    assert pack(src, tmp_path / "jsonl", captions=tmp_path / "c.jsonl").found == 6
    lines = [f"c.jsonl, line {line}" for line in (2, 4, 5, 6, 7)]
    assert list(packed(tmp_path / "jsonl")) == ["b.png"] and list(quarantine(tmp_path / "jsonl")) == lines
    table = write_table(tmp_path / "c.parquet", {"file": ["b.png", None, "a/z.png"], "caption": ["x", "x", None]})
    pack(src, tmp_path / "parquet", captions=table)
    assert quarantine(tmp_path / "parquet") == {
        "c.parquet, row 2": '"file" must be the path of an image',
        "a/z.png": "empty caption",
    }


def test_a_table_may_be_a_pipe_or_huge_without_a_line_and_is_refused(src, tmp_path):
    os.mkfifo(tmp_path / "pipe.csv")
    (tmp_path / "long.jsonl").write_bytes(b"x" * (2**22 + 1))
    for name, words in (("pipe.csv", "named pipe"), ("long.jsonl", "line 1, has more than"), ("x" * 300 + ".csv", "too long")):
        with pytest.raises(UsageError, match=words):
            pack(src, tmp_path / "out", captions=tmp_path / name)
    assert not (tmp_path / "out").exists()


# layouts that people have


def test_names_match_in_either_unicode_form(tmp_path):
    composed, decomposed = (unicodedata.normalize(form, "café/né.png") for form in ("NFC", "NFD"))
    make_image(tmp_path / "src" / decomposed)
    table = write_table(tmp_path / "c.csv", {"file": [composed], "caption": ["x"]})
    pack(tmp_path / "src", tmp_path / "table", captions=table)
    assert packed(tmp_path / "table") == {decomposed: ["x"]}
    (tmp_path / "src" / decomposed).with_name(unicodedata.normalize("NFC", "né.txt")).write_text("beside")
    pack(tmp_path / "src", tmp_path / "folder")
    assert packed(tmp_path / "folder") == {decomposed: ["beside"]}
    table = write_table(tmp_path / "d.csv", {"file": ["naïve.png", composed, decomposed], "caption": ["x", "x", "x"]})
    with pytest.raises(UsageError, match=r"names naïve.png \(in Unicode form NFC; no other form is there\), which is not in"):
        pack(tmp_path / "src", tmp_path / "missing", captions=table)
    make_image(tmp_path / "src" / "naïve.png")
    with pytest.raises(UsageError, match=r"line 4: .* is named twice"):
        pack(tmp_path / "src", tmp_path / "twice", captions=table)


def test_every_file_that_is_an_image_by_name_or_content_is_packed_or_quarantined(tmp_path):
    src = tmp_path / "src"
    for name in ("a.jfif", "b.JPE", "c.jpg", "d", "e.dat", "f.gif"):
        make_image(src / "x.jpeg")
        os.rename(src / "x.jpeg", src / name)
    for name in ("g.ppm", "h.tga", "i.gif", "j.tif", "k.bmp"):
        make_image(src / name)
    os.rename(src / "i.gif", src / "i")
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("red", "blue")]
    frames[0].save(src / "m.apng", "PNG", save_all=True, append_images=frames[1:])
    Image.new("RGB", (4, 4)).save(src / "n.apng", "PNG")
    (src / "o.heic").write_bytes(b"\0\0\0\x18ftypheic")
    (src / "note").write_text("P1 is no image")
    (src / "README.md").write_text("BM")
    os.mkfifo(src / "pipe")
    result = pack(src, tmp_path / "out", with_captions=False)
    taken = ["a.jfif", "b.JPE", "c.jpg", "d", "e.dat", "f.gif", "n.apng"]
    samples = list(ShardReader(tmp_path / "out" / "images-00000.tar"))
    assert [json.loads(sample.files["json"])["file"] for sample in samples] == taken
    reasons = quarantine(tmp_path / "out")
    assert list(reasons) == ["g.ppm", "h.tga", "i", "j.tif", "k.bmp", "m.apng", "o.heic"] and result.found == 14
    assert "(PNM); convert it" in reasons["g.ppm"] and "GIF" in reasons["i"] and "animated" in reasons["m.apng"]


def test_the_order_of_precedence_of_captions(tmp_path):
    src = tmp_path / "src"
    beside = {
        "a": {"txt": "text", "caption": "kohya", "tags": "one\ntwo", "json": '{"caption": "json"}'},
        "b": {"caption": "kohya", "json": '{"caption": "json"}'},
        "c": {"tags": "1girl\nred hair", "json": '{"caption": "json"}'},
        "d": {"json": '{"tags": ["1girl", "red hair"]}'},
        "e": {"txt": "text", "json": '{"captions": ["one", "two"]}'},
        "f": {"txt": "text", "json": "[broken"},
        "g": {"txt": " ", "json": '{"url": "x"}'},
        "h": {"png.txt": "with the extension"},
        "i": {},
    }
    for name, files in beside.items():
        make_image(src / f"{name}.png")
        for suffix, text in files.items():
            (src / f"{name}.{suffix}").write_text(text)
    rows = [{"file_name": f"{name}.png", "text": f"row {name}"} for name in "aghi"]
    (src / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    pack(src, tmp_path / "out")
    assert packed(tmp_path / "out") == {
        "a.png": ["text"],
        "b.png": ["kohya"],
        "c.png": ["1girl, red hair"],
        "d.png": ["1girl, red hair"],
        "e.png": ["one", "two"],
        "f.png": ["text"],
        "g.png": ["row g"],
        "h.png": ["with the extension"],
        "i.png": ["row i"],
    }


@pytest.mark.parametrize("kind", ["jsonl", "csv", "parquet"])
def test_metadata_of_an_image_folder(tmp_path, kind):
    src = tmp_path / "src"
    for name in ("a.png", "train/b.png", "train/deep/c.png", "train/d.png"):
        make_image(src / name)
    write_table(src / f"metadata.{kind}", {"file_name": ["a.png", "train/d.png"], "text": ["of a", "the lower one wins"]})
    names = ["b.png", "deep/c.png", "d.png", "gone.png", "b.png", "../a.png"]
    write_table(src / "train" / f"metadata.{kind}", {"file_name": names, "text": ["of b", "of c", "of d", "x", "x", "x"]})
    result = pack(src, tmp_path / "out")
    assert packed(tmp_path / "out") == {
        "a.png": ["of a"],
        "train/b.png": ["of b"],
        "train/d.png": ["of d"],
        "train/deep/c.png": ["of c"],
    }
    reasons = quarantine(tmp_path / "out")
    assert len(reasons) == 3 and all(f"train/metadata.{kind}, " in file for file in reasons) and result.found == 7
    for words in ("names b.png again", "names train/gone.png, which is no image", "relative"):
        assert any(words in reason for reason in reasons.values())


def test_a_metadata_table_of_something_else_is_ignored(tmp_path):
    make_image(tmp_path / "src" / "a.png", caption="beside")
    (tmp_path / "src" / "metadata.csv").write_text("id,artist\n1,someone\n")
    (tmp_path / "src" / "metadata.jsonl").write_text('{"id": 1}\n')
    assert pack(tmp_path / "src", tmp_path / "out").found == 1


# Parquet files of images


def hub_table(path, count, first=0, image="image", **columns):
    files = images(first + count)[first:]
    kind = pyarrow.struct([("bytes", pyarrow.binary()), ("path", pyarrow.string())])
    captions = [f"image {first + number}" for number in range(count)]
    path.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(pyarrow.table({image: pyarrow.array(files, kind), "text": captions} | columns), path)
    return files


@pytest.mark.parametrize("image", ["image", "photo"])
def test_parquet_files_of_images(tmp_path, image):
    files = hub_table(tmp_path / "src" / "data" / "train-00000-of-00002.parquet", 3, image=image)
    files += hub_table(tmp_path / "src" / "data" / "train-00001-of-00002.parquet", 2, 3, image=image)
    (tmp_path / "src" / "README.md").write_text("a data set")
    result = pack(tmp_path / "src", tmp_path / "out", keep_bytes=True, shard_size=2, workers=3)
    assert list(packed(tmp_path / "out").items()) == [
        (f"data/train-{n // 3:05d}-of-00002/{n % 3:09d}", [f"image {n}"]) for n in range(5)
    ]
    kept = [s.files["png"] for e in result.manifest.shards for s in ShardReader(tmp_path / "out" / e.name)]
    assert kept == [file["bytes"] for file in files]
    pack(tmp_path / "src" / "data" / "train-00000-of-00002.parquet", tmp_path / "one", with_captions=False)
    assert Manifest.load(tmp_path / "one").samples == 3
    pack(tmp_path / "src", tmp_path / "named", captions=tmp_path / "src" / "data" / "train-00001-of-00002.parquet")
    assert list(packed(tmp_path / "named")) == ["train-00001-of-00002/000000000", "train-00001-of-00002/000000001"]


def test_what_a_row_of_parquet_may_hold(tmp_path):
    src = tmp_path / "src"
    good = images(1)[0]["bytes"]
    make_image(tmp_path / "outside.png")
    (src / "files").mkdir(parents=True)
    (src / "files" / "beside").write_bytes(good)
    cells = [{"bytes": good}, {"path": "files/beside"}, {"path": "../outside.png"}, None, {"bytes": b"GIF89a"}, {"bytes": good}]
    kind = pyarrow.struct([("bytes", pyarrow.binary()), ("path", pyarrow.string())])
    captions = [["one", "two"], ["x"], ["x"], ["x"], ["x"], None]
    parquet.write_table(pyarrow.table({"image": pyarrow.array(cells, kind), "captions": captions}), src / "x.parquet")
    with pytest.raises(UsageError, match=r"images in x.parquet and as files"):
        pack(src, tmp_path / "out")
    pack(src / "x.parquet", tmp_path / "out")
    assert packed(tmp_path / "out") == {"x/000000000": ["one", "two"], "x/000000001": ["x"]}
    reasons = quarantine(tmp_path / "out")
    assert list(reasons) == [f"x/{row:09d}" for row in range(2, 6)] and reasons["x/000000005"] == "empty caption"
    parquet.write_table(pyarrow.table({"image": [good], "caption": ["plain bytes"]}), src / "y.parquet")
    pack(src / "y.parquet", tmp_path / "plain")
    assert packed(tmp_path / "plain") == {"y/000000000": ["plain bytes"]}
    (src / "z.parquet").write_bytes((src / "y.parquet").read_bytes()[:-9])
    with pytest.raises(UsageError, match=r"z.parquet is not readable Parquet"):
        pack(src / "z.parquet", tmp_path / "cut")


def test_a_pipe_named_as_a_table_does_not_block(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "0.png")
    os.mkfifo(tmp_path / "x.parquet")
    assert [item.key for item in open_pack_source(tmp_path).items()] == ["0.png"]
