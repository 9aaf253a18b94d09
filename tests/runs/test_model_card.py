"""The model card: it agrees with the run, its code opens the folder, and it names no path of the machine."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from diffusers import DiffusionPipeline, PixArtAlphaPipeline
from huggingface_hub import ModelCard, ModelCardData
from PIL import Image

from ldm.cli import main
from ldm.pipeline import load_pipeline
from ldm.reporting.grids import captioned_grid
from ldm.runs.model_card import TO_WRITE, CardFields, base_name, downloaded_base, without_paths
from tests.tiny import write_config

PROMPTS = ["a red ring", "a 'tiny' blue star / comet"]
STEPS = 6
NETWORKS: dict[str, dict[str, Any]] = {
    "DiT": {},
    "PixArt": {
        "class_path": "diffusers.PixArtTransformer2DModel",
        "init_args": {
            **{"sample_size": 16, "patch_size": 4, "num_layers": 1, "num_attention_heads": 2, "attention_head_dim": 16},
            **{"cross_attention_dim": 32, "caption_channels": 8, "out_channels": 4},
        },
    },
}


@pytest.fixture(scope="module")
def runs(latents: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A short run of each network."""
    folder = tmp_path_factory.mktemp("home-of-somebody")
    copies = [shutil.copytree(given, folder / given.name) for given in latents]
    model = {"ema_decay": 0.5, "optimiser": {"learning_rate": 0.02}, "preview_prompts": PROMPTS, "preview_steps": 3}
    for name, network in NETWORKS.items():
        file, trainer = folder / f"{name}.yaml", {"max_steps": STEPS, "val_check_interval": 3}
        write_config(file, (copies[0], copies[1]), trainer, 8, **model, **({"denoiser": network} if network else {}))
        main(["denoiser", "fit", "--config", str(file), "--out", str(folder / name)])
    return {name: folder / name for name in NETWORKS}


