import json
import pickle
import tarfile
from dataclasses import asdict

import numpy as np
import pytest
import safetensors.numpy
import torch

from ldm.data.check import check_folder
from ldm.data.decode import DecodeError
from ldm.data.images import Augmentation
from ldm.data.latents import (
    LatentDataset,
    LatentInfo,
    LatentShard,
    common_info,
    latent_manifest,
    read_null_text,
    read_texts,
    tensors_in,
    write_chunk,
    write_null_text,
)
from ldm.data.manifest import IMAGE_SHARDS, LATENT_SHARDS, Manifest, ShardEntry
from ldm.data.plan import Draw
from ldm.data.quarantine import BadSample
from ldm.data.shards import ShardReader
from ldm.data.sources import open_source
from ldm.data.writer import ShardWriter
from ldm.errors import LdmError, UsageError

INFO = LatentInfo(
    autoencoder="a" * 64,
    text_encoder="minilm",
    text_encoder_hash="t" * 64,
    text_width=6,
    latent_shape=(4, 2, 3),
    dtype="float16",
    latents_mean=(0.1, 0.2, 0.3, 0.4),
    latents_std=(1.0, 1.1, 1.2, 1.3),
    source="s" * 64,
)
SHARDS = [[3, 2], [4], [1, 1, 1]]  # samples per chunk, per shard


def made(count=12, dtype=np.float16):
    """Samples with captions of 1 to 5 tokens."""
    rng = np.random.default_rng(0)
    for index in range(count):
        yield {
            "mean": rng.normal(size=(4, 2, 3)).astype(dtype),
            "std": rng.uniform(0.1, 1, size=(4, 2, 3)).astype(dtype),
            "text": rng.normal(size=(1 + index % 5, 6)).astype(dtype),
            "key": f"{index:04d}",
            "caption": f"picture {index} — é",
        }


def write(folder, dtype=np.float16, **changes):
    samples, entries = made(dtype=dtype), []
    folder.mkdir()
    for number, chunks in enumerate(SHARDS):
        with ShardWriter(folder, "latents", samples_per_shard=100, first_index=number) as writer:
            for chunk, size in enumerate(chunks):
                few = [next(samples) for _ in range(size)]
                mean, std = (np.stack([sample[name] for sample in few]) for name in ("mean", "std"))
                texts, keys, captions = ([sample[name] for sample in few] for name in ("text", "key", "caption"))
                write_chunk(writer, f"{chunk:08d}", mean, std, texts, keys, captions)
        entries.append(ShardEntry(**asdict(writer.entries[0]) | {"samples": sum(chunks)}))
    manifest = Manifest(LATENT_SHARDS, tuple(entries), INFO.as_extra() | changes)
    manifest.save(folder)
    return folder


@pytest.fixture
def folder(tmp_path):
    return write(tmp_path / "latents")


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_what_is_written_is_read_back(tmp_path, dtype):
    dataset = LatentDataset(write(tmp_path / "latents", dtype))
    assert len(dataset) == 12
    for found, expected in zip((dataset[index] for index in range(12)), made(dtype=dtype), strict=True):
        for name in ("mean", "std", "text"):
            assert found[name].dtype == dtype and np.array_equal(found[name], expected[name])
    for index in (-1, 12):
        with pytest.raises(IndexError):
            dataset[index]


def test_nothing_but_tarfile_and_safetensors_is_needed_to_read_it(folder):
    found = []
    for name in sorted(path.name for path in folder.glob("*.tar")):
        with tarfile.open(folder / name, "r:") as tar:
            members = {member.name: tar.extractfile(member).read() for member in tar}
        for chunk in sorted(name.removesuffix(".json") for name in members if name.endswith(".json")):
            tensors = safetensors.numpy.load(members[f"{chunk}.safetensors"])
            words = json.loads(members[f"{chunk}.json"])
            assert tensors["text_start"].dtype == np.int64
            for row, (key, caption) in enumerate(zip(words["keys"], words["captions"], strict=True)):
                text = tensors["text"][tensors["text_start"][row] : tensors["text_start"][row + 1]]
                found.append(
                    {"mean": tensors["mean"][row], "std": tensors["std"][row], "text": text, "key": key, "caption": caption}
                )
    for ours, expected in zip(found, made(), strict=True):
        assert ours.keys() == expected.keys()
        assert all(np.array_equal(ours[name], expected[name]) for name in expected)


