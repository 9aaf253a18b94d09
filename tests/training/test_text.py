"""Stage two by what its text encoders are: several, class names, none; and captions drawn by weight."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from ldm.cli import dispatch
from ldm.data.datamodule import ShardDataModule
from ldm.data.image_dataset import Augmentation, ImageDataset
from ldm.data.latent_dataset import LatentDataset
from ldm.data.latent_schema import latent_info
from ldm.data.manifest import IMAGE_SHARDS, Manifest
from ldm.data.plan import PlannedSample
from ldm.data.sources import open_source
from ldm.data.writer import ShardWriter, encode_png
from ldm.errors import UsageError
from ldm.models.dit import DiT
from ldm.models.text_encoder import TextEncoderConfig
from ldm.pipeline import load_pipeline
from tests.training.test_denoiser import fit, make, noisy_batch

SIZES = dict[str, Any](in_channels=4, sample_size=16, patch_size=4, width=32, num_layers=2, num_attention_heads=2)


def denoiser(**settings: Any) -> DiT:
    torch.manual_seed(0)
    return DiT(**SIZES | settings)


@pytest.fixture(scope="module")
def named_shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six images with a class, a short and, but for one, a long caption."""
    folder = tmp_path_factory.mktemp("named") / "shards"
    folder.mkdir()
    with ShardWriter(folder, "x", samples_per_shard=4) as writer:
        for number in range(6):
            about = {"label": number % 2, "short": "ring"} | ({"long": ["a red ring", "one red ring"]} if number else {})
            image = encode_png(Image.new("RGB", (32, 32), (40 * number, 0, 0)))
            writer.write(f"{number:02d}", {"png": image, "json": json.dumps(about).encode()})
    Manifest(IMAGE_SHARDS, tuple(writer.entries)).save(folder)
    return folder


def export(autoencoder: Path, shards: Path, out: Path, *options: str) -> Path:
    dispatch(["latents", "export", "--autoencoder", str(autoencoder), "--shards", str(shards), "--out", str(out), *options])
    return out


def test_two_encoders_from_an_export_are_those_that_encode_online(
    latents: tuple[Path, Path], image_shards: Path, tiny_text_encoder: str, tmp_path: Path, randomised: Any
) -> None:
    second = "{name: minilm, layer: -2, prefix: 'an image of', max_tokens: 5}"
    folder = export(latents[0], image_shards, tmp_path / "latents", "--text-encoder", tiny_text_encoder, second)
    losses, statistics = [], []
    for dropout, shards, online in ((1, folder, False), (1, image_shards, True), (0, folder, False), (0, image_shards, True)):
        data = ShardDataModule(str(shards), str(shards), batch_size=4, caption_dropout=dropout, text_encoder=[0, 1])
        data.setup("fit")
        given = [tiny_text_encoder, TextEncoderConfig("minilm", -2, "an image of", 5)] if online else None
        module = make(latents[0], online=online, text_encoder=given, denoiser=denoiser(caption_channels=[8, 384]))
        if online:
            module.statistics = statistics[0]
        module.prepare(data)
        statistics.append(module.encoders.statistics)
        randomised(module.denoiser)
        module.seed = 2
        batch = noisy_batch(module, data, 3, 1, 4, 9)
        x0, condition = module.encode(batch)
        assert condition.mask.unique().tolist() == [0, 1, 2] and condition.embeddings.shape[-1] == 384
        losses.append(module.objective(module.denoiser, x0, condition, batch["t"], batch["eps"]).loss)
    torch.testing.assert_close(losses[::2], losses[1::2], rtol=2e-3, atol=2e-3)
    module.save(tmp_path / "pipeline")
    pipeline: Any = load_pipeline(tmp_path / "pipeline")
    assert (tmp_path / "pipeline/text_encoder_2").is_dir() and pipeline.config["trained_on"]["text_encoder_2"]
    again, null = pipeline._embed_all(["a red ring", ""]), module.pipeline()._embed_all(["a red ring", ""])
    assert torch.equal(again.embeddings, null.embeddings) and torch.equal(again.mask, null.mask)
    assert again.mask[0].tolist() == [1] * 10 + [2] * 5  # a token a letter; "a red ring" by MiniLM
    dispatch(["sample", str(tmp_path / "pipeline"), "a red ring", "--out", str(tmp_path / "images"), "--steps", "1"])
    dispatch(["attention", str(tmp_path / "pipeline"), "a red ring", "--out", str(tmp_path / "maps"), "--steps", "1"])
    with pytest.raises(UsageError, match=r"caption_channels is 8, but .* exported with .* \+ minilm of width \[8, 384\]"):
        fit(make(latents[0]), folder, tmp_path, 1, {"text_encoder": [0, 1]})
    with pytest.raises(UsageError, match="text_encoder is 0, 2, but"):
        fit(make(latents[0]), folder, tmp_path, 1, {"text_encoder": [0, 2]})


