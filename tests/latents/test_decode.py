"""Latent shards become images again: those that the autoencoder decodes, to the pixel."""

import errno
import json
import os
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from ldm.data.image_dataset import ImageDataset
from ldm.data.latent_schema import Chunk
from ldm.data.manifest import LATENT_SHARDS, Manifest
from ldm.data.pack.packer import pack
from ldm.data.writer import ShardWriter
from ldm.errors import LdmError, UsageError
from ldm.latents.decode import decode_latent_shards
from ldm.models.autoencoder import autoencoder_hash, decode, images_to_pil, load_autoencoder

KEYS = [["0000", "a/b", "../../é"], ["0000", ".hidden"], ["x" * 300, "x" * 300 + "y"]]


@pytest.fixture
def latents(autoencoder, make_info, tmp_path):
    """Three shards of a chunk each, of two sizes."""
    folder, entries, rng = tmp_path / "latents", [], np.random.default_rng(0)
    folder.mkdir()
    for number, keys in enumerate(KEYS):
        shape = (len(keys), 4, 4, 4 + 2 * (number == 1))
        chunk = Chunk(
            keys=keys,
            captions=[[f"image {key}"] if number else [f"image {key}", "another"] for key in keys],
            latents={name: rng.normal(size=shape).astype(np.float16) for name in ("mean", "std", "mean_flip", "std_flip")},
            texts=[[np.zeros((1, 3), np.float16)] * (len(keys) if number else 2 * len(keys))],
            original_size=np.tile([8, 8], (len(keys), 1)),
            crop=np.tile([0, 0, 8, 8], (len(keys), 1)),
        )
        with ShardWriter(folder, "latents", first_index=number) as writer:
            writer.write("0", chunk.members())
        entries.append((replace(writer.entries[0], samples=len(keys)), chunk))
    info = make_info(
        autoencoder=autoencoder_hash(load_autoencoder(autoencoder)), latent_shapes=((4, 4, 4), (4, 4, 6)), flips=True
    )
    Manifest(LATENT_SHARDS, tuple(entry for entry, _ in entries), info.as_extra()).save(folder)
    return folder, [chunk for _, chunk in entries]


def listed(out):
    return [json.loads(line) for line in (out / "captions.jsonl").read_text("utf-8").splitlines()]


def direct(autoencoder, mean):
    """The same with nothing in between."""
    with torch.inference_mode():
        return images_to_pil(decode(load_autoencoder(autoencoder), torch.from_numpy(mean.astype(np.float32))))


@pytest.mark.parametrize("flips", [False, True])
def test_images_are_those_that_the_autoencoder_decodes(latents, autoencoder, tmp_path, flips):
    folder, chunks = latents
    seen = []
    written = decode_latent_shards(
        folder, tmp_path / "out", autoencoder, flips=flips, device="cpu", on_progress=lambda *a: seen.append(a)
    )
    rows = listed(tmp_path / "out")
    ends = ("", "_flip") if flips else ("",)
    expected = [
        (key, captions, image)
        for chunk in chunks
        for key, captions, *images in zip(
            chunk.keys, chunk.captions, *(direct(autoencoder, chunk.latents[f"mean{end}"]) for end in ends), strict=True
        )
        for image in images
    ]
    assert written == len(rows) == len(expected) == 7 * len(ends)
    assert seen == [(done, written) for done in range(1, written + 1)]
    for row, (key, captions, image) in zip(rows, expected, strict=True):
        assert row["key"] == key and row["caption"] == (captions if len(captions) > 1 else captions[0])
        assert np.array_equal(np.asarray(Image.open(tmp_path / "out" / row["file"])), np.asarray(image))


def test_every_key_gets_a_file_of_its_own_inside_the_folder(latents, autoencoder, tmp_path):
    decode_latent_shards(latents[0], tmp_path / "out", autoencoder, device="cpu")
    files = [row["file"] for row in listed(tmp_path / "out")]
    assert files == [
        *("0000.png", "a_b.png", "_.._é.png", "0000~2.png", "hidden.png"),
        *(f"{'x' * 200}.png", f"{'x' * 200}~2.png"),
    ]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == sorted([*files, "captions.jsonl"])


