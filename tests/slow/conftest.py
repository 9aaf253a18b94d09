"""Tiny runs of both stages in real processes, from the shipped recipes."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

from ldm.cli import main
from ldm.data.writer import write_images
from ldm.models.autoencoder import AutoencoderConfig
from ldm.shapes.scenes import generate

ROOT = Path(__file__).parents[2]
NUM_IMAGES, SIZE = 24, 32


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

    def torchrun(self, command: Sequence[str], processes: int = 2) -> list[str]:
        """The command under torchrun with DDP on ``processes`` processes."""
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
        return [*launcher, *command[1:], "--trainer.devices", str(processes), "--trainer.strategy", "ddp"]


@pytest.fixture(scope="session")
def tiny_runs(tmp_path_factory: pytest.TempPathFactory, tiny_text_encoder: str) -> TinyRuns:
    folder = tmp_path_factory.mktemp("tiny")
    images = generate(NUM_IMAGES, SIZE, seed=0)
    write_images(folder / "shards", "shapes", images, samples_per_shard=10, extra={"image_size": SIZE})
    AutoencoderConfig([8, 16], 4, 1, 4, False, SIZE).build().save_pretrained(folder / "autoencoder")
    export = ["latents", "export", "--autoencoder", f"{folder}/autoencoder", "--shards", f"{folder}/shards"]
    main([*export, "--out", f"{folder}/latents", "--text-encoder", tiny_text_encoder])
    return TinyRuns(folder)


def start(command: Sequence[str], **environment: str) -> subprocess.Popen[str]:
    """The command in its own process group, which :func:`finish` ends; callbacks of this folder can be imported by name."""
    return subprocess.Popen(
        command,
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(Path(__file__).parent)])} | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def finish(process: subprocess.Popen[str], seconds: float = 120) -> tuple[int, str]:
    """Exit status and output; a process that does not end in time is killed with its children, and the test fails."""
    try:
        said, _ = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        # torchrun's processes have their own sessions
        subprocess.run(["pkill", "-9", "-P", str(process.pid)], check=False)
        os.killpg(process.pid, 9)
        said, _ = process.communicate()
        pytest.fail(f"still there after {seconds} s:\n{said[-3000:]}")
    return process.returncode, said


def run(command: Sequence[str], seconds: float = 120, /, **environment: str) -> tuple[int, str]:
    """Start and finish."""
    return finish(start(command, **environment), seconds)
