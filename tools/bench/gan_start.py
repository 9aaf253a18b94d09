"""What the start of the GAN costs: latent diffusion's recipe (Rombach et al. 2022) against ours, from the same weights.

    python tools/bench/gan_start.py [--quick] [--seeds N] [--before N] [--after N]

For every seed one autoencoder is trained without a discriminator; from there both recipes go on over the same batches, with
the same losses, weight and learning rates. Theirs: the discriminator (batch norm, weights of N(0, 0.02)) is heard from its
first step on, its gradient made as large as the reconstruction's. Ours: `alone`, `warmup` and the guard of
`ldm.training.adversarial`, spectral norm. A third run goes on without a discriminator. The autoencoder's raw weights are
validated, not their average, which would hide the shock.

What the game costs at a validation is what PSNR lies below that of the third run at the same step. Ends with `ratio NAME MEDIAN
MIN MAX` over the seeds: of the largest and of the average cost since the start (theirs over ours, at least 0.01 dB), and of
LPIPS at the end (theirs over ours).
"""

from __future__ import annotations

# isort: off
import ldm  # noqa: F401 - first: it settles how OpenMP waits

# isort: on
import argparse
import copy
import logging
import statistics
import tempfile
import warnings
from pathlib import Path

import torch
from lightning import Callback, LightningModule, Trainer
from torch import Tensor, nn

from ldm.data.datamodule import ShardDataModule
from ldm.data.writer import write_images
from ldm.losses import Hinge, PerceptualLoss, ReconstructionLoss
from ldm.machine import machine_info
from ldm.models.autoencoder import AutoencoderConfig
from ldm.models.discriminator import PatchDiscriminator
from ldm.shapes.scenes import generate
from ldm.training.adversarial import AdversarialTraining, ReconstructionGuard
from ldm.training.autoencoder import AutoencoderTraining
from ldm.training.optimiser import MuonConfig, OptimiserConfig

SIZE, BATCH, WEIGHT = 40, 8, 0.5
# lower from the start on, for all: at the first rate validation PSNR moves by a decibel from one batch to the next
LEARNING_RATES = {"before": 1e-3, "after": 2e-4}


class BatchNormDiscriminator(nn.Sequential):
    """PatchGAN as published (Isola et al. 2017, arXiv 1611.07004): batch norm, weights of N(0, 0.02)."""

    def __init__(self, width: int = 32, num_layers: int = 2):
        layers: list[nn.Module] = [nn.Conv2d(3, width, 4, 2, 1), nn.LeakyReLU(0.2)]
        for level in range(1, num_layers + 1):
            stride = 2 if level < num_layers else 1
            widths = [width * 2 ** (level - 1), width * 2**level]
            layers += [nn.Conv2d(*widths, 4, stride, 1, bias=False), nn.BatchNorm2d(widths[1]), nn.LeakyReLU(0.2)]
        super().__init__(*layers, nn.Conv2d(widths[1], 1, 4, 1, 1))
        for module in self:
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, 0, 0.02)
            if isinstance(module, nn.BatchNorm2d):
                nn.init.normal_(module.weight, 1, 0.02)


class HardStart(AdversarialTraining):
    """Latent diffusion's: heard from the first batch on, which its batch norm is in training mode for."""

    def __init__(self, start: int):
        guard = ReconstructionGuard(enabled=False)
        super().__init__(
            BatchNormDiscriminator(), Hinge(), WEIGHT, start=start, discriminator_warmup=-1, generator_ramp=0, guard=guard
        )

    def generator_loss(self, reconstruction: Tensor) -> Tensor:
        self.discriminator.requires_grad_(False)
        loss = self.loss.generator(self.discriminator(reconstruction))
        self.discriminator.requires_grad_(True)
        return loss


def guarded_start(start: int, after: int) -> AdversarialTraining:
    """Ours: a sixth of what is left alone, half of it to rise."""
    return AdversarialTraining(
        PatchDiscriminator(32, 2), Hinge(), WEIGHT, start=start, discriminator_warmup=after // 6, generator_ramp=after // 2
    )


class Record(Callback):
    """Validation PSNR and LPIPS by step."""

    def __init__(self) -> None:
        self.figures: list[tuple[int, float, float]] = []

    def on_validation_end(self, trainer: Trainer, module: LightningModule) -> None:
        found = trainer.callback_metrics
        self.figures.append((trainer.global_step, float(found["val/psnr"]), float(found["val/lpips"])))


