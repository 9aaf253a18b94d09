"""A shard folder is proved against its manifest, and tars from elsewhere are given one."""

import errno
import os
from dataclasses import replace
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load, save

from ldm.data.check import check_folder, index_elsewhere, index_folder, index_here
from ldm.data.image_dataset import ImageDataset
from ldm.data.latent_schema import Chunk, write_null_text
from ldm.data.manifest import IMAGE_SHARDS, LATENT_SHARDS, Manifest
from ldm.data.remote import ShardCache
from ldm.data.shards import ShardReader
from ldm.data.sources import open_source
from ldm.data.writer import ShardWriter, encode_png, write_images
from ldm.errors import LdmError, UsageError
from tests import samples
from tests.samples import write_tar

PNG = encode_png(Image.new("RGB", (4, 4)))


@pytest.fixture
def folder(tmp_path):
    """Seven images in shards of 3, 3 and 1, all with captions."""
    items = ((f"{index:04d}", np.full((5, 7, 3), index, np.uint8), f"image {index}") for index in range(7))
    write_images(tmp_path / "out", "x", items, samples_per_shard=3, extra={"captioned": 7})
    return tmp_path / "out"


def found(folder, deep=False):
    """All problems, as (where, what), and the good samples of each shard."""
    problems, shards = check_folder(folder, deep)
    every = [*problems, *(problem for shard in shards for problem in shard.problems)]
    assert all(problem.fix for problem in every)
    return [(problem.where, problem.what) for problem in every], [shard.good for shard in shards]


def count_anew(folder, **samples):
    """Give the shards x-NNNNN.tar of the manifest other sample counts, by number."""
    manifest = Manifest.load(folder)
    changed = {int(name[1:]): count for name, count in samples.items()}
    shards = [replace(entry, samples=changed.get(n, entry.samples)) for n, entry in enumerate(manifest.shards)]
    replace(manifest, shards=tuple(shards)).save(folder)


def test_a_whole_folder_has_no_problem_and_progress_counts_samples(folder):
    steps = []
    problems, shards = check_folder(folder, deep=True, on_progress=lambda *step: steps.append(step))
    assert problems == [] and all(shard.problems == () for shard in shards)
    assert [shard.entry for shard in shards] == list(Manifest.load(folder).shards)
    assert steps == [(3, 7), (6, 7), (7, 7)]


def test_missing_resized_and_unlisted_shards_are_found_beside_the_whole_one(folder):
    (folder / "x-00000.tar").unlink()
    with open(folder / "x-00001.tar", "ab") as file:
        file.write(bytes(512))
    write_tar(folder / "y.tar", [("1.png", PNG)])
    size = (folder / "x-00001.tar").stat().st_size
    assert found(folder) == (
        [
            ("y.tar", "is not listed in the manifest"),
            ("x-00000.tar", "is listed in the manifest but missing"),
            ("x-00001.tar", f"has {size} bytes, the manifest says {size - 512}"),
        ],
        [0, 0, 1],
    )


def test_the_hash_finds_one_flipped_bit_and_the_deep_check_what_no_longer_decodes(folder):
    path = folder / "x-00001.tar"
    data = bytearray(path.read_bytes())
    offset, _ = ShardReader(path).spans(1)["png"]
    data[offset] ^= 1  # the PNG signature
    path.write_bytes(data)
    other = ("x-00001.tar", "has other bytes than the manifest's sha256")
    assert found(folder) == ([other], [3, 3, 1])
    assert found(folder, deep=True) == ([other, ("x-00001.tar: 0004", "not a JPEG, PNG or WebP image")], [3, 2, 1])
    path.write_bytes(bytes(len(data)))
    assert found(folder) == ([other, ("x-00001.tar", "holds 0 samples, the manifest says 3")], [3, 0, 1])


def test_counts_that_disagree_are_found_either_way(folder):
    count_anew(folder, n0=2, n1=5)
    assert found(folder) == (
        [
            ("sizes.npy", "is no array of 8 pairs of int32"),
            ("x-00000.tar", "holds 3 samples, the manifest says 2"),
            ("x-00001.tar", "holds 3 samples, the manifest says 5"),
        ],
        [2, 3, 1],
    )


