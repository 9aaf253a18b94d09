"""Each extension point, from a file outside the package: named by class_path alone, trained, stopped and resumed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from ldm.cli import main
from ldm.errors import UsageError
from ldm.losses.auxiliary import AuxiliaryLoss
from ldm.models.dit import DiT
from tests.tiny import write_config
from tests.training.test_denoiser import fit, make

MINE = '''
import torch
from torch import nn

from ldm.diffusion.guidance import ClassifierFree
from ldm.diffusion.path import RectifiedFlow
from ldm.diffusion.prediction import Velocity
from ldm.diffusion.timesteps import Uniform
from ldm.diffusion.weighting import Weighting
from ldm.losses.auxiliary import AuxiliaryLoss


class MyPath(RectifiedFlow):
    pass


class MyPrediction(Velocity):
    pass


class MyTimesteps(Uniform):
    pass


class MyWeighting(Weighting):
    def scaled(self, path, t):
        return (1 + t) * path.sigma(t) ** 2


class MyGuidance(ClassifierFree):
    pass


class Alignment(AuxiliaryLoss):
    """Activations of one block, projected, against the latents' mean."""

    def __init__(self, block: int, width: int, weight: float = 0.1):
        super().__init__(weight, [block])
        self.project = nn.Linear(width, 4)

    def forward(self, activations, batch, output):
        (tokens,) = activations.values()
        return (self.project(tokens).mean(1) - batch["mean"].mean((2, 3))).square().mean()


class Brightness(nn.Module):
    """The difference of mean colours, scaled by learned factors."""

    def __init__(self, start: float = 1.0):
        super().__init__()
        self.scale = nn.Parameter(torch.full((3,), start))

    def forward(self, reconstruction, target):
        difference = reconstruction.mean((2, 3)) - target.mean((2, 3))
        return (self.scale * difference).square().mean() - 0.1 * self.scale.mean()
