import json
import os
import sys

import numpy as np
import pytest
from PIL import Image

from ldm.data.decode import decode_image
from ldm.data.manifest import IMAGE_SHARDS, Manifest
from ldm.data.pack import pack
from ldm.data.shards import ShardReader, check_folder
from ldm.errors import LdmError, UsageError


def picture(path, size=(40, 20), colour="red", caption="a picture", **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path, **options)
    if caption is not None:
        path.with_suffix(".txt").write_text(caption)


@pytest.fixture
def src(tmp_path):
    src = tmp_path / "src"
    picture(src / "b.png", caption="the second")
    picture(src / "a" / "z.JPG", caption="the first\n", format="JPEG")
    picture(src / "c.final.webp", caption="the third")
    return src


def samples(out):
    return [sample for entry in Manifest.load(out).shards for sample in ShardReader(out / entry.name)]


def quarantine(out):
    return {r["file"]: r["reason"] for r in map(json.loads, (out / "quarantine.jsonl").read_text().splitlines())}


def test_images_of_all_subfolders_are_packed_in_order(src, tmp_path):
    seen = []
    result = pack(src, tmp_path / "out", size=16, samples_per_shard=2, on_progress=lambda *a: seen.append(a))
    assert (result.packed, result.quarantined, result.found) == (3, 0, 3)
    assert seen == [(1, 3), (2, 3), (3, 3)]
    packed = samples(tmp_path / "out")
    assert [sample.key for sample in packed] == ["000000000", "000000001", "000000002"]
    assert [sample.caption for sample in packed] == [b"the first", b"the second", b"the third"]
    assert json.loads(packed[0].files["json"]) == {"file": "a/z.JPG", "width": 40, "height": 20}
    assert {decode_image(sample.image).size for sample in packed} == {(16, 16)}
    manifest = Manifest.load(tmp_path / "out", IMAGE_SHARDS)
    assert manifest == result.manifest and [entry.samples for entry in manifest.shards] == [2, 1]
    assert (manifest.extra["image_size"], manifest.extra["source"]) == (16, "pack")
    assert check_folder(tmp_path / "out", deep=True) == []


def test_equal_input_gives_equal_bytes(src, tmp_path):
    assert pack(src, tmp_path / "1", size=16).manifest.hash == pack(src, tmp_path / "2", size=16).manifest.hash


def test_the_centre_is_cut_out_of_the_longer_side(tmp_path):
    stripes = np.zeros((20, 60, 3), np.uint8)
    stripes[:, 20:40] = 255
    (tmp_path / "src").mkdir()
    Image.fromarray(stripes).save(tmp_path / "src" / "a.png")
    (tmp_path / "src" / "a.txt").write_text("white in the middle")
    pack(tmp_path / "src", tmp_path / "out", size=20)
    image = np.asarray(decode_image(samples(tmp_path / "out")[0].image))
    assert image.shape == (20, 20, 3) and image.min() == 255


def test_small_images_are_lossless_and_large_ones_jpeg(tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (128, 128, 3), dtype=np.uint8)
    (tmp_path / "src").mkdir()
    Image.fromarray(noise).save(tmp_path / "src" / "a.png")
    picture(tmp_path / "src" / "b.png", (300, 129))
    (tmp_path / "src" / "a.txt").write_text("noise")
    pack(tmp_path / "src", tmp_path / "out")
    small, large = samples(tmp_path / "out")
    assert set(small.files) == {"png", "txt", "json"} and set(large.files) == {"jpg", "txt", "json"}
    assert np.array_equal(np.asarray(decode_image(small.image)), noise)
    assert decode_image(large.image).size == (300, 129)


def test_what_cannot_be_used_is_quarantined_with_its_reason_and_nothing_is_lost(src, tmp_path):
    picture(src / "gif.gif")
    picture(src / "lonely.png", caption=None)
    picture(src / "empty.png", caption=" \n")
    picture(src / "latin.png", caption=None)
    (src / "latin.txt").write_bytes(b"caf\xe9")
    (src / "text.jpg").write_text("not an image")
    (src / "text.txt").write_text("a caption")
    picture(src / "cut.png", (64, 64))
    (src / "cut.png").write_bytes((src / "cut.png").read_bytes()[:-40])
    Image.new("RGB", (4, 4)).save(src / "moving.webp", save_all=True, append_images=[Image.new("RGB", (4, 4), "red")])
    (src / "moving.txt").write_text("it moves")
    picture(src / ".hidden" / "x.png")
    (src / "._b.png").write_bytes(b"macOS")
    os.mkfifo(src / "pipe.png")
    (src / "gone.png").symlink_to("nowhere")
    result = pack(src, tmp_path / "out", size=8)
    reasons = quarantine(tmp_path / "out")
    assert result.packed == 3 and result.packed + result.quarantined == result.found
    assert len(reasons) == result.quarantined == Manifest.load(tmp_path / "out").extra["quarantined"]
    expected = {
        "gif.gif": "not an allowed format",
        "lonely.png": "no caption",
        "empty.png": "empty caption",
        "latin.png": "not UTF-8",
        "text.jpg": "not a JPEG, PNG or WebP image",
        "cut.png": "cannot be decoded",
        "moving.webp": "animated",
        "pipe.png": "not a regular file",
        "gone.png": "not a regular file",
    }
    assert reasons.keys() == expected.keys()
    assert all(words in reasons[file] for file, words in expected.items())


