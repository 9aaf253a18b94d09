"""Stage one: what a step is, which network learns from which loss, and when."""

from __future__ import annotations

import math
import os
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal
from unittest.mock import patch

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from lightning import Trainer
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from PIL import Image
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from ldm.data.datamodule import ShardDataModule, datamodule_of
from ldm.data.manifest import IMAGE_SHARDS, Manifest
from ldm.data.writer import ShardWriter, encode_png
from ldm.errors import UsageError
from ldm.losses.adversarial import GradientPenalty, LeCam, NonSaturating
from ldm.losses.equivariance import Equivariance
from ldm.losses.perceptual import PerceptualLoss
from ldm.losses.reconstruction import ReconstructionLoss
from ldm.models.autoencoder import AutoencoderConfig, encode, pixels_to_images, reconstruct, set_latent_statistics
from ldm.models.discriminator import PatchDiscriminator
from ldm.training.adversarial import AdversarialTraining
from ldm.training.autoencoder import AutoencoderTraining
from ldm.training.encoders import measure_statistics
from ldm.training.optimiser import MuonConfig, OptimiserConfig
from tests.samples import write_photographs
from tests.tiny import make_trainer


def make(**changes: Any) -> AutoencoderTraining:
    torch.manual_seed(0)
    settings: dict[str, Any] = {
        "autoencoder": AutoencoderConfig([8, 16], 4, 1, 4, False, 32),
        "adversary": adversary(),
        "reconstruction": ReconstructionLoss(0.0, 1.0),
        "perceptual": PerceptualLoss("alex", "random"),
        "optimiser": MuonConfig(1e-3),
        "discriminator_optimiser": OptimiserConfig(1e-3),
        "ema_decay": 0.5,
    }
    return AutoencoderTraining(**settings | changes)


def adversary(start: int = 1, warmup: int = 100, ramp: int = 2, **changes: Any) -> AdversarialTraining:
    torch.manual_seed(0)
    return AdversarialTraining(
        PatchDiscriminator(8, 2), start=start, discriminator_warmup=warmup, generator_ramp=ramp, **changes
    )


def fit(module: AutoencoderTraining, shards: Path, folder: Path, steps: int, **changes: Any) -> Trainer:
    """Train, with validation every two batches."""
    torch.manual_seed(1)
    trainer = make_trainer(folder, steps, **{"val_check_interval": 2} | changes)
    trainer.fit(module, ShardDataModule(str(shards), str(shards), batch_size=4, validation_samples=4))
    return trainer


def train(module: AutoencoderTraining, shards: Path, folder: Path, steps: int) -> Trainer:
    """Train without validation."""
    return fit(module, shards, folder, steps, limit_val_batches=0)


def weights(network: nn.Module) -> torch.Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in network.parameters()])


def test_the_discriminator_waits_for_its_start(image_shards: Path, tmp_path: Path) -> None:
    """Of five batches it trains on the last two; its weights do not change before."""
    untrained = weights(make().adversary.discriminator)
    module = make(adversary=adversary(3))
    seen = []
    module.on_train_batch_end = lambda outputs, batch, batch_idx: seen.append(weights(module.adversary.discriminator))
    train(module, image_shards, tmp_path, 5)
    assert [torch.equal(untrained, now) for now in seen] == [True, True, True, False, False]


def test_steps_of_the_discriminator_do_not_change_the_autoencoder(image_shards: Path, tmp_path: Path) -> None:
    """Before the adversarial loss begins, with and without them its weights are bit-identical."""
    early, late = make(adversary=adversary(0)), make(adversary=adversary(3))
    train(early, image_shards, tmp_path, 4)
    train(late, image_shards, tmp_path, 4)
    assert torch.equal(weights(early.autoencoder), weights(late.autoencoder))
    assert not torch.equal(weights(early.adversary.discriminator), weights(late.adversary.discriminator))


def test_the_adversarial_loss_trains_the_autoencoder_only(image_shards: Path, tmp_path: Path) -> None:
    """One step with it and one without, from equal weights: other autoencoders, the same discriminator."""
    adversarial = make(adversary=adversary(0, 0, 1))
    without = make(adversary=adversary(0, 100))
    # the ramp is 0 at batch 0 and 1 at batch 1
    train(adversarial, image_shards, tmp_path, 2)
    train(without, image_shards, tmp_path, 2)
    assert not torch.equal(weights(adversarial.autoencoder), weights(without.autoencoder))
    assert torch.equal(weights(adversarial.adversary.discriminator), weights(without.adversary.discriminator))


