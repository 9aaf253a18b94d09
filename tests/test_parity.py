"""One model, one image: what training previews is what its pipeline draws, once exported, moved and opened elsewhere.

Each case is a real run of ``ldm denoiser fit``, a few steps of a tiny network, and its preview is the PNG that the run wrote.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoTokenizer, BertConfig, BertModel

from ldm.cli import dispatch
from ldm.latents.export import export_latents
from ldm.models.autoencoder import AutoencoderConfig, autoencoder_hash
from ldm.models.text_encoder import minilm_folder, text_encoder_hash
from ldm.pipeline import LatentDiffusionPipeline, load_pipeline
from ldm.reporting.grids import captioned_grid

PROMPTS = ["a red ring", "a tiny blue star at the left on a beige background", "a circle"]
STEPS, SAMPLING = 8, {"num_inference_steps": 4, "guidance_scale": 4.0}
WORDS: dict[str, Any] = {"hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}

# beside the plain one: all that is easily mislaid between training and a pipeline
CASES = {
    "latents, flow": {"path": "RectifiedFlow", "prediction": "Velocity", "timesteps": "LogitNormal"},
    "online, bf16, v, another average": {
        "path": "VariancePreserving",
        "prediction": "V",
        "timesteps": "Uniform",
        "power_averages": {"sigma_rel": [0.05, 0.25], "selected": 0.25, "snapshot_every": STEPS},
        "online": True,
    },
}


class Run(NamedTuple):
    """A finished run, moved away from where it was made, and what was made of it."""

    folder: Path
    pipeline: Path
    exported: Path
    settings: dict

    @property
    def preview(self) -> np.ndarray:
        """The grid of the last validation, of the final weights."""
        return np.asarray(Image.open(self.folder / "previews" / f"step-{STEPS:08d}.png")).astype(int)


@pytest.fixture(scope="module", params=CASES, ids=list(CASES))
def run(request: pytest.FixtureRequest, image_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder = tmp_path_factory.mktemp("made")
    case = dict(CASES[request.param])
    torch.manual_seed(0)
    AutoencoderConfig([8, 16], 4, 1, 4, False, 32).build().save_pretrained(folder / "autoencoder")
    tokenizer = AutoTokenizer.from_pretrained(minilm_folder())
    words = BertModel(BertConfig(**WORDS, vocab_size=len(tokenizer)))
    for part in (words, tokenizer):
        part.save_pretrained(folder / "words")
    online = case.pop("online", False)
    if online:
        data, text = image_shards, {"online": True, "text_encoder": str(folder / "words")}
    else:
        data, text = folder / "latents", {}
        export_latents(folder / "autoencoder", image_shards, data, text_encoder=str(folder / "words"))
    sizes = {"sample_size": 16, "patch_size": 4, "width": 32, "num_layers": 2, "num_attention_heads": 2, "caption_channels": 64}
    modules = {"path": "path", "prediction": "prediction", "timesteps": "timesteps"}
    diffusion = {name: {"class_path": f"ldm.diffusion.{modules[name]}.{case.pop(name)}"} for name in modules}
    precision = "bf16-mixed" if online else "32-true"
    settings = {
        "trainer": {"max_steps": STEPS, "val_check_interval": 4, "accelerator": "cpu", "devices": 1, "precision": precision},
        "data": {"train": str(data), "validation": str(data), "batch_size": 8},
        "model": {
            "autoencoder": str(folder / "autoencoder"),
            "denoiser": {"class_path": "ldm.models.dit.DiT", "init_args": sizes},
            "ema_decay": 0.5,
            "optimiser": {"learning_rate": 0.02},
            "preview_prompts": PROMPTS,
            "preview_steps": SAMPLING["num_inference_steps"],
            "preview_guidance": SAMPLING["guidance_scale"],
            **diffusion,
            **text,
            **case,
        },
    }
    (folder / "config.yaml").write_text(json.dumps(settings))  # JSON is YAML
    dispatch(["denoiser", "fit", "--config", str(folder / "config.yaml"), "--out", str(folder / "run")])
    dispatch(["denoiser", "export", str(folder / "run"), str(folder / "exported")])
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    for name, product in (("run/pipeline", "pipeline"), ("exported", "exported"), ("run", "run")):
        shutil.move(folder / name, elsewhere / product)
    shutil.rmtree(folder)  # what a pipeline still leaned on would be missed
    return Run(elsewhere / "run", elsewhere / "pipeline", elsewhere / "exported", settings)


def draw(pipeline: LatentDiffusionPipeline) -> np.ndarray:
    """The grid that the training's preview is, drawn by ``pipeline``."""
    pipeline.to("cpu").set_progress_bar_config(disable=True)
    generators = [torch.Generator().manual_seed(seed) for seed in range(len(PROMPTS))]
    return np.asarray(captioned_grid(pipeline(PROMPTS, generator=generators, **SAMPLING).images, PROMPTS)).astype(int)


