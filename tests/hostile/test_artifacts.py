"""Every artifact damaged: each command that reads it succeeds or says why not in one line, and leaves nothing half done."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from pathlib import Path

import pytest

from .conftest import check
from .mutations import bytes_damage, json_damage, special_damage

PIPELINE = ["sample", "pipeline", "a ring", "--out", "new", "--steps", "1"]
SHARDS = ["shards", "check", "shards"]
EXPORT = ["latents", "export", "--autoencoder", "autoencoder", "--shards", "shards", "--out", "new", "--text-encoder"]
LATENTS = ["latents", "check", "latents", "--deep"]
SHOW = ["latents", "show", "latents", "--autoencoder", "autoencoder", "--out", "new.png"]
FIT = ["denoiser", "fit", "--config", "runs/denoiser/logs/config.yaml", "--out", "new"]
REPORT = ["report", "runs/denoiser"]
RUN_EXPORT = ["denoiser", "export", "runs/denoiser", "new"]
IMAGES = ["sample", "pipeline", "a ring", "--out", "images", "--count", "2", "--steps", "2"]
STAGE_ONE = ["autoencoder", "export", "runs/autoencoder", "new"]

# the parts of the world that a command needs, the damaged file, the command
JSON = [
    (("shards",), "shards/manifest.json", SHARDS),
    (("shards", "autoencoder"), "shards/manifest.json", [*EXPORT, "minilm"]),
    (("shards", "autoencoder"), "autoencoder/config.json", [*EXPORT, "minilm"]),
    (("latents",), "latents/manifest.json", LATENTS),
    (("latents", "autoencoder", "runs"), "latents/manifest.json", FIT),
    (("latents", "autoencoder"), "latents/manifest.json", SHOW),
    (("pipeline",), "pipeline/model_index.json", PIPELINE),
    (("pipeline",), "pipeline/vae/config.json", PIPELINE),
    (("pipeline",), "pipeline/transformer/config.json", PIPELINE),
    (("pipeline",), "pipeline/scheduler/scheduler_config.json", PIPELINE),
    (("pipeline",), "pipeline/text_encoder/config.json", PIPELINE),
    (("pipeline",), "pipeline/tokenizer/tokenizer_config.json", PIPELINE),
    (("pipeline", "images"), "images/run.json", IMAGES),
    (("runs",), "runs/denoiser/logs/environment.json", REPORT),
    (("runs", "autoencoder", "latents"), "runs/denoiser/logs/environment.json", RUN_EXPORT),
]
BYTES = [
    (("shards",), "shards/shapes-00000.tar", [*SHARDS, "--deep"]),
    (("shards",), "shards/shapes-00000.tar", ["shards", "index", "shards", "--out", "new"]),
    (("shards", "autoencoder"), "shards/shapes-00000.tar", [*EXPORT, "minilm"]),
    (("latents",), "latents/latents-00000.tar", LATENTS),
    (("latents", "autoencoder", "runs"), "latents/latents-00000.tar", FIT),
    (("latents", "autoencoder", "runs"), "latents/null_text.safetensors", FIT),
    (("latents", "autoencoder"), "latents/latents-00000.tar", SHOW),
    (("pipeline",), "pipeline/transformer/diffusion_pytorch_model.safetensors", PIPELINE),
    (("pipeline",), "pipeline/vae/diffusion_pytorch_model.safetensors", PIPELINE),
    (("pipeline",), "pipeline/text_encoder/model.safetensors", PIPELINE),
    (("pipeline",), "pipeline/tokenizer/tokenizer.json", PIPELINE),
    (("runs",), "runs/denoiser/logs/metrics.csv", REPORT),
    (("runs",), "runs/denoiser/logs/config.yaml", REPORT),
    (("runs",), "runs/denoiser/logs/run.log", REPORT),
    (("runs",), "runs/denoiser/previews/step-00000004.png", REPORT),
    (("runs", "autoencoder", "latents"), "runs/denoiser/logs/config.yaml", RUN_EXPORT),
    (("runs", "autoencoder", "latents"), "runs/denoiser/checkpoints/step=00000004.ckpt", RUN_EXPORT),
    (("runs", "autoencoder", "latents"), "runs/denoiser/checkpoints/step=00000004.ckpt.sha256", RUN_EXPORT),
    (("runs", "shards"), "runs/autoencoder/checkpoints/step=00000004.ckpt", STAGE_ONE),
    (
        ("pipeline", "images"),
        "images/0000-a-ring.png",
        ["sample", "pipeline", "--from-image", "images/0000-a-ring.png", "--out", "new"],
    ),
]


def seed_of(*parts: object) -> int:
    return zlib.crc32(repr(parts).encode())


def outcome(folder: Path, arguments: list[str]) -> Path | None:
    return folder / "new" if "new" in arguments else None


@pytest.mark.parametrize(("parts", "file", "arguments"), JSON, ids=lambda value: value if isinstance(value, str) else value[0])
def test_json_of_any_shape(
    parts: tuple[str, ...], file: str, arguments: list[str], here: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    folder = here(*parts)
    damages = json_damage(folder / file, 10, seed_of(file, arguments))
    check(folder / file, damages, arguments, capsys, lambda: here(*parts), outcome(folder, arguments))


@pytest.mark.parametrize(("parts", "file", "arguments"), BYTES, ids=lambda value: value if isinstance(value, str) else value[0])
def test_bytes_cut_and_changed(
    parts: tuple[str, ...], file: str, arguments: list[str], here: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    folder = here(*parts)
    damages = bytes_damage(folder / file, 6, seed_of(file, arguments))
    check(folder / file, damages, arguments, capsys, lambda: here(*parts), outcome(folder, arguments))


@pytest.mark.parametrize(
    ("parts", "file", "arguments"), JSON + BYTES, ids=lambda value: value if isinstance(value, str) else value[0]
)
def test_things_that_are_no_files(
    parts: tuple[str, ...], file: str, arguments: list[str], here: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    folder = here(*parts)
    check(folder / file, special_damage(folder / file), arguments, capsys, lambda: here(*parts), outcome(folder, arguments))