def test_the_average_is_of_the_autoencoder_and_comes_back(image_shards: Path, tmp_path: Path) -> None:
    module = make()
    train(module, image_shards, tmp_path, 4)
    trained = weights(module.autoencoder)
    with pytest.raises(RuntimeError, match="midway"), module.average_applied():
        assert not torch.equal(weights(module.autoencoder), trained)
        assert not module.autoencoder.training
        raise RuntimeError("midway")
    assert torch.equal(weights(module.autoencoder), trained)


def test_captions_are_not_read(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (4, 32, 32, 3), np.uint8)
    captions = {"a": b"caf\xe9", "b": b"", "c": b"a caption", "d": b"\0"}
    with ShardWriter(tmp_path, "images") as writer:
        for (key, caption), image in zip(captions.items(), pixels, strict=True):
            writer.write(key, {"png": encode_png(Image.fromarray(image)), "txt": caption})
    Manifest(IMAGE_SHARDS, tuple(writer.entries), {"captioned": 4}).save(tmp_path)
    trainer = fit(make(), tmp_path, tmp_path / "run", 2)
    assert trainer.global_step == 2 and not (tmp_path / "run" / "quarantine.jsonl").exists()


def test_reconstruction_improves(image_shards: Path, tmp_path: Path) -> None:
    module = make(adversary=adversary(59))
    batch = ShardDataModule(str(image_shards), str(image_shards), batch_size=4)
    batch.setup("fit")
    images = pixels_to_images(next(iter(batch.val_dataloader()))["image"])
    with torch.no_grad():
        before = reconstruct(module.autoencoder, images).sub(images).square().mean()
        train(module, image_shards, tmp_path, 60)
        after = reconstruct(module.autoencoder, images).sub(images).square().mean()
    assert after < before / 4


def test_muon_has_the_convolutions_between_the_first_layers_and_the_last(image_shards: Path, tmp_path: Path) -> None:
    module = make(optimiser=MuonConfig(1e-3, muon_learning_rate=4e-3))
    trainer = train(module, image_shards, tmp_path, 2)
    names = {id(parameter): name for name, parameter in module.autoencoder.named_parameters()}
    adamws, muons = ([names[id(one)] for one in group["params"]] for group in trainer.optimizers[0].param_groups)
    assert {"encoder.down_blocks.0.resnets.0.conv1.weight", "decoder.up_blocks.0.upsamplers.0.conv.weight"} <= {*muons}
    matrices = {name for name, parameter in module.autoencoder.named_parameters() if parameter.ndim > 1}
    assert matrices - {*muons} == {
        "encoder.conv_in.weight", "encoder.conv_out.weight", "quant_conv.weight",
        "post_quant_conv.weight", "decoder.conv_in.weight", "decoder.conv_out.weight",
    }  # fmt: skip
    assert len(adamws) + len(muons) == len(names) and len(trainer.optimizers[1].param_groups) == 1