def test_class_names_condition_a_model_and_none_trains_an_unconditional_one(
    latents: tuple[Path, Path], named_shards: Path, tmp_path: Path
) -> None:
    (tmp_path / "classes.txt").write_text("0\n1\n")
    classes = str(tmp_path / "classes.txt")
    folder = export(latents[0], named_shards, tmp_path / "labels", "--text-encoder", classes, "--captions", "label")
    module = make(latents[0], denoiser=denoiser(caption_channels=3), preview_prompts=["0", "1"])
    fit(module, folder, tmp_path, 2, {"caption_dropout": 0.2, "batch_size": 4})
    module.save(tmp_path / "of-classes")
    dispatch(["sample", str(tmp_path / "of-classes"), "0", "1", "--out", str(tmp_path / "images"), "--steps", "1"])
    with pytest.raises(UsageError, match="'2' is no class that is known; give one of: 0, 1"):
        dispatch(["sample", str(tmp_path / "of-classes"), "2", "--out", str(tmp_path / "other")])
    folder = export(latents[0], named_shards, tmp_path / "latents", "--text-encoder", "none", "--dtype", "float32")
    exported = make(latents[0], denoiser=denoiser(caption_channels=1), preview_prompts=[""])
    fit(exported, folder, tmp_path, 2, {"batch_size": 4})
    online = make(latents[0], denoiser=denoiser(caption_channels=1), preview_prompts=[""], online=True, text_encoder="none")
    online.statistics = exported.encoders.statistics
    fit(online, named_shards, tmp_path, 2, {"batch_size": 4})
    for ours, theirs in zip(exported.denoiser.parameters(), online.denoiser.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-3)
    exported.save(tmp_path / "unconditional")
    dispatch(["sample", str(tmp_path / "unconditional"), "--count", "2", "--out", str(tmp_path / "two"), "--steps", "1"])
    assert len(list((tmp_path / "two").glob("0*.png"))) == 2
    with pytest.raises(UsageError, match="the prompt is 'a ring', but the model is unconditional; leave it empty"):
        load_pipeline(tmp_path / "unconditional")("a ring")


def test_captions_are_drawn_by_weight_among_those_that_a_sample_has(
    latents: tuple[Path, Path], named_shards: Path, tiny_text_encoder: str, tmp_path: Path
) -> None:
    weights = {"short": 0.25, "long": 0.75}
    options = ("--text-encoder", tiny_text_encoder, "--captions", "short", "long")
    folder = export(latents[0], named_shards, tmp_path / "latents", *options)
    assert latent_info(open_source(folder)).caption_names == ("short", "long")
    dispatch(["latents", "check", str(folder), "--deep", "--autoencoder", str(latents[0])])
    draws, how = [PlannedSample(1, number) for number in range(1000)], Augmentation(caption=weights, seed=3)
    images, stored = ImageDataset(named_shards, augmentation=how), LatentDataset(folder, how)
    found = Counter(images._load(draw.sample, draw.number)["caption"] for draw in draws)
    shares = {"ring": 0.25, "a red ring": 0.375, "one red ring": 0.375}
    assert {text: count / 1000 for text, count in found.items()} == pytest.approx(shares, abs=0.05)
    lengths = Counter(len(stored._load(draw.sample, draw.number)["text"]) for draw in draws)  # two more than letters
    assert {4 + 2: lengths[6] / 1000, 8 + 2: lengths[10] / 1000, 12: lengths[12] / 1000} == pytest.approx(
        {6: 0.25, 10: 0.375, 12: 0.375}, abs=0.05
    )
    for dataset in (images, stored):
        assert dataset._load(0, 7) is not None  # which has no long caption
    assert images[1]["caption"] == "ring" and len(stored[1]["text"]) == 6  # without a draw the first name
    np.testing.assert_equal(images._load(0, 7)["caption"], "ring")
    for caption, message in (
        ({"short": 0.5, "tags": 0.5}, r"caption is .*'tags'.* export them again: ldm latents export --captions short tags"),
        ({"short": 0.0}, "give numbers of 0 or more, one above 0"),
    ):
        with pytest.raises(UsageError, match=message):
            ShardDataModule(str(folder), str(folder), caption=caption).setup("fit")
