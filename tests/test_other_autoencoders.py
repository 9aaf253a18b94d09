"""Stage two on latents of every class of autoencoders, and on pixels: export, check, decode, training, sampling."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderTiny
from PIL import Image

from ldm.cli import main
from ldm.data.image_dataset import ImageDataset
from ldm.data.manifest import Manifest
from ldm.errors import UsageError
from ldm.models.autoencoder import load_autoencoder
from ldm.pipeline import load_pipeline
from ldm.runs.pixart import export_pixart
from tests.samples import AUTOENCODERS
from tests.tiny import write_config

SHAPES = {"flux2": [4, 16, 16], "dc": [4, 8, 8], "tiny": [4, 16, 16], "pixels": [3, 32, 32]}


@pytest.mark.parametrize("kind", AUTOENCODERS)
def test_from_images_to_images(kind: str, image_shards: Path, tiny_text_encoder: str, tmp_path: Path) -> None:
    autoencoder, latents = str(tmp_path / "autoencoder"), tmp_path / "latents"
    if kind == "pixels":
        autoencoder = "identity"
    else:
        AUTOENCODERS[kind]().save_pretrained(autoencoder)
    export = ["latents", "export", "--autoencoder", autoencoder, "--shards", str(image_shards), "--out", str(latents)]
    main([*export, "--text-encoder", tiny_text_encoder, "--flip"])
    found = Manifest.load(latents).extra
    assert found["latent_shapes"] == [SHAPES[kind]] and len(found["latents_std"]) == SHAPES[kind][0]
    assert found["posterior"] == ("gaussian" if kind == "flux2" else "mode")
    main(["latents", "check", str(latents), "--deep", "--autoencoder", autoencoder])
    main(["latents", "show", str(latents), "--out", str(tmp_path / "page.html"), "--autoencoder", autoencoder])
    main(["latents", "decode", str(latents), str(tmp_path / "decoded"), "--autoencoder", autoencoder])
    if kind == "pixels":  # to the last bit
        images = ImageDataset(image_shards, read_captions=False)
        for sample in (images[number] for number in range(len(images))):
            decoded = np.asarray(Image.open(tmp_path / "decoded" / f"{sample['key']}.png"))
            assert np.array_equal(decoded, np.transpose(sample["image"], (1, 2, 0)))

    channels, side, _ = SHAPES[kind]
    sizes = {"in_channels": channels, "sample_size": side, "patch_size": 4, "patch_bottleneck": 6 if kind == "pixels" else None}
    sizes |= {"width": 16, "num_layers": 1, "num_attention_heads": 2, "caption_channels": 8}
    model = {
        "denoiser": {"class_path": "ldm.models.dit.DiT", "init_args": sizes},
        "prediction": {"class_path": "ldm.diffusion.prediction.X0"},
        "weighting": {"class_path": "ldm.diffusion.weighting.VelocityError"},
        "preview_prompts": ["a ring"],
        "preview_steps": 2,
    }
    trainer = {"max_steps": 2, "val_check_interval": 2}
    statistics = []
    for name, data, more in (
        ("stored", latents, {}),
        ("online", image_shards, {"online": True, "text_encoder": tiny_text_encoder}),
    ):
        config = write_config(tmp_path / f"{name}.json", (Path(autoencoder), data), trainer, **model, **more)
        main(["denoiser", "fit", "--config", str(config), "--out", str(tmp_path / name)])
        pipeline = load_pipeline(tmp_path / name / "pipeline")
        assert pipeline.config["trained_on"]["autoencoder"] == found["autoencoder"]
        assert [*pipeline.config["trained_on"]["latent_shape"]] == SHAPES[kind]
        statistics.append([pipeline.vae.config["latents_mean"], pipeline.vae.config["latents_std"]])
    assert statistics[0] == [found["latents_mean"], found["latents_std"]]
    torch.testing.assert_close(*map(torch.tensor, statistics), atol=2e-3, rtol=2e-3)
    main(["denoiser", "export", str(tmp_path / "online"), str(tmp_path / "again")])
    main(["sample", str(tmp_path / "again"), "a ring", "--out", str(tmp_path / "images"), "--steps", "2"])
    assert Image.open(next((tmp_path / "images").glob("0000*.png"))).size == (32, 32)
    with pytest.raises(UsageError, match="PixArt"):
        export_pixart(pipeline, tmp_path)
    # a part that is exchanged is refused
    two: Any = {"num_encoder_blocks": (1, 1), "num_decoder_blocks": (1, 1)}
    other = AutoencoderTiny(3, 3, (8, 8), (8, 8), latent_channels=channels, **two)
    other.save_pretrained(tmp_path / "stored" / "pipeline" / "vae")
    index = json.loads((tmp_path / "stored" / "pipeline" / "model_index.json").read_text())
    (tmp_path / "stored" / "pipeline" / "model_index.json").write_text(
        json.dumps(index | {"vae": ["diffusers", "AutoencoderTiny"]})
    )
    with pytest.raises(UsageError, match=r"vae/ of the pipeline is autoencoder .* put that one back"):
        load_pipeline(tmp_path / "stored" / "pipeline")


def test_several_kinds_are_evaluated_side_by_side(image_shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    AUTOENCODERS["dc"]().save_pretrained(tmp_path / "dc")
    main(["evaluate", "autoencoder", str(tmp_path / "dc"), "identity", "--shards", str(image_shards), "--json", "-"])
    dc, pixels = json.loads(capsys.readouterr().out)["autoencoders"]
    assert pixels["psnr"] == float("inf") and pixels["ssim"] == pytest.approx(1, abs=1e-3) and dc["psnr"] < 30
    assert {*dc["latent_kl"], *pixels["latent_kl"]} == {float("inf")} and pixels["latent_dead"] == 0


def test_identity_has_no_directory_for_statistics(image_shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    export = ["latents", "export", "--autoencoder", "identity", "--shards", str(image_shards), "--out", str(tmp_path / "out")]
    with pytest.raises(SystemExit):
        main([*export, "--keep-statistics"])
    assert "identity has none" in capsys.readouterr().err
    assert load_autoencoder("identity").config["latents_mean"] is None
