import csv
import errno
import io
import json
import os
import shutil
import signal
import tarfile
import tempfile
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from ldm.cli import main
from ldm.data.decode import decode_image
from ldm.data.image_dataset import ImageDataset
from ldm.data.manifest import IMAGE_SHARDS, Manifest
from ldm.data.pack.journal import JOURNAL_NAME, Journal
from ldm.data.pack.packer import pack
from ldm.data.shards import ShardReader
from ldm.errors import LdmError, UsageError
from ldm.files import LOCK_NAME
from ldm.locks import hold
from ldm.progress import Progress


def make_image(path, size=(40, 20), colour="red", caption: str | None = "an image", **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path, **options)
    if caption is not None:
        path.with_suffix(".txt").write_text(caption)


@pytest.fixture
def src(tmp_path):
    src = tmp_path / "src"
    make_image(src / "b.png", caption="the second")
    make_image(src / "a" / "z.JPG", caption="the first\n", format="JPEG")
    make_image(src / "c.final.webp", caption="the third")
    return src


@pytest.fixture(scope="module")
def many(tmp_path_factory):
    """Nine images of noise in all sizes, three more that cannot be used among them and one at either end."""
    src = tmp_path_factory.mktemp("many")
    generator = np.random.default_rng(0)
    for number in range(9):
        height, width = generator.integers(20, 200, 2)
        noise = Image.fromarray(generator.integers(0, 256, (height, width, 3), dtype=np.uint8))
        noise.save(src / f"{number}.png")
        (src / f"{number}.txt").write_text(f"noise number {number}")
    for name in ("0-bad.jpg", "4-bad.jpg", "4-worse.jpg", "9-bad.jpg"):
        (src / name).write_text("no image")
        (src / name).with_suffix(".txt").write_text("a caption")
    return src


def samples(out):
    return [sample for entry in Manifest.load(out).shards for sample in ShardReader(out / entry.name)]


def quarantine(out):
    return {r["file"]: r["reason"] for r in map(json.loads, (out / "quarantine.jsonl").read_text().splitlines())}


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


class Killed(Exception):
    pass


def pack_until(last, src, out, **options):
    """Pack and stop, as if killed, after ``last`` items; what the process does on its way out is undone."""

    def on_progress(done, found):
        if done == last:
            raise Killed

    with pytest.raises(Killed):
        pack(src, out, on_progress=on_progress, **options)


def test_images_of_all_subfolders_are_packed_in_order(src, tmp_path):
    seen = []
    result = pack(src, tmp_path / "out", size=16, shard_size=2, on_progress=lambda *a: seen.append(a))
    assert (result.packed, result.quarantined, result.found) == (3, 0, 3)
    assert seen == [(1, 3), (2, 3), (3, 3)]
    packed = samples(tmp_path / "out")
    assert [sample.key for sample in packed] == ["000000000", "000000001", "000000002"]
    assert [sample.files["txt"] for sample in packed] == [b"the first", b"the second", b"the third"]
    assert json.loads(packed[0].files["json"]) == {"file": "a/z.JPG", "width": 40, "height": 20}
    assert {decode_image(sample.image or b"").size for sample in packed} == {(16, 16)}
    manifest = Manifest.load(tmp_path / "out", IMAGE_SHARDS)
    assert manifest == result.manifest and [entry.samples for entry in manifest.shards] == [2, 1]
    assert (manifest.extra["image_size"], manifest.extra["source"]) == (16, "pack")
    manifest.check_cheap(tmp_path / "out")
    names = ["images-00000.tar", "images-00001.tar", "manifest.json", "quarantine.jsonl", "sizes.npy"]
    assert sorted(contents(tmp_path / "out")) == names