def test_halves_and_twins_are_found_without_decoding_and_captions_where_the_folder_has_them(tmp_path):
    members = [("1.png", PNG), ("1.txt", b"one"), ("2.txt", b"two"), ("3.png", PNG), ("3.png", PNG), ("4.png", PNG)]
    write_tar(tmp_path / "a.tar", members)
    manifest = index_folder(tmp_path)
    # the caption of 2 is none of an image
    assert (manifest.samples, manifest.extra["captioned"], manifest.extra["unusable"]) == (4, 1, 2)
    manifest.save(tmp_path)
    halves = [("a.tar: 2", "has no image"), ("a.tar: 3", "comes twice in the shard (two .png)")]
    assert found(tmp_path) == (halves, [2])
    assert found(tmp_path, deep=True) == ([*halves, ("a.tar: 4", "has no caption")], [1])
    replace(manifest, extra={"captioned": 0}).save(tmp_path)
    assert found(tmp_path, deep=True) == (halves, [2])


def test_index_makes_a_manifest_that_checks(tmp_path):
    write_tar(tmp_path / "00000.tar", [("1.png", PNG), ("1.txt", b"one"), ("2.png", PNG), ("2.txt", b"two")])
    write_tar(tmp_path / "00001.tar", [("1.png", PNG), ("1.txt", b"one"), ("1.json", b"{}")])
    (tmp_path / "00000_stats.json").write_text("{}")
    steps = []
    manifest = index_folder(tmp_path, on_progress=lambda *step: steps.append(step))
    assert manifest.format == IMAGE_SHARDS and [entry.samples for entry in manifest.shards] == [2, 1]
    assert (manifest.extra["captioned"], manifest.extra["unusable"]) == (3, 0) and steps == [(1, 2), (2, 2)]
    manifest.save(tmp_path)
    assert found(tmp_path, deep=True) == ([], [2, 1])


def test_index_refuses_what_cannot_be_trained_on(tmp_path):
    with pytest.raises(UsageError, match=r"holds no \.tar shard"):
        index_folder(tmp_path)
    for members, words in [
        ([("1.txt", b"")], r"a\.tar holds no image; each sample needs one of \.jpg"),
        ([("1.npy", b"")], r"a\.tar holds no image"),
        ([("1.safetensors", b"")], r"a\.tar holds latents, not images"),
        ([("1.png", b""), ("1.png", b"")], r"a\.tar holds no image"),  # the only one comes twice
    ]:
        write_tar(tmp_path / "a.tar", members)
        with pytest.raises(LdmError, match=words):
            index_folder(tmp_path)
    write_tar(tmp_path / "a.tar", [("1.png", PNG), ("2.png", PNG)])
    whole = (tmp_path / "a.tar").read_bytes()
    (tmp_path / "a.tar").write_bytes(whole[:1024])
    with pytest.raises(LdmError, match=r"a\.tar is cut short at byte 1024 after 1 samples; restore it"):
        index_folder(tmp_path)


INFO = replace(samples.INFO, latent_shapes=((4, 2, 2), (4, 2, 3)))


def chunk(number, info=INFO, **tensors):
    """Three images with 1, 0 and 2 captions of 2, 1 and 1 tokens; ``tensors`` replaces some (None: leaves them out)."""
    names = ("mean", "std", "mean_flip", "std_flip")
    whole = Chunk(
        keys=[f"{number}{row}" for row in "abc"],
        captions=[["one"], [], ["two", "three"]],
        latents={name: np.ones((3, 4, 2, 2), np.float32) for name in names},
        texts=[[np.ones((length, text.width), np.float32) for length in (2, 1, 1)] for text in INFO.text_encoders],
        original_size=np.ones((3, 2)),
        crop=np.ones((3, 4)),
    ).members()
    kept = {name: tensor for name, tensor in (load(whole["safetensors"]) | tensors).items() if tensor is not None}
    return whole | {"safetensors": save(kept)}


