import json
import os
import shutil
from functools import partial
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import ExifTags, Image
from safetensors.numpy import load_file
from transformers import CLIPTextConfig, CLIPTextModel

from ldm.data.check import check_folder
from ldm.data.image_dataset import ImageDataset
from ldm.data.latent_dataset import LatentDataset
from ldm.data.latent_schema import TextInfo, latent_info, path_of, read_null_text
from ldm.data.manifest import IMAGE_SHARDS, LATENT_SHARDS, Manifest
from ldm.data.quarantine import QUARANTINE_NAME
from ldm.data.sources import open_source
from ldm.data.writer import ShardWriter, encode_png, write_images
from ldm.errors import LdmError, UsageError
from ldm.latents.claims import WORK_NAME
from ldm.latents.compute import Process, single_threaded
from ldm.latents.export import export_latents
from ldm.latents.text_encoders import TextEncoders, call_shape
from ldm.models.autoencoder import (
    LatentNormalizer,
    autoencoder_hash,
    encode,
    load_autoencoder,
    pixels_to_images,
    set_latent_statistics,
)
from ldm.models.text_encoder import TextEncoder
from ldm.shapes.scenes import generate
from tests.samples import contents, encoded


@pytest.fixture
def export(tiny_text_encoder):
    """:func:`export_latents`, where it does not matter which text encoder it is."""
    return partial(export_latents, text_encoder=tiny_text_encoder)


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
            posterior = encode(network, pixels_to_images(torch.from_numpy(sample["image"])[None]))
        np.testing.assert_allclose(latent["mean"], posterior.mean[0], rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(latent["std"], posterior.std[0], rtol=1e-4, atol=1e-5)
        embedding, _ = minilm.encode([sample["caption"]])
        np.testing.assert_allclose(latent["text"], embedding[0], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(read_null_text(open_source(tmp_path / "out")), minilm.encode([""])[0][0], rtol=1e-4, atol=1e-5)


def test_the_manifest_says_what_made_it(autoencoder, image_shards, minilm, tmp_path):
    export_latents(autoencoder, image_shards, tmp_path / "out")
    info = latent_info(open_source(tmp_path / "out", LATENT_SHARDS))
    assert info.autoencoder == autoencoder_hash(load_autoencoder(autoencoder))
    assert info.text_encoders == (TextInfo("minilm", minilm.hash, 384, 512, 0),)
    assert info.source == Manifest.load(image_shards).hash
    assert path_of(open_source(tmp_path / "out"), info.source_shards) == os.path.realpath(image_shards)
    assert not Path(info.source_shards).is_absolute()
    assert info.latent_shapes == ((4, 16, 16),) and (info.dtype, info.precision, info.resolution) == ("float16", "fp32", None)
    assert info.versions["torch"] == version("torch")
    sample = LatentDataset(tmp_path / "out")[0]
    null_text = load_file(tmp_path / "out" / "null_text.safetensors")["text"]
    assert {sample[name].dtype for name in ("mean", "std", "text")} == {np.dtype(np.float16)} == {null_text.dtype}


def test_the_statistics_are_exact_and_normalise_what_is_drawn(export, autoencoder, image_shards, tmp_path):
    export(autoencoder, image_shards, tmp_path / "out")
    dataset = LatentDataset(tmp_path / "out")
    means, stds = (np.stack([dataset[i][name] for i in range(10)]).astype(np.float64) for name in ("mean", "std"))
    average = means.mean((0, 2, 3))
    deviation = np.sqrt((means**2).mean((0, 2, 3)) + (stds**2).mean((0, 2, 3)) - average**2)
    info = latent_info(open_source(tmp_path / "out", LATENT_SHARDS))
    np.testing.assert_allclose(info.latents_mean, average, rtol=0, atol=1e-12)
    np.testing.assert_allclose(info.latents_std, deviation, rtol=1e-12)
    network = load_autoencoder(autoencoder)
    set_latent_statistics(network, info.latents_mean, info.latents_std)
    rng = np.random.default_rng(0)
    drawn = np.concatenate([means + stds * rng.normal(size=means.shape) for _ in range(40)])
    normalised = LatentNormalizer.of(network).normalize(torch.from_numpy(drawn))
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
def test_an_interrupted_export_resumes_to_the_same_bytes(export, autoencoder, repeating_shards, tmp_path, samples):
    whole = export(autoencoder, repeating_shards, tmp_path / "whole")
    with pytest.raises(Interrupted):
        export(autoencoder, repeating_shards, tmp_path / "out", on_progress=stop_at(samples))
    assert (tmp_path / "out" / WORK_NAME).is_dir()
    tars = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("*.tar")}
    assert not list((tmp_path / "out").glob("*.tmp"))
    # what is unfinished cannot be taken for latents
    with pytest.raises(LdmError):
        latent_info(open_source(tmp_path / "out", LATENT_SHARDS))
    again = export(autoencoder, repeating_shards, tmp_path / "out")
    assert again.hash == whole.hash and contents(tmp_path / "out") == contents(tmp_path / "whole")
    assert {path: path.stat().st_mtime_ns for path in tars} == tars  # whole shards are not made again


def test_a_finished_shard_that_was_lost_is_made_again(export, autoencoder, repeating_shards, tmp_path):
    export(autoencoder, repeating_shards, tmp_path / "whole")
    with pytest.raises(Interrupted):
        export(autoencoder, repeating_shards, tmp_path / "out", on_progress=stop_at(9))
    (tmp_path / "out" / "latents-00000.tar").unlink()
    (tmp_path / "out" / "latents-00001.tar").write_bytes(b"cut")
    export(autoencoder, repeating_shards, tmp_path / "out")
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_another_export_is_kept_out_of_the_same_folder(export, autoencoder, image_shards, tmp_path):
    out = tmp_path / "out"
    with pytest.raises(Interrupted):
        export(autoencoder, image_shards, out, on_progress=stop_at(5))
    before = contents(out)
    with pytest.raises(UsageError, match="unfinished export with other settings"):
        export(autoencoder, image_shards, out, dtype="float32")
    network = load_autoencoder(autoencoder)
    next(network.decoder.parameters()).data += 1
    network.save_pretrained(tmp_path / "other")
    with pytest.raises(UsageError, match="unfinished export with other settings"):
        export(tmp_path / "other", image_shards, out)
    assert contents(out) == before


def test_a_finished_export_and_other_work_are_left_alone(export, autoencoder, image_shards, tmp_path):
    out = tmp_path / "out"
    export(autoencoder, image_shards, out)
    assert not (out / WORK_NAME).exists() and not list(out.glob(".*"))
    before = contents(out)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes").touch()
    with pytest.raises(UsageError, match="already holds other work"):
        export(autoencoder, image_shards, tmp_path / "mine")
    with pytest.raises(UsageError, match=r"holds a finished export with other settings \(dtype: float16, not float32\)"):
        export(autoencoder, image_shards, out, dtype="float32")
    # the same again: done already, as for a process that starts when the others have finished
    assert export(autoencoder, image_shards, out) == Manifest.load(out)
    assert contents(out) == before and list(contents(tmp_path / "mine")) == [Path("notes")]


def test_an_image_without_a_caption_is_named(export, autoencoder, tmp_path):
    items = [(sample.key, sample.image, "" if sample.key.endswith("2") else "a caption") for sample in generate(4, 32, 0)]
    write_images(tmp_path / "images", "x", items)
    with pytest.raises(LdmError, match=r"1 of 4 samples cannot be used.*00000002 has no caption"):
        export(autoencoder, tmp_path / "images", tmp_path / "out")


def test_an_autoencoder_that_says_nan_is_stopped(export, autoencoder, image_shards, tmp_path):
    network = load_autoencoder(autoencoder)
    next(network.encoder.parameters()).data[0] = float("nan")
    network.save_pretrained(tmp_path / "broken")
    with pytest.raises(LdmError, match=r"shapes-00000.tar: the latents of 00000000 are not finite"):
        export(tmp_path / "broken", image_shards, tmp_path / "out")
    assert not list((tmp_path / "out").glob("*.tar")) and not (tmp_path / "out" / "manifest.json").exists()


@pytest.fixture
def mostly_whole(tmp_path):
    """The function that writes 120 images in three shards, some of which cannot be used."""

    def write(bad=(), uncaptioned=()):
        folder = tmp_path / "mostly"
        folder.mkdir()
        with ShardWriter(folder, "x", samples_per_shard=50) as writer:
            for number in range(120):
                image = encode_png(Image.new("RGB", (8, 8), (2 * number, 0, 0))) if number not in bad else b"no image"
                caption = f"red number {number % 3}" if number not in uncaptioned else ""
                writer.write(f"{number:03d}", {"png": image, "txt": caption.encode()})
        Manifest(IMAGE_SHARDS, tuple(writer.entries), {"captioned": 120 - len(uncaptioned)}).save(folder)
        return folder

    return write


def test_samples_that_cannot_be_used_are_left_out_and_on_record(export, autoencoder, mostly_whole, tmp_path, monkeypatch):
    monkeypatch.setattr("ldm.latents.chunks.CHUNK_SAMPLES", 16)
    shards, out = mostly_whole(bad=(57,)), tmp_path / "out"
    manifest = export(autoencoder, shards, out)
    assert manifest.samples + manifest.extra["quarantined"] == 120 and manifest.extra["quarantined"] == 1
    assert [entry.samples for entry in manifest.shards] == [50, 49, 20]
    (line,) = map(json.loads, (out / QUARANTINE_NAME).read_text().splitlines())
    assert line == {"shard": str(shards / "x-00001.tar"), "key": "057", "reason": "not a JPEG, PNG or WebP image"}
    assert is_whole(out)
    # all the others in their order, each with its own caption and latent
    dataset, words = LatentDataset(out), []
    for entry in manifest.shards:
        shard = dataset.open_shard(out / entry.name, entry)
        words += [shard.metadata(chunk) for chunk in range(len(shard.spans))]
    keys = [key for chunk in words for key in chunk["keys"]]
    assert keys == [f"{number:03d}" for number in range(120) if number != 57]
    assert [caption for chunk in words for (caption,) in chunk["captions"]] == [f"red number {int(key) % 3}" for key in keys]
    image = torch.tensor([2 * 58, 0, 0], dtype=torch.uint8).view(1, 3, 1, 1).expand(1, 3, 8, 8)
    with torch.no_grad():
        mean = encode(load_autoencoder(autoencoder), pixels_to_images(image)).mean[0]
    np.testing.assert_allclose(dataset[57]["mean"], mean, rtol=1e-2, atol=1e-2)
    # interrupted it comes to the same, the record too
    for samples in (60, 120):
        with pytest.raises(Interrupted):
            export(autoencoder, shards, tmp_path / f"{samples}", on_progress=stop_at(samples))
        export(autoencoder, shards, tmp_path / f"{samples}")
        assert contents(tmp_path / f"{samples}") == contents(out)


def test_a_shard_without_a_usable_image_is_absent(export, autoencoder, mostly_whole, tmp_path):
    """More in a row than training tolerates, too."""
    shards, out = mostly_whole(bad=range(5, 115)), tmp_path / "out"
    manifest = export(autoencoder, shards, out, max_bad_share=1)
    assert [(entry.name, entry.samples) for entry in manifest.shards] == [("latents-00000.tar", 5), ("latents-00002.tar", 5)]
    assert manifest.extra["quarantined"] == 110 == len((out / QUARANTINE_NAME).read_text().splitlines())
    assert sorted(path.name for path in out.glob("*.tar")) == [entry.name for entry in manifest.shards] and is_whole(out)


def test_a_set_without_a_usable_image_or_caption_is_an_error(export, autoencoder, mostly_whole, tmp_path):
    shards, out = mostly_whole(bad=range(120)), tmp_path / "out"
    with pytest.raises(LdmError, match=rf"^{out}: no sample could be used; {out}/quarantine.jsonl says why$"):
        export(autoencoder, shards, out, max_bad_share=1)
    manifest = Manifest.load(shards)
    Manifest(IMAGE_SHARDS, manifest.shards, {"captioned": 0}).save(shards)
    with pytest.raises(UsageError, match=rf"^{shards} has no captions; "):
        export(autoencoder, shards, tmp_path / "other")
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize(
    ("spoilt", "reason"),
    [({"bad": (57, 110)}, "not a JPEG, PNG or WebP image"), ({"uncaptioned": (57, 110)}, "has no caption")],
)
def test_too_much_that_cannot_be_used_stops_the_export_in_one_line(export, autoencoder, mostly_whole, tmp_path, spoilt, reason):
    shards = mostly_whole(**spoilt)
    with pytest.raises(LdmError) as error:
        export(autoencoder, shards, tmp_path / "out")
    message = str(error.value)
    assert message.startswith("2 of 120 samples cannot be used, more than 1.00%, the last one ")
    assert f"{shards}/x-00002.tar: 110 {reason}; " in message and "ldm shards check --deep" in message
    assert "\n" not in message
    assert not (tmp_path / "out" / "manifest.json").exists()


def test_mirrored_images_are_what_the_encoder_says_of_them(export, autoencoder, image_shards, tmp_path):
    export(autoencoder, image_shards, tmp_path / "out", dtype="float32", flip=True, batch_size=4)
    images, network = ImageDataset(image_shards), load_autoencoder(autoencoder)
    chunks = list(LatentDataset(tmp_path / "out").chunked())
    found = {name: np.concatenate([chunk[name] for chunk in chunks]) for name in ("mean", "mean_flip", "std_flip")}
    for index in range(10):
        mirrored = pixels_to_images(torch.from_numpy(images[index]["image"].copy())[None]).flip(-1)
        with torch.no_grad():
            posterior = encode(network, mirrored)
        np.testing.assert_allclose(found["mean_flip"][index], posterior.mean[0], rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(found["std_flip"][index], posterior.std[0], rtol=1e-4, atol=1e-5)
    assert not np.allclose(found["mean"], found["mean_flip"])
    assert latent_info(open_source(tmp_path / "out", LATENT_SHARDS)).flips


def test_modes_alone_have_no_deviation_and_their_own_statistics(export, autoencoder, image_shards, tmp_path):
    export(autoencoder, image_shards, tmp_path / "out", dtype="float32", mode=True)
    chunks, info = list(LatentDataset(tmp_path / "out").chunked()), latent_info(open_source(tmp_path / "out", LATENT_SHARDS))
    assert info.posterior == "mode" and all("std" not in chunk for chunk in chunks)
    every = np.concatenate([chunk["mean"] for chunk in chunks]).astype(np.float64)
    np.testing.assert_allclose(info.latents_mean, every.mean((0, 2, 3)), rtol=1e-10)
    np.testing.assert_allclose(info.latents_std, every.std((0, 2, 3)), rtol=1e-10)


@pytest.fixture
def several_of_everything(tmp_path):
    """Images of three sizes, with one, two or three captions, packed from larger ones, one of them turned by its EXIF."""
    folder, rng = tmp_path / "several", np.random.default_rng(0)
    folder.mkdir()
    with ShardWriter(folder, "x", samples_per_shard=7) as writer:
        for number in range(18):
            width, height = [(16, 16), (24, 17), (8, 16)][number % 3]
            image = Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))
            turned = Image.Exif()
            turned[ExifTags.Base.Orientation] = 6 if number == 4 else 1
            captions = [f"caption {number} {which}" for which in range(number % 3 + 1)]
            about = {"captions": captions} | ({"width": 640, "height": 480} if number == 2 else {})
            writer.write(f"{number:03d}", {"png": encoded(image, exif=turned), "json": json.dumps(about).encode()})
    Manifest(IMAGE_SHARDS, tuple(writer.entries), {"captioned": 18}).save(folder)
    return folder


