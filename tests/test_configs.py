"""The shipped recipes themselves, run through ``fit`` with tiny overrides, one after another as the README shows."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, DiffusionPipeline
from PIL import Image

from ldm.cli import main

CONFIGS = Path(__file__).parents[1] / "configs"


def test_every_recipe_is_tried_here() -> None:
    assert sorted(str(path.relative_to(CONFIGS)) for path in CONFIGS.rglob("*.yaml")) == [
        "decoder_finetune.yaml",
        "emoji/autoencoder.yaml",
        "emoji/denoiser.yaml",
        "kl_f16_256.yaml",
        "kl_f4_cpu.yaml",
        "kl_f8_256.yaml",
        "kl_f8_256_24gb.yaml",
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


def tiny_arguments(config: str, size: int) -> list[str]:
    """A recipe of stage one, its pictures, networks and run made small."""
    data = ["--data.train", "shards", "--data.validation", "shards", "--data.batch_size", "4", "--data.validation_samples", "2"]
    arguments = [
        "autoencoder",
        "fit",
        "--config",
        str(CONFIGS / config),
        *data,
        "--data.workers",
        "0",
        "--trainer.devices",
        "1",
    ]
    arguments += ["--trainer.max_steps", "3", "--trainer.val_check_interval", "3", "--data.image_size", str(size)]
    arguments += ["--model.adversary.start", "0", "--model.adversary.alone", "0", "--model.adversary.warmup", "1"]
    return [*arguments, "--model.adversary.discriminator.init_args.width", "8"]


@pytest.mark.parametrize(
    ("config", "widths", "factor"),
    [("kl_f8_256", "[8, 8, 8, 8]", 8), ("kl_f8_256_24gb", "[8, 8, 8, 8]", 8), ("kl_f16_256", "[8, 8, 8, 8, 8]", 16),
     ("kl_f4_cpu", "[8, 8, 8]", 4)],
)  # fmt: skip
def test_recipes_for_your_own_pictures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, config: str, widths: str, factor: int
) -> None:
    """And, from what one of them leaves behind, the decoder alone on windows of larger pictures, which are validated whole."""
    monkeypatch.chdir(tmp_path)
    main(["shards", "shapes", "shards", "--count", "8", "--size", "80"])
    arguments = tiny_arguments(f"{config}.yaml", 64)
    arguments += ["--model.autoencoder.widths", widths, "--model.autoencoder.norm_groups", "4"]
    arguments += ["--model.autoencoder.sample_size", "64", "--model.perceptual.init_args.weights", "random"]
    main([*arguments, "--out", "run"])
    trained = AutoencoderKL.from_pretrained("run/autoencoder")
    assert 2 ** (len(trained.config.block_out_channels) - 1) == factor
    if config == "kl_f4_cpu":
        arguments = tiny_arguments("decoder_finetune.yaml", 32)
        arguments += ["--model.autoencoder.init_from", "run/autoencoder", "--model.perceptual.init_args.weights", "random"]
        main([*arguments, "--out", "finer"])
        finer = AutoencoderKL.from_pretrained("finer/autoencoder")
        assert finer.config.latents_mean == trained.config.latents_mean
        for name, before in trained.state_dict().items():
            assert torch.equal(before, finer.state_dict()[name]) or not name.startswith(("encoder.", "quant_conv."))
        assert not torch.equal(trained.decoder.conv_out.weight, finer.decoder.conv_out.weight)
        assert "run/autoencoder" not in Path("finer/autoencoder/config.json").read_text()
        assert Image.open("finer/previews/step-00000003.png").width > 2 * 80  # whole pictures


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
    arguments = [*tiny_arguments("kl_f8_256.yaml", 64), "--out", "run", "--model.autoencoder.widths", "[8, 8, 8, 8]"]
    arguments += ["--model.autoencoder.norm_groups", "4", "--model.autoencoder.sample_size", "64"]
    with pytest.raises(SystemExit) as left:
        main(arguments)
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert left.value.code == 2 and "path" in said and "'random'" in said