def train(
    adversary: AdversarialTraining, folder: Path, seed: int, steps: int, every: int, start_from: dict | None = None
) -> tuple[dict, list[tuple[int, float, float]]]:
    """Train so many steps; returns the autoencoder's state and optimiser's, and the figures of every validation."""
    torch.manual_seed(seed)
    rate = LEARNING_RATES["before" if start_from is None else "after"]
    module = AutoencoderTraining(
        AutoencoderConfig([16, 32, 64], 4, 1, 4, False, SIZE),
        adversary,
        ReconstructionLoss(0.0, 1.0),
        PerceptualLoss("alex", "random"),
        MuonConfig(rate, (0.5, 0.9)),
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
        # Adam goes on as it was: a fresh one would shake the weights by itself
        build = module.optimiser.build

        def go_on(*arguments: object) -> tuple:
            optimiser, schedule = build(*arguments)
            optimiser.load_state_dict(copy.deepcopy(start_from["optimiser"]))
            optimiser.param_groups[0]["lr"] = optimiser.param_groups[0]["initial_lr"] = rate
            return optimiser, schedule

        module.optimiser.build = go_on
        data.seed += 1000  # other batches than before, the same for every recipe
    trainer.fit(module, data)
    state = {"autoencoder": module.autoencoder.state_dict(), "optimiser": trainer.optimizers[0].state_dict()}
    return copy.deepcopy(state), record.figures


def main() -> None:
    """Measure, and print the ratios."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="one seed, few steps: under 50 s, says little")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--before", type=int, default=400, help="steps before the start")
    parser.add_argument("--after", type=int, default=320, help="steps from the start on")
    options = parser.parse_args()
    seeds, before, after = (1, 40, 40) if options.quick else (options.seeds, options.before, options.after)
    every = max(after // 24, 5)
    warnings.filterwarnings("ignore")
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    print(machine_info())
    print(f"shapes of {SIZE} px, batch {BATCH}, {before} steps before the start, {after} after it, adversarial weight {WEIGHT}")
    ratios: dict[str, list[float]] = {"gan_start_psnr_cost": [], "gan_start_mean_psnr_cost": [], "gan_start_final_lpips": []}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        write_images(folder / "train", "shapes", generate(4000, SIZE, seed=0), 1000)
        write_images(folder / "validation", "shapes", generate(64, SIZE, seed=1), 64)
        for seed in range(seeds):
            never = AdversarialTraining(PatchDiscriminator(8, 2), weight=0.0, start=before - 1, discriminator_warmup=10**9)
            state, figures = train(never, folder, seed, before, before)
            _, psnr, lpips = figures[-1]
            print(f"seed {seed}: before the start PSNR {psnr:.2f} dB, LPIPS {lpips:.4f}", flush=True)
            most, average, last = {}, {}, {}
            recipes = {
                "none": AdversarialTraining(PatchDiscriminator(8, 2), weight=0.0, start=after - 1, discriminator_warmup=10**9),
                "theirs": HardStart(0),
                "ours": guarded_start(0, after),
            }
            for name, adversary in recipes.items():
                if name == "ours":  # the guard's mark is what the start found
                    adversary.guard.update(psnr, lpips, heard=False)
                _, figures = train(adversary, folder, seed, after, every, state)
                if name == "none":
                    undisturbed = figures
                costs = [without[1] - figure[1] for without, figure in zip(undisturbed, figures, strict=True)]
                most[name], average[name], last[name] = max(costs), statistics.mean(costs), figures[-1]
                print(f"  {name:6} PSNR " + " ".join(f"{figure[1]:.1f}" for figure in figures))
                print(f"  {name:6} LPIPS " + " ".join(f"{figure[2]:.3f}" for figure in figures))
                print(
                    f"  {name:6} costs up to {most[name]:.2f} dB, {average[name]:.2f} on average; ends at "
                    f"{last[name][1]:.2f} dB, LPIPS {last[name][2]:.4f}, guard at {float(adversary.guard.level):.2f}",
                    flush=True,
                )
            for name, cost in (("gan_start_psnr_cost", most), ("gan_start_mean_psnr_cost", average)):
                ratios[name].append(max(cost["theirs"], 0.01) / max(cost["ours"], 0.01))
            ratios["gan_start_final_lpips"].append(last["theirs"][2] / last["ours"][2])
    for name, values in ratios.items():
        print(f"ratio {name} {statistics.median(values):.2f} {min(values):.2f} {max(values):.2f}")


if __name__ == "__main__":
    main()