def test_images_of_several_sizes_and_captions_keep_all_that_is_known_of_them(
    export, autoencoder, several_of_everything, tiny_text_encoder, tmp_path
):
    manifest = export(autoencoder, several_of_everything, tmp_path / "out", captions="all", batch_size=2)
    info = latent_info(open_source(tmp_path / "out", LATENT_SHARDS))
    # height and width over the autoencoder's factor of 2, what is left over cut off; number 4 lies on its side
    assert set(info.latent_shapes) == {(4, 8, 8), (4, 8, 12), (4, 8, 4), (4, 12, 8)} and info.latent_shape is None
    assert info.latent_shapes[-1] == (4, 12, 8) and info.captions == "all"
    dataset, network, images = (
        LatentDataset(tmp_path / "out"),
        load_autoencoder(autoencoder),
        ImageDataset(several_of_everything),
    )
    text_encoder, seen = TextEncoder.load(tiny_text_encoder), 0
    for entry in manifest.shards:
        shard = dataset.open_shard(tmp_path / "out" / entry.name, entry)
        for chunk in range(len(shard.spans)):
            tensors, words = shard.tensors(chunk), shard.metadata(chunk)
            for row, key in enumerate(words["keys"]):
                number = int(key)
                first, end = tensors["caption_start"][row : row + 2]
                assert words["captions"][row] == [f"caption {number} {which}" for which in range(number % 3 + 1)]
                for caption, at in zip(words["captions"][row], range(first, end), strict=True):
                    text = tensors["text"][slice(*tensors["text_start"][at : at + 2])]
                    np.testing.assert_allclose(text, text_encoder.encode([caption])[0][0], rtol=1e-2, atol=2e-3)
                pixels = torch.from_numpy(images[number]["image"].copy())[None]
                height, width = pixels.shape[2:]
                top, left, high, wide = tensors["crop"][row]
                assert (top, left, high, wide) == (0, 0, height // 2 * 2, width // 2 * 2)
                assert tuple(tensors["original_size"][row]) == ((480, 640) if number == 2 else (height, width))
                with torch.no_grad():
                    mean = encode(network, pixels_to_images(pixels[:, :, :high, :wide])).mean[0]
                np.testing.assert_allclose(tensors["mean"][row], mean, rtol=1e-2, atol=1e-2)
                seen += 1
    assert seen == manifest.samples == 18
    # fitted to one side they are all alike, and the crop says what was cut
    export(autoencoder, several_of_everything, tmp_path / "square", image_size=8)
    assert latent_info(open_source(tmp_path / "square", LATENT_SHARDS)).latent_shapes == ((4, 4, 4),)
    crops = np.concatenate([chunk["crop"] for chunk in LatentDataset(tmp_path / "square").chunked()])
    assert crops[:5].tolist() == [[0, 0, 16, 16], [0, 3, 17, 17], [4, 0, 8, 8], [0, 0, 16, 16], [3, 0, 17, 17]]


def test_nothing_that_is_exported_names_an_absolute_path(export, autoencoder, image_shards, tmp_path):
    export(autoencoder, image_shards, tmp_path / "out")
    manifest = (tmp_path / "out" / "manifest.json").read_text()
    assert str(tmp_path) not in manifest and str(image_shards) not in manifest and '"/' not in manifest


def test_a_text_encoder_that_has_moved_resumes_the_same_export(autoencoder, image_shards, tiny_text_encoder, tmp_path):
    shutil.copytree(tiny_text_encoder, tmp_path / "text")
    export_latents(autoencoder, image_shards, tmp_path / "out", str(tmp_path / "text"))
    before = contents(tmp_path / "out")
    (tmp_path / "text").rename(tmp_path / "moved")
    export_latents(autoencoder, image_shards, tmp_path / "out", str(tmp_path / "moved"))
    assert contents(tmp_path / "out") == before


def test_statistics_are_not_kept_in_the_autoencoder_of_a_pipeline(export, autoencoder, image_shards, tmp_path):
    (tmp_path / "pipeline").mkdir()
    autoencoder.rename(tmp_path / "pipeline" / "vae")
    with pytest.raises(UsageError, match="keep_statistics would change the pipeline"):
        export(tmp_path / "pipeline", image_shards, tmp_path / "out", keep_statistics=True)
    assert not (tmp_path / "out").exists()
    assert export(tmp_path / "pipeline", image_shards, tmp_path / "out").samples == 10


def test_several_text_encoders_stand_beside_each_other(autoencoder, image_shards, minilm, tmp_path):
    config = CLIPTextConfig(vocab_size=30522, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
                            max_position_embeddings=8, bos_token_id=101, eos_token_id=102, pad_token_id=0)  # fmt: skip
    torch.manual_seed(0)
    CLIPTextModel(config).save_pretrained(tmp_path / "clip")
    minilm.tokenizer.save_pretrained(tmp_path / "clip")
    small = json.loads((tmp_path / "clip" / "tokenizer_config.json").read_text()) | {"model_max_length": 8}
    (tmp_path / "clip" / "tokenizer_config.json").write_text(json.dumps(small))
    export_latents(autoencoder, image_shards, tmp_path / "out", ["minilm", str(tmp_path / "clip")], dtype="float32")
    source = open_source(tmp_path / "out")
    first, second = latent_info(open_source(tmp_path / "out", LATENT_SHARDS)).text_encoders
    captions = [ImageDataset(image_shards)[index]["caption"] for index in range(10)]
    cut = sum(len(ids) > 8 for ids in minilm.tokenizer(captions).input_ids)
    assert (first.width, first.cut, second.width, second.max_tokens) == (384, 0, 16, 8) and second.cut == cut > 0
    assert (read_null_text(source).shape[1], read_null_text(source, 1).shape[1]) == (384, 16)
    clip, dataset = TextEncoder.load(str(tmp_path / "clip")), LatentDataset(tmp_path / "out", text_encoder=1)
    for index, caption in enumerate(captions):
        found = dataset[index]["text"]
        assert len(found) <= 8
        np.testing.assert_allclose(found, clip.encode([caption])[0][0], rtol=1e-3, atol=1e-4)
    with pytest.raises(UsageError, match="give one or more, each once"):
        export_latents(autoencoder, image_shards, tmp_path / "twice", ["minilm", "minilm"])


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_captions_embedding_is_the_same_to_the_last_bit_in_any_company(minilm, precision):
    captions = [" ".join(["word", "a", "blue"][i % 3] for i in range(length % 23)) + f" {length}" for length in range(40)]
    few = captions[::8] if precision == "bf16" else captions  # emulated here
    rng, seen = np.random.default_rng(0), {}
    with single_threaded():
        for _ in range(2):
            encoders = TextEncoders([minilm], "float32", precision)
            order = list(rng.permutation(few))
            for start in range(0, len(order), size := int(rng.integers(3, 20))):
                for caption, embedded in encoders.lookup(order[start : start + size])[0].items():
                    assert np.array_equal(seen.setdefault(caption, embedded.text), embedded.text)


def test_a_captions_call_follows_from_its_own_tokens_and_on_a_gpu_is_larger():
    for tokens in range(1, 200):
        assert call_shape(tokens, 100, torch.device("cpu")) == (16, min(-(-tokens // 8) * 8, 100))
        batch, length = call_shape(tokens, 100, torch.device("cuda"))
        assert length == min(-(-tokens // 16) * 16, 100)
        assert batch * length <= 2048 < (batch + 1) * length  # full, unless captions are long
    assert call_shape(512, 512, torch.device("cuda")) == (16, 512)


def test_the_number_of_threads_changes_no_byte(export, autoencoder, several_of_everything, tmp_path):
    for threads in (1, 3):
        export(autoencoder, several_of_everything, tmp_path / f"{threads}", flip=True, batch_size=2, threads=threads)
    assert contents(tmp_path / "1") == contents(tmp_path / "3")


def test_the_statistics_go_into_the_autoencoders_config_if_asked(export, autoencoder, image_shards, tmp_path):
    before = autoencoder_hash(load_autoencoder(autoencoder))
    export(autoencoder, image_shards, tmp_path / "plain")
    assert load_autoencoder(autoencoder).config["latents_mean"] is None
    manifest = export(autoencoder, image_shards, tmp_path / "out", keep_statistics=True)
    network = load_autoencoder(autoencoder)
    assert network.config["latents_mean"] == manifest.extra["latents_mean"] and autoencoder_hash(network) == before
    assert network.config["latents_std"] == manifest.extra["latents_std"]


def test_what_a_cpu_has_not_is_refused(export, autoencoder, image_shards, tmp_path):
    with pytest.raises(UsageError, match="precision fp16 needs a GPU"):
        export(autoencoder, image_shards, tmp_path / "out", precision="fp16")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, (0, 1, 0, 1)),
        ({"RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}, (3, 8, 1, 2)),
        ({"SLURM_PROCID": "5", "SLURM_NTASKS": "6", "SLURM_LOCALID": "1"}, (5, 6, 1, 1)),
        ({"RANK": "3"}, (0, 1, 0, 1)),
    ],
)
def test_which_process_this_is_say_torchrun_and_slurm(monkeypatch, environment, expected):
    for name in list(os.environ):
        if name.startswith(("SLURM_", "RANK", "WORLD_SIZE", "LOCAL_")):
            monkeypatch.delenv(name)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert Process.from_environment() == expected
