"""Tiny trainings that several tests share."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning import Callback, Trainer

ROOT = Path(__file__).parents[1]
SIZE = 32  # of the images of TinyRuns


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


@dataclass(frozen=True)
class TinyRuns:
    """Shards of 24 shapes of 32 px, an untrained f2 autoencoder and its latents of 16 x 16, in ``folder``."""

    folder: Path

    def command(self, stage: str, out: str | Path, *options: str, steps: int = 8, validate_every: int = 4) -> list[str]:
        """``ldm STAGE fit`` of networks that take milliseconds a step; ``options`` override the rest."""
        common = [
            *("--out", str(out), "--trainer.accelerator", "cpu", "--trainer.devices", "1"),
            *("--trainer.max_steps", str(steps), "--trainer.val_check_interval", str(validate_every)),
            *("--trainer.log_every_n_steps", "1", "--data.batch_size", "4", "--data.validation_samples", "4"),
        ]
        if stage == "autoencoder":
            own = [
                *("--data.train", f"{self.folder}/shards", "--data.validation", f"{self.folder}/shards"),
                *("--model.autoencoder.block_out_channels", "[8, 16]", "--model.autoencoder.sample_size", str(SIZE)),
                *("--model.adversary.discriminator.init_args.width", "8"),
                *("--model.adversary.discriminator.init_args.num_layers", "1"),
                *("--model.adversary.start", "2", "--model.adversary.discriminator_warmup", "1"),
                *("--model.adversary.generator_ramp", "2"),
            ]
        elif stage == "matcher":
            own = [
                *("--data.train", f"{self.folder}/latents", "--data.validation", f"{self.folder}/latents"),
                *("--model.autoencoder", f"{self.folder}/autoencoder", "--model.matcher.init_args.width", "16"),
                *("--model.matcher.init_args.sample_size", str(SIZE // 2), "--model.matcher.init_args.num_layers", "1"),
                *("--model.matcher.init_args.num_attention_heads", "2", "--model.matcher.init_args.caption_channels", "8"),
            ]
        else:
            own = [
                *("--data.train", f"{self.folder}/latents", "--data.validation", f"{self.folder}/latents"),
                *("--model.autoencoder", f"{self.folder}/autoencoder", "--model.preview_steps", "2"),
                *("--model.denoiser.init_args.sample_size", str(SIZE // 2), "--model.denoiser.init_args.width", "16"),
                *("--model.denoiser.init_args.num_layers", "2", "--model.denoiser.init_args.num_attention_heads", "2"),
                *("--model.denoiser.init_args.caption_channels", "8", "--model.preview_prompts", "[a ring]"),
            ]
        recipe = ROOT / "configs" / "shapes" / f"{stage}.yaml"
        return [sys.executable, "-m", "ldm", stage, "fit", "--config", str(recipe), *common, *own, *options]

    def evaluation(self, **settings: Any) -> list[str]:
        """Options of an evaluation of a few images, in batches that two processes cannot share evenly."""
        asked = {"shards": f"{self.folder}/shards", "every": 4, "networks": ["alex-random"]}
        asked |= {"count": 12, "steps": 2, "batch_size": 5}
        return ["--model.evaluation", json.dumps(asked | settings)]

    def torchrun(self, command: Sequence[str], processes: int = 2) -> list[str]:
        """The command under torchrun with DDP on ``processes`` processes."""
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
        return [*launcher, *command[1:], "--trainer.devices", str(processes), "--trainer.strategy", "ddp"]
