import json

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.numpy import load_file

from ldm.data.check import check_folder
from ldm.data.images import ImageDataset
from ldm.data.latents import LatentDataset, latent_manifest, read_null_text
from ldm.data.manifest import IMAGE_SHARDS, LATENT_SHARDS, Manifest
from ldm.data.quarantine import QUARANTINE_NAME
from ldm.data.shapes import generate
from ldm.data.sources import open_source
from ldm.data.writer import ShardWriter, encode_png, write_images
from ldm.errors import LdmError, UsageError
from ldm.export import UNFINISHED_NAME, CaptionCache, export_latents, latent_statistics
from ldm.models.autoencoder import (
    autoencoder_hash,
    load_autoencoder,
    normalise_latents,
    pixels_to_images,
    set_latent_statistics,
)


@pytest.fixture
def autoencoder(tiny_autoencoder, tmp_path):
    """Its folder; the posterior made wide and uneven, so that the deviations matter."""
    with torch.no_grad():
        tiny_autoencoder.quant_conv.weight[4:] = tiny_autoencoder.quant_conv.weight[:4] / 2
        tiny_autoencoder.quant_conv.bias[4:] = torch.tensor([-1.0, 0.0, -2.0, -0.5])
    tiny_autoencoder.save_pretrained(tmp_path / "autoencoder")
    return tmp_path / "autoencoder"


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def is_whole(folder):
    problems, shards = check_folder(folder, deep=True)
    return not problems and all(shard.good == shard.entry.samples and not shard.problems for shard in shards)


