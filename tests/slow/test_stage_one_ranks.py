"""Both players of stage one on two real processes: turns, pieces, guard and export go well together with DDP."""

from __future__ import annotations

import csv
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL

from ldm.data.writer import write_images
from ldm.shapes.scenes import generate

CONFIG = Path(__file__).parents[2] / "configs/shapes/autoencoder.yaml"


@pytest.mark.slow
def test_the_game_is_played_on_two_processes(tmp_path: Path) -> None:
    write_images(tmp_path / "shards", "shapes", generate(24, 40, seed=0), 8, {"image_size": 40})
    command = [sys.executable, "-m", "ldm", "autoencoder", "fit", "--config", str(CONFIG), "--out", "run"]
    command += ["--data.train", "shards", "--data.validation", "shards", "--data.validation_samples", "8"]
    command += ["--trainer.max_steps", "4", "--trainer.val_check_interval", "2", "--trainer.log_every_n_steps", "1"]
    command += [
        "--model.adversary.start",
        "1",
        "--model.adversary.discriminator_warmup",
        "0",
        "--model.adversary.generator_ramp",
        "1",
    ]
    command += ["--data.batch_size", "4", "--model.accumulate", "2", "--trainer.devices", "2", "--trainer.accelerator", "cpu"]
    ended = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert ended.returncode == 0, ended.stderr[-2000:]
    rows = list(csv.DictReader((tmp_path / "run/logs/metrics.csv").open()))
    heard = [float(row["train/g_weight"]) for row in rows if row.get("train/g_weight")]
    assert len(heard) == 2 and all(weight > 0 for weight in heard)  # batches 2 and 3
    assert torch.load(tmp_path / "run/checkpoints/last.ckpt", weights_only=True)["global_step"] == 4
    assert AutoencoderKL.from_pretrained(tmp_path / "run/autoencoder").config.latents_std