def latents(folder, info=INFO, members=None, **tensors):
    """A shard of latents in two chunks of three; of the second one, members or tensors may be replaced."""
    folder.mkdir()
    with ShardWriter(folder, "latents") as writer:
        writer.write("0", chunk(0))
        writer.write("1", chunk(1, **tensors) | (members or {}))
    write_null_text(folder, [np.ones((2, text.width), np.float32) for text in INFO.text_encoders])
    Manifest(LATENT_SHARDS, (replace(writer.entries[0], samples=6),), info.as_extra()).save(folder)
    return folder


def test_latents_are_counted_by_sample_and_looked_at_by_the_deep_check(tmp_path):
    assert found(latents(tmp_path / "whole"), deep=True) == ([], [6])
    mean, text = np.ones((3, 4, 2, 2), np.float32), np.ones((4, 5), np.float32)
    mean[1, 0, 0, 0], mean[1, 1, 0, 0], text[3, 0] = np.nan, np.inf, -np.inf
    folder = latents(tmp_path / "nan", mean_flip=mean, text_2=text)
    assert found(folder) == ([], [6])
    bad = [(f"latents-00000.tar: {key}", "has values that are not finite") for key in ("1b", "1c")]
    assert found(folder, deep=True) == (bad, [4])
    manifest = Manifest.load(folder)
    replace(manifest, shards=(replace(manifest.shards[0], samples=5),)).save(folder)
    assert ("latents-00000.tar", "holds 6 samples, the manifest says 5") in found(folder)[0]


@pytest.mark.parametrize(
    ("members", "words"),
    [
        ({"safetensors": b"none at all"}, "is in a chunk that is no safetensors of latents"),
        ({"json": b"[]"}, "has a chunk without its list of keys"),
        ({"json": b"{"}, "has a chunk without its list of keys"),
        ({"json": b"[" * 100_000}, "has a chunk without its list of keys"),
    ],
)
def test_a_broken_chunk_of_latents_is_found(tmp_path, members, words):
    problems, good = found(latents(tmp_path / "x", members=members))
    assert any(where.startswith("latents-00000.tar") and words in what for where, what in problems) and good == [0]


def test_keys_that_are_not_as_many_as_the_captions_cost_the_chunk(tmp_path):
    folder = latents(tmp_path / "x", members={"json": b'{"keys": ["a", "b", "c"], "captions": [["one"], [], []]}'})
    assert found(folder) == (
        [("latents-00000.tar: #3", "is in a chunk without its keys and captions: their numbers disagree")],
        [3],
    )


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"std": None}, "without std, which the manifest promises"),
        ({"std_flip": None, "text_2": None}, "without std_flip, text_2, which the manifest promises"),
        (
            {"text_3": np.ones((4, 5), np.float32), "text_3_start": np.array([0, 2, 3, 4])},
            "with text_3, text_3_start, which",
        ),
        ({"mean": np.ones((3, 4, 2, 2), np.float16)}, "with mean in float16, the manifest says float32"),
        ({"crop": np.ones((3, 4), np.int64)}, "with crop in int64, the manifest says int32"),
        ({"text_2": np.ones((4, 6), np.float32)}, "with text_2 of width 6, the manifest says 5"),
        (
            {name: np.ones((3, 4, 3, 2), np.float32) for name in ("mean", "std", "mean_flip", "std_flip")},
            "with latents of 4 x 3 x 2, the manifest says 4 x 2 x 2 or 4 x 2 x 3",
        ),
    ],
)
def test_what_the_manifest_does_not_promise_costs_the_chunk(tmp_path, changes, what):
    ((where, found_what),), good = found(latents(tmp_path / "x", **changes))
    assert where == "latents-00000.tar: #3" and found_what.startswith(f"is in a chunk {what}") and good == [3]


def test_modes_and_no_flips_are_promises_too(tmp_path):
    gone = dict.fromkeys(("mean_flip", "std_flip"))
    problems, good = found(latents(tmp_path / "a", replace(INFO, flips=False), **gone))
    assert problems == [("latents-00000.tar: #0", "is in a chunk with mean_flip, std_flip, which the manifest does not have")]
    assert good == [3]
    problems, good = found(latents(tmp_path / "b", replace(INFO, posterior="mode"), std=None, std_flip=None))
    assert problems == [("latents-00000.tar: #0", "is in a chunk with std, std_flip, which the manifest does not have")]


