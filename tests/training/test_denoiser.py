"""Stage two: what it refuses, what it learns, and that its preview is what its pipeline draws."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from lightning import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from ldm.data.datamodule import ShardDataModule
from ldm.diffusion.path import RectifiedFlow, VariancePreserving
from ldm.diffusion.prediction import V, Velocity
from ldm.diffusion.timesteps import LogitNormal, Uniform
from ldm.errors import UsageError
from ldm.latents.export import export_latents
from ldm.models.autoencoder import AutoencoderConfig, autoencoder_hash, load_autoencoder
from ldm.models.dit import DiT
from ldm.models.text import TextEncoder
from ldm.pipeline import load_pipeline
from ldm.training.base import OptimiserConfig
from ldm.training.denoiser import DenoiserTraining


def new_autoencoder(folder: Path, seed: int) -> Path:
    torch.manual_seed(seed)
    AutoencoderConfig([8, 16], 4, 1, 4, False, 32).build().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def exported(image_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """An untrained autoencoder and the latents made with it: (16, 16) each, of ten shapes."""
    folder = tmp_path_factory.mktemp("exported")
    autoencoder = new_autoencoder(folder / "autoencoder", 0)
    export_latents(autoencoder, image_shards, folder / "latents")
    return autoencoder, folder / "latents"


def make(autoencoder: Path, **changes: object) -> DenoiserTraining:
    torch.manual_seed(0)
    settings = {
        "denoiser": DiT(in_channels=4, sample_size=16, patch_size=4, width=32, num_layers=2, num_heads=2, text_width=384),
        "autoencoder": str(autoencoder),
        "path": RectifiedFlow(),
        "prediction": Velocity(),
        "timesteps": LogitNormal(),
        "optimiser": OptimiserConfig(3e-3),
        "ema_decay": 0.9,
        "preview_prompts": ["a red ring", "a blue star"],
        "preview_steps": 3,
    }
    return DenoiserTraining(**settings | changes)


def fit(
    module: DenoiserTraining, latents: Path, folder: Path, steps: int, data: dict | None = None, **trainer: object
) -> Trainer:
    torch.manual_seed(1)
    settings = {"accelerator": "cpu", "devices": 1, "logger": False, "enable_checkpointing": False} | trainer
    trainer = Trainer(
        max_steps=steps, max_epochs=-1, enable_progress_bar=False, enable_model_summary=False, num_sanity_val_steps=0,
        check_val_every_n_epoch=None, val_check_interval=steps, default_root_dir=folder, use_distributed_sampler=False,
        **settings,
    )  # fmt: skip
    trainer.fit(module, ShardDataModule(str(latents), str(latents), batch_size=8, **data or {}))
    return trainer


@pytest.mark.parametrize("diffusion", [(RectifiedFlow(), Velocity(), LogitNormal()), (VariancePreserving(), V(), Uniform())])
def test_the_loss_falls(exported: tuple[Path, Path], tmp_path: Path, diffusion: tuple) -> None:
    path, prediction, timesteps = diffusion
    short = fit(make(exported[0], path=path, prediction=prediction, timesteps=timesteps), exported[1], tmp_path, 2)
    long = fit(make(exported[0], path=path, prediction=prediction, timesteps=timesteps), exported[1], tmp_path, 150)
    assert long.callback_metrics["val/loss"] < 0.8 * short.callback_metrics["val/loss"]


def test_bf16_keeps_fp32_master_weights(exported: tuple[Path, Path], tmp_path: Path) -> None:
    module = make(exported[0])
    trainer = fit(module, exported[1], tmp_path, 2, precision="bf16-mixed")
    assert {parameter.dtype for parameter in module.denoiser.parameters()} == {torch.float32}
    assert torch.isfinite(trainer.callback_metrics["val/loss"])


def test_preview_is_what_the_saved_pipeline_draws(exported: tuple[Path, Path], tmp_path: Path) -> None:
    module = make(exported[0])
    fit(module, exported[1], tmp_path, 20)
    with module.average_applied():
        preview = [pictures[0] for _, pictures in module.preview()]
        module.save(tmp_path / "pipeline")
    pipeline = DiffusionPipeline.from_pretrained(tmp_path / "pipeline")
    pipeline.set_progress_bar_config(disable=True)
    drawn = pipeline(
        module.preview_prompts, num_inference_steps=3, generator=[torch.Generator().manual_seed(seed) for seed in range(2)]
    ).images
    for ours, theirs in zip(preview, drawn, strict=True):
        assert np.abs(np.asarray(ours, int) - np.asarray(theirs, int)).max() <= 1


def test_another_autoencoder_is_refused_and_both_are_named(exported: tuple[Path, Path], tmp_path: Path) -> None:
    other = new_autoencoder(tmp_path / "other", 1)
    with pytest.raises(UsageError) as refused:
        fit(make(other), exported[1], tmp_path, 1)
    assert str(other) in str(refused.value) and str(exported[1]) in str(refused.value)


@pytest.mark.parametrize(
    ("denoiser", "named"),
    [({"in_channels": 8}, "in_channels"), ({"sample_size": 8}, "sample_size"), ({"text_width": 64}, "text_width")],
)
def test_sizes_that_do_not_fit_the_latents_are_refused(
    exported: tuple[Path, Path], tmp_path: Path, denoiser: dict, named: str
) -> None:
    sizes = {"in_channels": 4, "sample_size": 16, "text_width": 384} | denoiser
    module = make(exported[0], denoiser=DiT(patch_size=4, width=32, num_layers=1, num_heads=2, **sizes))
    with pytest.raises(UsageError, match=named):
        fit(module, exported[1], tmp_path, 1)


def test_frozen_parts_are_in_no_checkpoint(exported: tuple[Path, Path], tmp_path: Path) -> None:
    module = make(exported[0])
    trainer = fit(module, exported[1], tmp_path, 1)
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    state = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert all(name.startswith("denoiser.") for name in state["state_dict"])
    assert set(state["average"]) >= {"shadow_params", "optimization_step"}


def test_validation_latents_of_another_autoencoder_are_refused(
    exported: tuple[Path, Path], image_shards: Path, tmp_path: Path
) -> None:
    export_latents(new_autoencoder(tmp_path / "other", 1), image_shards, tmp_path / "latents")
    trainer = Trainer(max_steps=1, max_epochs=-1, accelerator="cpu", devices=1, logger=False, enable_checkpointing=False)
    with pytest.raises(UsageError, match=r"latents has another autoencoder than .*export both with the same"):
        trainer.fit(make(exported[0]), ShardDataModule(str(exported[1]), str(tmp_path / "latents"), batch_size=8))


def test_checkpoints_hold_the_trained_weights_beside_the_average(exported: tuple[Path, Path], tmp_path: Path) -> None:
    """Lightning saves at the end of a validation, when the average still stands in the trained weights' place."""
    module = make(exported[0])
    saver = ModelCheckpoint(tmp_path, save_last=True, save_on_train_epoch_end=False)
    fit(module, exported[1], tmp_path, 6, enable_checkpointing=True, callbacks=[saver])
    state = torch.load(tmp_path / "last.ckpt", weights_only=True)
    for (name, trained), average in zip(module.denoiser.named_parameters(), state["average"]["shadow_params"], strict=True):
        saved = state["state_dict"][f"denoiser.{name}"]
        assert torch.equal(saved, trained)
        assert trained.grad is None or not torch.equal(saved, average)


