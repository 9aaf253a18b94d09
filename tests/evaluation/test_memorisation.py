"""Copies of training images are found, whatever the autoencoder makes of them, and other images are not."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from ldm.cli import main
from ldm.data.manifest import Manifest
from ldm.data.writer import write_images
from ldm.diffusion.path import RectifiedFlow
from ldm.diffusion.prediction import Velocity
from ldm.diffusion.scheduler import diffusion_config, make_scheduler, samplers_for
from ldm.errors import UsageError
from ldm.evaluation.image_sets import ImageSet
from ldm.evaluation.memorisation import FALSE_ALARMS, ComparedImages, PixelFeatures, closest, memorised
from ldm.models.autoencoder import pixels_to_images
from ldm.models.dit import DiT
from ldm.models.pixels import PixelAutoencoder
from ldm.models.text_encoder import TextEncoder
from ldm.pipeline import LatentDiffusionPipeline
from ldm.runs.lineage import LINEAGE_NAME
from ldm.shapes.scenes import generate

SIDE, COUNT = 32, 64


def test_copies_are_found_and_new_images_are_not() -> None:
    """Images of a caption resemble its own image; where training and held-out ones do so alike, nothing is memorised."""
    random = torch.Generator().manual_seed(0)
    train, held_out = (torch.rand(number, 3, 40, 40, generator=random) * 2 - 1 for number in (100, 400))
    features = PixelFeatures()

    def near(images: Tensor, noise: float) -> Tensor:
        return features(images + noise * torch.randn(images.shape, generator=random))

    copies, control = near(train, 0.02), near(held_out[:100], 0.5)
    generated = torch.cat([near(train[:40], 0.05), near(train[40:], 0.5)])
    found = memorised(features(train), generated, copies, features(held_out), control)
    assert found.recall == 1 and abs(found.share - 0.4 - 0.6 * FALSE_ALARMS) < 0.05
    assert found.neighbours.tolist() == [*range(100)]
    assert {number for number, _ in closest({"pixels": found}, 40)} == {*range(40)}
    none = memorised(features(train), near(train, 0.5), copies, features(held_out), control)
    assert none.share < FALSE_ALARMS + 3 * none.error
    sets = [
        ImageSet([features], [None] * len(features), [(1, 1)] * len(features), {})
        for features in (features(train), copies[:50], features(train[:50]))
    ]
    (limit, _) = ComparedImages(sets[0], sets[1], sets[1], sets[2], sets[1]).limits()
    assert limit == "50 of 50 held-out images are among the training images, by their pixels"
    among_themselves = memorised(features(train), generated, copies)
    assert among_themselves.share == among_themselves.recall == 1  # all are nearer than other training images are
    black, white = -torch.ones(1, 3, 8, 8), torch.ones(1, 3, 8, 8)
    assert torch.dist(features(black), features(white)) == pytest.approx(1, abs=1e-5)


def test_too_few_images_set_no_threshold() -> None:
    images = torch.rand(10, 4)
    with pytest.raises(UsageError, match="10 held-out images set no threshold; give 20 or more"):
        memorised(images, images, images, images, images)
    with pytest.raises(UsageError, match="10 training images set no threshold"):
        memorised(images, images, images)


def shapes(folder: Path, seed: int, count: int = COUNT) -> Tensor:
    """Write shards; returns their images, (N, 3, H, W) in [−1, 1]."""
    images = [*generate(count, SIDE, seed=seed)]
    write_images(folder, "shapes", images, extra={"captioned": count})
    return pixels_to_images(torch.stack([torch.from_numpy(pixels) for _, pixels, _ in images]).permute(0, 3, 1, 2))


def perfect_model(folder: Path, words: TextEncoder, images: Tensor) -> LatentDiffusionPipeline:
    """A pipeline of pixels whose denoiser has the least loss that there is on these images: the mean of what may be below the
    noise. It ignores captions."""
    path, prediction = RectifiedFlow(), Velocity()
    autoencoder = PixelAutoencoder(latents_mean=[0.0] * 3, latents_std=[1.0] * 3)
    dit = DiT(3, SIDE, patch_size=8, width=8, num_layers=1, num_attention_heads=1, caption_channels=words.width)
    scheduler = make_scheduler(samplers_for(path, prediction)[0], path, prediction)
    parts: Any = (autoencoder, words.model, words.tokenizer, dit.eval(), scheduler)
    made = LatentDiffusionPipeline(*parts, diffusion=diffusion_config(path, prediction))
    made.save_pretrained(folder)

    every = images.flatten(1)
    squares = every.square().sum(1)

    def velocity(hidden_states: Tensor, timestep: Tensor, **_: Any) -> tuple[Tensor]:
        t, x = timestep[:, None] / 1000, hidden_states.flatten(1)
        a = 1 - t
        x0 = torch.softmax((a * (x @ every.T) - a**2 * squares / 2) / t**2, 1) @ every  # of normal densities around a·x0
        return (((x - x0) / t).view_as(hidden_states),)

    made.transformer.forward = velocity  # pyright: ignore[reportAttributeAccessIssue]
    return made


@pytest.mark.parametrize("words", ["captions", "none"])
def test_a_model_of_64_images_is_found_to_copy_them(
    words: str,
    tiny_text_encoder: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    """And a model of others of the kind is not, with and without captions, with and without a held-out set."""
    encoder = TextEncoder.load(tiny_text_encoder if words == "captions" else "none")
    images = shapes(tmp_path / "shards", 0)
    shapes(tmp_path / "held-out", 1)
    found: dict[str, Any] = {}
    for name, trained in (("copying", images), ("honest", shapes(tmp_path / "others", 2, 128))):
        model = tmp_path / name
        pipeline = perfect_model(model, encoder, trained)
        monkeypatch.setattr("ldm.pipeline.load_pipeline", lambda *_, pipeline=pipeline: pipeline)
        command = ["evaluate", "memorisation", f"{model}", "--shards", f"{tmp_path}/shards", "--steps", "8", "--json", "-"]
        command += ["--guidance", "1"]
        capsys.readouterr()
        main([*command, "--held-out", f"{tmp_path}/held-out", "--network", "alex-random", "--page", f"{tmp_path}/{name}.html"])
        found[name] = json.loads(capsys.readouterr().out)
        if name == "copying":
            main(command)
            found["without a held-out set"] = json.loads(capsys.readouterr().out)
    honest = found.pop("honest")
    for record in found.values():
        for each in record["memorisation"].values():
            assert each["share"] >= 0.95 and each["copies_found"] == 1 and each["authenticity"] <= 0.05
        copied = [image["nearest"]["pixels"] for image in record["images"]]
        assert len(copied) == COUNT and max(distance for _, distance in copied) < 0.01
    for each in honest["memorisation"].values():
        assert each["share"] < FALSE_ALARMS + 4 * each["standard_error"] and each["authenticity"] > 0.2
    assert (honest["images"][0]["caption"] is None) == (words == "none")
    assert honest["protocol"]["held_out_hash"] == Manifest.load(tmp_path / "held-out").hash
    assert honest["protocol"]["limits"] == [f"{tmp_path}/honest has no record of what it was trained on"]
    assert "The nearest pairs" in (tmp_path / "honest.html").read_text()


def test_the_data_are_compared_with_what_the_model_was_trained_on(
    make_pipeline: Callable, tiny_text_encoder: str, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    model = tmp_path / "model"
    make_pipeline(words=TextEncoder.load(tiny_text_encoder)).save_pretrained(model)
    for seed, name in enumerate(("shards", "held-out", "few")):
        shapes(tmp_path / name, seed, 4 if name == "few" else 24)
    trained = Manifest.load(tmp_path / "shards").hash
    source = {"hash": "0" * 64, "images": trained, "samples": 24, "weight": 1.0}
    lineage = {"format_version": 1, "stage": "denoiser", "step": 1, "weights": "0" * 64, "data": [source]}
    (model / LINEAGE_NAME).write_text(json.dumps(lineage))

    def run(shards: str, *options: str) -> str:
        common = ["--shards", f"{tmp_path}/{shards}", "--steps", "1", "--guidance", "1"]
        main(["evaluate", "memorisation", str(model), *common, *options])
        return capsys.readouterr().out

    printed = run("shards", "--held-out", f"{tmp_path}/held-out")
    assert "too near" in printed and "nearest training image" in printed and "record" not in printed
    assert f"{model} was trained on other shards, by its record" in " ".join(run("held-out").split())
    for options, said in (
        (("held-out", "--held-out", f"{tmp_path}/shards"), f"{tmp_path}/shards is what the model was trained on"),
        (("shards", "--held-out", f"{tmp_path}/shards"), "--held-out and --shards are the same"),
        (("shards", "--count", "16"), "--count is 16, which sets no threshold; give 20 or more"),
        (("shards", "--held-out", f"{tmp_path}/few"), "4 held-out images set no threshold; give 20 or more"),
        (("shards", "--held-out", f"{tmp_path}/few", "--count", "5"), f"--count is 5, but {tmp_path}/few holds 4 images"),
        (("few",), "4 training images set no threshold"),
        (("shards", "--seed", "-1"), "--seed is -1"),
    ):
        with pytest.raises(SystemExit):
            run(*options)
        assert said in capsys.readouterr().err.strip().splitlines()[-1]
