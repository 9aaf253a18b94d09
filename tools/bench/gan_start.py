"""What the start of the adversarial loss costs: latent diffusion's recipe (Rombach et al. 2022) against ours.

    python tools/bench/gan_start.py [--quick] [--seeds N] [--before N] [--after N]

For every seed one autoencoder is trained without a discriminator. From its weights both recipes continue on the same batches,
with the same losses, weight and learning rates. Theirs: the adversarial loss of the decoder, with batch norm and weights of
N(0, 0.02) in the discriminator, counts fully from the discriminator's first step on, its gradient scaled to that of the
reconstruction. Ours: `discriminator_warmup`, `generator_ramp` and the guard of `ldm.training.adversarial`, spectral norm. A
third run continues without a discriminator. The raw weights of the autoencoder are validated, not their average, which would
hide the effect.

The cost at a validation is the PSNR of the third run at the same step less that of the recipe. Ends with `ratio NAME MEDIAN MIN
MAX` over the seeds: of the largest and of the average cost (theirs over ours, at least 0.01 dB), and of LPIPS at the end
(theirs over ours).
"""

from __future__ import annotations

import copy
import statistics
import tempfile
from pathlib import Path
from typing import Any

import common
import torch
from lightning import Callback, LightningModule, Trainer
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from ldm.data.datamodule import ShardDataModule
from ldm.data.writer import write_images
from ldm.losses.adversarial import Hinge
from ldm.losses.perceptual import PerceptualLoss
from ldm.losses.reconstruction import ReconstructionLoss
from ldm.machine import machine_info
from ldm.models.autoencoder import AutoencoderConfig
from ldm.models.discriminator import PatchDiscriminator
from ldm.shapes.scenes import generate
from ldm.training.adversarial import AdversarialTraining, ReconstructionGuard
from ldm.training.autoencoder import AutoencoderTraining
from ldm.training.optimiser import MuonConfig, OptimiserConfig

SIZE, BATCH, WEIGHT = 40, 8, 0.5
# lower once the runs part: at the first rate validation PSNR changes by a decibel from one batch to the next
LEARNING_RATES = {"before": 1e-3, "after": 2e-4}


class BatchNormDiscriminator(nn.Sequential):
    """PatchGAN as published (Isola et al. 2017, arXiv 1611.07004): batch norm, weights of N(0, 0.02)."""

    def __init__(self, width: int = 32, num_layers: int = 2):
        layers: list[nn.Module] = [nn.Conv2d(3, width, 4, 2, 1), nn.LeakyReLU(0.2)]
        for level in range(1, num_layers + 1):
            stride = 2 if level < num_layers else 1
            layers += [nn.Conv2d(width, 2 * width, 4, stride, 1, bias=False), nn.BatchNorm2d(2 * width), nn.LeakyReLU(0.2)]
            width *= 2
        super().__init__(*layers, nn.Conv2d(width, 1, 4, 1, 1))
        for module in self:
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, 0, 0.02)
            if isinstance(module, nn.BatchNorm2d):
                nn.init.normal_(module.weight, 1, 0.02)

    def train(self, mode: bool = True) -> BatchNormDiscriminator:
        """Latent diffusion's discriminator normalises by the batch in the decoder's loss, too."""
        return super().train(True)


def full_weight_at_once() -> AdversarialTraining:
    """Latent diffusion's start."""
    guard = ReconstructionGuard(enabled=False)
    return AdversarialTraining(
        BatchNormDiscriminator(), Hinge(), WEIGHT, start=0, discriminator_warmup=-1, generator_ramp=0, guard=guard
    )


def without_discriminator(steps: int) -> AdversarialTraining:
    """One that never weighs in, and trains at the last step alone."""
    return AdversarialTraining(PatchDiscriminator(8, 2), weight=0.0, start=steps - 1, discriminator_warmup=10**9)


def guarded_start(steps: int) -> AdversarialTraining:
    """Ours: the discriminator trains alone for a sixth of the steps, and the weight rises over half of them."""
    return AdversarialTraining(
        PatchDiscriminator(32, 2), Hinge(), WEIGHT, start=0, discriminator_warmup=steps // 6, generator_ramp=steps // 2
    )


class Record(Callback):
    """PSNR and LPIPS of each validation."""

    def __init__(self) -> None:
        self.metrics: list[tuple[float, float]] = []

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        found = trainer.callback_metrics
        self.metrics.append((float(found["val/psnr"]), float(found["val/lpips"])))


class ResumedAdamW(MuonConfig):
    """The optimiser continues from a state, with another rate: a new one would disturb the weights by itself."""

    state: dict[str, Any]

    def build(self, network: nn.Module, num_steps: int, *others: Any, **named: Any) -> tuple[Optimizer, LRScheduler]:
        optimiser, schedule = super().build(network, num_steps, *others, **named)
        optimiser.load_state_dict(copy.deepcopy(self.state))
        optimiser.param_groups[0]["lr"] = optimiser.param_groups[0]["initial_lr"] = self.learning_rate
        return optimiser, schedule