def edit_manifest(folder: Path, change: Callable[[dict], None]) -> None:
    manifest = json.loads((folder / "manifest.json").read_text())
    change(manifest)
    (folder / "manifest.json").write_text(json.dumps(manifest))


def test_another_text_encoder_is_refused_and_both_are_named(exported: tuple[Path, Path], tmp_path: Path, minilm) -> None:
    """The folder that the captions went through holds other weights by the time of stage two."""
    shutil.copytree(exported[1], tmp_path / "latents")
    minilm.model.save_pretrained(tmp_path / "text")
    minilm.tokenizer.save_pretrained(tmp_path / "text")
    edit_manifest(tmp_path / "latents", lambda manifest: manifest["text_encoders"][0].update(name=str(tmp_path / "text")))
    fit(make(exported[0]), tmp_path / "latents", tmp_path, 1)  # the same weights, config and words from another folder
    config = json.loads((tmp_path / "text" / "config.json").read_text())
    (tmp_path / "text" / "config.json").write_text(json.dumps(config | {"layer_norm_eps": 1e-6}))
    with pytest.raises(UsageError) as refused:
        fit(make(exported[0]), tmp_path / "latents", tmp_path, 1)
    found = TextEncoder.load(str(tmp_path / "text")).hash
    assert f"was exported with text encoder {minilm.hash[:12]}, but {tmp_path / 'text'} is {found[:12]} now" in str(
        refused.value
    )


