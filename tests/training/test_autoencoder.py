"""Stage one: who learns from whom, and when; what a step is."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL
from lightning import Trainer
from torch import nn

from ldm.data.datamodule import ShardDataModule
from ldm.errors import LdmError, UsageError
from ldm.losses import Equivariance, GradientPenalty, LeCam, NonSaturating, PerceptualLoss, ReconstructionLoss
from ldm.models.autoencoder import AutoencoderConfig, pixels_to_images, set_latent_statistics
from ldm.models.discriminator import PatchDiscriminator
from ldm.training.adversarial import AdversarialTraining
from ldm.training.autoencoder import AutoencoderTraining
from ldm.training.optimiser import MuonConfig, OptimiserConfig


def make(**changes: object) -> AutoencoderTraining:
    torch.manual_seed(0)
    settings = {
        "autoencoder": AutoencoderConfig([8, 16], 4, 1, 4, False, 32),
        "adversary": adversary(),
        "reconstruction": ReconstructionLoss(0.0, 1.0),
        "perceptual": PerceptualLoss("alex", "random"),
        "optimiser": MuonConfig(1e-3),
        "discriminator_optimiser": OptimiserConfig(1e-3),
        "ema_decay": 0.5,
    }
    return AutoencoderTraining(**settings | changes)


def adversary(start: int = 1, alone: int = 100, warmup: int = 2, **changes: object) -> AdversarialTraining:
    torch.manual_seed(0)
    return AdversarialTraining(
        PatchDiscriminator(8, 2), start=start, discriminator_warmup=alone, generator_ramp=warmup, **changes
    )


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
    return torch.cat([parameter.detach().flatten() for parameter in network.parameters()])


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


def test_muon_has_the_convolutions_between_the_first_layers_and_the_last(image_shards: Path, tmp_path: Path) -> None:
    module = make(optimiser=MuonConfig(1e-3, muon_learning_rate=4e-3))
    trainer = fit(module, image_shards, tmp_path, 2)
    names = {id(parameter): name for name, parameter in module.autoencoder.named_parameters()}
    adamws, muons = ([names[id(one)] for one in group["params"]] for group in trainer.optimizers[0].param_groups)
    assert {"encoder.down_blocks.0.resnets.0.conv1.weight", "decoder.up_blocks.0.upsamplers.0.conv.weight"} <= {*muons}
    weighty = {name for name, parameter in module.autoencoder.named_parameters() if parameter.ndim > 1}
    assert weighty - {*muons} == {
        "encoder.conv_in.weight", "encoder.conv_out.weight", "quant_conv.weight",
        "post_quant_conv.weight", "decoder.conv_in.weight", "decoder.conv_out.weight",
    }  # fmt: skip
    assert len(adamws) + len(muons) == len(names) and len(trainer.optimizers[1].param_groups) == 1


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


def run(module: AutoencoderTraining, shards: Path, folder: Path, steps: int, **settings: object) -> Trainer:
    """As ``fit`` above, with validation every two batches and settings of the trainer."""
    torch.manual_seed(1)
    trainer = Trainer(
        max_steps=steps, max_epochs=-1, accelerator="cpu", devices=1, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, num_sanity_val_steps=0, check_val_every_n_epoch=None,
        default_root_dir=folder, use_distributed_sampler=False, **{"val_check_interval": 2} | settings,
    )  # fmt: skip
    trainer.fit(module, ShardDataModule(str(shards), str(shards), batch_size=4, validation_samples=4))
    return trainer


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@pytest.mark.parametrize("accumulate", [1, 4])
def test_neither_player_sends_gradients_to_the_other(
    image_shards: Path, tmp_path: Path, precision: str, accumulate: int
) -> None:
    """Seen at the moment of each optimiser's step: the other player's gradients are those that its own step left, or none."""
    module = make(adversary=adversary(0, 0, 1), accumulate=accumulate, optimiser=MuonConfig(1e-3, max_grad_norm=1e9))
    discriminator, seen = module.adversary.discriminator, []
    module.on_before_optimizer_step = lambda optimiser: None

    def gradients(network: nn.Module) -> list[torch.Tensor | None]:
        return [None if p.grad is None else p.grad.clone() for p in network.parameters()]

    train_autoencoder, train_discriminator = module._train_autoencoder, module._train_discriminator

    def watch_autoencoder(*arguments: object) -> object:
        before = gradients(discriminator)
        judged = train_autoencoder(*arguments)
        seen.append((before, gradients(discriminator)))
        return judged

    def watch_discriminator(*arguments: object) -> None:
        before = gradients(module.autoencoder)
        train_discriminator(*arguments)
        seen.append((before, gradients(module.autoencoder)))

    module._train_autoencoder, module._train_discriminator = watch_autoencoder, watch_discriminator
    run(module, image_shards, tmp_path, 3, precision=precision)
    assert len(seen) == 6
    for before, after in seen:
        for a, b in zip(before, after, strict=True):
            assert (a is None and b is None) or torch.equal(a, b)


def test_a_batch_in_pieces_is_the_batch(image_shards: Path, tmp_path: Path) -> None:
    """The same weights to rounding, before the game is heard: then nothing depends on more than one image."""
    whole, pieces = make(adversary=adversary(0), kl_weight=0.0), make(adversary=adversary(0), kl_weight=0.0, accumulate=4)
    for module in (whole, pieces):
        # noise would be drawn in another order
        module.autoencoder.quant_conv.bias.data[4:] = -60.0
        run(module, image_shards, tmp_path, 3)
    torch.testing.assert_close(weights(whole.autoencoder), weights(pieces.autoencoder), rtol=0, atol=2e-4)
    assert whole.global_step == pieces.global_step == 3


def test_options_of_the_game_and_of_the_latents_train(image_shards: Path, tmp_path: Path) -> None:
    """All at once: LeCam, R1, equivariance, learned variance, KL warm-up, a FID, pieces; every figure is finite."""
    module = make(
        adversary=adversary(0, 0, 1, lecam=LeCam(0.1), gradient_penalty=GradientPenalty(1.0, 2), loss=NonSaturating()),
        equivariance=Equivariance(0.5), learn_variance=True, kl_warmup=3, accumulate=2, fid_trunk="alex-random",
        channels_last=True,
    )  # fmt: skip
    untrained = weights(module.adversary.discriminator)
    trainer = run(module, image_shards, tmp_path, 4)
    figures = {name: float(value) for name, value in trainer.callback_metrics.items()}
    assert {"train/g_weight", "train/log_variance", "val/rfid_alex_random", "val/latent_std_03", "val/latent_dead"} <= set(
        figures
    )
    assert all(map(math.isfinite, figures.values()))
    assert module.variance.log_variance != 0 and not torch.equal(untrained, weights(module.adversary.discriminator))
    assert module.adversary.lecam.real != 0
    module.save(tmp_path / "saved")
    saved = AutoencoderKL.from_pretrained(tmp_path / "saved").state_dict()
    assert all(torch.equal(saved[name], tensor) for name, tensor in module.autoencoder.state_dict().items())


def test_the_kl_warms_up(image_shards: Path, tmp_path: Path) -> None:
    """In the first batch a KL under warm-up weighs nothing: it moves the weights as a KL of weight 0 does."""
    warmed, without = make(kl_weight=1.0, kl_warmup=10), make(kl_weight=0.0)
    for module in (warmed, without):
        module.adversary.start = 0
        run(module, image_shards, tmp_path, 1, val_check_interval=1)
    assert torch.equal(weights(warmed.autoencoder), weights(without.autoencoder))


class Faulty(ReconstructionLoss):
    """Not a number for the batches named."""

    def __init__(self, batches: set[int]):
        super().__init__(0.0, 1.0)
        self.batches, self.calls = batches, 0

    def __call__(self, reconstruction: torch.Tensor, images: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return super().__call__(reconstruction, images) * (torch.nan if self.calls - 1 in self.batches else 1.0)


def test_a_batch_whose_gradients_are_no_numbers_is_skipped_and_counted(
    image_shards: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    module = make(reconstruction=Faulty({1, 2}), adversary=adversary(0, 0, 1), max_skipped=2)
    trainer = run(module, image_shards, tmp_path, 4)
    assert trainer.global_step == module.reconstruction.calls == 4  # a batch that is skipped is a step all the same
    assert torch.isfinite(weights(module.autoencoder)).all() and torch.isfinite(weights(module.adversary.discriminator)).all()
    assert trainer.callback_metrics["train/skipped"] == 2
    said = [record.getMessage() for record in caplog.records if record.name.startswith("ldm.")]
    assert [message.split(" (")[1] for message in said] == ["1 in a row)", "2 in a row)"]


def test_too_many_such_batches_in_a_row_stop_the_run(image_shards: Path, tmp_path: Path) -> None:
    module = make(reconstruction=Faulty({2, 3, 4}), max_skipped=2)
    with pytest.raises(LdmError, match=r"not finite 3 times in a row, at step 4") as error:
        run(module, image_shards, tmp_path, 9)
    assert "\n" not in str(error.value)


def test_the_guard_is_asked_at_validation_and_its_state_is_in_checkpoints(image_shards: Path, tmp_path: Path) -> None:
    """With a mark that nothing reaches, every validation after the start halves the level."""
    module = make(adversary=adversary(0, 0, 1))
    module.adversary.guard.update(99.0, 0.0, active=False)
    trainer = run(module, image_shards, tmp_path, 6)
    assert float(module.adversary.guard.level) == float(trainer.callback_metrics["val/g_level"]) == 0.125
    trainer.save_checkpoint(tmp_path / "guarded.ckpt")
    again = make(adversary=adversary(0, 0, 1))
    checkpoint = torch.load(tmp_path / "guarded.ckpt", weights_only=True)
    assert not any(name.startswith("perceptual.") for name in checkpoint["state_dict"])
    again.on_load_checkpoint(checkpoint)
    again.load_state_dict(checkpoint["state_dict"])
    assert again.adversary.guard.level == 0.125 and again.adversary.guard.best_psnr == 99


@pytest.mark.parametrize("warm", ["all", "decoder"])
def test_a_warm_start_trains_all_or_the_decoder_alone(
    image_shards: Path, tmp_path: Path, tiny_autoencoder: nn.Module, warm: str
) -> None:
    """Decoder alone: the encoder and its latents stay bit-identical, through training, averaging and export."""
    set_latent_statistics(tiny_autoencoder, [1.0, 2.0, 3.0, 4.0], [5.0, 6.0, 7.0, 8.0])
    tiny_autoencoder.save_pretrained(tmp_path / "start")
    module = make(autoencoder=AutoencoderConfig(init_from=str(tmp_path / "start"), train=warm))
    start = AutoencoderKL.from_pretrained(tmp_path / "start")
    assert torch.equal(weights(start), weights(module.autoencoder))
    run(module, image_shards, tmp_path, 3)
    with module.average_applied():
        (tmp_path / "end").mkdir()
        module.save(tmp_path / "end")
    end = AutoencoderKL.from_pretrained(tmp_path / "end")
    assert not torch.equal(weights(start.decoder), weights(end.decoder))
    images = torch.rand(2, 3, 32, 32) * 2 - 1
    with torch.no_grad():
        before, after = (network.encode(images).latent_dist.parameters for network in (start, end))
    kept = warm == "decoder"
    assert torch.equal(weights(start.encoder), weights(end.encoder)) == torch.equal(before, after) == kept
    assert (end.config.latents_mean == [1.0, 2.0, 3.0, 4.0]) == kept


def test_what_it_saves_is_a_stock_autoencoder_with_its_latents_measured(image_shards: Path, tmp_path: Path) -> None:
    """Stock diffusers gives the trainer's own reconstruction; mean and deviation are those of latents drawn over the set."""
    module = make()
    run(module, image_shards, tmp_path, 3)
    images = torch.rand(3, 3, 32, 32) * 2 - 1
    with module.average_applied():
        module.save(tmp_path)
        expected = module.reconstruct(images)
    stock = AutoencoderKL.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        found = stock.decode(stock.encode(images).latent_dist.mode()).sample.clamp(-1, 1)
        dataset = module.trainer.datamodule.train_set
        posterior = stock.encode(pixels_to_images(dataset.batch(range(10))["image"])).latent_dist
    assert (found - expected).abs().max() <= 1e-5
    mean = posterior.mean.double().mean((0, 2, 3))
    spread = (posterior.mean.double() - mean[:, None, None]).square().mean((0, 2, 3)) + posterior.var.double().mean((0, 2, 3))
    torch.testing.assert_close(torch.tensor(stock.config.latents_mean).double(), mean, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(torch.tensor(stock.config.latents_std).double(), spread.sqrt(), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(
    ("changes", "settings", "said"),
    [
        ({}, {"precision": "bf16-true"}, "bf16-mixed"),
        (
            {"autoencoder": AutoencoderConfig([8] * 7, 4, 1, 4, False, 64)},
            {},
            "32 x 32 are not multiples of the autoencoder's downsampling factor 64",
        ),
        ({"adversary": adversary(start=50)}, {}, "the adversary's start 50 is not before max_steps 4"),
        ({"accumulate": 5}, {}, "accumulate 5 is more than batch_size 4"),
    ],
)
def test_what_cannot_go_well_is_said_before_the_first_step(
    image_shards: Path, tmp_path: Path, changes: dict, settings: dict, said: str
) -> None:
    with pytest.raises(UsageError, match=said) as error:
        run(make(**changes), image_shards, tmp_path, 4, **settings)
    assert "\n" not in str(error.value)