def test_latents_are_what_the_encoders_say(autoencoder, image_shards, minilm, tmp_path):
    seen = []
    manifest = export_latents(
        autoencoder, image_shards, tmp_path / "out", batch_size=3, dtype="float32", on_progress=lambda *a: seen.append(a)
    )
    images, latents, network = ImageDataset(image_shards), LatentDataset(tmp_path / "out"), load_autoencoder(autoencoder)
    # conservation: as many as there were, shard by shard, in the same order
    assert manifest.shards == Manifest.load(tmp_path / "out", LATENT_SHARDS).shards
    assert [entry.samples for entry in manifest.shards] == [entry.samples for entry in images.sources[0].manifest.shards]
    assert len(latents) == len(images) == 10
    assert seen[-1] == (10, 10) and sorted(seen) == seen
    assert is_whole(tmp_path / "out")
    for index in range(10):
        sample, latent = images[index], latents[index]
        with torch.no_grad():
            posterior = network.encode(pixels_to_images(torch.from_numpy(sample["image"])[None])).latent_dist
        np.testing.assert_allclose(latent["mean"], posterior.mean[0], rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(latent["std"], posterior.std[0], rtol=1e-4, atol=1e-5)
        embedding, _ = minilm.encode([sample["caption"]])
        np.testing.assert_allclose(latent["text"], embedding[0], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(read_null_text(open_source(tmp_path / "out")), minilm.encode([""])[0][0], rtol=1e-4, atol=1e-5)


def test_the_manifest_says_what_made_it(autoencoder, image_shards, minilm, tmp_path):
    export_latents(autoencoder, image_shards, tmp_path / "out")
    _, info = latent_manifest(tmp_path / "out")
    assert info.autoencoder == autoencoder_hash(load_autoencoder(autoencoder))
    assert (info.text_encoder, info.text_encoder_hash, info.text_width) == ("minilm", minilm.hash, 384)
    assert info.source == Manifest.load(image_shards).hash
    assert list(info.latent_shape) == [4, 16, 16] and info.dtype == "float16"
    sample = LatentDataset(tmp_path / "out")[0]
    assert {sample[name].dtype for name in ("mean", "std", "text")} == {np.dtype(np.float16)}


def test_the_statistics_are_exact_and_normalise_what_is_drawn(autoencoder, image_shards, tmp_path):
    export_latents(autoencoder, image_shards, tmp_path / "out")
    dataset = LatentDataset(tmp_path / "out")
    means, stds = (np.stack([dataset[i][name] for i in range(10)]).astype(np.float64) for name in ("mean", "std"))
    average = means.mean((0, 2, 3))
    deviation = np.sqrt((means**2).mean((0, 2, 3)) + (stds**2).mean((0, 2, 3)) - average**2)
    found = latent_statistics(dataset)
    np.testing.assert_allclose(found[0], average, rtol=0, atol=1e-12)
    np.testing.assert_allclose(found[1], deviation, rtol=1e-12)
    _, info = latent_manifest(tmp_path / "out")
    assert list(info.latents_mean) == found[0].tolist() and list(info.latents_std) == found[1].tolist()
    network = load_autoencoder(autoencoder)
    set_latent_statistics(network, info.latents_mean, info.latents_std)
    rng = np.random.default_rng(0)
    drawn = np.concatenate([means + stds * rng.normal(size=means.shape) for _ in range(40)])
    normalised = normalise_latents(network, torch.from_numpy(drawn))
    torch.testing.assert_close(normalised.mean((0, 2, 3)), torch.zeros(4).double(), rtol=0, atol=0.02)
    torch.testing.assert_close(normalised.std((0, 2, 3)), torch.ones(4).double(), rtol=0.02, atol=0)


class Interrupted(Exception):
    pass


def stop_at(samples):
    def on_progress(done, total):
        if done >= samples:
            raise Interrupted

    return on_progress


@pytest.fixture
def repeating_shards(tmp_path):
    """Three shards in which captions of several lengths come back, as they do in real sets."""
    captions = ["a red circle", "a tiny blue star at the top left of a dark green background", "ring", "a small white cross"]
    items = [(sample.key, sample.image, captions[i**2 % 4 if i < 4 else i % 4]) for i, sample in enumerate(generate(12, 32, 0))]
    write_images(tmp_path / "repeating", "x", items, samples_per_shard=4)
    return tmp_path / "repeating"


@pytest.mark.parametrize("samples", [1, 5, 12])
def test_an_interrupted_export_goes_on_to_the_same_bytes(autoencoder, repeating_shards, tmp_path, samples):
    whole = export_latents(autoencoder, repeating_shards, tmp_path / "whole")
    with pytest.raises(Interrupted):
        export_latents(autoencoder, repeating_shards, tmp_path / "out", on_progress=stop_at(samples))
    assert (tmp_path / "out" / UNFINISHED_NAME).is_file()
    tars = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("*.tar")}
    assert not list((tmp_path / "out").glob("*.tmp"))
    # what is unfinished cannot be taken for latents
    with pytest.raises(LdmError):
        latent_manifest(tmp_path / "out")
    again = export_latents(autoencoder, repeating_shards, tmp_path / "out")
    assert again.hash == whole.hash and contents(tmp_path / "out") == contents(tmp_path / "whole")
    assert {path: path.stat().st_mtime_ns for path in tars} == tars  # whole shards are not made again


@pytest.mark.parametrize("capacity", [2, 3, 100])
def test_the_cache_of_captions_changes_none_of_them(minilm, capacity):
    calls = [["a", "a red circle"], ["a red circle", "ring", "a"], ["a"], ["a small white cross on black", "ring", "ring"]]
    cache, resumed = (CaptionCache(minilm, "float32", capacity) for _ in range(2))
    for captions in calls:
        found = cache(captions)
        for caption, text in zip(captions, found, strict=True):
            np.testing.assert_allclose(text, minilm.encode([caption])[0][0], rtol=1e-4, atol=1e-5)
        resumed.remember(captions, found)
        assert resumed.known.keys() == cache.known.keys()  # as if it had made them itself
        assert all(np.array_equal(resumed.known[caption], text) for caption, text in cache.known.items())


def test_another_export_is_kept_out_of_the_same_folder(autoencoder, image_shards, tmp_path):
    out = tmp_path / "out"
    with pytest.raises(Interrupted):
        export_latents(autoencoder, image_shards, out, on_progress=stop_at(5))
    before = contents(out)
    with pytest.raises(UsageError, match="unfinished export of other things"):
        export_latents(autoencoder, image_shards, out, dtype="float32")
    network = load_autoencoder(autoencoder)
    network.decoder.conv_out.bias.data += 1
    network.save_pretrained(tmp_path / "other")
    with pytest.raises(UsageError, match="unfinished export of other things"):
        export_latents(tmp_path / "other", image_shards, out)
    assert contents(out) == before


def test_a_finished_export_and_other_work_are_left_alone(autoencoder, image_shards, tmp_path):
    out = tmp_path / "out"
    export_latents(autoencoder, image_shards, out)
    assert not (out / UNFINISHED_NAME).exists() and not list(out.glob(".*"))
    before = contents(out)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes").touch()
    for folder in (out, tmp_path / "mine"):
        with pytest.raises(UsageError, match="already holds other work"):
            export_latents(autoencoder, image_shards, folder)
    assert contents(out) == before and list(contents(tmp_path / "mine")) == ["notes"]


def test_a_picture_without_a_caption_is_named(autoencoder, tmp_path):
    items = [(sample.key, sample.image, "" if sample.key.endswith("2") else "a caption") for sample in generate(4, 32, 0)]
    write_images(tmp_path / "images", "x", items)
    with pytest.raises(LdmError, match=r"sample 00000002 has no caption"):
        export_latents(autoencoder, tmp_path / "images", tmp_path / "out")


def test_an_autoencoder_that_says_nan_is_stopped(autoencoder, image_shards, tmp_path):
    network = load_autoencoder(autoencoder)
    network.encoder.conv_in.bias.data[0] = float("nan")
    network.save_pretrained(tmp_path / "broken")
    with pytest.raises(LdmError, match="latents near sample 00000000 are not finite"):
        export_latents(tmp_path / "broken", image_shards, tmp_path / "out")


def test_pictures_are_fitted_where_a_size_is_asked_for(autoencoder, image_shards, tmp_path):
    export_latents(autoencoder, image_shards, tmp_path / "out", image_size=16)
    assert LatentDataset(tmp_path / "out")[0]["mean"].shape == (4, 8, 8)
    assert load_file(tmp_path / "out" / "null_text.safetensors")["text"].dtype == np.float16


@pytest.fixture
def mostly_whole(tmp_path):
    """The function that writes 120 pictures in three shards, some of which cannot be used."""

    def write(bad=(), uncaptioned=()):
        folder = tmp_path / "mostly"
        folder.mkdir()
        with ShardWriter(folder, "x", samples_per_shard=50) as writer:
            for number in range(120):
                image = encode_png(Image.new("RGB", (8, 8), (2 * number, 0, 0))) if number not in bad else b"no picture"
                caption = f"red number {number % 3}" if number not in uncaptioned else ""
                writer.write(f"{number:03d}", {"png": image, "txt": caption.encode()})
        Manifest(IMAGE_SHARDS, tuple(writer.entries), {"captioned": 120 - len(uncaptioned)}).save(folder)
        return folder

    return write


def test_samples_that_cannot_be_used_are_left_out_and_on_record(autoencoder, mostly_whole, tmp_path, monkeypatch):
    monkeypatch.setattr("ldm.export.CHUNK_SAMPLES", 16)
    shards, out = mostly_whole(bad=(57,)), tmp_path / "out"
    manifest = export_latents(autoencoder, shards, out)
    assert manifest.samples + manifest.extra["quarantined"] == 120 and manifest.extra["quarantined"] == 1
    assert [entry.samples for entry in manifest.shards] == [50, 49, 20]
    (line,) = map(json.loads, (out / QUARANTINE_NAME).read_text().splitlines())
    assert line == {"shard": str(shards / "x-00001.tar"), "key": "057", "reason": "not a JPEG, PNG or WebP image"}
    assert is_whole(out)
    # all the others in their order, each with its own caption and latent
    dataset, words = LatentDataset(out), []
    for entry in manifest.shards:
        shard = dataset.open_shard(out / entry.name, entry)
        words += [shard.words(chunk) for chunk in range(len(shard.spans))]
    keys = [key for chunk in words for key in chunk["keys"]]
    assert keys == [f"{number:03d}" for number in range(120) if number != 57]
    assert [caption for chunk in words for caption in chunk["captions"]] == [f"red number {int(key) % 3}" for key in keys]
    picture = torch.tensor([2 * 58, 0, 0], dtype=torch.uint8).view(1, 3, 1, 1).expand(1, 3, 8, 8)
    with torch.no_grad():
        mean = load_autoencoder(autoencoder).encode(pixels_to_images(picture)).latent_dist.mean[0]
    np.testing.assert_allclose(dataset[57]["mean"], mean, rtol=1e-2, atol=1e-2)
    # interrupted it comes to the same, the record too
    for samples in (60, 120):
        with pytest.raises(Interrupted):
            export_latents(autoencoder, shards, tmp_path / f"{samples}", on_progress=stop_at(samples))
        export_latents(autoencoder, shards, tmp_path / f"{samples}")
        assert contents(tmp_path / f"{samples}") == contents(out)


@pytest.mark.parametrize(
    ("spoilt", "reason"),
    [({"bad": (57, 110)}, "not a JPEG, PNG or WebP image"), ({"uncaptioned": (57, 110)}, "has no caption")],
)
def test_too_much_that_cannot_be_used_stops_the_export_in_one_line(autoencoder, mostly_whole, tmp_path, spoilt, reason):
    shards = mostly_whole(**spoilt)
    with pytest.raises(LdmError) as error:
        export_latents(autoencoder, shards, tmp_path / "out")
    message = str(error.value)
    assert message.startswith("2 of 120 samples cannot be used, more than 1.00%, the last one ")
    assert f"{shards}/x-00002.tar: 110 {reason}; " in message and "ldm shards check --deep" in message
    assert "data." not in message and "\n" not in message  # that section is none of an export's
    assert not (tmp_path / "out" / "manifest.json").exists()