def test_captions_and_their_embeddings_come_back_by_shard(folder):
    shards = Manifest.load(folder).shards
    chunks = [chunk for entry in shards for chunk in read_texts(folder / entry.name, entry.samples)]
    assert [len(captions) for captions, _ in chunks] == [size for sizes in SHARDS for size in sizes]
    pairs = [pair for captions, texts in chunks for pair in zip(captions, texts, strict=True)]
    for (caption, text), expected in zip(pairs, made(), strict=True):
        assert caption == expected["caption"] and np.array_equal(text, expected["text"])


def test_tensors_are_mapped_not_copied_and_cannot_be_written(folder):
    dataset = LatentDataset(folder)
    mean = dataset[0]["mean"]
    assert isinstance(mean.base, np.memmap) and not mean.flags.writeable
    offset, size = ShardReader(folder / "latents-00000.tar").spans(0)["safetensors"]
    data = np.fromfile(folder / "latents-00000.tar", np.uint8)[offset : offset + size]
    views, whole = tensors_in(data), safetensors.numpy.load(data.tobytes())
    assert views.keys() == whole.keys() == {"mean", "std", "text", "text_start"}
    assert all(np.array_equal(views[name], whole[name]) and np.shares_memory(views[name], data) for name in views)


def test_collating_pads_with_zeros_and_masks_them(folder):
    dataset = LatentDataset(folder)
    samples = [dataset[index] for index in (4, 0, 2)]  # 5, 1 and 3 tokens
    batch = dataset.collate(samples)
    assert {name: (value.dtype, tuple(value.shape)) for name, value in batch.items()} == {
        "mean": (torch.float32, (3, 4, 2, 3)),
        "std": (torch.float32, (3, 4, 2, 3)),
        "text": (torch.float32, (3, 5, 6)),
        "text_mask": (torch.int64, (3, 5)),
    }
    assert batch["text_mask"].tolist() == [[1, 1, 1, 1, 1], [1, 0, 0, 0, 0], [1, 1, 1, 0, 0]]
    for row, sample in enumerate(samples):
        length = len(sample["text"])
        assert np.array_equal(batch["text"][row, :length].numpy(), sample["text"].astype(np.float32))
        assert not batch["text"][row, length:].any()
        assert np.array_equal(batch["mean"][row].numpy(), sample["mean"].astype(np.float32))
    batch["mean"] += 1  # a copy: the shard is read-only


def test_chunks_are_the_whole_set_in_order(folder):
    means, stds = (np.concatenate(parts) for parts in zip(*LatentDataset(folder).chunked(), strict=True))
    assert means.dtype == stds.dtype == np.float64
    assert np.array_equal(means, np.stack([sample["mean"] for sample in made()]))
    assert np.array_equal(stds, np.stack([sample["std"] for sample in made()]))


def test_it_can_be_sent_to_another_process(folder):
    dataset = LatentDataset(folder)
    dataset[5]
    data = pickle.dumps(dataset)
    assert len(data) < 5000  # where the chunks lie, not what they hold
    again = pickle.loads(data)
    assert all(np.array_equal(again[index]["text"], dataset[index]["text"]) for index in range(len(dataset)))


def test_its_manifest_says_what_it_was_made_with(folder):
    manifest, info = latent_manifest(folder)
    assert manifest.samples == 12 and {entry.samples for entry in manifest.shards} == {5, 4, 3}
    assert asdict(info) | {"latent_shape": (4, 2, 3)} == asdict(INFO) | {
        "latents_mean": list(INFO.latents_mean),
        "latents_std": list(INFO.latents_std),
    }


def test_an_incomplete_manifest_names_what_it_lacks(folder):
    manifest = Manifest.load(folder)
    Manifest(LATENT_SHARDS, manifest.shards, {k: v for k, v in manifest.extra.items() if k != "text_width"}).save(folder)
    with pytest.raises(UsageError, match=rf"manifest of {folder} lacks 'text_width'; export again"):
        latent_manifest(folder)


def test_a_manifest_that_counts_otherwise_is_refused(folder):
    manifest = Manifest.load(folder)
    wrong = ShardEntry(**asdict(manifest.shards[0]) | {"samples": 6})
    Manifest(LATENT_SHARDS, (wrong, *manifest.shards[1:]), manifest.extra).save(folder)
    dataset = LatentDataset(folder)
    with pytest.raises(LdmError, match=r"latents-00000.tar holds 5 latents, its manifest says 6; export again"):
        dataset[0]
    assert np.array_equal(dataset[6]["mean"], list(made())[5]["mean"])  # the other shards


