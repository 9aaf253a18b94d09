"""A run starts from another model's weights: it begins where that one ended, or says in one line why it cannot."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import PixArtTransformer2DModel
from safetensors.torch import load_file, save_file
from torch import Tensor

from ldm.cli import dispatch, main
from ldm.data.writer import write_images
from ldm.errors import LdmError, UsageError
from ldm.latents.export import export_latents
from ldm.models.autoencoder import load_autoencoder
from ldm.models.dit import DiT
from ldm.models.text_encoder import TextEncoder
from ldm.runs.checkpoints.files import sidecar
from ldm.runs.layout import RunFolder
from ldm.shapes.scenes import generate
from ldm.training.initial import InitialWeights
from tests.tiny import write_config

SIZES: dict[str, Any] = {
    "sample_size": 16, "patch_size": 4, "width": 32, "num_layers": 2, "num_attention_heads": 2, "caption_channels": 8
}  # fmt: skip
STEPS = {"max_steps": 4, "val_check_interval": 4}
# a step that changes nothing, validated after it
STILL = {"max_steps": 1, "val_check_interval": 1}


def fit(folder: Path, latents: tuple[Path, Path], trainer: dict[str, Any], *options: str, **model: Any) -> Path:
    """A run in ``folder``, of which ``latents`` are the autoencoder and the data."""
    folder.mkdir(exist_ok=True)
    config = write_config(folder / "config.yaml", latents, {"log_every_n_steps": 1} | trainer, **model)
    dispatch(["denoiser", "fit", "--config", str(config), "--out", str(folder / "run"), *options])
    return folder / "run"


def start(folder: Path, latents: tuple[Path, Path], source: Path | str, *options: str, **model: Any) -> Path:
    """A run from ``source`` that changes no weight."""
    still = {"denoiser": None, "init_from": str(source), "optimiser": {"learning_rate": 0.0}}
    return fit(folder, latents, STILL, *options, **still | model)


def validation_loss(run: Path) -> float:
    rows = csv.DictReader(RunFolder(run).metrics.open())
    return [float(row["val/loss"]) for row in rows if row["val/loss"]][-1]


def exported(run: Path) -> dict[str, Tensor]:
    return load_file(run / "pipeline" / "transformer" / "diffusion_pytorch_model.safetensors")


@pytest.fixture(scope="module")
def source(latents: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    averages = {"sigma_rel": [0.05, 0.1], "snapshot_every": 4, "selected": 0.1}
    return fit(tmp_path_factory.mktemp("source"), latents, STEPS, power_averages=averages)


@pytest.mark.parametrize(
    "place", ["", "checkpoints/last.ckpt", "checkpoints/step=00000004.ckpt", "pipeline", "pipeline/transformer"]
)
def test_the_first_loss_is_the_last_one_of_the_source(
    place: str, source: Path, latents: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """Its selected average is taken from wherever it is, and class and config with it."""
    run = start(tmp_path, latents, source / place)
    assert validation_loss(run) == pytest.approx(validation_loss(source), abs=1e-6)
    assert f"weights loaded from {source / place}" in capsys.readouterr().out or place == ""
    before, after = exported(source), exported(run)
    assert all(torch.equal(weight, after[name]) for name, weight in before.items()) and before.keys() == after.keys()


def test_the_weights_in_training_can_be_taken_too(source: Path, latents: tuple[Path, Path], tmp_path: Path) -> None:
    run = start(tmp_path, latents, source, init_weights="trained")
    trained = torch.load(RunFolder(source).last_checkpoint, weights_only=True)["state_dict"]
    assert all(torch.equal(weight, trained[f"denoiser.{name}"]) for name, weight in exported(run).items())
    with pytest.raises(UsageError, match="init_weights trained"):
        start(tmp_path / "again", latents, source / "pipeline", init_weights="trained")


def test_other_data_are_normalised_as_in_the_training_of_the_source(
    source: Path, latents: tuple[Path, Path], tiny_text_encoder: str, tmp_path: Path
) -> None:
    """Their own statistics would shift all that the weights know. They stay with the run, its checkpoints and its pipeline."""
    write_images(tmp_path / "shards", "shapes", generate(8, 32, seed=7), samples_per_shard=8)
    export_latents(latents[0], tmp_path / "shards", tmp_path / "latents", tiny_text_encoder)
    other = ("--data.train", str(tmp_path / "latents"))
    run = start(tmp_path / "a", latents, source, *other)
    assert validation_loss(run) == pytest.approx(validation_loss(source), abs=1e-6)
    shutil.rmtree(run / "pipeline")
    dispatch(["denoiser", "export", str(run), str(run / "pipeline")])
    again = start(tmp_path / "b", latents, run / "pipeline/transformer", *other)
    for made in (run, again):
        found, expected = (load_autoencoder(each / "pipeline/vae").config for each in (made, source))
        assert (found["latents_mean"], found["latents_std"]) == (expected["latents_mean"], expected["latents_std"])


def test_a_resumed_run_does_not_need_the_source(source: Path, latents: tuple[Path, Path], tmp_path: Path) -> None:
    copied = shutil.copytree(source / "pipeline", tmp_path / "copied")
    model = {"denoiser": None, "init_from": str(copied), "freeze": ["patch_embed.*", "blocks.0.*"]}
    whole = fit(tmp_path / "whole", latents, STEPS, **model)
    fit(tmp_path / "parts", latents, {"max_steps": 2, "val_check_interval": 2}, **model)
    shutil.rmtree(copied)
    shutil.rmtree(tmp_path / "parts/run/pipeline")
    resumed = fit(tmp_path / "parts", latents, STEPS, "--resume", "latest", **model)
    states = [torch.load(RunFolder(run).last_checkpoint, weights_only=True)["state_dict"] for run in (whole, resumed)]
    assert all(torch.equal(weight, states[1][name]) for name, weight in states[0].items())
    before, after = exported(source), exported(resumed)
    frozen = {name for name in before if name.startswith(("patch_embed.", "blocks.0."))}
    assert {name for name in before if torch.equal(before[name], after[name])} == frozen
    shutil.rmtree(resumed / "pipeline")
    with pytest.raises(UsageError, match="freeze"):
        fit(tmp_path / "parts", latents, STEPS, "--resume", "latest", **model | {"freeze": ["patch_embed.*", "blocks.1.*"]})


@pytest.mark.parametrize("muon", [None, 0.01])
def test_what_is_frozen_is_not_in_the_optimiser(
    muon: float | None, source: Path, latents: tuple[Path, Path], tmp_path: Path
) -> None:
    optimiser = {"learning_rate": 0.01, "weight_decay": 0.5, "muon_learning_rate": muon}
    run = fit(tmp_path, latents, STEPS, optimiser=optimiser, freeze=["*.attention.*"], init_from=str(source))
    content = torch.load(RunFolder(run).last_checkpoint, weights_only=True)
    before, after = exported(source), exported(run)
    frozen = {name for name in before if ".attention." in name}
    assert frozen and {name for name in before if torch.equal(before[name], after[name])} == frozen
    assert len(content["optimizer_states"][0]["state"]) == len(before) - len(frozen)


def test_micro_conditioning_begins_without_effect(randomised: Any) -> None:
    before, after = randomised(DiT(**SIZES)), DiT(**SIZES, micro_conditioning=True)
    weights = {name: weight.detach() for name, weight in before.named_parameters()}
    assert "; resized: none; new: size_embed.linear_1.weight" in InitialWeights("there", dict(before.config), weights).load(
        after
    )
    x, text, t, sizes = torch.randn(2, 4, 16, 24), torch.randn(2, 3, 8), torch.tensor([5.0, 500.0]), 999 * torch.rand(2, 6)
    with torch.no_grad():
        found, expected = after(x, text, t, added_cond_kwargs={"time_ids": sizes}).sample, before(x, text, t).sample
    assert torch.equal(found, expected)
    with pytest.raises(UsageError, match=r"size_embed.linear_1.weight: .* there, none here"):
        InitialWeights("there", dict(after.config), dict(after.named_parameters())).load(before)


def test_a_denoiser_of_more_channels_begins_with_zeros(randomised: Any) -> None:
    larger: dict[str, Any] = SIZES | {"in_channels": 6, "sample_size": 32}
    small, large = randomised(DiT(**SIZES)), DiT(**larger)
    weights = {name: weight.detach() for name, weight in small.named_parameters()}
    said = InitialWeights("there", dict(small.config), weights).load(large)
    assert "patch_embed.weight: (32, 4, 4, 4) -> (32, 6, 4, 4)" in said and "sample_size 16 -> 32" in said
    x, text, t = torch.randn(2, 6, 32, 32), torch.randn(2, 3, 8), torch.tensor([5.0, 500.0])
    small.register_to_config(sample_size=32)
    with torch.no_grad():
        found, expected = large(x, text, t).sample, small(x[:, :4], text, t).sample
    assert torch.equal(found[:, 4:], torch.zeros(2, 2, 32, 32))
    torch.testing.assert_close(found[:, :4], expected)


@pytest.fixture(scope="module")
def pixart(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A repository with a ``transformer`` as PixArt's are published: under diffusers' former class, with a learned variance."""
    folder = tmp_path_factory.mktemp("pixart") / "transformer"
    torch.manual_seed(0)
    network = PixArtTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, num_layers=2, cross_attention_dim=16, caption_channels=8, sample_size=16,
        interpolation_scale=0.5,  # pyright: ignore[reportArgumentType]  as at 256 px
    )  # fmt: skip
    network.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"_class_name": "Transformer2DModel", "num_vector_embeds": None}))
    return folder.parent