'''


@pytest.fixture
def mine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "my_extensions.py").write_text(MINE)
    monkeypatch.syspath_prepend(tmp_path / "outside")


def trained_and_resumed(stage: str, folder: Path) -> dict[str, torch.Tensor]:
    """The weights after four steps by ``config.yaml``, which must equal those of a run that was stopped after two."""
    weights = []
    for run, stops in (("whole", (4,)), ("stopped", (2, 4))):
        for steps in stops:
            options = ["--config", folder / "config.yaml", "--out", folder / run, "--export", folder / f"{run}-{steps}"]
            options += ["--trainer.max_steps", steps, "--trainer.val_check_interval", 2, *["--resume", "latest"] * (steps == 4)]
            main([stage, "fit", *map(str, options)])
        weights.append(torch.load(folder / run / "checkpoints/step=00000004.ckpt", weights_only=True)["state_dict"])
    whole, resumed = weights
    assert whole.keys() == resumed.keys()
    assert [name for name in whole if not torch.equal(whole[name], resumed[name])] == []
    return whole


def test_stage_two_from_outside(mine: None, latents: tuple[Path, Path], tmp_path: Path) -> None:
    model = {
        "path": {"class_path": "my_extensions.MyPath"},
        "prediction": {"class_path": "my_extensions.MyPrediction"},
        "timesteps": {"class_path": "my_extensions.MyTimesteps"},
        "weighting": {"class_path": "my_extensions.MyWeighting"},
        "auxiliary_losses": [{"class_path": "my_extensions.Alignment", "init_args": {"block": 1, "width": 32}}],
        "preview_guidance": {"class_path": "my_extensions.MyGuidance", "init_args": {"scale": 2.0}},
        "preview_prompts": ["a red ring"],
        "preview_steps": 2,
        "accumulate": 2,
        "optimiser": {"learning_rate": 0.01},
    }
    write_config(tmp_path / "config.yaml", latents, {}, **model)
    weights = trained_and_resumed("denoiser", tmp_path)
    bias = weights["auxiliary_losses.0.project.bias"]
    assert bias.shape == (4,) and torch.isfinite(bias).all()
    two = torch.load(tmp_path / "stopped/checkpoints/step=00000002.ckpt", weights_only=True)["state_dict"]
    assert not torch.equal(two["auxiliary_losses.0.project.bias"], bias)


def test_stage_one_from_outside(mine: None, image_shards: Path, tmp_path: Path) -> None:
    network = {"block_out_channels": [8, 16], "layers_per_block": 1, "norm_num_groups": 4, "mid_block_add_attention": False}
    discriminator = {"class_path": "ldm.models.discriminator.PatchDiscriminator", "init_args": {"width": 8, "num_layers": 1}}
    model = {
        "autoencoder": network | {"sample_size": 32},
        "adversary": {"discriminator": discriminator, "start": 1, "discriminator_warmup": 0, "generator_ramp": 1},
        "reconstruction": {"class_path": "ldm.losses.reconstruction.ReconstructionLoss", "init_args": {"l1": 0.0, "l2": 1.0}},
        "perceptual": {
            "class_path": "ldm.losses.perceptual.PerceptualLoss",
            "init_args": {"trunk": "alex", "weights": "random"},
        },
        "reconstruction_losses": [
            {"loss": {"class_path": "my_extensions.Brightness"}, "weight": 0.5},
            {"loss": {"class_path": "torch.nn.SmoothL1Loss"}, "weight": 0.1},
        ],
        "accumulate": 2,
        "optimiser": {"learning_rate": 0.001},
        "discriminator_optimiser": {"learning_rate": 0.001},
    }
    data = {"train": str(image_shards), "validation": str(image_shards), "batch_size": 4, "validation_samples": 4}
    trainer = {"accelerator": "cpu", "precision": "32-true", "logger": False}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({"trainer": trainer, "data": data, "model": model}))
    weights = trained_and_resumed("autoencoder", tmp_path)
    (scale,) = (weight for name, weight in weights.items() if name.endswith("scale") and "reconstruction" in name)
    assert (scale != 1).all() and (scale - 1).abs().max() < 0.02


# -- the rules -------------------------------------------------------------------------------------------------------


class Nothing(AuxiliaryLoss):
    def forward(self, activations: Any, batch: Any, output: Any) -> torch.Tensor:
        assert activations.keys() == set(self.blocks)
        return output.prediction.sum() * 0


def train_with(latents: tuple[Path, Path], folder: Path, loss: AuxiliaryLoss | None, denoiser: Any = None) -> None:
    changes = {"denoiser": denoiser} if denoiser else {}
    module = make(latents[0], auxiliary_losses=[loss] if loss else None, **changes)
    fit(module, latents[1], folder, 1)


def test_activations_are_kept_only_where_a_loss_asks(
    latents: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []
    forward = DiT.forward

    def record(self: DiT, *arguments: Any, **named: Any) -> Any:
        if torch.is_grad_enabled():
            asked.append(named.get("return_activations"))
        return forward(self, *arguments, **named)

    monkeypatch.setattr(DiT, "forward", record)
    for loss in (None, Nothing()):
        train_with(latents, tmp_path, loss)
    assert asked == [None, None]


def test_blocks_that_are_not_there_are_refused_by_name(latents: tuple[Path, Path], tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"auxiliary_losses Nothing asks for the blocks \[2\]; give numbers from 0 to 1"):
        train_with(latents, tmp_path, Nothing(blocks=[2]))


def test_a_denoiser_without_activations_is_refused_by_name(latents: tuple[Path, Path], tmp_path: Path) -> None:
    class Plain(DiT):
        def forward(  # pyright: ignore[reportIncompatibleMethodOverride]  which is the point here
            self, hidden_states, encoder_hidden_states, timestep, encoder_attention_mask=None, return_dict=True
        ):
            raise AssertionError

    denoiser = Plain(sample_size=16, patch_size=4, width=32, num_layers=2, num_attention_heads=2, caption_channels=8)
    with pytest.raises(UsageError, match="auxiliary_losses Nothing needs activations, which Plain does not return"):
        train_with(latents, tmp_path, Nothing(blocks=[0]), denoiser)