def test_what_cannot_be_used_is_quarantined_with_its_reason_and_nothing_is_lost(src, tmp_path):
    make_image(src / "gif.gif")
    make_image(src / "lonely.png", caption=None)
    make_image(src / "empty.png", caption=" \n")
    make_image(src / "latin.png", caption=None)
    (src / "latin.txt").write_bytes(b"caf\xe9")
    (src / "text.jpg").write_text("not an image")
    (src / "text.txt").write_text("a caption")
    make_image(src / "cut.png", (64, 64))
    (src / "cut.png").write_bytes((src / "cut.png").read_bytes()[:-40])
    Image.new("RGB", (4, 4)).save(src / "moving.webp", save_all=True, append_images=[Image.new("RGB", (4, 4), "red")])
    (src / "moving.txt").write_text("it moves")
    make_image(src / ".hidden" / "x.png")
    (src / "._b.png").write_bytes(b"macOS")
    os.mkfifo(src / "pipe.png")
    (src / "gone.png").symlink_to("nowhere")
    result = pack(src, tmp_path / "out", size=8)
    reasons = quarantine(tmp_path / "out")
    extra = Manifest.load(tmp_path / "out").extra
    assert result.packed == 3 and result.packed + result.quarantined == result.found
    assert (extra["found"], extra["quarantined"], extra["captioned"]) == (12, len(reasons), 3)
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


KINDS = {
    "good": lambda path: make_image(path, (3, 2)),
    "no caption": lambda path: make_image(path, (3, 2), caption=None),
    "empty caption": lambda path: make_image(path, (3, 2), caption=""),
    "small": lambda path: make_image(path, (9, 1)),
    "broken": lambda path: (path.write_bytes(b"\x89PNG\r\n"), path.with_suffix(".txt").write_text("x")),
    "empty": lambda path: (path.touch(), path.with_suffix(".txt").write_text("x")),
}
NAMES = st.text("ab -._é\n'%", min_size=1, max_size=3).filter(lambda name: name.strip(".") == name)
TREES = st.dictionaries(
    st.tuples(st.sampled_from(["", "a", "a-", "a/b"]), NAMES), st.sampled_from(sorted(KINDS)), min_size=1, max_size=8
)


@settings(max_examples=40, deadline=None)
@given(TREES, st.integers(1, 3), st.integers(1, 4))
def test_packed_and_quarantined_are_what_was_found(tree, shard_size, workers):
    with tempfile.TemporaryDirectory() as folder:
        src, out = Path(folder, "src"), Path(folder, "out")
        files = {}
        for (inside, name), kind in tree.items():
            (src / inside).mkdir(parents=True, exist_ok=True)
            KINDS[kind](src / inside / f"{name}.png")
            files[f"{inside}/{name}.png".lstrip("/")] = kind
        good = sorted(file for file, kind in files.items() if kind == "good")
        if not good:
            with pytest.raises(UsageError, match="none of the"):
                pack(src, out, min_size=2, shard_size=shard_size, workers=workers)
            assert not out.exists()
            return
        result = pack(src, out, min_size=2, shard_size=shard_size, workers=workers)
        assert [json.loads(sample.files["json"])["file"] for sample in samples(out)] == good
        assert sorted([*good, *quarantine(out)]) == sorted(files)
        assert (result.packed, result.found) == (len(good), len(files))


def test_bytes_do_not_depend_on_the_number_of_workers(many, tmp_path):
    for workers in (1, 3):
        result = pack(many, tmp_path / str(workers), size=24, shard_size=4, workers=workers)
        assert (result.packed, result.quarantined, result.found) == (9, 4, 13)
    assert contents(tmp_path / "1") == contents(tmp_path / "3")