def test_published_pixart_weights_predict_the_same_noise(pixart: Path, latents: tuple[Path, Path], tmp_path: Path) -> None:
    diffusion = {
        "path": {"class_path": "ldm.diffusion.path.VariancePreserving", "init_args": {"schedule": "linear"}},
        "prediction": {"class_path": "ldm.diffusion.prediction.Epsilon"},
    }
    run = start(tmp_path, latents, pixart, **diffusion)
    shutil.rmtree(run / "pipeline")
    dispatch(["denoiser", "export", str(run), str(run / "pipeline")])  # built from what the run recorded
    ours: Any = PixArtTransformer2DModel.from_pretrained(run / "pipeline/transformer")
    theirs: Any = PixArtTransformer2DModel.from_pretrained(pixart / "transformer")
    x, text, t = torch.randn(2, 4, 16, 24), torch.randn(2, 3, 8), torch.tensor([5, 500])
    with torch.no_grad():
        found, expected = ours(x, text, t).sample, theirs(x, text, t).sample
    assert ours.config["interpolation_scale"] == 0.5
    torch.testing.assert_close(found, expected[:, :4])


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"num_layers": 3}, "num_layers: 2 there, 3 here"),
        ({"num_attention_heads": 4}, "num_attention_heads: 2 there, 4 here"),  # of the same weights
        ({"in_channels": 2}, "patch_embed.weight"),
    ],
)
def test_another_architecture_is_refused_with_the_keys(
    changes: dict[str, int], said: str, source: Path, latents: tuple[Path, Path], tmp_path: Path
) -> None:
    denoiser = {"class_path": "ldm.models.dit.DiT", "init_args": SIZES | changes}
    for place in ("", "pipeline"):
        with pytest.raises(UsageError) as refused:
            start(tmp_path, latents, source / place, denoiser=denoiser)
        assert said in str(refused.value) and str(source) in str(refused.value) and "\n" not in str(refused.value)
        assert not (tmp_path / "run").exists()