def test_file_names_that_are_not_unicode_are_packed(src, tmp_path):
    name = os.fsdecode(b"caf\xe9.png")
    picture(src / name, caption="odd")
    assert pack(src, tmp_path / "out").packed == 4
    assert rb"caf\\xe9.png" in b"".join(sample.files["json"] for sample in samples(tmp_path / "out"))


CSV = 'caption,file,other\nfirst,./a/z.JPG,1\n"second, with comma",b.png,2\n'
JSONL = '{"file": "a/z.JPG", "caption": "first"}\n\n{"file": "b.png", "caption": "second, with comma"}\n'


def write_parquet(path):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    columns = {"file": ["a/z.JPG", "b.png"], "caption": ["first", "second, with comma"]}
    parquet.write_table(pyarrow.table(columns), path)


@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet"])
def test_captions_from_one_file(src, tmp_path, kind):
    table = tmp_path / f"captions.{kind}"
    write_parquet(table) if kind == "parquet" else table.write_text({"csv": CSV, "jsonl": JSONL}[kind])
    result = pack(src, tmp_path / "out", captions=table)
    assert (result.packed, result.quarantined) == (2, 1)
    assert [sample.caption for sample in samples(tmp_path / "out")] == [b"first", b"second, with comma"]
    assert quarantine(tmp_path / "out") == {"c.final.webp": f"no caption: captions.{kind} does not name it"}


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("c.csv", "path,caption\nb.png,x\n", "lacks the column file (found: path, caption)"),
        ("c.csv", "", "lacks the column file and caption (found: none)"),
        ("c.csv", "file,caption\n", "holds no row"),
        ("c.csv", "file,caption\nb.png,x\nq.png,x\nr.png,y\n", "names q.png, which is not in"),
        ("c.csv", "file,caption\nb.png,x\n./b.png,y\n", "row 2: b.png is named twice"),
        ("c.csv", "file,caption\n../x.png,x\n", "must be a path relative to"),
        ("c.csv", "file,caption\n/etc/passwd,x\n", "must be a path relative to"),
        ("c.csv", b"file,caption\nb.png,caf\xe9\n", "cannot be read"),
        ("c.jsonl", "{]\n", "row 1 is not JSON"),
        ("c.jsonl", "[1]\n", "row 1 is not a JSON object"),
        ("c.jsonl", '{"file": "b.png"}\n', "row 1 lacks the column caption (found: file)"),
        ("c.jsonl", '{"file": "b.png", "caption": ["x"]}\n', '"caption" must be a text'),
        ("c.parquet", "no parquet", "arquet"),
        ("c.xlsx", "", "must end in .csv, .jsonl or .parquet"),
        ("none.csv", None, "does not exist"),
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


def test_parquet_without_pyarrow_names_the_package(src, tmp_path, monkeypatch):
    (tmp_path / "c.parquet").write_bytes(b"")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(UsageError, match="pip install pyarrow"):
        pack(src, tmp_path / "out", captions=tmp_path / "c.parquet")


def test_sources_that_cannot_be_packed_leave_nothing_behind(src, tmp_path):
    (tmp_path / "bare").mkdir()
    picture(tmp_path / "uncaptioned" / "a.png", caption=None)
    before = sorted(os.listdir(tmp_path))
    for source, words in [
        (tmp_path / "nothing", "is not a folder"),
        (src / "b.png", "is not a folder"),
        (tmp_path / "bare", "holds no image"),
        (tmp_path / "uncaptioned", "none of the 1 images"),
    ]:
        with pytest.raises(UsageError, match=words):
            pack(source, tmp_path / "out")
    for options in ({"size": 0}, {"samples_per_shard": 0}, {"prefix": "a/b"}):
        with pytest.raises(UsageError):
            pack(src, tmp_path / "out", **options)
    assert sorted(os.listdir(tmp_path)) == before


def test_other_work_is_never_overwritten(src, tmp_path):
    pack(src, tmp_path / "out")
    before = Manifest.load(tmp_path / "out")
    with pytest.raises(LdmError, match="already holds other work"):
        pack(src, tmp_path / "out", size=8)
    assert Manifest.load(tmp_path / "out") == before
