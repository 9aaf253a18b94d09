"""The schema of latent shards: written, read back, by anyone; what their manifest knows; what is broken is told."""

import json
import os
import tarfile
from dataclasses import replace
from itertools import count

import numpy as np
import pytest
import safetensors.numpy

from ldm.data.decode import DecodeError
from ldm.data.latent_schema import (
    Chunk,
    LatentShard,
    TextInfo,
    common_info,
    latent_info,
    read_null_text,
    tensors_in,
    text_name,
    write_null_text,
)
from ldm.data.manifest import LATENT_SHARDS, Manifest
from ldm.data.moments import Moments
from ldm.data.shards import ShardReader
from ldm.data.sources import open_source
from ldm.data.writer import ShardWriter
from ldm.errors import LdmError, UsageError
from tests import samples

INFO = replace(
    samples.INFO,
    text_encoders=(TextInfo("minilm", "t" * 64, 6, 5, 1), TextInfo("other", "u" * 64, 3, 7, 0)),
    latent_shapes=((4, 2, 3), (4, 5, 1)),
    dtype="float16",
    latents_mean=(0.1, 0.2, 0.3, 0.4),
    latents_std=(1.0, 1.1, 1.2, 1.3),
)
# images per chunk, and the sides of their latents, per shard
SHARDS = [[(3, (2, 3)), (2, (5, 1))], [(4, (2, 3))], [(1, (5, 1)), (1, (2, 3)), (1, (2, 3))]]
NULL = [np.random.default_rng(0).normal(size=(2, width)).astype(np.float16) for width in (6, 3)]
NAMES = {("gaussian", True): ("mean", "std", "mean_flip", "std_flip"), ("mode", False): ("mean",)}


def make_images(names, dtype):
    """Images one after another, of one to three captions; send the sides of the next one's latents."""
    rng, sides = np.random.default_rng(0), (yield)
    for index in count():
        captions = [f"image {index} — é, {number}" for number in range(1 + index % 3)]
        sides = yield {
            "key": f"{index:04d}",
            "captions": captions,
            "latents": {name: rng.uniform(0.1, 1, size=(4, *sides)).astype(dtype) for name in names},
            "texts": [[rng.normal(size=(1 + rng.integers(5), width)).astype(dtype) for _ in captions] for width in (6, 3)],
            "original_size": (200 + index, 300),
            "crop": (index, 2, 40, 60),
        }


def write(folder, dtype=np.float16, info=INFO):
    """Latent shards, and the images that are in them."""
    source, every, entries = make_images(NAMES[info.posterior, info.flips], dtype), [], []
    next(source)
    folder.mkdir()
    for number, chunks in enumerate(SHARDS):
        with ShardWriter(folder, "latents", first_index=number) as writer:
            for chunk, (size, sides) in enumerate(chunks):
                few = [source.send(sides) for _ in range(size)]
                writer.write(f"{chunk:08d}", chunk_of(few).members())
                every += few
        entries.append(replace(writer.entries[0], samples=sum(size for size, _ in chunks)))
    Manifest(LATENT_SHARDS, tuple(entries), info.as_extra()).save(folder)
    write_null_text(folder, NULL)
    return every


def chunk_of(few):
    return Chunk(
        keys=[image["key"] for image in few],
        captions=[image["captions"] for image in few],
        latents={name: np.stack([image["latents"][name] for image in few]) for name in few[0]["latents"]},
        texts=[[text for image in few for text in image["texts"][encoder]] for encoder in range(len(few[0]["texts"]))],
        original_size=np.array([image["original_size"] for image in few]),
        crop=np.array([image["crop"] for image in few]),
    )


def shards(folder):
    return [LatentShard(folder / entry.name, entry.samples) for entry in Manifest.load(folder).shards]


@pytest.fixture
def folder(tmp_path):
    write(tmp_path / "latents")
    return tmp_path / "latents"