def test_the_preview_is_what_the_pipeline_draws(run: Run) -> None:
    drawn = draw(load_pipeline(run.pipeline))
    assert np.abs(drawn - run.preview).max() <= 1
    assert len(np.unique(drawn.reshape(-1, 3), axis=0)) > 500  # images, and not a plain colour


def test_the_preview_is_of_the_average_and_not_of_the_weights_in_training(run: Run) -> None:
    checkpoint = torch.load(run.folder / "checkpoints" / "last.ckpt", weights_only=True)
    pipeline = load_pipeline(run.pipeline)
    state = checkpoint["state_dict"]
    pipeline.transformer.load_state_dict({name.removeprefix("denoiser."): weight for name, weight in state.items()})
    assert np.abs(draw(pipeline) - run.preview).max() > 8


def test_an_export_of_the_checkpoint_is_the_same_pipeline_to_the_byte(run: Run) -> None:
    files = {path.relative_to(run.pipeline) for path in run.pipeline.rglob("*") if path.is_file()}
    assert files == {path.relative_to(run.exported) for path in run.exported.rglob("*") if path.is_file()}
    # a tokenizer is saved with the padding of its last call, which no call of ours leaves to it
    files.remove(Path("tokenizer/tokenizer.json"))
    assert [file for file in files if (run.pipeline / file).read_bytes() != (run.exported / file).read_bytes()] == []


def test_the_pipeline_carries_all_that_it_was_trained_with(run: Run) -> None:
    pipeline, model = load_pipeline(run.pipeline), run.settings["model"]
    found = pipeline.config["trained_on"]
    assert found["autoencoder"] == autoencoder_hash(pipeline.vae) and found["latent_shape"] == [4, 16, 16]
    assert found["text_encoder"] == text_encoder_hash(pipeline.tokenizer, pipeline.text_encoder)
    assert pipeline.text_encoder.config.hidden_size == 64 and pipeline.tokenizer.model_max_length == 512
    for part in ("path", "prediction"):
        assert type(getattr(pipeline.diffusion, part)).__name__ == model[part]["class_path"].rpartition(".")[2]
    mean, std = pipeline.vae.config.latents_mean, pipeline.vae.config.latents_std
    if model.get("online"):
        checkpoint = torch.load(run.folder / "checkpoints" / "last.ckpt", weights_only=True)
        assert [mean, std] == checkpoint["latent_statistics"]
    assert len(mean) == len(std) == 4 and min(std) > 0


FRESH = """
import sys
import numpy as np
import ldm
import torch
from diffusers import DiffusionPipeline
from ldm.reporting.grids import captioned_grid
folder, out, *prompts = sys.argv[1:]
pipeline = DiffusionPipeline.from_pretrained(folder)
generators = [torch.Generator().manual_seed(seed) for seed in range(len(prompts))]
images = pipeline(prompts, num_inference_steps=4, guidance_scale=4.0, generator=generators).images
np.save(out, np.asarray(captioned_grid(images, prompts)))
"""


@pytest.mark.parametrize("run", [*CASES][1:], indirect=True)  # starting one takes longer than all the rest
def test_a_copy_draws_the_same_in_a_fresh_process(run: Run, tmp_path: Path) -> None:
    shutil.copytree(run.exported, tmp_path / "copy")
    arguments = [str(tmp_path / "copy"), str(tmp_path / "out.npy"), *PROMPTS]
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [sys.executable, "-c", FRESH, *arguments], capture_output=True, text=True, cwd=tmp_path, env=environment
    )
    assert done.returncode == 0, done.stderr
    assert np.abs(np.load(tmp_path / "out.npy").astype(int) - run.preview).max() <= 1