def test_missing_shards_and_image_shards_are_refused(folder):
    shard = folder / "latents-00001.tar"
    data = shard.read_bytes()
    shard.unlink()
    with pytest.raises(LdmError, match=r"latents-00001.tar is listed in the manifest but missing"):
        LatentDataset(folder)
    shard.write_bytes(data[:-512])
    with pytest.raises(LdmError, match=r"latents-00001.tar has \d+ bytes, the manifest says \d+"):
        LatentDataset(folder)
    Manifest(IMAGE_SHARDS, Manifest.load(folder).shards).save(folder)
    with pytest.raises(UsageError, match="describes ldm-image-shards, but ldm-latent-shards are needed"):
        LatentDataset(folder)


def resize(folder):
    """Let the manifest say that the first shard has the size that it has now."""
    manifest, path = Manifest.load(folder), folder / "latents-00000.tar"
    entry = ShardEntry(**asdict(manifest.shards[0]) | {"bytes": path.stat().st_size})
    Manifest(LATENT_SHARDS, (entry, *manifest.shards[1:]), manifest.extra).save(folder)


def test_a_broken_chunk_costs_its_shard_which_is_named(folder):
    shard = folder / "latents-00000.tar"
    offset = ShardReader(shard).spans(0)["safetensors"][0]
    data = bytearray(shard.read_bytes())
    data[offset + 8 : offset + 40] = b"\xff" * 32
    shard.write_bytes(data)
    dataset = LatentDataset(folder)
    found = [dataset.attempt(index) for index in range(12)]
    bad = [sample for sample in found if isinstance(sample, BadSample)]
    assert [sample.key for sample in bad] == [f"#{row}" for row in range(5)] and set(map(type, found[5:])) == {dict}
    assert {sample.shard for sample in bad} == {str(shard)}
    assert all("is in a chunk that is no safetensors of latents" in sample.reason for sample in bad)
    with pytest.raises(LdmError, match=r"latents-00000.tar: #4 is in a chunk that is no safetensors.*ldm shards check"):
        dataset[4]


def test_a_cut_shard_stops_the_reading(folder):
    shard = folder / "latents-00000.tar"
    offset = ShardReader(shard).spans(1)["safetensors"][0]
    shard.write_bytes(shard.read_bytes()[: offset + 9])
    resize(folder)
    with pytest.raises(LdmError, match=r"latents-00000.tar is cut short at byte \d+; export again"):
        LatentDataset(folder)[0]


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"safetensors": None}, "without its .safetensors"),
        ({"text_start": None}, "are not those of latents"),
        ({"text_start": np.array([0, 1, 3])}, "disagree about its samples"),
        ({"text_start": np.array([0, 4, 3, 6])}, "disagree about its samples"),
        ({"text_start": np.array([0, 1, 3, 60])}, "disagree about its samples"),
        ({"text_start": np.array(3)}, "are not those of latents"),
        ({"std": np.ones((2, 4, 2, 3), np.float16)}, "disagree about its samples"),
        ({"mean": np.ones((3, 4, 2, 3), np.float64)}, "no safetensors of latents"),
    ],
)
def test_tensors_that_do_not_go_together_are_told_before_a_sample_is_cut_out_of_them(tmp_path, changes, reason):
    tensors = {name: np.ones((3, 4, 2, 3), np.float16) for name in ("mean", "std")}
    tensors |= {"text": np.ones((6, 6), np.float16), "text_start": np.array([0, 1, 3, 6])}

    def shard(name, **members):
        with ShardWriter(tmp_path, name) as writer:
            writer.write("0", {extension: data for extension, data in members.items() if data is not None})
        return LatentShard(tmp_path / f"{name}-00000.tar", 3)

    words = json.dumps({"keys": ["a", "b", "c"], "captions": ["", "", ""]}).encode()
    whole = shard("whole", safetensors=safetensors.numpy.save(tensors), json=words)
    assert whole.words(0)["keys"] == ["a", "b", "c"] and whole.locate(2) == (0, 2)
    tensors = {name: array for name, array in (tensors | changes).items() if array is not None}
    data = safetensors.numpy.save(tensors) if "safetensors" not in changes else None
    with pytest.raises(DecodeError, match=f"is in a chunk .*{reason}"):
        shard("broken", safetensors=data, json=words)