@pytest.mark.parametrize(
    ("dtype", "info"), [(np.float16, INFO), (np.float32, INFO), (np.float16, replace(INFO, posterior="mode", flips=False))]
)
def test_nothing_but_tarfile_and_safetensors_is_needed_to_read_it(tmp_path, dtype, info):
    expected, found = write(tmp_path / "latents", dtype, info), []
    names = NAMES[info.posterior, info.flips]
    for path in sorted((tmp_path / "latents").glob("*.tar")):
        with tarfile.open(path, "r:") as tar:
            members = {member.name: file.read() for member in tar if (file := tar.extractfile(member))}
        assert {name.split(".")[1] for name in members} == {"safetensors", "json"}
        for chunk in sorted(name.removesuffix(".json") for name in members if name.endswith(".json")):
            tensors = safetensors.numpy.load(members[f"{chunk}.safetensors"])
            words = json.loads(members[f"{chunk}.json"])
            assert {name: tensor.dtype for name, tensor in tensors.items()} == {
                **dict.fromkeys((*names, "text", "text_2"), dtype),
                **dict.fromkeys(("original_size", "crop"), np.int32),
                **dict.fromkeys(("caption_start", "text_start", "text_2_start"), np.int64),
            }
            for row, (key, captions) in enumerate(zip(words["keys"], words["captions"], strict=True)):
                first, end = tensors["caption_start"][row : row + 2]
                assert end - first == len(captions)
                texts = []
                for name in ("text", "text_2"):
                    starts = tensors[f"{name}_start"]
                    texts.append([tensors[name][starts[caption] : starts[caption + 1]] for caption in range(first, end)])
                found.append(
                    {
                        "key": key,
                        "captions": captions,
                        "latents": {name: tensors[name][row] for name in names},
                        "texts": texts,
                        "original_size": tuple(tensors["original_size"][row]),
                        "crop": tuple(tensors["crop"][row]),
                    }
                )
    assert len(found) == len(expected) == 12
    for ours, theirs in zip(found, expected, strict=True):
        for name in ("key", "captions", "original_size", "crop"):
            assert ours[name] == theirs[name]
        assert ours["latents"].keys() == theirs["latents"].keys()
        assert all(np.array_equal(ours["latents"][name], theirs["latents"][name]) for name in names)
        for some, others in zip(ours["texts"], theirs["texts"], strict=True):
            assert all(np.array_equal(one, other) for one, other in zip(some, others, strict=True))


def test_a_shard_gives_back_its_chunks_their_words_and_where_an_image_is(tmp_path):
    expected = iter(write(tmp_path / "latents"))
    for shard, chunks in zip(shards(tmp_path / "latents"), SHARDS, strict=True):
        assert shard.starts == [0, *np.cumsum([size for size, _ in chunks])]
        rows = [(chunk, row) for chunk, (size, _) in enumerate(chunks) for row in range(size)]
        assert [shard.locate(row) for row in range(len(rows))] == rows
        for chunk, row in rows:
            image, words = next(expected), shard.metadata(chunk)
            assert (words["keys"][row], words["captions"][row]) == (image["key"], image["captions"])
            for name, latent in image["latents"].items():
                assert np.array_equal(shard.tensors(chunk)[name][row], latent)


def test_tensors_are_read_when_they_are_indexed(folder):
    with ShardReader(folder / "latents-00000.tar") as reader:
        offset, size = reader.spans(0)["safetensors"]
        found, whole = tensors_in(reader.read, offset, size), safetensors.numpy.load(reader.read(offset, size))
    assert found.keys() == whole.keys() > {"mean", "std_flip", "text_2", "crop"}
    with pytest.raises(ValueError, match="is closed"):
        found["mean"][0]
    tensors = shards(folder)[0].tensors(0)
    for name, values in whole.items():
        assert (tensors[name].shape, tensors[name].dtype, len(tensors[name])) == (values.shape, values.dtype, len(values))
        for rows in (slice(None), slice(1, 3), slice(2, 2), slice(3, 1), -1, 0):
            assert np.array_equal(tensors[name][rows], values[rows])
        assert np.array_equal(tensors[name], values)