def test_latents_of_several_sizes_are_refused_with_the_mend(exported: tuple[Path, Path], tmp_path: Path) -> None:
    shutil.copytree(exported[1], tmp_path / "latents")
    edit_manifest(tmp_path / "latents", lambda manifest: manifest["latent_shapes"].append([4, 16, 24]))
    with pytest.raises(UsageError, match=r"latents of several sizes \(16 x 16, 24 x 16\); export with --image-size"):
        fit(make(exported[0]), tmp_path / "latents", tmp_path, 1)


def test_modes_and_mirrored_latents_can_be_trained_on(exported: tuple[Path, Path], image_shards: Path, tmp_path: Path) -> None:
    export_latents(exported[0], image_shards, tmp_path / "latents", mode=True, flip=True, captions="all")
    data = {"flip": 0.5, "caption": "random", "caption_dropout": 0.1}
    trainer = fit(make(exported[0]), tmp_path / "latents", tmp_path, 3, data=data)
    assert torch.isfinite(trainer.callback_metrics["val/loss"])


def test_the_pipeline_knows_what_its_denoiser_was_trained_on(exported: tuple[Path, Path], tmp_path: Path) -> None:
    module = make(exported[0])
    fit(module, exported[1], tmp_path, 1)
    saved = tmp_path / "pipeline"
    module.save(saved)
    autoencoder = autoencoder_hash(load_autoencoder(exported[0]))
    trained_on = {"autoencoder": autoencoder, "text_encoder": module.frozen.text_encoder.hash, "latent_shape": [4, 16, 16]}
    assert load_pipeline(saved).config.trained_on == trained_on
    other = new_autoencoder(tmp_path / "other", 1)
    shutil.move(saved / "vae", tmp_path / "own")
    shutil.copytree(other, saved / "vae")
    found = autoencoder_hash(load_autoencoder(other))
    with pytest.raises(UsageError) as refused:
        load_pipeline(saved)
    expected = f"vae/ of the pipeline is autoencoder {found[:12]}, but its denoiser was trained with {autoencoder[:12]}"
    assert str(refused.value) == f"{saved}: {expected}; put that one back"
    shutil.rmtree(saved / "vae")
    shutil.move(tmp_path / "own", saved / "vae")
    for file, change, expected in (
        ("text_encoder/config.json", {"layer_norm_eps": 1e-6}, "text_encoder/ of the pipeline is text encoder "),
        (
            "transformer/config.json",
            {"sample_size": 32},
            "latents of 4 channels and side 32, but was trained on 4 and 16",
        ),
    ):
        before = (saved / file).read_text()
        (saved / file).write_text(json.dumps(json.loads(before) | change))
        with pytest.raises(UsageError, match=expected):
            load_pipeline(saved)
        (saved / file).write_text(before)
    load_pipeline(saved)
