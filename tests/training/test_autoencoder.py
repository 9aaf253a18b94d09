"""Stage one: who learns from whom, and when; what a step is."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from lightning import Trainer
from torch import nn

from ldm.data.datamodule import ShardDataModule
from ldm.losses import PerceptualLoss, ReconstructionLoss
from ldm.models.autoencoder import AutoencoderConfig, pixels_to_images
from ldm.models.discriminator import PatchDiscriminator
from ldm.training.adversary import Adversary
from ldm.training.autoencoder import AutoencoderTraining
from ldm.training.base import OptimiserConfig


def make(**changes: object) -> AutoencoderTraining:
    torch.manual_seed(0)
    settings = {
        "autoencoder": AutoencoderConfig([8, 16], 4, 1, 4, False, 32),
        "adversary": adversary(),
        "reconstruction": ReconstructionLoss(0.0, 1.0),
        "perceptual": PerceptualLoss("alex", "random"),
        "optimiser": OptimiserConfig(1e-3),
        "discriminator_optimiser": OptimiserConfig(1e-3),
        "ema_decay": 0.5,
    }
    return AutoencoderTraining(**settings | changes)


def adversary(start: int = 1, alone: int = 100, warmup: int = 2, **changes: object) -> Adversary:
    torch.manual_seed(0)
    return Adversary(PatchDiscriminator(8, 2), start=start, alone=alone, warmup=warmup, **changes)


def fit(module: AutoencoderTraining, shards: Path, folder: Path, steps: int) -> Trainer:
    torch.manual_seed(1)
    trainer = Trainer(
        max_steps=steps, max_epochs=-1, accelerator="cpu", devices=1, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, num_sanity_val_steps=0, limit_val_batches=0,
        default_root_dir=folder, use_distributed_sampler=False,
    )  # fmt: skip
    trainer.fit(module, ShardDataModule(str(shards), str(shards), batch_size=4))
    return trainer


def weights(network: nn.Module) -> torch.Tensor:
    return nn.utils.parameters_to_vector(network.parameters()).detach().clone()


def test_steps_are_batches_though_two_optimisers_step(image_shards: Path, tmp_path: Path) -> None:
    assert fit(make(), image_shards, tmp_path, 5).global_step == 5


def test_the_discriminator_waits_for_its_start(image_shards: Path, tmp_path: Path) -> None:
    """Of four batches it trains on the last one, of five on the last two; before that its weights stand still."""
    untrained = weights(make().adversary.discriminator)
    module = make(adversary=adversary(3))
    seen = []
    module.on_train_batch_end = lambda *_: seen.append(weights(module.adversary.discriminator))
    fit(module, image_shards, tmp_path, 5)
    assert [torch.equal(untrained, now) for now in seen] == [True, True, True, False, False]


def test_an_unheard_discriminator_leaves_the_autoencoder_alone(image_shards: Path, tmp_path: Path) -> None:
    """The discriminator's steps send nothing to the autoencoder: with and without them its weights are bit-identical."""
    early, late = make(adversary=adversary(0)), make(adversary=adversary(3))
    fit(early, image_shards, tmp_path, 4)
    fit(late, image_shards, tmp_path, 4)
    assert torch.equal(weights(early.autoencoder), weights(late.autoencoder))
    assert not torch.equal(weights(early.adversary.discriminator), weights(late.adversary.discriminator))


def test_the_decoder_learns_from_the_discriminator_once_heard(image_shards: Path, tmp_path: Path) -> None:
    """With equal weights before it, one heard batch moves the autoencoder otherwise, but the discriminator the same: the
    autoencoder's step sends no gradient to it."""
    heard = make(adversary=adversary(0, 0, 1))
    unheard = make(adversary=adversary(0, 100))
    # the ramp is 0 at batch 0 and 1 at batch 1: two batches, of which the second is heard
    fit(heard, image_shards, tmp_path, 2)
    fit(unheard, image_shards, tmp_path, 2)
    assert not torch.equal(weights(heard.autoencoder), weights(unheard.autoencoder))
    assert torch.equal(weights(heard.adversary.discriminator), weights(unheard.adversary.discriminator))


def test_the_average_is_of_the_autoencoder_and_comes_back(image_shards: Path, tmp_path: Path) -> None:
    module = make()
    fit(module, image_shards, tmp_path, 4)
    trained = weights(module.autoencoder)
    with pytest.raises(RuntimeError, match="midway"), module.average_applied():
        assert not torch.equal(weights(module.autoencoder), trained)
        assert not module.autoencoder.training
        raise RuntimeError("midway")
    assert torch.equal(weights(module.autoencoder), trained)


def test_reconstruction_improves(image_shards: Path, tmp_path: Path) -> None:
    module = make(adversary=adversary(59))
    batch = ShardDataModule(str(image_shards), str(image_shards), batch_size=4)
    batch.setup("fit")
    images = pixels_to_images(next(iter(batch.val_dataloader()))["image"])
    with torch.no_grad():
        before = module.reconstruct(images).sub(images).square().mean()
        fit(module, image_shards, tmp_path, 60)
        after = module.reconstruct(images).sub(images).square().mean()
    assert after < before / 4


def test_bf16_keeps_fp32_master_weights(image_shards: Path, tmp_path: Path) -> None:
    module = make(adversary=adversary(0, 0, 1))
    torch.manual_seed(1)
    trainer = Trainer(
        max_steps=3, max_epochs=-1, accelerator="cpu", devices=1, precision="bf16-mixed", logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, num_sanity_val_steps=0,
        check_val_every_n_epoch=None, val_check_interval=3, default_root_dir=tmp_path,
    )  # fmt: skip
    trainer.fit(module, ShardDataModule(str(image_shards), str(image_shards), batch_size=4))
    networks = (*module.autoencoder.parameters(), *module.adversary.discriminator.parameters())
    assert {parameter.dtype for parameter in networks} == {torch.float32}
    assert all(torch.isfinite(parameter).all() for parameter in networks)
    assert torch.isfinite(trainer.callback_metrics["val/psnr"])