CHANGES = {
    "cut to nothing": (lambda data: b"", "is empty"),
    "cut to its first header": (lambda data: data[:600], "is cut short at byte"),
    "cut in its middle": (lambda data: data[: len(data) // 2], "is cut short at byte"),
    "overwritten": (lambda data: b"\xa5" * len(data), "is not an uncompressed tar"),
    "with a broken chunk": (lambda data: data.replace(b'"F16"', b'"F99"'), "changed while it was used: a sample is in a chunk"),
    "with other captions' lengths": (lambda data: data[:1536] + b"\0" * 1024 + data[2560:], "changed|broken|cut short|holds"),
}


@pytest.mark.parametrize("reopened", [False, True])
@pytest.mark.parametrize("change", CHANGES)
def test_a_shard_that_changes_while_it_is_used_is_named(folder, change, reopened):
    """Each change is written into the same file, as by a copy over it."""
    path, (damage, told) = folder / "latents-00000.tar", CHANGES[change]
    shard = LatentShard(path, 5)
    rows = shard.tensors(0)["mean"]
    path.write_bytes(damage(path.read_bytes()))
    if reopened:
        shard.close()
    with pytest.raises(LdmError, match=f"^{path} ({told})") as error:
        shard.reopen(path) if reopened else shard.tensors(0)
    assert not isinstance(error.value, DecodeError)  # no other sample takes its place: it ends the run
    if damage is CHANGES["cut to nothing"][0]:
        with pytest.raises((LdmError, ValueError)):  # nothing that was opened before ends the process
            rows[0]


def test_a_shard_that_was_touched_or_copied_anew_is_the_same(folder):
    path = folder / "latents-00000.tar"
    shard, data = LatentShard(path, 5), path.read_bytes()
    mean = shard.tensors(0)["mean"][:]
    os.utime(path, ns=(1, 1))
    assert np.array_equal(shard.tensors(0)["mean"], mean)
    shard.close()
    path.unlink()
    path.write_bytes(data)
    shard.reopen(path)
    assert np.array_equal(shard.tensors(0)["mean"], mean)


def test_the_moments_of_chunks_are_those_of_the_whole_set_without_the_mirrored(tmp_path):
    every = write(tmp_path / "latents")
    parts = [chunk_of(every[start:stop]).moments() for start, stop in ((0, 3), (3, 5), (5, 9))]
    # of all the images of one size at once, and of those of the other
    alike = [[p["latents"] for p in every[:9] if p["latents"]["mean"].shape[1] == side] for side in (2, 5)]
    whole = Moments.merge(Moments.of(*(np.stack([p[name] for p in some]) for name in ("mean", "std"))) for some in alike)
    found = Moments.merge(parts)
    assert found.count == whole.count == 7 * 6 + 2 * 5
    np.testing.assert_allclose(found.mean, whole.mean, rtol=1e-12)
    np.testing.assert_allclose(found.std, whole.std, rtol=1e-12)


def test_its_manifest_says_what_it_was_made_with(folder):
    manifest, info = Manifest.load(folder), latent_info(open_source(folder, LATENT_SHARDS))
    assert manifest.samples == 12 and [entry.samples for entry in manifest.shards] == [5, 4, 3]
    assert info == INFO and info.latent_shape is None
    assert replace(info, latent_shapes=((4, 2, 3),)).latent_shape == (4, 2, 3)
    assert [text_name(encoder) for encoder in range(3)] == ["text", "text_2", "text_3"]


def test_an_incomplete_manifest_names_what_it_lacks(folder):
    manifest = Manifest.load(folder)
    Manifest(LATENT_SHARDS, manifest.shards, {k: v for k, v in manifest.extra.items() if k != "flips"}).save(folder)
    with pytest.raises(UsageError, match=rf"manifest of {folder} lacks 'flips'; export again"):
        latent_info(open_source(folder, LATENT_SHARDS))


BROKEN = {
    "text_encoders": [{"name": "minilm", "mood": "good"}],
    "latent_shapes": [[4, 2]],
    "latents_mean": [0.1, "0.2", 0.3, 0.4],
    "latents_std": [1.0, 1.1, 1.2, -1.3],
    "posterior": "other",
    "flips": 1,
    "dtype": "int8",
    "resolution": 10**12,
    "versions": [],
}


@pytest.mark.parametrize("entry", BROKEN)
def test_a_manifest_of_wrong_types_is_one_line_with_the_entry(folder, entry):
    manifest = Manifest.load(folder)
    for value in (BROKEN[entry], {"a": [None]}, *([None] if entry != "resolution" else [])):
        Manifest(LATENT_SHARDS, manifest.shards, manifest.extra | {entry: value}).save(folder)
        with pytest.raises(LdmError, match=rf"^the manifest of {folder}: {entry}[.:].*; write it again or restore it$"):
            latent_info(open_source(folder, LATENT_SHARDS))


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"latents_std": (1.0, 1.1, 1.2, 13.0)}, "was changed after the export"),
        ({"latents_mean": (1.0, 0.2, 0.3, 0.4)}, "was changed after the export"),
        ({"autoencoder": "b" * 64}, "was changed after the export"),
        ({"latent_shapes": ((4, 2, 3),)}, "was changed after the export"),
        ({"null_text": "c" * 64}, "was changed after the export"),
        ({"latents_std": (1.0, 1.1, 1.2)}, "has statistics of another number of channels"),
    ],
)
def test_numbers_that_were_changed_after_the_export_are_not_believed(folder, changes, what):
    manifest = Manifest.load(folder)
    Manifest(LATENT_SHARDS, manifest.shards, manifest.extra | changes).save(folder)
    with pytest.raises(LdmError, match=f"manifest of {folder} {what}"):
        latent_info(open_source(folder))
    older = {name: value for name, value in manifest.extra.items() if name not in ("fingerprint", "null_text")}
    Manifest(LATENT_SHARDS, manifest.shards, older).save(folder)
    assert latent_info(open_source(folder)) == INFO