@pytest.mark.parametrize("limit", ["40KB", "100kb", "0.06 MiB"])
def test_shards_by_bytes_are_as_full_as_they_may_be(many, tmp_path, limit):
    manifest = pack(many, tmp_path / "out", shard_size=limit).manifest
    most = {"40KB": 40_000, "100kb": 100_000, "0.06 MiB": 62_914}[limit]
    assert manifest.samples == 9 and len(manifest.shards) > 1
    assert all(entry.bytes <= most or entry.samples == 1 for entry in manifest.shards)
    for entry, following in pairwise(manifest.shards):
        first = next(iter(ShardReader(tmp_path / "out" / following.name)))
        grown = io.BytesIO((tmp_path / "out" / entry.name).read_bytes())
        with tarfile.open(fileobj=grown, mode="a") as tar:
            for extension, data in first.files.items():
                member = tarfile.TarInfo(f"{first.key}.{extension}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
        assert len(grown.getvalue()) > most


@pytest.mark.parametrize("options", [{"shard_size": 2}, {"shard_size": "60KB"}, {"shard_size": 1000}])
@pytest.mark.parametrize("twice", [False, True])
def test_a_pack_that_was_killed_goes_on_to_the_same_bytes(many, tmp_path, options, twice):
    pack(many, tmp_path / "whole", size=100, **options)
    whole = contents(tmp_path / "whole")
    for last in range(1, 14):
        out = tmp_path / str(last)
        pack_until(last, many, out, size=100, **options)
        if twice and last < 13:
            pack_until(last + 1, many, out, size=100, **options)
        shards = {name: data for name, data in contents(out).items() if name.endswith(".tar")}
        assert shards.items() <= whole.items() and "manifest.json" not in contents(out)
        seen = []
        result = pack(many, out, size=100, on_progress=lambda *now, seen=seen: seen.append(now), **options)
        assert contents(out) == whole
        assert (result.packed, result.quarantined, result.found) == (9, 4, 13)
        # nothing that lies in a whole shard was looked at again
        packed = sum(len(ShardReader(out / name)) for name in shards)
        assert seen[-1] == (13, 13) and seen[0][0] >= packed


def test_what_a_kill_leaves_lying_about_is_cleared_away(many, tmp_path):
    pack(many, tmp_path / "whole", shard_size=2)
    out = tmp_path / "out"
    pack_until(9, many, out, shard_size=2)
    (out / ".images-00003.tar.1.tmp").write_bytes(b"half a shard")
    (out / ".manifest.json.1.tmp").write_bytes(b"{")
    with open(out / "quarantine.jsonl", "a") as file:
        file.write('{"file": "9-b')
    lines = (out / JOURNAL_NAME).read_bytes().splitlines(keepends=True)
    # the last shard was renamed, its line was not written to the end
    (out / JOURNAL_NAME).write_bytes(b"".join(lines[:-1]) + lines[-1][:-9])
    pack(many, out, shard_size=2)
    assert contents(out) == contents(tmp_path / "whole")
    # and before the very first line was whole
    (tmp_path / "early").mkdir()
    (tmp_path / "early" / JOURNAL_NAME).write_bytes(lines[0][:50])
    pack(many, tmp_path / "early", shard_size=2)
    assert contents(tmp_path / "early") == contents(tmp_path / "whole")


def test_a_kill_between_manifest_and_end_changes_nothing(many, tmp_path, monkeypatch):
    def dies(journal, manifests):
        manifests[""].save(journal.out)
        raise Killed

    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(Journal, "finish", dies)
        with pytest.raises(Killed):
            pack(many, out, shard_size=2)
    before = contents(out)
    assert before.pop(JOURNAL_NAME) and "manifest.json" in before
    pack(many, out, shard_size=2)
    assert contents(out) == before


def test_an_unfinished_pack_of_other_things_is_refused_and_stays_as_it_is(src, tmp_path):
    out = tmp_path / "out"
    make_image(src / "d.png")
    pack_until(3, src, out, size=16, shard_size=1)
    before = contents(out)
    for options, words in [
        ({"size": 8}, "with size 16, not 8"),
        ({"format": "webp"}, "with format auto, not webp"),
        ({"shard_size": 2}, "with shard_size 1, not 2"),
        ({"min_size": 4}, "with min_size None, not 4"),
    ]:
        with pytest.raises(UsageError, match=words) as error:
            pack(src, out, **{"size": 16, "shard_size": 1} | options)
        assert str(out) in str(error.value) and "\n" not in str(error.value)
    (src / "b.txt").write_text("another second")
    with pytest.raises(UsageError, match="has changed since"):
        pack(src, out, size=16, shard_size=1)
    assert contents(out) == before


def test_any_change_of_the_source_is_seen(src, tmp_path):
    out = tmp_path / "out"
    pack_until(2, src, out, shard_size=1)

    def refused():
        with pytest.raises(UsageError, match="has changed since"):
            pack(src, out, shard_size=1)

    about = (src / "b.png").stat()
    os.utime(src / "b.png", ns=(about.st_atime_ns, about.st_mtime_ns + 1))
    refused()
    os.utime(src / "b.png", ns=(about.st_atime_ns, about.st_mtime_ns))
    make_image(src / "new.png")
    refused()
    for suffix in (".png", ".txt"):
        (src / f"new{suffix}").unlink()
    os.rename(src / "c.final.webp", src / "d.webp")
    refused()
    os.rename(src / "d.webp", src / "c.final.webp")
    assert pack(src, out, shard_size=1).packed == 3


def test_a_damaged_unfinished_pack_is_refused(src, tmp_path):
    out = tmp_path / "out"
    pack_until(3, src, out, shard_size=1)
    whole = contents(out)

    os.unlink(out / "quarantine.jsonl")
    os.mkfifo(out / "quarantine.jsonl")
    with pytest.raises(LdmError, match=r"quarantine.jsonl is missing or was changed"):
        pack(src, out, shard_size=1)
    os.unlink(out / "quarantine.jsonl")
    (out / "quarantine.jsonl").write_bytes(whole["quarantine.jsonl"])

    def refused(name, data, words):
        (out / name).unlink() if data is None else (out / name).write_bytes(data)
        with pytest.raises(LdmError, match=words) as error:
            pack(src, out, shard_size=1)
        assert name in str(error.value)
        (out / name).write_bytes(whole[name])

    refused("images-00000.tar", None, "is missing or was changed")
    refused("images-00000.tar", b"", "is missing or was changed")
    refused(JOURNAL_NAME, whole[JOURNAL_NAME] + b"{}\n", "is damaged")
    header, done = whole[JOURNAL_NAME].splitlines()[:2]
    for line in (b"[", b"[" * 100_000, b"null", b'{"version": 3, "request": "x", "listing": "x"}', b"\xff", b"9" * 5000):
        refused(JOURNAL_NAME, line + b"\n", "is damaged")
    (out / JOURNAL_NAME).write_bytes(header.replace(b'"version": 3', b'"version": 1') + b"\n")
    with pytest.raises(UsageError, match="an unfinished pack of another version"):
        pack(src, out, shard_size=1)
    for wrong in (done.replace(b'"images-00000.tar"', b"null"), done.replace(b'"consumed": 1', b'"consumed": "1"')):
        refused(JOURNAL_NAME, header + b"\n" + wrong + b"\n", "is damaged")
    assert pack(src, out, shard_size=1).packed == 3


@pytest.mark.parametrize("good", range(3))
def test_a_full_disk_is_one_line_and_the_pack_goes_on(many, tmp_path, monkeypatch, good):
    def replace(temporary, path, real=os.replace):
        if path.name == f"images-{good:05d}.tar":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(temporary, path)

    pack(many, tmp_path / "whole", shard_size=3)
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", replace)
        with pytest.raises(LdmError, match="No space left on device") as error:
            pack(many, tmp_path / "out", shard_size=3)
    assert str(tmp_path / "out") in str(error.value) and "to resume" in str(error.value)
    assert sorted(path.name for path in (tmp_path / "out").glob("*.tar")) == [f"images-{n:05d}.tar" for n in range(good)]
    pack(many, tmp_path / "out", shard_size=3)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_two_at_once_do_not_share_a_folder(src, tmp_path):
    out = tmp_path / "out"
    pack_until(2, src, out, shard_size=1)
    with hold(out / LOCK_NAME, "packing"), pytest.raises(UsageError, match="another ldm is packing into"):
        pack(src, out, shard_size=1)
    assert pack(src, out, shard_size=1).packed == 3


def test_a_source_that_changes_meanwhile_is_no_whole_pack(tmp_path):
    src = tmp_path / "src"
    for number in range(20):
        make_image(src / f"{number:02d}.png", (2, 2))
    make_image(src / "z" / "a.png", (2, 2))
    with pytest.raises(LdmError, match="changed while it was packed"):
        pack(src, tmp_path / "out", on_progress=lambda done, found: make_image(src / "z" / "b.png", (2, 2)), workers=1)
    assert not (tmp_path / "out" / "manifest.json").exists()


def test_sources_that_cannot_be_packed_leave_nothing_behind(src, tmp_path):
    (tmp_path / "bare").mkdir()
    make_image(tmp_path / "uncaptioned" / "a.png", caption=None)
    (tmp_path / "tars").mkdir()
    (tmp_path / "tars" / "00000.tar").touch()
    (tmp_path / "there").mkdir()
    before = sorted(os.listdir(tmp_path))
    for source, words in [
        (tmp_path / "nothing", "is not a folder"),
        (src / "b.png", "is not a folder"),
        (tmp_path / "bare", "holds no image"),
        (tmp_path / "tars", "ldm shards index"),
        (tmp_path / "uncaptioned", r"none of the 1 images .*first: a.png: no caption"),
    ]:
        for out in ("out", "there"):
            with pytest.raises(UsageError, match=words):
                pack(source, tmp_path / out)
    refused: list[dict[str, Any]] = [
        {"shard_size": 0},
        {"shard_size": "1 banana"},
        {"prefix": "a/b"},
        {"workers": 0},
        {"caption_columns": ["a"]},
    ]
    for options in refused:
        with pytest.raises(UsageError):
            pack(src, tmp_path / "out", **options)
    assert sorted(os.listdir(tmp_path)) == before and os.listdir(tmp_path / "there") == []


def test_other_work_is_never_overwritten(src, tmp_path):
    pack(src, tmp_path / "out")
    before = contents(tmp_path / "out")
    for size in (None, 8):
        with pytest.raises(LdmError, match="already holds other work"):
            pack(src, tmp_path / "out", size=size)
    assert contents(tmp_path / "out") == before


def test_the_command_line_passes_everything_on(src, tmp_path, capsys, monkeypatch):
    (tmp_path / "c.csv").write_text('path,short,long\nb.png,two,\na/z.JPG,"[""one"", ""uno""]",the first\nc.final.webp,,\n')
    choices = ["--captions", str(tmp_path / "c.csv"), "--image-column", "path", "--caption-columns", "short,long"]
    choices += ["--size", "30", "--resize", "shorter", "--format", "webp", "--quality", "80", "--background", "#000000"]
    choices += ["--shard-size", "10KB", "--workers", "2"]
    main(["shards", "pack", str(src), str(tmp_path / "out"), *choices])
    said = capsys.readouterr().out
    assert "2 of 3 images in 2 shards" in said and "1 could not be used" in said
    assert "2 were smaller and have been enlarged; --min-size 30" in said
    two, one = samples(tmp_path / "out")
    assert decode_image(one.files["webp"]).size == (60, 30) and two.files["txt"] == b"two"
    assert json.loads(one.files["json"])["captions"] == ["one", "uno", "the first"]

    class Stopped(Progress):
        def update(self, done, *_, **__):
            if done == 2:
                raise KeyboardInterrupt

    monkeypatch.setattr("ldm.cli.shards.Progress", Stopped)
    with pytest.raises(SystemExit) as leave:
        main(["shards", "pack", str(src), str(tmp_path / "stopped"), "--keep-bytes", "--min-size", "8"])
    assert leave.value.code == 130 and "the same command again to resume" in capsys.readouterr().err


def test_captions_with_names_are_kept_by_name_from_tables_and_from_files_beside(src, tmp_path, capsys):
    def packed(name, *arguments):
        main(["shards", "pack", str(src), str(tmp_path / name), *arguments])
        chosen = ("short", "long", "label")
        found = {json.loads(one.files["json"])["file"]: one for one in samples(tmp_path / name)}
        named = {file: [one.captions_called(each) for each in chosen] for file, one in found.items()}
        return named, {file: one.captions for file, one in found.items()}, Manifest.load(tmp_path / name).extra["caption_names"]

    rows = [("b.png", "two", "", 2), ("a/z.JPG", ["one", "uno"], "the first", 1), ("c.final.webp", None, None, None)]
    cells = [[json.dumps(cell) if isinstance(cell, list) else cell or "" for cell in row] for row in rows]
    with open(tmp_path / "c.csv", "w") as file:
        csv.writer(file).writerows([("file", "brief", "long", "label"), *cells])
    records = [dict(zip(("file", "brief", "long", "label"), row, strict=True)) for row in rows]
    records = [{name: cell for name, cell in record.items() if cell} for record in records]
    (tmp_path / "c.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    ask = ("--caption-names", "short=brief,long,label")
    expected = {"b.png": [["two"], [], ["2"]], "a/z.JPG": [["one", "uno"], ["the first"], ["1"]]}
    counts = {"short": 2, "long": 1, "label": 2}
    for kind in ("csv", "jsonl"):
        named, captions, counted = packed(kind, "--captions", str(tmp_path / f"c.{kind}"), *ask)
        assert (named, counted) == (expected, counts)
        assert captions == {"b.png": ["two", "2"], "a/z.JPG": ["one", "uno", "the first", "1"]}
    assert "captions: 2 short, 1 long, 2 label" in capsys.readouterr().out

    # files beside the images, fields of their json, and a metadata table, the first that there is
    for path in src.rglob("*.txt"):
        path.unlink()
    (src / "b.brief.txt").write_text("two\n")
    (src / "b.json").write_text('{"brief": "not this", "label": 2}')
    (src / "a" / "z.JPG.brief.txt").write_text("one")
    (src / "metadata.csv").write_text("file_name,long\na/z.JPG,the first\nc.final.webp,\n")
    (src / "a" / "z.json").write_text('{"label": [1]}')
    named, *_ = packed("beside", *ask)
    assert named == expected | {"a/z.JPG": [["one"], ["the first"], ["1"]]}
    assert quarantine(tmp_path / "beside") == {
        "c.final.webp": "no caption called brief or long or label: neither such a .txt nor such a field of a .json beside it"
    }
    (src / "b.txt").write_text("a plain text")
    assert packed("plain", "--caption-names", "long=txt")[0] == {"b.png": [[], ["a plain text"], []]}
    for wrong, line in (
        ("caption", "cannot be called caption; call it otherwise"),
        ("0", "cannot be called 0"),
        ("a,a", "a name twice"),
    ):
        with pytest.raises(SystemExit):
            main(["shards", "pack", str(src), str(tmp_path / "none"), "--caption-names", wrong])
        assert line in capsys.readouterr().err


def test_without_captions_none_are_read_and_the_manifest_says_so(src, tmp_path):
    (src / "b.txt").write_bytes(b"caf\xe9")
    (src / "a" / "z.txt").unlink()
    result = pack(src, tmp_path / "out", with_captions=False, keep_bytes=True)
    assert (result.packed, result.found, result.manifest.extra["captioned"]) == (3, 3, 0)
    assert all("txt" not in sample.files and not sample.captions for sample in samples(tmp_path / "out"))
    dataset = ImageDataset(tmp_path / "out")
    assert [dataset[index]["caption"] for index in range(3)] == [""] * 3
    (tmp_path / "c.csv").write_text("file\nb.png\n")
    assert pack(src, tmp_path / "listed", captions=tmp_path / "c.csv", with_captions=False).packed == 1
    assert main(["shards", "pack", str(src), str(tmp_path / "again"), "--no-captions", "--keep-bytes"]) is None
    assert contents(tmp_path / "again") == contents(tmp_path / "out")
    (src / "b.txt").write_text(" ")
    main(["shards", "pack", str(src), str(tmp_path / "default"), "--caption", "a photo of sks"])
    texts = [sample.captions for sample in samples(tmp_path / "default")]
    assert texts == [["a photo of sks"], ["a photo of sks"], ["the third"]]  # none beside z.JPG, an empty one beside b.png
    with pytest.raises(UsageError, match="captions have names, and one for images without has none"):
        pack(src, tmp_path / "named", caption_columns={"short": "short"}, default_caption="sks")


def names(folder):
    return {json.loads(sample.files["json"])["file"] for sample in samples(folder)}


@pytest.fixture(scope="module")
def hundred(tmp_path_factory):
    src = tmp_path_factory.mktemp("hundred")
    for number in range(100):
        make_image(src / f"{number:02d}.png", (2, 2))
    return src


def test_a_share_for_validation_is_stable_when_images_are_added(hundred, tmp_path):
    result = pack(hundred, tmp_path / "out", validation="20%")
    out, held_out = tmp_path / "out", tmp_path / "out" / "validation"
    assert result.packed == 100 == len(names(out)) + len(names(held_out)) and not names(out) & names(held_out)
    assert 10 <= len(names(held_out)) <= 30 and result.validation == Manifest.load(held_out)
    assert {key: result.manifest.extra[key] for key in ("found", "captioned")} == dict.fromkeys(
        ("found", "captioned"), 100 - len(names(held_out))
    )
    assert main(["shards", "check", str(out), "--deep"]) is None and main(["shards", "check", str(held_out)]) is None
    more = tmp_path / "more"
    shutil.copytree(hundred, more)
    for number in range(100):
        make_image(more / f"new-{number}.png", (2, 2))
    pack(more, tmp_path / "grown", validation="20%")
    assert names(held_out) <= names(tmp_path / "grown" / "validation") and names(out) <= names(tmp_path / "grown")


def test_a_number_for_validation(hundred, tmp_path, capsys):
    main(["shards", "pack", str(hundred), str(tmp_path / "out"), "--validation", "7"])
    said = capsys.readouterr().out
    assert "100 of 100 images in 2 shards" in said and f"7 of them are for validation: {tmp_path}/out/validation" in said
    seven = names(tmp_path / "out" / "validation")
    pack(hundred, tmp_path / "less", validation=5)
    assert len(seven) == 7 and names(tmp_path / "less" / "validation") < seven
    for wrong in (0, 100, "0%", "100%", "-1", "half", "1e9", "0.1%"):
        with pytest.raises(UsageError, match="validation"):
            pack(hundred, tmp_path / "wrong", validation=wrong)
    assert not (tmp_path / "wrong").exists()


def tree(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_pack_with_validation_that_was_killed_goes_on_to_the_same_bytes(many, tmp_path):
    pack(many, tmp_path / "whole", shard_size=2, validation=4)
    for last in range(1, 14):
        pack_until(last, many, tmp_path / str(last), shard_size=2, validation=4)
        result = pack(many, tmp_path / str(last), shard_size=2, validation=4)
        assert tree(tmp_path / str(last)) == tree(tmp_path / "whole") and (result.packed, result.found) == (9, 13)


def test_sigterm_leaves_what_the_same_command_resumes(many, tmp_path):
    pack(many, tmp_path / "whole", shard_size=1)
    handler = signal.getsignal(signal.SIGTERM)

    def on_progress(done, found):
        if done == 5:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(SystemExit) as leave:
        pack(many, tmp_path / "out", shard_size=1, on_progress=on_progress)
    assert leave.value.code == 143 and signal.getsignal(signal.SIGTERM) is handler
    assert not [name for name in contents(tmp_path / "out") if name.endswith((".tmp", ".lock"))]
    pack(many, tmp_path / "out", shard_size=1)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_an_out_that_cannot_be_written_is_refused_before_the_work(src, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    outs = {tmp_path / "file" / "out": "cannot be made", tmp_path / ("x" * 300): "cannot be made", "a\0b": "cannot be made"}
    for out, words in {**outs, "": "has no name", "/proc/out": "cannot be made"}.items():
        with pytest.raises(UsageError, match=words):
            pack(src, out, on_progress=lambda *_: pytest.fail("work was done"))
    (tmp_path / "link").symlink_to(tmp_path / "real")
    assert pack(src, tmp_path / "link").packed == 3 and (tmp_path / "real" / "manifest.json").is_file()
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    assert pack(src, ".").packed == 3