def test_what_is_decoded_can_be_packed_again(latents, autoencoder, tmp_path):
    decode_latent_shards(latents[0], tmp_path / "out", autoencoder, device="cpu")
    result = pack(tmp_path / "out", tmp_path / "shards", captions=tmp_path / "out" / "captions.jsonl")
    assert (result.packed, result.quarantined) == (7, 0)
    images = ImageDataset(tmp_path / "shards", 8)
    assert [images[index]["caption"] for index in range(7)] == [f"image {key}" for keys in KEYS for key in keys]


@pytest.mark.parametrize("batch_size", [1, 2])
def test_as_many_as_asked_for_in_batches_of_any_size(latents, autoencoder, tmp_path, batch_size):
    out = tmp_path / "out"
    assert decode_latent_shards(latents[0], out, autoencoder, samples=4, batch_size=batch_size, device="cpu") == 4
    assert [row["key"] for row in listed(out)] == [*KEYS[0], KEYS[1][0]]
    assert decode_latent_shards(latents[0], tmp_path / "all", autoencoder, samples=100, device="cpu") == 7


def test_another_autoencoder_is_refused(latents, autoencoder, tmp_path):
    other = load_autoencoder(autoencoder)
    ours = autoencoder_hash(other)
    with torch.no_grad():
        next(other.decoder.parameters()).add_(1)
    other.save_pretrained(tmp_path / "other")
    theirs = autoencoder_hash(load_autoencoder(tmp_path / "other"))
    with pytest.raises(UsageError) as error:
        decode_latent_shards(latents[0], tmp_path / "out", tmp_path / "other", device="cpu")
    assert str(error.value) == (
        f"{latents[0]} holds latents of autoencoder {ours[:12]}, but {tmp_path / 'other'} is {theirs[:12]}; give the one that "
        "they were exported with, or export again: ldm latents export"
    )
    assert not (tmp_path / "out").exists()


def test_what_cannot_be_done_is_told_and_leaves_nothing(latents, autoencoder, tmp_path):
    folder, _ = latents
    with pytest.raises(UsageError, match=r"^samples is 0"):
        decode_latent_shards(folder, tmp_path / "out", autoencoder, samples=0)
    manifest = Manifest.load(folder)
    Manifest(LATENT_SHARDS, manifest.shards, manifest.extra | {"flips": False}).save(folder)
    with pytest.raises(UsageError, match="has no latents of mirrored images"):
        decode_latent_shards(folder, tmp_path / "out", autoencoder, flips=True)
    shard = folder / manifest.shards[1].name
    data = shard.read_bytes()
    shard.write_bytes(data.replace(b'"keys"', b'"KEYS"'))
    with pytest.raises(LdmError, match=r"latents-00001.tar: chunk 0 is in a chunk without its keys"):
        decode_latent_shards(folder, tmp_path / "out", autoencoder, device="cpu")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["autoencoder", "latents"]


def test_a_full_disk_is_told_and_leaves_nothing(latents, autoencoder, tmp_path, monkeypatch):
    def full(image):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("ldm.latents.decode.encode_png", full)
    with pytest.raises(LdmError, match=r"out cannot be written \(No space left on device\); fix that and decode again"):
        decode_latent_shards(latents[0], tmp_path / "out", autoencoder, device="cpu")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["autoencoder", "latents"]


def test_latents_that_are_not_finite_are_named(latents, autoencoder, tmp_path):
    folder, chunks = latents
    chunks[0].latents["mean"][1] = np.nan
    with ShardWriter(folder, "latents") as writer:
        writer.write("0", chunks[0].members())
    manifest = Manifest.load(folder)
    entries = (replace(writer.entries[0], samples=3), *manifest.shards[1:])
    Manifest(LATENT_SHARDS, entries, manifest.extra).save(folder)
    with pytest.raises(LdmError, match=r"latents-00000.tar: a/b or one of .* decodes to values that are not finite"):
        decode_latent_shards(folder, tmp_path / "out", autoencoder, batch_size=1, device="cpu")