def test_a_shard_that_holds_other_than_its_manifest_says_is_refused(folder):
    path = folder / "latents-00000.tar"
    with pytest.raises(LdmError, match=r"latents-00000.tar holds 5 latents, its manifest says 6; export again"):
        LatentShard(path, 6)
    path.write_bytes(path.read_bytes()[: ShardReader(path).spans(1)["safetensors"][0] + 9])
    with pytest.raises(LdmError, match=r"latents-00000.tar is cut short at byte \d+; export again"):
        LatentShard(path, 5)
    shard = LatentShard(folder / "latents-00001.tar", 4)
    shard.close()
    with pytest.raises(LdmError, match=r"gone.tar does not exist; restore it"):
        shard.reopen(folder / "gone.tar")
    shard.reopen(folder / "latents-00001.tar")
    assert shard.tensors(0)["mean"].shape == (4, 4, 2, 3)


STARTS = np.array([0, 1, 3, 6])


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"safetensors": None}, "without its .safetensors"),
        ({"text_start": None}, "are not those of latents"),
        ({"text_2_start": None}, "are not those of latents"),
        ({"caption_start": None}, "are not those of latents"),
        ({"crop": None}, "are not those of latents"),
        ({"text_start": np.array([0, 1, 3])}, "disagree about its samples"),
        ({"text_2_start": np.array([0, 4, 3, 6])}, "disagree about its samples"),
        ({"text_start": np.array([0, 1, 3, 60])}, "disagree about its samples"),
        ({"text_start": np.array(3)}, "are not those of latents"),
        ({"caption_start": np.array([0, 2, 1, 3])}, "disagree about its samples"),
        ({"caption_start": np.array([0, 1, 2, 4])}, "disagree about its samples"),
        ({"original_size": np.ones((2, 2), np.int32)}, "disagree about its samples"),
        ({"crop": np.ones((3, 2), np.int32)}, "disagree about its samples"),
        ({"std": np.ones((2, 4, 2, 3), np.float16)}, "disagree about its samples"),
        ({"std_flip": np.ones((3, 4, 3, 2), np.float16)}, "disagree about its samples"),
        ({"mean": np.ones((3, 4, 2, 3), np.float64)}, "no safetensors of latents"),
    ],
)
def test_tensors_that_do_not_go_together_are_told_before_a_sample_is_cut_out_of_them(tmp_path, changes, reason):
    tensors = {name: np.ones((3, 4, 2, 3), np.float16) for name in NAMES["gaussian", True]}
    tensors |= {"original_size": np.ones((3, 2), np.int32), "crop": np.ones((3, 4), np.int32)}
    tensors |= {"caption_start": np.array([0, 1, 2, 3])}
    tensors |= {name: np.ones((6, 6), np.float16) for name in ("text", "text_2")}
    tensors |= {name: STARTS for name in ("text_start", "text_2_start")}

    def shard(name, **members):
        with ShardWriter(tmp_path, name) as writer:
            writer.write("0", {extension: data for extension, data in members.items() if data is not None})
        return LatentShard(tmp_path / f"{name}-00000.tar", 3)

    words = json.dumps({"keys": ["a", "b", "c"], "captions": [["x"], ["y"], ["z"]]}).encode()
    whole = shard("whole", safetensors=safetensors.numpy.save(tensors), json=words)
    assert whole.metadata(0)["keys"] == ["a", "b", "c"] and whole.locate(2) == (0, 2)
    tensors = {name: array for name, array in (tensors | changes).items() if array is not None}
    data = safetensors.numpy.save(tensors) if "safetensors" not in changes else None
    with pytest.raises(DecodeError, match=f"is in a chunk .*{reason}"):
        shard("broken", safetensors=data, json=words)