def test_the_null_text_is_there_for_each_text_encoder(tmp_path):
    folder = latents(tmp_path / "x")
    for texts, what in [
        ([np.ones((2, 6), np.float32)], "is without text_2, which the manifest promises"),
        ([np.ones((2, 6), np.float32)] * 2, "has text_2 of 2 x 6, the manifest says 5 a token"),
        ([np.full((2, 6), np.nan), np.ones((2, 5))], "has values in text that are not finite"),
    ]:
        write_null_text(folder, texts)
        assert found(folder) == ([("null_text.safetensors", what)], [6])
    (folder / "null_text.safetensors").write_bytes(b"none")
    ((where, what),), _ = found(folder)
    assert where == "null_text.safetensors" and what.startswith("cannot be read")
    (folder / "null_text.safetensors").unlink()
    path = folder / "null_text.safetensors"
    assert found(folder) == ([("null_text.safetensors", f"{path} does not exist")], [6])
    without = latents(tmp_path / "none", replace(INFO, text_encoders=()))
    (without / "null_text.safetensors").unlink()
    assert all(where != "null_text.safetensors" for where, _ in found(without)[0])


def test_latents_of_another_schema_are_told_in_one_line(tmp_path):
    folder = latents(tmp_path / "x")
    manifest = Manifest.load(folder)
    replace(manifest, extra={"autoencoder": "a" * 64}).save(folder)
    with pytest.raises(UsageError, match=rf"manifest of {folder} lacks 'text_encoders'; export again"):
        check_folder(folder)


def test_a_cut_shard_of_latents_has_no_less_than_no_sample(tmp_path):
    folder = latents(tmp_path / "x")
    path = folder / "latents-00000.tar"
    offset, _ = ShardReader(path).spans(1)["safetensors"]
    path.write_bytes(path.read_bytes()[: offset + 100])
    manifest = Manifest.load(folder)
    replace(manifest, shards=(replace(manifest.shards[0], bytes=path.stat().st_size),)).save(folder)
    problems, good = found(folder, deep=True)
    assert any("is cut short" in what for _, what in problems) and good == [0]


