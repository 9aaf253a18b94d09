"""Stage two on a few images: default captions, prior preservation, and all that a run keeps of them."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from ldm.cli import dispatch
from ldm.data.datamodule import Regularisation, ShardDataModule
from ldm.data.plan import PlannedSample
from ldm.errors import UsageError
from ldm.pipeline import load_pipeline
from ldm.runs.layout import RunFolder
from tests.data.test_image_folder import generated, images
from tests.tiny import ROOT, write_config
from tests.training.test_denoiser import make, noisy_batch


@pytest.fixture
def folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Path]:
    """Five images of a subject without captions, and four of its class."""
    monkeypatch.setenv("LDM_CACHE", str(tmp_path / "cache"))
    return images(tmp_path / "photos", 5, 32), generated(tmp_path / "class", 4, 32)


def test_the_loss_of_the_class_counts_by_its_weight(
    folders: tuple[Path, Path], latents: tuple[Path, Path], tiny_text_encoder: str, randomised: Any
) -> None:
    photos, prior = map(str, folders)
    settings: dict[str, Any] = {
        "default_caption": "sks",
        "regularisation": Regularisation(prior, loss_weight=0.3),
        "batch_size": 4,
    }
    data = ShardDataModule(photos, photos, **settings)
    data.setup("fit")
    module = make(latents[0], online=True, text_encoder=tiny_text_encoder)
    module.statistics = [0.0] * 4, [1.0] * 4
    module.prepare(data)
    randomised(module.denoiser)
    module.seed = 2
    loader = data.train_dataloader()
    batch = noisy_batch(module, data, 1, 5, 2, 8)  # two of the subject, two of the class
    batch["loss_weight"] = loader.batch([*map(_draw, (1, 5, 2, 8))])["loss_weight"]
    losses = module.objective(module.denoiser, *module.encode(batch), batch["t"], batch["eps"]).loss
    expected = (losses[0] + losses[2] + 0.3 * (losses[1] + losses[3])) / 4
    torch.testing.assert_close(module.loss_terms(batch)["train/loss"], expected)


def _draw(number: int) -> PlannedSample:
    return PlannedSample(number, number)


def test_a_run_resumes_exactly_and_exports(
    folders: tuple[Path, Path], latents: tuple[Path, Path], tiny_text_encoder: str, tmp_path: Path
) -> None:
    photos, prior = map(str, folders)
    model = {"online": True, "text_encoder": tiny_text_encoder, "preview_steps": 2}

    def run(name: str, steps: int, *options: str) -> dict[str, torch.Tensor]:
        (tmp_path / name).mkdir(exist_ok=True)
        trainer = {"max_steps": steps, "val_check_interval": steps}
        config = write_config(tmp_path / name / "config.yaml", (latents[0], folders[0]), trainer, **model)
        few = ["--config", str(ROOT / "configs/denoiser/few_images.yaml"), "--data.train", photos, "--data.validation", photos]
        few += ["--data.regularisation", prior, "--data.image_size", "32", "--model.preview_prompts", "[a photo of sks]"]
        dispatch(["denoiser", "fit", "--config", str(config), *few, "--out", str(tmp_path / name / "run"), *options])
        last = RunFolder(tmp_path / name / "run").last_checkpoint
        return torch.load(last, weights_only=True)["state_dict"]

    whole, _ = run("whole", 4), run("parts", 2)
    shutil.rmtree(tmp_path / "parts/run/pipeline")
    resumed = run("parts", 4, "--resume", "latest")
    assert all(torch.equal(weight, resumed[name]) for name, weight in whole.items())
    (start,) = RunFolder(tmp_path / "whole/run").read_starts()
    sources = start["data"]["sources"]  # pyright: ignore[reportTypedDictNotRequiredAccess]
    assert [(source["path"], source["samples"], source["weight"]) for source in sources] == [(photos, 5, 1), (prior, 4, 1.25)]
    dispatch(["denoiser", "export", str(tmp_path / "whole/run"), str(tmp_path / "exported")])
    assert load_pipeline(tmp_path / "exported").default_size == (32, 32)
    with pytest.raises(UsageError, match="regularisation is for a denoiser"):
        dispatch(
            ["matcher", "fit", "--config", str(ROOT / "configs/shapes/matcher.yaml"), "--out", str(tmp_path / "m"),
             "--data.train", str(latents[1]), "--data.validation", str(latents[1]), "--data.regularisation", str(latents[1]),
             "--model.autoencoder", str(latents[0])]
        )  # fmt: skip
    with pytest.raises(UsageError, match=r"data.train: none of the 5 images .*photos can be used \(first: 0.png: no caption"):
        dispatch(["denoiser", "fit", "--config", str(tmp_path / "whole/config.yaml"), "--out", str(tmp_path / "n")])