@pytest.mark.parametrize(
    "words",
    [
        b"{",
        b"[]",
        b'{"keys": ["0000"], "captions": [["a"]]}',
        b'{"keys": ["0000", "0001"]}',
        b'{"keys": ["0000", "0001"], "captions": [["a"], ["b"]]}',  # the second has two
        b'{"keys": ["0000", "0001"], "captions": [1, 2]}',
        b'{"keys": ["0000", 1], "captions": [["a"], ["b", "c"]]}',
        b'{"keys": ["0000", "0001"], "captions": [["a"], ["b", null]]}',
        b"[" * 60,
        b"\xff\xfe",
    ],
)
def test_broken_keys_and_captions_are_told(tmp_path, words):
    source = make_images(("mean",), np.float32)
    next(source)
    with ShardWriter(tmp_path, "x") as writer:
        writer.write("0", chunk_of([source.send((1, 1)), source.send((1, 1))]).members())
    path = tmp_path / "x-00000.tar"
    data, shard = path.read_bytes(), LatentShard(path, 2)
    assert [len(captions) for captions in shard.metadata(0)["captions"]] == [1, 2]
    offset, size = shard.spans[0]["json"]
    assert len(words) <= size
    path.write_bytes(data[:offset] + words.ljust(size) + data[offset + size :])
    with pytest.raises(DecodeError, match="is in a chunk without its keys and captions"):
        LatentShard(path, 2).metadata(0)