@pytest.fixture(scope="module")
def exported(runs: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("exported") / "tiny-shapes"
    report = folder.parent / "report.json"
    report.write_text(json.dumps({"prompt_accuracy": 0.875}))
    said = ["--license", "apache-2.0", "--dataset", "somebody/shapes", "--report", str(report)]
    said += ["--base-model", "somebody/base"]
    main(["denoiser", "export", str(runs["DiT"]), str(folder), "--model-card", *said])
    return folder


def snippet(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Image.Image:
    """The image of the card's Python, run in its folder."""
    (code,) = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)
    monkeypatch.chdir(folder)
    exec(code, {})
    with Image.open("image.png") as image:
        image.load()
    Path("image.png").unlink()
    return image


def first_of_the_grid(folder: Path, image: Image.Image, prompts: list[str]) -> np.ndarray:
    """By how much samples.png differs from the grid that would begin with ``image``, in its first image."""
    again = captioned_grid([image] * len(prompts), prompts)
    grid = Image.open(folder / "samples.png")
    assert grid.size == again.size
    half = (0, 0, grid.width // len(prompts), grid.height)
    return np.abs(np.asarray(grid.crop(half)).astype(int) - np.asarray(again.crop(half)))


def data_of(card: ModelCard) -> ModelCardData:
    assert isinstance(card.data, ModelCardData)
    return card.data


def test_the_card_parses_back_with_what_was_said(exported: Path, runs: dict[str, Path]) -> None:
    card = ModelCard.load(exported / "README.md")
    data = data_of(card)
    assert (data.license, data.library_name, data.pipeline_tag) == ("apache-2.0", "diffusers", "text-to-image")
    assert data.datasets == ["somebody/shapes"] and data.base_model == "somebody/base" and data.model_name == "tiny-shapes"
    assert "fine-tuned here from somebody/base" in card.text
    assert {"text-to-image", "diffusers:LatentDiffusionPipeline"} <= set(data.tags or [])
    rows = (runs["DiT"] / "logs" / "metrics.csv").read_text().splitlines()
    last = dict(zip(rows[0].split(","), rows[-1].split(","), strict=True))
    loss, accuracy = (result.metric_value for result in data.eval_results or [])
    assert loss == pytest.approx(float(last["val/loss"]), abs=1e-4) and accuracy == 0.875
    assert f"at step {STEPS} | {float(last['val/loss']):.4f} |" in card.text
    assert f"| images seen in training | {8 * STEPS} |" in card.text
    for number in range(10):
        name = f"val/loss_bin_{number:02d}"
        if last.get(name):
            assert f"| {number / 10:.1f} to {(number + 1) / 10:.1f} | {float(last[name]):.4f} |" in card.text
    trained_on = load_pipeline(exported).config["trained_on"]
    assert trained_on["autoencoder"] in card.text and trained_on["text_encoder"] in card.text


def test_the_base_model_is_what_the_run_started_from_where_that_was_downloaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    cached = tmp_path / "hub" / "models--owner--base"
    for file, text in {"refs/main": "0" * 40, f"snapshots/{'0' * 40}/model_index.json": "{}"}.items():
        (cached / file).parent.mkdir(parents=True, exist_ok=True)
        (cached / file).write_text(text)
    assert downloaded_base("owner/base") == "owner/base"
    assert [downloaded_base(name) for name in ("runs/denoiser", "pipeline", "/runs/denoiser", "")] == [None] * 4
    (tmp_path / "owner").mkdir()
    assert downloaded_base("owner/base") is None


def test_the_configuration_in_the_card_is_the_runs_own(exported: Path, runs: dict[str, Path]) -> None:
    (text,) = re.findall(r"```yaml\n(.*?)```", (exported / "README.md").read_text(), re.DOTALL)
    found, own = yaml.safe_load(text), yaml.safe_load((runs["DiT"] / "logs" / "config.yaml").read_text())
    assert found["model"].pop("autoencoder") == "autoencoder" and own["model"].pop("autoencoder")
    assert found["model"] == own["model"] and found["data"]["train"] == "latents"
    assert found["model"]["preview_prompts"] == PROMPTS


def test_no_path_of_the_machine_is_in_the_folder(exported: Path) -> None:
    for file in exported.rglob("*"):
        if file.suffix in (".md", ".json"):
            text = file.read_text()
            assert "home-of-somebody" not in text and str(exported.parent) not in text, file


def test_links_resolve(exported: Path) -> None:
    links = re.findall(r"\]\(([^)]+)\)", (exported / "README.md").read_text())
    assert links == ["samples.png"] and Image.open(exported / "samples.png").format == "PNG"


def test_a_folder_with_a_card_generates_the_same_images(
    exported: Path, runs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = shutil.copytree(exported, tmp_path / "elsewhere")
    images = []
    for place in (folder, runs["DiT"] / "pipeline"):
        pipeline: Any = DiffusionPipeline.from_pretrained(place)
        generators = [torch.Generator().manual_seed(seed) for seed in range(len(PROMPTS))]
        images_of = pipeline(PROMPTS, num_inference_steps=3, guidance_scale=3.0, generator=generators).images
        images.append(np.asarray(captioned_grid(images_of, PROMPTS)))
    assert np.array_equal(*images)
    if not torch.cuda.is_available():
        assert np.array_equal(np.asarray(Image.open(folder / "samples.png")), images[0])
        preview = Image.open(runs["DiT"] / "previews" / f"step-{STEPS:08d}.png")
        assert np.abs(np.asarray(preview).astype(int) - images[0]).max() <= 1
    assert first_of_the_grid(folder, snippet(folder, monkeypatch), PROMPTS).max() <= 1


def test_what_was_not_said_is_left_to_the_author(runs: dict[str, Path], exported: Path, tmp_path: Path) -> None:
    bare = shutil.copytree(runs["DiT"], tmp_path / "run")
    (bare / "logs" / "metrics.csv").unlink()
    main(["denoiser", "export", str(bare), str(tmp_path / "out"), "--model-card"])
    card = ModelCard.load(tmp_path / "out" / "README.md")
    data = data_of(card)
    assert data.license == "unknown" and data.datasets is None and data.base_model is None and data.eval_results is None
    assert "loss |" not in card.text and "accuracy" not in card.text
    said = (exported / "README.md").read_text()
    assert card.text.count(TO_WRITE) > said.count(TO_WRITE) > 0


def test_a_stock_pipeline_has_a_card_that_opens_it(
    runs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "stock"
    main(["denoiser", "export", str(runs["PixArt"]), str(out), "--as", "pixart", "--model-card"])
    text = (out / "README.md").read_text()
    assert "import ldm" not in text and "ldm sample" not in text
    assert "diffusers:PixArtAlphaPipeline" in (data_of(ModelCard.load(out / "README.md")).tags or [])
    assert type(DiffusionPipeline.from_pretrained(out)) is PixArtAlphaPipeline
    assert first_of_the_grid(out, snippet(out, monkeypatch), PROMPTS).max() <= 2


def test_an_unconditional_model_is_called_so_and_is_given_no_prompt(
    latents: tuple[Path, Path], image_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    export = ["latents", "export", "--autoencoder", str(latents[0]), "--shards", str(image_shards), "--text-encoder", "none"]
    main([*export, "--out", str(tmp_path / "latents")])
    model = {"preview_prompts": [""], "preview_steps": 2, "denoiser.init_args.caption_channels": 1}
    trainer = {"max_steps": 1, "val_check_interval": 1}
    write_config(tmp_path / "fit.yaml", (latents[0], tmp_path / "latents"), trainer, 8, **model)
    main(["denoiser", "fit", "--config", str(tmp_path / "fit.yaml"), "--out", str(tmp_path / "run")])
    main(["denoiser", "export", str(tmp_path / "run"), str(tmp_path / "out"), "--model-card"])
    card = ModelCard.load(tmp_path / "out" / "README.md")
    assert data_of(card).pipeline_tag == "unconditional-image-generation"
    assert "An unconditional latent diffusion model" in card.text and "ldm sample . --steps 2" in card.text
    assert first_of_the_grid(tmp_path / "out", snippet(tmp_path / "out", monkeypatch), [""]).max() <= 1


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        (["--license", "mit"], "--license is for the model card; give --model-card, too"),
        (["--dataset", "a/b"], "--dataset is for the model card; give --model-card, too"),
        (["--model-card", "--license", "My Licence"], "'My Licence' is not a name of a license on the hub"),
        (["--model-card", "--report", "{run}/logs/report.json"], "report.json: prompt_accuracy: field required"),
        (["--model-card", "--report", "{run}/nowhere.json"], "nowhere.json does not exist"),
        (["--model-card", "--as", "pixart"], "the denoiser is a DiT, but PixArtAlphaPipeline runs a PixArt"),
    ],
)
def test_wrong_options_are_refused_in_one_line(
    runs: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture, arguments: list[str], why: str
) -> None:
    run = runs["DiT"]
    (run / "logs" / "report.json").write_text("{}")
    with pytest.raises(SystemExit) as left:
        main(["denoiser", "export", str(run), str(tmp_path / "out"), *(argument.format(run=run) for argument in arguments)])
    *_, complaint = capsys.readouterr().err.splitlines()
    assert left.value.code in (1, 2) and complaint.startswith("ldm: ") and why in complaint
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("given", "left"),
    [
        ("/home/somebody/latents", "latents"),
        ("../runs/dit/", "dit"),
        ("C:\\data\\latents", "latents"),
        ("https://somebody:secret@host/data/train-{00..09}.tar?token=secret", "train-{00..09}.tar"),
        ("s3://bucket", "bucket"),
        ("latents", "latents"),
    ],
)
def test_of_paths_and_urls_the_last_part_is_left(given: str, left: str) -> None:
    assert base_name(given) == left
    assert without_paths({"data": {"train": [{"path": given, "weight": 1.0}]}}) == {
        "data": {"train": [{"path": left, "weight": 1.0}]}
    }


def test_words_and_names_on_the_hub_are_no_paths() -> None:
    config = {
        "preview_prompts": ["half/half"],
        "text_encoder": "google/t5-v1_1-base",
        "class_path": "ldm.models.dit.DiT",
        "n": 3,
    }
    assert without_paths(config) == config
    assert CardFields().license == "unknown"
