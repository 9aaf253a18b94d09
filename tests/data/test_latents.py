import json
import pickle
import tarfile
from dataclasses import asdict

import numpy as np
import pytest
import safetensors.numpy
import torch

from ldm.data.latents import (
    LatentDataset,
    LatentInfo,
    latent_manifest,
    map_tensors,
    read_null_text,
    read_texts,
    write_chunk,
    write_null_text,
)
from ldm.data.manifest import IMAGE_SHARDS, LATENT_SHARDS, Manifest, ShardEntry
from ldm.data.shards import ShardWriter, check_folder
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
    chunks = [chunk for name in sorted(folder.glob("*.tar")) for chunk in read_texts(name)]
    assert [len(captions) for captions, _ in chunks] == [size for sizes in SHARDS for size in sizes]
    pairs = [pair for captions, texts in chunks for pair in zip(captions, texts, strict=True)]
    for (caption, text), expected in zip(pairs, made(), strict=True):
        assert caption == expected["caption"] and np.array_equal(text, expected["text"])


def test_tensors_are_mapped_not_copied_and_cannot_be_written(folder):
    dataset = LatentDataset(folder)
    mean = dataset[0]["mean"]
    assert isinstance(mean.base, np.memmap) and not mean.flags.writeable
    views, expected = map_tensors(*dataset.chunks[0]), next(made())
    assert views.keys() == {"mean", "std", "text", "text_start"} and np.array_equal(views["mean"][0], expected["mean"])


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
    with pytest.raises(UsageError, match=r"manifest.json lacks 'text_width'; export again"):
        latent_manifest(folder)


def test_a_manifest_that_counts_otherwise_is_refused(folder):
    manifest = Manifest.load(folder)
    wrong = ShardEntry(**asdict(manifest.shards[0]) | {"samples": 6})
    Manifest(LATENT_SHARDS, (wrong, *manifest.shards[1:]), manifest.extra).save(folder)
    with pytest.raises(LdmError, match="holds 12 latents, its manifest says 13"):
        LatentDataset(folder)


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


def test_a_broken_chunk_names_its_shard(folder):
    shard = folder / "latents-00000.tar"
    offset = LatentDataset(folder).chunks[0][1]
    data = bytearray(shard.read_bytes())
    data[offset + 8 : offset + 40] = b"\xff" * 32
    shard.write_bytes(data)
    with pytest.raises(LdmError, match=r"latents-00000.tar: the chunk at byte \d+ is no safetensors of latents"):
        LatentDataset(folder)


def test_the_deep_check_counts_latents_not_chunks(folder):
    assert check_folder(folder, deep=True) == []
    manifest = Manifest.load(folder)
    wrong = ShardEntry(**asdict(manifest.shards[1]) | {"samples": 3})
    Manifest(LATENT_SHARDS, (manifest.shards[0], wrong, manifest.shards[2]), manifest.extra).save(folder)
    (problem,) = check_folder(folder, deep=True)
    assert str(problem) == "latents-00001.tar holds 4 samples, the manifest says 3; restore it"


def test_the_null_text_comes_back_as_float32(tmp_path):
    with pytest.raises(LdmError, match=r"null_text.safetensors does not exist; export the latents again"):
        read_null_text(tmp_path)
    text = np.random.default_rng(0).normal(size=(2, 6)).astype(np.float16)
    write_null_text(tmp_path, text)
    found = read_null_text(tmp_path)
    assert found.dtype == torch.float32 and np.array_equal(found.numpy(), text.astype(np.float32))