@pytest.mark.parametrize("words", [b"{", b"[]", b'{"keys": ["a"], "captions": ["a"]}', b'{"keys": ["a", "b"]}'])
def test_broken_keys_and_captions_are_told(tmp_path, words):
    with ShardWriter(tmp_path, "x") as writer:
        write_chunk(writer, "0", *np.ones((2, 2, 4, 1, 1), np.float32), [np.ones((1, 6), np.float32)] * 2, ["a", "b"], ["", ""])
    data = (tmp_path / "x-00000.tar").read_bytes()
    shard = LatentShard(tmp_path / "x-00000.tar", 2)
    offset, size = shard.spans[0]["json"]
    assert len(words) <= size
    (tmp_path / "x-00000.tar").write_bytes(data[:offset] + words.ljust(size) + data[offset + size :])
    with pytest.raises(DecodeError, match="is in a chunk without its keys and captions"):
        LatentShard(tmp_path / "x-00000.tar", 2).words(0)


def test_the_deep_check_counts_latents_not_chunks(folder):
    problems, shards = check_folder(folder, deep=True)
    assert problems == [] and [(shard.good, shard.problems) for shard in shards] == [(5, ()), (4, ()), (3, ())]
    manifest = Manifest.load(folder)
    wrong = ShardEntry(**asdict(manifest.shards[1]) | {"samples": 3})
    Manifest(LATENT_SHARDS, (manifest.shards[0], wrong, manifest.shards[2]), manifest.extra).save(folder)
    _, shards = check_folder(folder)
    (problem,) = [problem for shard in shards for problem in shard.problems]
    assert str(problem) == "latents-00001.tar holds 4 samples, the manifest says 3; restore it"


def test_a_dropped_caption_is_the_null_text_and_the_draw_alone_says_which(folder):
    null = np.full((2, 6), 7.0, np.float16)
    dataset = LatentDataset(folder, Augmentation(caption_dropout=0.5, seed=3), null)
    draws = [Draw(index % 12, index) for index in range(200)]
    dropped = [np.array_equal(sample["text"], null) for sample in dataset.__getitems__(draws)]
    assert dropped == [np.array_equal(sample["text"], null) for sample in dataset.__getitems__(draws)]
    assert abs(np.mean(dropped) - 0.5) < 4 * 0.5 / 200**0.5
    # asked for by number nothing is random
    for index, expected in enumerate(made()):
        assert np.array_equal(dataset[index]["text"], expected["text"])


def test_several_folders_have_the_statistics_of_all_their_samples(tmp_path):
    """Per channel, over 12 and 24 samples as over 36."""
    rng = np.random.default_rng(0)
    sets = [rng.normal(2, 3, size=(12, 4)), rng.normal(-1, 0.5, size=(24, 4))]
    sources = []
    for name, values in zip("ab", sets, strict=True):
        folder = write(tmp_path / name, latents_mean=values.mean(0).tolist(), latents_std=values.std(0).tolist())
        manifest = Manifest.load(folder)
        repeat = len(values) // 12
        shards = [ShardEntry(**asdict(entry) | {"samples": entry.samples * repeat}) for entry in manifest.shards]
        Manifest(LATENT_SHARDS, tuple(shards), manifest.extra).save(folder)
        sources.append(open_source(folder))
    info, every = common_info(sources), np.concatenate(sets)
    np.testing.assert_allclose(info.latents_mean, every.mean(0), rtol=1e-12)
    np.testing.assert_allclose(info.latents_std, every.std(0), rtol=1e-12)
    assert common_info(sources[:1]) == LatentInfo.of(sources[0].manifest)


@pytest.mark.parametrize(
    ("name", "other"), [("autoencoder", "b" * 64), ("text_encoder_hash", "u" * 64), ("latent_shape", (4, 2, 2))]
)
def test_folders_that_do_not_go_together_are_named(tmp_path, name, other):
    sources = [open_source(write(tmp_path / "a")), open_source(write(tmp_path / "b", **{name: other}))]
    with pytest.raises(UsageError, match=rf"{tmp_path / 'b'} has another {name} than {tmp_path / 'a'} .*; export both"):
        common_info(sources)


def test_the_null_text_comes_back_as_float32(folder):
    with pytest.raises(LdmError, match=r"null_text.safetensors does not exist; restore it"):
        read_null_text(open_source(folder))
    text = np.random.default_rng(0).normal(size=(2, 6)).astype(np.float16)
    write_null_text(folder, text)
    found = read_null_text(open_source(folder))
    assert found.dtype == np.float32 and np.array_equal(found, text.astype(np.float32))