def test_several_folders_have_the_statistics_of_all_their_samples(tmp_path):
    """Per channel, over 12 and 24 samples as over 36."""
    rng = np.random.default_rng(0)
    sets = [rng.normal(2, 3, size=(12, 4)), rng.normal(-1, 0.5, size=(24, 4))]
    sources = []
    for name, values in zip("ab", sets, strict=True):
        folder = tmp_path / name
        write(folder, info=replace(INFO, latents_mean=tuple(values.mean(0)), latents_std=tuple(values.std(0))))
        manifest = Manifest.load(folder)
        shards = [replace(entry, samples=entry.samples * len(values) // 12) for entry in manifest.shards]
        Manifest(LATENT_SHARDS, tuple(shards), manifest.extra).save(folder)
        sources.append(open_source(folder))
    info, every = common_info(sources), np.concatenate(sets)
    np.testing.assert_allclose(info.latents_mean, every.mean(0), rtol=1e-12)
    np.testing.assert_allclose(info.latents_std, every.std(0), rtol=1e-12)
    assert common_info(sources[:1]) == latent_info(sources[0])


@pytest.mark.parametrize(
    ("what", "changes"),
    [
        ("autoencoder", {"autoencoder": "b" * 64}),
        ("text encoders", {"text_encoders": INFO.text_encoders[:1]}),
        ("text encoders", {"text_encoders": INFO.text_encoders[::-1]}),
        ("latent shape", {"latent_shapes": ((4, 2, 2),)}),
        ("resolution", {"resolution": 64}),
        ("posterior", {"posterior": "mode", "flips": False}),
    ],
)
def test_folders_that_do_not_go_together_are_named(tmp_path, what, changes):
    write(tmp_path / "a")
    write(tmp_path / "b", info=replace(INFO, **changes))
    sources = [open_source(tmp_path / name) for name in "ab"]
    with pytest.raises(UsageError, match=rf"^{tmp_path / 'b'} has another {what} than {tmp_path / 'a'} .*; export both"):
        common_info(sources)


def test_the_null_text_of_each_encoder_comes_back_as_float32(folder):
    for encoder, text in enumerate(NULL):
        found = read_null_text(open_source(folder), encoder)
        assert found.dtype == np.float32 and np.array_equal(found, text.astype(np.float32))
    (folder / "null_text.safetensors").unlink()
    with pytest.raises(LdmError, match=r"null_text.safetensors does not exist; restore it"):
        read_null_text(open_source(folder))


@pytest.mark.parametrize(
    ("data", "what"),
    [
        (b"none", "cannot be read"),
        (b"", "cannot be read"),
        (b"\xff" * 64, "cannot be read"),
        ({"text_2": np.ones((2, 3), np.float32)}, "is without text, which"),
        ({"text": np.ones((2, 5), np.float32)}, "has text of 2 x 5, the manifest says 6 a token"),
        ({"text": np.ones((0, 6), np.float32)}, "has text of 0 x 6"),
        ({"text": np.ones(6, np.float32)}, "has text of 6,"),
        ({"text": np.full((2, 6), np.nan, np.float32)}, "has values in text that are not finite"),
        ({"text": np.full((2, 6), np.inf, np.float16)}, "has values in text that are not finite"),
    ],
)
def test_a_broken_null_text_is_told(folder, data, what):
    data = data if isinstance(data, bytes) else safetensors.numpy.save(data)
    (folder / "null_text.safetensors").write_bytes(data)
    with pytest.raises(LdmError, match=f"^null_text.safetensors of {folder} {what}.*; restore it"):
        read_null_text(open_source(folder))


def test_the_null_text_is_that_of_the_export(folder):
    manifest = Manifest.load(folder)
    info = replace(INFO, null_text=write_null_text(folder, NULL))
    Manifest(LATENT_SHARDS, manifest.shards, info.as_extra()).save(folder)
    read_null_text(open_source(folder))
    write_null_text(folder, [text + 1 for text in NULL])
    with pytest.raises(LdmError, match="has other bytes than the manifest's sha256"):
        read_null_text(open_source(folder))
