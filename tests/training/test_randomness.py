"""The noise of training: whose bits they are, and where they are drawn."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning import Callback
from torch import Tensor

from ldm.data.datamodule import ShardDataModule
from ldm.data.plan import PlannedSample
from ldm.diffusion.path import RectifiedFlow, VariancePreserving
from ldm.diffusion.prediction import Velocity
from ldm.diffusion.timesteps import LogitNormal, LogNormal
from ldm.losses.perceptual import PerceptualLoss
from ldm.losses.reconstruction import ReconstructionLoss
from ldm.models.autoencoder import AutoencoderConfig
from ldm.models.discriminator import PatchDiscriminator
from ldm.models.dit import DiT
from ldm.training.adversarial import AdversarialTraining
from ldm.training.autoencoder import AutoencoderTraining
from ldm.training.base import TrainingModule
from ldm.training.denoiser import DenoiserTraining
from ldm.training.optimiser import MuonConfig, OptimiserConfig
from ldm.training.randomness import DenoisingNoise, PosteriorNoise, sample_generators
from tests.tiny import make_trainer

DRAWS = [PlannedSample(sample, number) for sample, number in ((3, 0), (1, 7), (4, 10**12))]
SHAPE = (4, 8, 6)
PATHS = [(RectifiedFlow(), LogitNormal()), (VariancePreserving(), LogNormal())]


@pytest.mark.parametrize("diffusion", PATHS)
@pytest.mark.parametrize("posteriors", [True, False])
def test_a_sample_draws_posterior_time_and_noise_in_this_order(diffusion: tuple, posteriors: bool) -> None:
    """Checkpoints of any version resume to the same numbers only if the order and shapes of the draws stay."""
    path, timesteps = diffusion
    batch = {"mean": torch.zeros(3, *SHAPE)} | ({"std": torch.ones(3, *SHAPE)} if posteriors else {})
    noise = DenoisingNoise(5, SHAPE[0], 4, path, timesteps)(batch, DRAWS)
    assert set(noise) == {"t", "eps"} | ({"posterior_noise"} if posteriors else set())
    for row, generator in enumerate(sample_generators(5, DRAWS)):
        if posteriors:
            assert torch.equal(noise["posterior_noise"][row], torch.randn(1, *SHAPE, generator=generator)[0])
        assert torch.equal(noise["t"][row : row + 1], timesteps(torch.empty(1, *SHAPE), path, generator))
        assert torch.equal(noise["eps"][row], torch.randn(1, *SHAPE, generator=generator)[0])
    images = {"image": torch.zeros(3, 3, 32, 24, dtype=torch.uint8)}  # of the same latents, once they are encoded
    online = DenoisingNoise(5, SHAPE[0], 4, path, timesteps)(images, DRAWS)
    assert not posteriors or all(torch.equal(online[name], value) for name, value in noise.items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_stage_one_draws_the_posterior_s_noise_in_its_dtype(dtype: torch.dtype) -> None:
    noise = PosteriorNoise(5, 4, 2, dtype)({"image": torch.zeros(3, 3, 16, 12, dtype=torch.uint8)}, DRAWS)["posterior_noise"]
    expected = [torch.randn(1, *SHAPE, generator=generator, dtype=dtype) for generator in sample_generators(5, DRAWS)]
    assert noise.dtype == dtype and torch.equal(noise, torch.cat(expected))


def test_only_settings_are_sent_to_the_workers() -> None:
    """Neither tables nor a device's memory; what arrives draws the same numbers."""
    path = VariancePreserving()
    path.alpha(torch.rand(2))
    noise = DenoisingNoise(5, SHAPE[0], 4, path, LogNormal())
    sent = pickle.dumps(noise)
    assert len(sent) < 1000
    batch = {"mean": torch.zeros(3, *SHAPE)}
    arrived = pickle.loads(sent)(batch, DRAWS)
    assert all(torch.equal(arrived[name], value) for name, value in noise(batch, DRAWS).items())


class Recorder(Callback):
    """Keeps the batches of training steps. With ``alone``, a random number drawn by a step is an error."""

    def __init__(self, alone: pytest.MonkeyPatch | None = None):
        self.batches: list[dict[str, Any]] = []
        self.alone = alone

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: dict[str, Any], batch_idx: int) -> None:
        self.batches.append(batch)
        if self.alone is not None:
            for name in ("randn", "rand", "randn_like", "normal"):
                self.alone.setattr(torch, name, None)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any, **__: Any) -> None:
        if self.alone is not None:
            self.alone.undo()


def stage_one() -> AutoencoderTraining:
    torch.manual_seed(0)
    return AutoencoderTraining(
        autoencoder=AutoencoderConfig([8, 16], 4, 1, 4, False, 32),
        adversary=AdversarialTraining(PatchDiscriminator(8, 2), start=2),
        reconstruction=ReconstructionLoss(),
        perceptual=PerceptualLoss("alex", "random"),
        optimiser=MuonConfig(1e-3),
        discriminator_optimiser=OptimiserConfig(1e-3),
    )


def stage_two(autoencoder: Path, **settings: Any) -> DenoiserTraining:
    torch.manual_seed(0)
    denoiser = DiT(
        in_channels=4, sample_size=16, patch_size=4, width=32, num_layers=1, num_attention_heads=2, caption_channels=8
    )
    return DenoiserTraining(
        str(autoencoder), RectifiedFlow(), Velocity(), LogitNormal(), MuonConfig(3e-3), denoiser=denoiser, **settings
    )


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("stage", ["autoencoder", "denoiser", "online"])
def test_the_workers_draw_what_the_training_process_would(
    stage: str,
    latents: tuple[Path, Path],
    image_shards: Path,
    tiny_text_encoder: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Equal batches and weights with and without workers; a step of a run with workers draws nothing itself."""
    make: dict[str, Callable[[], TrainingModule]] = {
        "autoencoder": stage_one,
        "denoiser": lambda: stage_two(latents[0]),
        "online": lambda: stage_two(latents[0], online=True, text_encoder=tiny_text_encoder),
    }
    shards = str(latents[1] if stage == "denoiser" else image_shards)
    found, weights = [], []
    for workers in (0, 2):
        module, recorder = make[stage](), Recorder(monkeypatch if workers else None)
        torch.manual_seed(1)
        trainer = make_trainer(tmp_path, 3, callbacks=[recorder], limit_val_batches=0)
        trainer.fit(module, ShardDataModule(shards, shards, batch_size=4, workers=workers))
        found.append(recorder.batches)
        weights.append([*module.averaged().parameters()])
    names = {"posterior_noise"} | (set() if stage == "autoencoder" else {"t", "eps"})
    for ours, theirs in zip(*found, strict=True):
        assert ours.keys() >= names
        for name, value in ours.items():
            if isinstance(value, Tensor):
                assert torch.equal(value, theirs[name])
    assert all(torch.equal(*pair) for pair in zip(*weights, strict=True))
    assert all(batch["draws"].shape == (4, 2) for batch in islice(found[0], 3))