def test_bf16_keeps_fp32_master_weights(image_shards: Path, tmp_path: Path) -> None:
    module = make(adversary=adversary(0, 0, 1))
    trainer = fit(module, image_shards, tmp_path, 3, precision="bf16-mixed", val_check_interval=3)
    networks = (*module.autoencoder.parameters(), *module.adversary.discriminator.parameters())
    assert {parameter.dtype for parameter in networks} == {torch.float32}
    assert all(torch.isfinite(parameter).all() for parameter in networks)
    assert torch.isfinite(trainer.callback_metrics["val/psnr"])


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@pytest.mark.parametrize("accumulate", [1, 4])
def test_neither_network_s_step_gives_gradients_to_the_other(
    image_shards: Path, tmp_path: Path, precision: str, accumulate: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After each network's step, the other's gradients are what they were before it."""
    module = make(adversary=adversary(0, 0, 1), accumulate=accumulate, optimiser=MuonConfig(1e-3, max_grad_norm=1e9))
    discriminator, seen = module.adversary.discriminator, []

    def gradients(network: nn.Module) -> list[torch.Tensor | None]:
        return [None if p.grad is None else p.grad.clone() for p in network.parameters()]

    of_autoencoder, of_discriminator = module._autoencoder_gradients, module._discriminator_gradients

    def watch_autoencoder(*arguments: Any) -> Any:
        before = gradients(discriminator)
        found = of_autoencoder(*arguments)
        seen.append((before, gradients(discriminator)))
        return found

    def watch_discriminator(*arguments: Any) -> Any:
        before = gradients(module.autoencoder)
        found = of_discriminator(*arguments)
        seen.append((before, gradients(module.autoencoder)))
        return found

    monkeypatch.setattr(module, "_autoencoder_gradients", watch_autoencoder)
    monkeypatch.setattr(module, "_discriminator_gradients", watch_discriminator)
    fit(module, image_shards, tmp_path, 3, precision=precision)
    assert len(seen) == 6
    for before, after in seen:
        for a, b in zip(before, after, strict=True):
            assert a is b is None or (a is not None and b is not None and torch.equal(a, b))


def test_micro_batches_are_the_batch(image_shards: Path, tmp_path: Path) -> None:
    """The same weights up to rounding, before the adversarial loss begins: then no loss depends on more than one image."""
    whole, split = make(adversary=adversary(0), kl_weight=0.0), make(adversary=adversary(0), kl_weight=0.0, accumulate=4)
    for module in (whole, split):
        module.autoencoder.get_parameter("quant_conv.bias").data[4:] = -60.0  # no noise
        fit(module, image_shards, tmp_path, 3)
    torch.testing.assert_close(weights(whole.autoencoder), weights(split.autoencoder), rtol=0, atol=2e-4)
    assert whole.global_step == split.global_step == 3


def test_all_options_train_together(image_shards: Path, tmp_path: Path) -> None:
    """LeCam, R1, equivariance, learned variance, KL warm-up, FID, micro-batches; every metric is finite."""
    module = make(
        adversary=adversary(0, 0, 1, lecam=LeCam(0.1), gradient_penalty=GradientPenalty(1.0, 2), loss=NonSaturating()),
        equivariance=Equivariance(0.5), learn_variance=True, kl_warmup=3, accumulate=2, fid_trunk="alex-random",
        channels_last=True,
    )  # fmt: skip
    untrained = weights(module.adversary.discriminator)
    trainer = fit(module, image_shards, tmp_path, 4, log_every_n_steps=1)
    metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
    names = {"train/g_weight", "train/log_variance", "val/rfid_alex_random", "val/latent_std_03", "val/latent_dead"}
    assert names <= metrics.keys() and all(map(math.isfinite, metrics.values()))
    assert (
        module.variance is not None
        and module.variance.log_variance != 0
        and not torch.equal(untrained, weights(module.adversary.discriminator))
    )
    assert module.adversary.lecam.real != 0
    module.save(tmp_path / "saved")
    saved = AutoencoderKL.from_pretrained(tmp_path / "saved").state_dict()
    assert all(torch.equal(saved[name], tensor) for name, tensor in module.autoencoder.state_dict().items())


def test_the_kl_warms_up(image_shards: Path, tmp_path: Path) -> None:
    """In the first batch a KL with warm-up has weight 0."""
    warmed, without = make(kl_weight=1.0, kl_warmup=10), make(kl_weight=0.0)
    for module in (warmed, without):
        module.adversary.start = 0
        fit(module, image_shards, tmp_path, 1, val_check_interval=1)
    assert torch.equal(weights(warmed.autoencoder), weights(without.autoencoder))


class Faulty(ReconstructionLoss):
    """NaN for the numbered batches."""

    def __init__(self, batches: set[int]):
        super().__init__(0.0, 1.0)
        self.batches, self.calls = batches, 0

    def __call__(self, reconstruction: torch.Tensor, images: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return super().__call__(reconstruction, images) * (torch.nan if self.calls - 1 in self.batches else 1.0)


def test_a_batch_with_nan_is_skipped_and_counted(image_shards: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    loss = Faulty({1, 2})
    module = make(reconstruction=loss, adversary=adversary(0, 0, 1), max_skipped=2)
    trainer = fit(module, image_shards, tmp_path, 4, log_every_n_steps=1)
    assert trainer.global_step == loss.calls == 4  # a skipped batch counts as a step
    assert torch.isfinite(weights(module.autoencoder)).all() and torch.isfinite(weights(module.adversary.discriminator)).all()
    assert trainer.callback_metrics["train/skipped"] == 2
    messages = [record.getMessage() for record in caplog.records if record.name.startswith("ldm.")]
    assert [message.split(" (")[1] for message in messages] == ["1 in a row)", "2 in a row)"]


def test_a_skipped_step_leaves_the_adversary_as_it_was(image_shards: Path, tmp_path: Path) -> None:
    """Weights, estimates of spectral norms, averages of logits, the guard's accuracy; the next step changes them all."""
    module, states = make(reconstruction=Faulty({2}), adversary=adversary(0, 100, lecam=LeCam(0.1))), []

    def record(outputs: object, batch: object, batch_idx: int) -> None:
        states.append({name: value.clone() for name, value in module.adversary.state_dict().items()})

    module.on_train_batch_end = record
    train(module, image_shards, tmp_path, 4)
    changed = [{name for name in now if not torch.equal(now[name], before[name])} for before, now in pairwise(states)]
    assert changed[1] == set() and changed[0] == changed[2]
    assert {"lecam.real", "guard.accuracy", "discriminator.layers.0.weight"} <= changed[0]
    assert any(name.endswith("._u") for name in changed[0])


def test_the_guard_acts_at_validation_and_its_state_is_in_checkpoints(image_shards: Path, tmp_path: Path) -> None:
    """If no validation comes near the best values, each one after the start halves the level."""
    module = make(adversary=adversary(0, 0, 1))
    module.adversary.guard.update(99.0, 0.0, active=False)
    trainer = fit(module, image_shards, tmp_path, 6)
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
    image_shards: Path, tmp_path: Path, tiny_autoencoder: AutoencoderKL, warm: Literal["all", "decoder"]
) -> None:
    """Decoder alone: encoder and latents stay bit-identical through training, averaging and export."""
    set_latent_statistics(tiny_autoencoder, [1.0, 2.0, 3.0, 4.0], [5.0, 6.0, 7.0, 8.0])
    tiny_autoencoder.save_pretrained(tmp_path / "start")
    module = make(autoencoder=AutoencoderConfig(init_from=str(tmp_path / "start"), train=warm))
    start = AutoencoderKL.from_pretrained(tmp_path / "start")
    assert torch.equal(weights(start), weights(module.autoencoder))
    fit(module, image_shards, tmp_path, 3)
    with module.average_applied():
        (tmp_path / "end").mkdir()
        module.save(tmp_path / "end")
    end = AutoencoderKL.from_pretrained(tmp_path / "end")
    assert not torch.equal(weights(start.decoder), weights(end.decoder))
    images = torch.rand(2, 3, 32, 32) * 2 - 1
    with torch.no_grad():
        before, after = (encode(network, images).parameters for network in (start, end))
    kept = warm == "decoder"
    assert torch.equal(weights(start.encoder), weights(end.encoder)) == torch.equal(before, after) == kept
    assert (end.config["latents_mean"] == [1.0, 2.0, 3.0, 4.0]) == kept