def test_what_holds_no_weights_is_refused(
    source: Path, latents: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = shutil.copytree(source / "pipeline", tmp_path / "broken")
    file = broken / "transformer/diffusion_pytorch_model.safetensors"
    save_file({name: weight for name, weight in load_file(file).items() if name != "proj_out.bias"}, file)
    poisoned = shutil.copytree(source / "pipeline", tmp_path / "poisoned")
    file = poisoned / "transformer/diffusion_pytorch_model.safetensors"
    save_file(load_file(file) | {"proj_out.bias": torch.full((64,), torch.nan)}, file)
    short = shutil.copytree(source, tmp_path / "short", symlinks=True)
    checkpoint = RunFolder(short).last_checkpoint.resolve()
    content = torch.load(checkpoint, weights_only=True)
    content["average"]["power_function"]["0.1"]["shadow_params"].pop()
    torch.save(content, checkpoint)
    sidecar(checkpoint).unlink()
    monkeypatch.chdir(tmp_path)
    for place, said in {
        str(tmp_path): "holds no weights to start from",
        str(latents[0]): "holds a network of class AutoencoderKL",
        str(broken): "proj_out.bias",
        str(poisoned): "not finite",
        str(short): "is not a whole checkpoint of its run",
        str(source / "checkpoints/step=00000009.ckpt"): "does not exist",
        "somebody/something": "somebody/something is no directory here, and cannot be downloaded",
    }.items():
        with pytest.raises(LdmError) as refused:
            start(tmp_path / "new", latents, place)
        assert said in str(refused.value) and "\n" not in str(refused.value) and not (tmp_path / "new/run").exists()
    with pytest.raises(UsageError, match=r"model\.denoiser is missing"):
        fit(tmp_path / "new", latents, STILL, denoiser=None)


@pytest.mark.parametrize(("patterns", "said"), [(["blocks.0"], "freeze blocks.0 matches no weight"), (["*"], "matches all")])
def test_patterns_that_cannot_be_meant_are_refused(
    patterns: list[str], said: str, latents: tuple[Path, Path], tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match=said):
        fit(tmp_path, latents, STILL, freeze=patterns)


def test_an_autoencoder_on_the_hub_is_named_where_there_is_no_network(
    image_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    command = ["latents", "export", "--autoencoder", "stabilityai/sd-vae-ft-mse", "--shards", str(image_shards), "--out", "out"]
    with pytest.raises(SystemExit) as left:
        main(command)
    said = capsys.readouterr().err.strip().splitlines()
    assert left.value.code == 2 and len(said) == 1 and "cannot be downloaded from the Hugging Face hub" in said[0]


def test_a_name_on_the_hub_is_downloaded(
    latents: tuple[Path, Path], source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only what is needed of a repository, once, and afterwards it is a directory like any other."""
    asked: list[Any] = []

    def download(name: str, **settings: Any) -> str:
        asked.append((name, settings["allow_patterns"]))
        return str(source / "pipeline" if name == "me/model" else latents[0])

    monkeypatch.setattr("ldm.models.directories.snapshot_download", download)
    monkeypatch.chdir(tmp_path)
    run = start(tmp_path, (Path("me/autoencoder"), latents[1]), "me/model")
    assert validation_loss(run) == pytest.approx(validation_loss(source), abs=1e-6)
    assert [name for name, _ in asked] == ["me/model", "me/autoencoder"] and "transformer/*.safetensors" in asked[0][1]
    assert not any("text_encoder" in pattern for _, patterns in asked for pattern in patterns)
    Path("me").mkdir()
    with pytest.raises(UsageError, match="me/other is not an autoencoder directory"):
        load_autoencoder("me/other")


def test_other_encoders_than_the_source_s_are_named(
    source: Path, latents: tuple[Path, Path], image_shards: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Their statistics are then the data's: the source's say nothing of them."""
    from tests.training.test_denoiser import new_autoencoder

    other = new_autoencoder(tmp_path / "other", 5)
    encoder = json.loads((source / "pipeline/model_index.json").read_text())["trained_on"]["text_encoder"]
    export_latents(other, image_shards, tmp_path / "latents", str(source / "pipeline/text_encoder"))
    assert TextEncoder.load(str(source / "pipeline/text_encoder")).hash == encoder
    run = start(tmp_path, (other, tmp_path / "latents"), source)
    assert "was trained with autoencoder" in caplog.text and "with text_encoder" not in caplog.text
    manifest = json.loads((tmp_path / "latents/manifest.json").read_text())
    assert load_autoencoder(run / "pipeline/vae").config["latents_mean"] == manifest["latents_mean"]