def train(
    adversary: AdversarialTraining, folder: Path, seed: int, steps: int, every: int, start_from: dict[str, Any] | None = None
) -> tuple[dict[str, Any], list[tuple[float, float]]]:
    """Train for so many steps; returns the states of autoencoder and optimiser, and the metrics of every validation."""
    torch.manual_seed(seed)
    rate = LEARNING_RATES["before" if start_from is None else "after"]
    optimiser = (MuonConfig if start_from is None else ResumedAdamW)(rate, (0.5, 0.9))
    module = AutoencoderTraining(
        AutoencoderConfig([16, 32, 64], 4, 1, 4, False, SIZE),
        adversary,
        ReconstructionLoss(0.0, 1.0),
        PerceptualLoss("alex", "random"),
        optimiser,
        OptimiserConfig(rate, (0.5, 0.9)),
        perceptual_weight=0.1,
        kl_weight=1e-6,
        ema_decay=0.0,
    )
    record = Record()
    trainer = Trainer(
        max_steps=steps, max_epochs=-1, val_check_interval=every, check_val_every_n_epoch=None, accelerator="cpu", devices=1,
        logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        num_sanity_val_steps=0, default_root_dir=folder, use_distributed_sampler=False, callbacks=[record],
    )  # fmt: skip
    data = ShardDataModule(
        str(folder / "train"), str(folder / "validation"), batch_size=BATCH, validation_samples=64, seed=seed
    )
    if start_from is not None:
        module.autoencoder.load_state_dict(start_from["autoencoder"])
        assert isinstance(optimiser, ResumedAdamW)
        optimiser.state = start_from["optimiser"]
        data.seed += 1000  # other batches than before, the same for every recipe
    trainer.fit(module, data)
    state = {"autoencoder": module.autoencoder.state_dict(), "optimiser": trainer.optimizers[0].state_dict()}
    return copy.deepcopy(state), record.metrics


def main() -> None:
    """Measure, and print the ratios."""
    parser = common.bench_parser(__doc__, "one seed, few steps: under 50 s, says little")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--before", type=int, default=400, help="steps before the start")
    parser.add_argument("--after", type=int, default=320, help="steps from the start on")
    options = parser.parse_args()
    seeds, before, after = (1, 40, 40) if options.quick else (options.seeds, options.before, options.after)
    every = max(after // 24, 5)
    common.quieten()
    print(machine_info())
    print(f"shapes of {SIZE} px, batch {BATCH}, {before} steps before the start, {after} after it, adversarial weight {WEIGHT}")
    ratios: dict[str, list[float]] = {"gan_start_psnr_cost": [], "gan_start_mean_psnr_cost": [], "gan_start_final_lpips": []}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        write_images(folder / "train", "shapes", generate(4000, SIZE, seed=0), 1000)
        write_images(folder / "validation", "shapes", generate(64, SIZE, seed=1), 64)
        for seed in range(seeds):
            state, metrics = train(without_discriminator(before), folder, seed, before, before)
            psnr, lpips = metrics[-1]
            print(f"seed {seed}: before the start PSNR {psnr:.2f} dB, LPIPS {lpips:.4f}", flush=True)
            ours = guarded_start(after)
            ours.guard.update(psnr, lpips, active=False)  # sets its best so far to what the start found
            recipes = {"none": without_discriminator(after), "theirs": full_weight_at_once(), "ours": ours}
            found = {name: train(recipe, folder, seed, after, every, state)[1] for name, recipe in recipes.items()}
            largest, average, last = {}, {}, {}
            for name, metrics in found.items():
                costs = [without - psnr for (without, _), (psnr, _) in zip(found["none"], metrics, strict=True)]
                largest[name], average[name], (psnr, last[name]) = max(costs), statistics.mean(costs), metrics[-1]
                print(f"  {name:6} PSNR " + " ".join(f"{psnr:.1f}" for psnr, _ in metrics))
                print(f"  {name:6} LPIPS " + " ".join(f"{lpips:.3f}" for _, lpips in metrics))
                print(
                    f"  {name:6} costs up to {largest[name]:.2f} dB, {average[name]:.2f} on average; ends at {psnr:.2f} dB, "
                    f"LPIPS {last[name]:.4f}, guard at {float(recipes[name].guard.level):.2f}",
                    flush=True,
                )
            for name, cost in (("gan_start_psnr_cost", largest), ("gan_start_mean_psnr_cost", average)):
                ratios[name].append(max(cost["theirs"], 0.01) / max(cost["ours"], 0.01))
            ratios["gan_start_final_lpips"].append(last["theirs"] / last["ours"])
    common.print_ratios(ratios)


if __name__ == "__main__":
    main()