def test_what_it_saves_is_a_stock_autoencoder_with_its_latents_measured(image_shards: Path, tmp_path: Path) -> None:
    """Stock diffusers reconstructs as the module does; mean and deviation are those of latents sampled over the set."""
    module = make()
    fit(module, image_shards, tmp_path, 3)
    images = torch.rand(3, 3, 32, 32) * 2 - 1
    with module.average_applied():
        module.save(tmp_path)
        expected = reconstruct(module.autoencoder, images)
    stock = AutoencoderKL.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        found = reconstruct(stock, images)
        dataset = datamodule_of(module.trainer).train_set
        posterior = encode(stock, pixels_to_images(dataset.batch(range(10))["image"]))
    assert (found - expected).abs().max() <= 1e-5
    mean = posterior.mean.double().mean((0, 2, 3))
    spread = (posterior.mean.double() - mean[:, None, None]).square().mean((0, 2, 3)) + posterior.var.double().mean((0, 2, 3))
    torch.testing.assert_close(torch.tensor(stock.config["latents_mean"]).double(), mean, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(torch.tensor(stock.config["latents_std"]).double(), spread.sqrt(), rtol=1e-5, atol=1e-7)


def test_images_in_buckets_train_and_their_latents_are_measured(tmp_path: Path) -> None:
    """Wide, square and upright batches, with everything on; the statistics are those of all images, each at its size."""
    shards = write_photographs(tmp_path / "x", [(120, 80), (64, 64), (80, 120)] * 4)
    module = make(adversary=adversary(0, 0, 1), equivariance=Equivariance(0.5), accumulate=2)
    trainer = make_trainer(tmp_path, 6, val_check_interval=3)
    buckets: dict[str, Any] = {"crop": "bucket", "buckets": [64], "bucket_step": 16}
    data = ShardDataModule(str(shards), str(shards), batch_size=4, **buckets)
    trainer.fit(module, data)
    assert trainer.global_step == 6 and torch.isfinite(trainer.callback_metrics["val/psnr"])
    dataset = data.train_set
    batches = [dataset.batch(rows)["image"] for rows in dataset.batches_of_one_size(range(12), 4)]
    assert len({batch.shape for batch in batches}) == 3
    with torch.no_grad():
        posteriors = [encode(module.autoencoder, pixels_to_images(batch)) for batch in batches]
    means, spreads = (
        torch.cat([each.double().permute(1, 0, 2, 3).flatten(1) for each in tensors], 1)
        for tensors in ([posterior.mean for posterior in posteriors], [posterior.var for posterior in posteriors])
    )
    mean, std = measure_statistics(module.autoencoder, dataset, 3)  # pyright: ignore[reportArgumentType]
    torch.testing.assert_close(torch.tensor(mean).double(), means.mean(1), rtol=1e-5, atol=1e-6)
    expected = (means.var(1, correction=0) + spreads.mean(1)).sqrt()
    torch.testing.assert_close(torch.tensor(std).double(), expected, rtol=1e-5, atol=1e-6)
    with pytest.raises(
        UsageError, match=r"the buckets have sides of .* which the autoencoder's downsampling factor .* does not divide"
    ):
        wide = make(autoencoder=AutoencoderConfig([8] * 6, 4, 1, 4, False, 64))
        make_trainer(tmp_path, 2).fit(wide, ShardDataModule(str(shards), str(shards), batch_size=4, **buckets))


@pytest.mark.parametrize(
    ("changes", "settings", "message"),
    [
        ({}, {"precision": "bf16-true"}, "precision bf16-true: .* give bf16-mixed or 32-true"),
        (
            {"autoencoder": AutoencoderConfig([8] * 7, 4, 1, 4, False, 64)},
            {},
            "32 x 32 in .* are not multiples of the autoencoder's downsampling factor 64",
        ),
        ({"adversary": adversary(start=50)}, {}, "the adversary's start 50 is not before max_steps 4"),
        ({"accumulate": 5}, {}, "accumulate 5 is more than batch_size 4"),
    ],
)
def test_settings_that_cannot_be_trained_with_are_refused_before_the_first_step(
    image_shards: Path, tmp_path: Path, changes: dict[str, Any], settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(UsageError, match=message) as error:
        fit(make(**changes), image_shards, tmp_path, 4, **settings)
    assert "\n" not in str(error.value)


def test_ddp_exchanges_the_autoencoder_s_gradients_alone(image_shards: Path, tmp_path: Path) -> None:
    """Of one process; the discriminator's are exchanged once, where it trains: tests/slow/test_many_processes.py."""
    module, sizes = make(adversary=adversary(0, 0, 1), learn_variance=True), []

    def measure(outputs: object, batch: object, batch_idx: int) -> None:
        strategy = module.trainer.strategy
        assert isinstance(strategy, DDPStrategy) and isinstance(strategy.model, DistributedDataParallel)
        sizes.append(strategy.model._get_ddp_logging_data()["total_parameter_size_bytes"])

    module.on_train_batch_end = measure
    try:
        with patch.dict(os.environ):  # in which Lightning sets a rank, that commands of later tests would take for theirs
            fit(module, image_shards, tmp_path, 2, strategy=DDPStrategy(find_unused_parameters=False))
    finally:
        torch.distributed.destroy_process_group()
    assert module.variance is not None
    assert sizes == [4 * (len(weights(module.autoencoder)) + 1)] * 2
    assert all(parameter.requires_grad for parameter in module.adversary.discriminator.parameters())


def test_losses_with_parameters_are_refused_under_fsdp(
    image_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ldm.training.base.ModelParallelStrategy", SingleDeviceStrategy)
    with pytest.raises(UsageError, match="LearnedVariance has parameters, which fsdp does not shard"):
        train(make(learn_variance=True), image_shards, tmp_path, 2)
