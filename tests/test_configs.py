"""The shipped recipes themselves, run through ``fit`` with tiny overrides, one after another as the README shows."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, DiffusionPipeline

from ldm.cli import main

CONFIGS = Path(__file__).parents[1] / "configs"


def test_every_recipe_is_tried_here() -> None:
    assert sorted(str(path.relative_to(CONFIGS)) for path in CONFIGS.rglob("*.yaml")) == [
        "emoji/autoencoder.yaml",
        "emoji/denoiser.yaml",
        "kl_f8_256.yaml",
        "shapes/autoencoder.yaml",
        "shapes/denoiser.yaml",
    ]


@pytest.mark.parametrize("recipes", ["shapes", "emoji"])
def test_both_stages_from_the_shipped_recipes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, recipes: str) -> None:
    monkeypatch.chdir(tmp_path)
    size = "40" if recipes == "shapes" else "64"
    main(["shards", "shapes", "shards", "--count", "24", "--size", size])
    data = ["--data.train", "shards", "--data.validation", "shards", "--data.batch_size", "4", "--data.validation_samples", "4"]
    few = ["--trainer.max_steps", "6", "--trainer.val_check_interval", "3"]
    game = ["--model.adversary.start", "2", "--model.adversary.alone", "1", "--model.adversary.warmup", "2"]
    config = str(CONFIGS / recipes / "autoencoder.yaml")
    main(["autoencoder", "fit", "--config", config, "--out", "runs/ae", *data, *few, *game])
    assert AutoencoderKL.from_pretrained("runs/ae/autoencoder").config.latent_channels == 4
    # max_steps counts batches though two optimisers step
    state = torch.load("runs/ae/checkpoints/last.ckpt", weights_only=True)
    assert state["global_step"] == 6
    assert sorted(path.name for path in Path("runs/ae/previews").iterdir()) == [f"step-0000000{step}.png" for step in (0, 3, 6)]
    main(["autoencoder", "export", "runs/ae", "again-ae"])
    assert all(Path("again-ae", path.name).read_bytes() == path.read_bytes() for path in Path("runs/ae/autoencoder").iterdir())

    main(["latents", "export", "--autoencoder", "runs/ae/autoencoder", "--shards", "shards", "--out", "latents"])
    extra = json.loads(Path("latents/manifest.json").read_text())
    assert extra["samples"] == 24 and len(extra["latents_mean"]) == 4

    latents = ["--data.train", "latents", "--data.validation", "latents", *data[4:], "--model.preview_steps", "2"]
    config = str(CONFIGS / recipes / "denoiser.yaml")
    model = ["--model.autoencoder", "runs/ae/autoencoder"]
    main(["denoiser", "fit", "--config", config, "--out", "runs/dit", *latents, *few, *model])
    pipeline = DiffusionPipeline.from_pretrained("runs/dit/pipeline")
    assert pipeline.vae.config.latents_mean == extra["latents_mean"]
    main(["denoiser", "export", "runs/dit", "again-pipeline"])
    weights = "transformer/diffusion_pytorch_model.safetensors"
    assert Path("again-pipeline", weights).read_bytes() == Path("runs/dit/pipeline", weights).read_bytes()

    for out in ("pictures", "again"):
        main(["sample", "runs/dit/pipeline", "a red ring", "a blue star", "--out", out, "--steps", "2", "--seed", "5"])
    pictures, again = ({path.name: path.read_bytes() for path in Path(out).iterdir()} for out in ("pictures", "again"))
    assert len(pictures) == 3 and pictures == again


def test_the_recipe_for_real_training_says_what_it_lacks_offline(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """It asks for the pretrained trunk of LPIPS; where that cannot be had, one line with the two ways out."""

    def offline(*_: object, **__: object) -> None:
        raise OSError("no network")

    monkeypatch.setattr("torch.hub.load_state_dict_from_url", offline)
    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", offline)
    monkeypatch.chdir(tmp_path)
    main(["shards", "shapes", "shards", "--count", "4", "--size", "64"])
    data = ["--data.train", "shards", "--data.validation", "shards", "--data.image_size", "64", "--data.batch_size", "2"]
    arguments = ["autoencoder", "fit", "--config", str(CONFIGS / "kl_f8_256.yaml"), "--out", "run", *data]
    arguments += ["--model.autoencoder.widths", "[8, 8, 8, 8]", "--model.autoencoder.norm_groups", "4"]
    arguments += ["--model.autoencoder.sample_size", "64", "--trainer.devices", "1", "--data.workers", "0"]
    arguments += ["--trainer.max_steps", "2", "--trainer.val_check_interval", "2", "--model.adversary.start", "0"]
    arguments += ["--model.adversary.discriminator.init_args.width", "8", "--data.validation_samples", "2"]
    with pytest.raises(SystemExit) as left:
        main(arguments)
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert left.value.code == 2 and "path" in said and "'random'" in said
    main([*arguments, "--model.perceptual.init_args.weights", "random"])
    assert AutoencoderKL.from_pretrained("run/autoencoder").config.latent_channels == 4
