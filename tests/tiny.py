"""Tiny trainings that several tests share."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lightning import Callback, Trainer


class Do(Callback):
    """Calls ``action`` at one hook of one step."""

    def __init__(self, hook: str, step: int, action: Callable[[Trainer], object]):
        def at_hook(trainer: Trainer, *_: object) -> None:
            if trainer.global_step == step:
                action(trainer)

        setattr(self, hook, at_hook)


def make_trainer(folder: Path, steps: int, **settings: Any) -> Trainer:
    """A trainer of one CPU process for an endless loader, which prints and saves nothing by itself."""
    defaults: dict[str, Any] = {"accelerator": "cpu", "devices": 1, "logger": False, "enable_checkpointing": False}
    return Trainer(
        max_steps=steps, max_epochs=-1, check_val_every_n_epoch=None, num_sanity_val_steps=0, use_distributed_sampler=False,
        enable_progress_bar=False, enable_model_summary=False, default_root_dir=folder, **defaults | settings,
    )  # fmt: skip


def write_config(file: Path, latents: tuple[Path, Path], trainer: dict[str, Any], batch_size: int = 4, **model: Any) -> Path:
    """A config of ``ldm denoiser fit``; ``trainer`` and ``model`` add to their sections or replace entries of them."""
    sizes = {"sample_size": 16, "patch_size": 4, "width": 32, "num_layers": 2, "num_attention_heads": 2, "caption_channels": 8}
    defaults = {
        "autoencoder": str(latents[0]),
        "denoiser": {"class_path": "ldm.models.dit.DiT", "init_args": sizes},
        "path": {"class_path": "ldm.diffusion.path.RectifiedFlow"},
        "prediction": {"class_path": "ldm.diffusion.prediction.Velocity"},
        "timesteps": {"class_path": "ldm.diffusion.timesteps.Uniform"},
        "optimiser": {"learning_rate": 0.003},
    }
    config = {
        "trainer": {"accelerator": "cpu", "precision": "32-true", "logger": False} | trainer,
        "data": {"train": str(latents[1]), "validation": str(latents[1]), "batch_size": batch_size},
        "model": defaults | model,
    }
    file.write_text(json.dumps(config))  # JSON is YAML
    return file