def test_tars_at_a_url_get_a_manifest_that_can_be_trained_on(tmp_path):
    """The manifest is made by one download of each shard; what it says is then read through the cache."""
    write_images(tmp_path / "site", "x", [(f"{i:02d}", np.full((8, 8, 3), i, np.uint8), f"number {i}") for i in range(10)], 4)
    (tmp_path / "site" / "manifest.json").unlink()
    served = ThreadingHTTPServer(("127.0.0.1", 0), partial(SimpleHTTPRequestHandler, directory=str(tmp_path / "site")))
    Thread(target=served.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{served.server_port}"
    try:
        with pytest.raises(UsageError, match=r"has no manifest.json; .*ldm shards index"):
            open_source(url)
        manifest, path = index_elsewhere(f"{url}/x-{{00000..00002}}.tar", tmp_path / "index")
        assert [entry.samples for entry in manifest.shards] == [4, 4, 2] and manifest.extra["captioned"] == 10
        assert sorted(file.name for file in path.parent.iterdir()) == ["manifest.json", "sizes.npy"]
        dataset = ImageDataset(open_source(path.parent, cache=ShardCache(tmp_path / "cache")))
        assert [dataset[index]["caption"] for index in range(10)] == [f"number {index}" for index in range(10)]
        with pytest.raises(LdmError, match=r"x-00003.tar cannot be fetched: 404"):
            index_elsewhere(f"{url}/x-{{00000..00003}}.tar", tmp_path / "more")
        assert not (tmp_path / "more").exists()
        with pytest.raises(UsageError, match="names no tars at a URL; write them with braces"):
            index_elsewhere(f"{url}/*.tar", tmp_path / "more")
    finally:
        served.shutdown()


def test_captions_in_json_alone_are_counted_checked_and_trained_on(tmp_path):
    fields = [b'{"caption": "one"}', b'{"captions": "two"}', b'{"captions": ["three", "drei"]}', b'{"caption": ""}', b"{"]
    members = [member for n, json in enumerate(fields) for member in ((f"{n}.png", PNG), (f"{n}.json", json))]
    write_tar(tmp_path / "a.tar", [*members, ("5.png", PNG), ("5.caption", b"five")])
    manifest, _ = index_here(tmp_path)
    assert manifest.extra["captioned"] == 4 and manifest.captioned
    dataset = ImageDataset(tmp_path)
    assert [dataset[index]["caption"] for index in (0, 1, 2, 5)] == ["one", "two", "three", "five"]
    assert [where for where, _ in found(tmp_path, deep=True)[0]] == ["a.tar: 3", "a.tar: 4"]


def test_images_in_no_sample_are_counted_and_named_until_the_keys_are_others(tmp_path):
    names = ["1", "2", "photo v1.0", "photo v1.1"]
    members = [member for name in names for member in ((f"{name}.png", PNG), (f"{name}.txt", b"a"))]
    write_tar(tmp_path / "a.tar", members)
    manifest, _ = index_here(tmp_path)
    assert manifest.samples == 2 and manifest.extra["unread_images"] == 2
    assert manifest.extra["unread_such_as"][0].startswith("a.tar: photo v1.0.png (")
    ((where, what),), good = found(tmp_path, deep=True)
    assert where == "a.tar" and what.endswith("photo v1.0.png, photo v1.1.png") and good == [2]
    manifest, _ = index_here(tmp_path, key_dot="last")
    assert manifest.samples == 4 and manifest.extra["captioned"] == 4 and "unread_images" not in manifest.extra
    assert found(tmp_path, deep=True) == ([], [4])
    assert [ImageDataset(tmp_path)[index]["key"] for index in range(4)] == names
    write_tar(tmp_path / "a.tar", [("0.input.jpg", PNG), ("0.output.jpg", PNG)])
    with pytest.raises(LdmError, match=r"holds no image.*0\.input\.jpg, 0\.output\.jpg.*--key-dot last"):
        index_folder(tmp_path)


def test_shards_in_a_folder_that_is_not_written_have_their_manifest_elsewhere(tmp_path, monkeypatch):
    (tmp_path / "tars").mkdir()
    write_tar(tmp_path / "tars" / "a.tar", [("1.png", PNG), ("1.txt", b"one")])
    manifest, path = index_elsewhere(str(tmp_path / "tars"), tmp_path / "m")
    assert manifest.location == "../tars" and path == tmp_path / "m" / "manifest.json"
    assert [file.name for file in (tmp_path / "tars").iterdir()] == ["a.tar"]
    assert found(tmp_path / "m", deep=True) == ([], [1]) and ImageDataset(tmp_path / "m")[0]["caption"] == "one"
    # both moved together, and seen through a link
    (tmp_path / "all").mkdir()
    for name in ("tars", "m"):
        (tmp_path / name).rename(tmp_path / "all" / name)
    (tmp_path / "link").symlink_to(tmp_path / "all" / "m")
    assert found(tmp_path / "link", deep=True) == ([], [1])
    write_tar(tmp_path / "all" / "tars" / "b.tar", [("2.png", PNG)])
    assert found(tmp_path / "link")[0] == [("b.tar", "is not listed in the manifest")]
    (tmp_path / "all" / "tars").rename(tmp_path / "gone")
    with pytest.raises(UsageError, match=r'manifest.json: "location" ../tars is no folder here .*; mount or move the shards'):
        check_folder(tmp_path / "link")

    def refuse(**_):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr("tempfile.mkdtemp", refuse)
    with pytest.raises(UsageError, match=r"Read-only file system.*: ldm shards index .*gone --out DIR"):
        index_here(tmp_path / "gone")


def test_files_that_are_no_readable_shards_are_named(tmp_path):
    (tmp_path / "a.tar.gz").write_bytes(b"")
    with pytest.raises(UsageError, match=r"holds no \.tar shard \(it holds a\.tar\.gz\); unpack compressed ones"):
        index_folder(tmp_path)
    os.mkfifo(tmp_path / "a.tar")
    with pytest.raises(LdmError, match=r"a\.tar is not a regular file; restore the shard"):
        index_folder(tmp_path)
    (tmp_path / "a.tar").unlink()
    (tmp_path / "a.tar").symlink_to("nowhere")
    with pytest.raises(LdmError, match=r"a\.tar does not exist; restore it"):
        index_folder(tmp_path)
