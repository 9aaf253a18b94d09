"""A training step of stage one: ours against the same losses written as latent diffusion writes them.

    python tools/bench/autoencoder.py [--quick] [--rounds R] [--precision bf16|fp32] [--size PIXELS] [--batch N]

Both train the same ``AutoencoderKL`` and ``PatchDiscriminator`` with L1, LPIPS (vgg, random trunk), KL, hinge loss, adaptive
weight, AdamW for both networks and an average of the autoencoder. Before anything is timed, their gradients are compared.
Ours is the training step inside Lightning's ``Trainer.fit``, whose overhead counts, with clipping, logs and the check for
non-finite gradients. Theirs is a bare loop. It calls the training step once for each of the two networks, and every call runs
the autoencoder, reconstruction loss and LPIPS again. The adaptive weight backpropagates through LPIPS and the discriminator to
the decoder's last layer and keeps the graph; the sum of the losses is then backpropagated once more. The network that is not
updated is frozen, as Lightning does with several optimisers. Batches are held in memory as bytes.

Each side runs in the memory layout (contiguous or channels_last) in which it is faster. Peak memory, not measured with --quick,
is that of a separate process: on a GPU what torch allocated, on the CPU what is resident beyond the imports. Ends with
`ratio NAME MEDIAN MIN MAX`: theirs over ours, of time per step and of memory; and our step without equivariance over that with
equivariance on every batch (which scales about half of the images' area away).
"""

from __future__ import annotations

import copy
import math
import multiprocessing
import statistics
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import cache, partial
from itertools import repeat
from pathlib import Path
from typing import Any, Literal, cast

import common
import numpy as np
import torch
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from lightning import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from ldm.data.datamodule import ShardDataModule
from ldm.data.plan import PlannedSample
from ldm.data.writer import write_images
from ldm.losses.adversarial import Hinge
from ldm.losses.equivariance import Equivariance
from ldm.losses.perceptual import PerceptualLoss
from ldm.losses.reconstruction import ReconstructionLoss
from ldm.machine import bf16_is_faster, machine_info
from ldm.models.autoencoder import AutoencoderConfig, decode, encode, pixels_to_images
from ldm.models.discriminator import PatchDiscriminator
from ldm.shapes.scenes import generate
from ldm.training.adversarial import AdversarialTraining
from ldm.training.autoencoder import AutoencoderTraining
from ldm.training.base import TrainingModule
from ldm.training.ema import Average
from ldm.training.optimiser import MuonConfig, OptimiserConfig
from ldm.training.randomness import sample_generators

WEIGHT, KL_WEIGHT, EMA_DECAY = 0.5, 1e-6, 0.9999
LAYOUTS = ("contiguous", "channels_last")
Network = Literal["autoencoder", "discriminator"]
NETWORKS: tuple[Network, Network] = ("autoencoder", "discriminator")


@dataclass(frozen=True)
class Setting:
    """Sizes, precision and device of the training, and the folder of its images."""

    widths: tuple[int, ...]
    layers: int
    discriminator_width: int
    size: int
    batch: int
    bf16: bool
    device: str
    folder: Path

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device, torch.bfloat16, enabled=self.bf16)

    def now(self) -> float:
        return common.now(self.device)


class ReadyBatches(ShardDataModule):
    """The same batch of decoded images again and again."""

    def setup(self, stage: str) -> None:
        super().setup(stage)
        self.batch = {"image": self.train_set.batch(range(self.batch_size))["image"]}

    def train_dataloader(self) -> Iterator[dict[str, Any]]:  # pyright: ignore[reportIncompatibleMethodOverride]  not a loader
        assert self.trainer is not None
        draws = planned(self.batch_size)
        make_noise = cast(TrainingModule, self.trainer.lightning_module).batch_noise()
        assert make_noise is not None
        return repeat(self.batch | make_noise(self.batch, draws) | {"draws": np.array(draws)})


def planned(number: int) -> list[PlannedSample]:
    """The first samples, each drawn once, in their order."""
    return [PlannedSample(sample, sample) for sample in range(number)]


class Clock(Callback):
    """Seconds per batch, from the end of the first one, which allocates, to the end of the last one."""

    def __init__(self, setting: Setting, steps: int):
        self.setting, self.steps = setting, steps

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if batch_idx == 0:
            self.began = self.setting.now()
        if batch_idx == self.steps:
            self.seconds = (self.setting.now() - self.began) / self.steps


# -- ours ----------------------------------------------------------------------------------------------------------------


@cache
def perceptual() -> PerceptualLoss:
    """LPIPS, to be copied, since its trunk is slow to build."""
    return PerceptualLoss("vgg", "random")


def build_ours(setting: Setting, layout: str) -> AutoencoderTraining:
    """The module of stage one, with the adversarial loss from the first batch on."""
    torch.manual_seed(0)
    adversary = AdversarialTraining(
        PatchDiscriminator(setting.discriminator_width), Hinge(), WEIGHT, start=0, discriminator_warmup=-1, generator_ramp=0
    )
    ours = AutoencoderTraining(
        AutoencoderConfig(list(setting.widths), 4, setting.layers, 16, True, setting.size),
        adversary,
        ReconstructionLoss(1.0, 0.0),
        copy.deepcopy(perceptual()),
        MuonConfig(1e-4, (0.5, 0.9)),
        OptimiserConfig(1e-4, (0.5, 0.9)),
        kl_weight=KL_WEIGHT,
        channels_last=layout == "channels_last",
        ema_decay=EMA_DECAY,
    )
    ours.print = lambda *_: None  # would print at every fit
    return ours


def fit(ours: AutoencoderTraining, setting: Setting, steps: int, *callbacks: Callback) -> None:
    """Train for so many steps with a new trainer."""
    trainer = Trainer(
        max_steps=steps, max_epochs=-1, accelerator="gpu" if setting.device == "cuda" else "cpu", devices=1,
        precision="bf16-mixed" if setting.bf16 else "32-true", logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, num_sanity_val_steps=0, limit_val_batches=0,
        default_root_dir=setting.folder, use_distributed_sampler=False, callbacks=list(callbacks),
    )  # fmt: skip
    shards = str(setting.folder / "shards")
    trainer.fit(ours, ReadyBatches(shards, shards, batch_size=setting.batch))


def time_ours(ours: AutoencoderTraining, setting: Setting, steps: int, equivariance: float = 0.0) -> float:
    """Seconds per batch."""
    ours.equivariance = Equivariance(equivariance)
    clock = Clock(setting, steps)
    fit(ours, setting, 1 + steps, clock)
    return clock.seconds


def anatomy(ours: AutoencoderTraining, setting: Setting, pixels: Tensor, repeats: int) -> dict[str, float]:
    """Median seconds of the parts of our step, run outside of Lightning."""
    discriminator, pixels = ours.adversary.discriminator, pixels.to(setting.device)
    ours.to(setting.device).train()
    ours.average.to(torch.device(setting.device))
    optimiser, _ = ours.optimiser.build(ours.autoencoder, 1000)
    discriminator_optimiser, _ = ours.discriminator_optimiser.build(discriminator, 1000)
    spent: dict[str, list[float]] = {}

    before_last: list[Tensor] = []  # input of the decoder's last layer
    hook = ours.autoencoder.decoder.conv_out.register_forward_pre_hook(lambda _, given: before_last.append(given[0].detach()))

    def lap(part: str) -> None:
        nonlocal began
        spent.setdefault(part, []).append(setting.now() - began)
        began = setting.now()

    for _ in range(1 + repeats):
        with setting.autocast():
            began = setting.now()
            images = pixels_to_images(pixels)
            lap("bytes to floats")
            posterior = encode(ours.autoencoder, images)
            reconstruction = decode(ours.autoencoder, posterior.sample()).float()
            lap("autoencoder, forward")
            leaf = reconstruction.detach().requires_grad_()
            (by_error,) = torch.autograd.grad(ours.reconstruction(leaf, images) + ours.perceptual(leaf, images), leaf)
            lap("L1 and LPIPS, forward and backward")
            (by_generator,) = torch.autograd.grad(ours.adversary.generator_loss(leaf), leaf)
            lap("adversarial loss of the decoder")
            weight = ours._adaptive_weight(before_last.pop(), by_error, by_generator)
            lap("adaptive weight")
            towards = ((by_error + WEIGHT * weight * by_generator) * reconstruction).sum()
            (towards + KL_WEIGHT * posterior.kl().sum() / images.numel()).backward()
            lap("autoencoder, backward")
            loss, _ = ours.adversary.discriminator_loss(images, reconstruction.detach(), 0)
            loss.backward()
            lap("discriminator, forward and backward")
            for network, its_optimiser in ((ours.autoencoder, optimiser), (discriminator, discriminator_optimiser)):
                nn.utils.clip_grad_norm_(network.parameters(), ours.optimiser.max_grad_norm)
                its_optimiser.step()
                its_optimiser.zero_grad()
            ours.average.update()
            lap("clipping, optimisers, average")
    hook.remove()
    return {part: statistics.median(laps[1:]) for part, laps in spent.items()}


# -- theirs --------------------------------------------------------------------------------------------------------------


class PerceptualAndDiscriminatorLoss(nn.Module):
    """Latent diffusion's loss (Rombach et al. 2022, arXiv 2112.10752, appendix G), called once for each network.

    The adaptive weight is that of Esser et al. 2021 (arXiv 2012.09841, eq. 7). Means, where theirs are sums over an image.
    """

    def __init__(self, perceptual: PerceptualLoss, discriminator: nn.Module):
        super().__init__()
        self.perceptual, self.discriminator, self.adversarial = perceptual, discriminator, Hinge()

    def forward(
        self,
        images: Tensor,
        reconstruction: Tensor,
        posterior: DiagonalGaussianDistribution,
        updated: Network,
        last_layer: Tensor,
    ) -> Tensor:
        errors = (images - reconstruction).abs() + self.perceptual.network(reconstruction, images)  # (B, 3, H, W)
        error, kl = errors.mean(), posterior.kl().sum() / images.numel()
        if updated == "discriminator":
            return self.adversarial.discriminator(self.discriminator(images), self.discriminator(reconstruction.detach()))
        # keeps the estimates of spectral norms, as ours does
        self.discriminator.eval()
        generator = self.adversarial.generator(self.discriminator(reconstruction))
        self.discriminator.train()
        return error + WEIGHT * self.adaptive_weight(error, generator, last_layer) * generator + KL_WEIGHT * kl

    def adaptive_weight(self, error: Tensor, generator: Tensor, last_layer: Tensor) -> Tensor:
        (by_error,) = torch.autograd.grad(error, last_layer, retain_graph=True)
        (by_generator,) = torch.autograd.grad(generator, last_layer, retain_graph=True)
        return (by_error.norm() / (by_generator.norm() + 1e-4)).clamp(0, 1e4).detach()


class LatentDiffusion:
    """The same networks, weights and settings as ours, trained as latent diffusion does."""

    def __init__(self, ours: AutoencoderTraining, setting: Setting):
        """``ours`` is copied: its networks in their memory layout, and its optimisers' settings."""
        self.setting = setting
        self.autoencoder = copy.deepcopy(ours.autoencoder)
        nn.Module.to(self.autoencoder, setting.device)
        self.loss = PerceptualAndDiscriminatorLoss(copy.deepcopy(ours.perceptual), copy.deepcopy(ours.adversary.discriminator))
        self.loss.to(setting.device)
        self.average = Average(self.autoencoder, EMA_DECAY)
        self.networks: dict[Network, nn.Module] = {"autoencoder": self.autoencoder, "discriminator": self.loss.discriminator}
        self.optimisers: dict[Network, tuple[Optimizer, LRScheduler]] = {
            "autoencoder": ours.optimiser.build(self.autoencoder, 1000),
            "discriminator": ours.discriminator_optimiser.build(self.loss.discriminator, 1000),
        }

    def training_step(self, images: Tensor, updated: Network, noise: list[torch.Generator] | None) -> Tensor:
        """The loss of one network."""
        with self.setting.autocast():
            posterior = encode(self.autoencoder, images)
            reconstruction = decode(self.autoencoder, posterior.sample(cast(Any, noise)))  # one generator per sample serves
            return self.loss(images, reconstruction, posterior, updated, self.autoencoder.decoder.conv_out.weight)

    def backward(self, images: Tensor, updated: Network, noise: list[torch.Generator] | None = None) -> None:
        """Gradients of one network; the other is frozen."""
        for name, network in self.networks.items():
            network.requires_grad_(name == updated)
        self.training_step(images, updated, noise).backward()

    def step(self, pixels: Tensor) -> None:
        """One batch."""
        images = pixels_to_images(pixels.to(self.setting.device))
        for name, (optimiser, schedule) in self.optimisers.items():
            optimiser.zero_grad()
            self.backward(images, name)
            optimiser.step()
            schedule.step()
        self.autoencoder.requires_grad_(True)  # the average skips frozen parameters
        self.average.update()

    def seconds(self, pixels: Tensor, steps: int) -> float:
        """Seconds per batch after the first one."""
        self.step(pixels)
        return common.seconds_of(partial(self.step, pixels), self.setting.device, steps)


# -- side by side --------------------------------------------------------------------------------------------------------


def assert_same_gradients(setting: Setting, pixels: Tensor) -> None:
    """One batch with the same noise, in fp32 on the CPU: the gradients of all parameters are equal on both sides."""
    setting = replace(setting, bf16=False, device="cpu")
    ours = build_ours(setting, "contiguous")
    theirs = LatentDiffusion(ours, setting)
    ours.optimiser.max_grad_norm = ours.discriminator_optimiser.max_grad_norm = math.inf
    fit(ours, setting, 1)
    assert ours.seed is not None
    for name, network in zip(NETWORKS, (ours.autoencoder, ours.adversary.discriminator), strict=True):
        theirs.backward(pixels_to_images(pixels), name, sample_generators(ours.seed, planned(setting.batch)))
        mine, wanted = gradients(network), gradients(theirs.networks[name])
        # the gradient of a bias before a norm is rounding alone
        rounding = 1e-6 * max(float(gradient.abs().max()) for gradient in wanted.values())
        for parameter, gradient in wanted.items():
            error, size = float((mine[parameter] - gradient).abs().max()), float(gradient.abs().max())
            assert error <= 1e-3 * size + rounding, f"gradients of the {name}'s {parameter} differ by {error} of {size}"


def gradients(network: nn.Module) -> dict[str, Tensor]:
    """Of all parameters, by name."""
    return {name: cast(Tensor, parameter.grad) for name, parameter in network.named_parameters()}


def peak_memory(side: str, layout: str, setting: Setting) -> float:
    """MiB at the peak of three steps, in a new process; on the CPU what is resident beyond the imports."""
    common.quieten()
    imports = resident("VmRSS") if setting.device == "cpu" else 0.0
    ours = build_ours(setting, layout)
    if side == "ours":
        run = partial(fit, ours, setting, 3)
    else:
        theirs, pixels = LatentDiffusion(ours, setting), ready_pixels(setting)
        del ours
        run = partial(theirs.seconds, pixels, 2)
    if setting.device == "cuda":
        run()
        return torch.cuda.max_memory_allocated() / 2**20
    # ru_maxrss would count what building LPIPS' trunk takes for a moment; this resets the kernel's peak
    Path("/proc/self/clear_refs").write_text("5")
    run()
    return resident("VmHWM") - imports


def resident(which: str) -> float:
    """MiB of this process: VmRSS now, VmHWM at the peak."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(status[which].split()[0]) / 1024


def ready_pixels(setting: Setting) -> Tensor:
    """The batch of both sides, uint8."""
    shards = str(setting.folder / "shards")
    data = ReadyBatches(shards, shards, batch_size=setting.batch)
    data.setup("fit")
    return data.batch["image"]


def measure(setting: Setting, rounds: int, steps: int, quick: bool) -> dict[str, list[float]]:
    """Print all measurements as they come; return the ratios."""
    pixels = ready_pixels(setting)
    assert_same_gradients(setting, pixels)
    print("gradients agree", flush=True)

    ours = {layout: build_ours(setting, layout) for layout in LAYOUTS}
    networks = ours["contiguous"].autoencoder, ours["contiguous"].adversary.discriminator
    counts = [sum(parameter.numel() for parameter in network.parameters()) for network in networks]
    print(f"autoencoder {counts[0] / 1e6:.1f}M parameters, discriminator {counts[1] / 1e6:.1f}M")
    theirs = {layout: LatentDiffusion(ours[layout], setting) for layout in LAYOUTS}

    sides: dict[str, Callable[[str], float]] = {
        "ours": lambda layout: time_ours(ours[layout], setting, steps),
        "theirs": lambda layout: theirs[layout].seconds(pixels, steps),
    }
    tries = range(1 if quick else 2)
    found = {(side, layout): min(run(layout) for _ in tries) for side, run in sides.items() for layout in LAYOUTS}
    chosen = {side: min(LAYOUTS, key=lambda layout: found[side, layout]) for side in sides}
    for side in sides:
        rates = ", ".join(f"{layout} {setting.batch / found[side, layout]:.2f}" for layout in LAYOUTS)
        print(f"{side}: images/s by layout: {rates}; timed in {chosen[side]}", flush=True)
    del ours[next(layout for layout in LAYOUTS if layout != chosen["ours"])]
    del theirs[next(layout for layout in LAYOUTS if layout != chosen["theirs"])]

    timed: dict[str, Callable[[], float]] = {side: partial(run, chosen[side]) for side, run in sides.items()}
    timed["ours, equivariance"] = lambda: time_ours(ours[chosen["ours"]], setting, steps, equivariance=1.0)
    seconds = common.time_in_turn(timed, rounds, "s/step")
    for name, values in seconds.items():
        rates = [setting.batch / value for value in values]
        print(f"{name}: {statistics.median(rates):.2f} images/s ({min(rates):.2f} to {max(rates):.2f})")

    parts = anatomy(ours[chosen["ours"]], setting, pixels, 2 * steps)
    step = statistics.median(seconds["ours"])
    parts["rest: Lightning, logs (by subtraction)"] = step - sum(parts.values())
    print("parts of our step:")
    for part, value in parts.items():
        print(f"  {part:42} {1000 * value:8.1f} ms {value / step:6.1%}")

    ratios = {
        "autoencoder_step": [b / a for a, b in zip(seconds["ours"], seconds["theirs"], strict=True)],
        "equivariance_step": [a / b for a, b in zip(seconds["ours"], seconds["ours, equivariance"], strict=True)],
    }
    if not quick:
        ours.clear()
        theirs.clear()
        peaks = {side: peak_alone(side, chosen[side], setting) for side in sides}
        print("peak memory, MiB:", {side: round(peak) for side, peak in peaks.items()})
        ratios["autoencoder_memory"] = [peaks["theirs"] / peaks["ours"]]
    return ratios


def peak_alone(side: str, layout: str, setting: Setting) -> float:
    """:func:`peak_memory` in a process that has done nothing else."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(peak_memory, side, layout, setting).result()


def main() -> None:
    """Measure, and print the ratios."""
    parser = common.bench_parser(__doc__, "a small autoencoder (4M), few rounds, no memory: under 50 s")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--precision", choices=["bf16", "fp32"], help="default: bf16 where the machine supports it")
    parser.add_argument("--size", type=int, help="of the images, in pixels (default: 64; on a GPU 256 without --quick)")
    parser.add_argument("--batch", type=int, help="images (default: 4, 2 with --quick; on a GPU 16)")
    options = parser.parse_args()
    common.quieten()
    gpu = torch.cuda.is_available()
    bf16 = options.precision == "bf16" if options.precision else bf16_is_faster("cuda" if gpu else "cpu")
    network = ((32, 64, 128, 128), 1, 32) if options.quick else ((64, 128, 256, 256), 2, 64)
    large = gpu and not options.quick
    size = options.size or (256 if large else 64)
    batch = options.batch or (16 if large else 2 if options.quick else 4)
    rounds, steps = (1, 1) if options.quick else (options.rounds, 4)
    print(machine_info())
    how = "bf16 autocast" if bf16 else "fp32"
    print(f"widths {network[0]}, {size} px, batch {batch}, {how}, {rounds} rounds of {steps} steps, both with an average")
    if options.quick:
        print("quick: a small autoencoder and discriminator, no memory")
    with tempfile.TemporaryDirectory() as temporary:
        setting = Setting(*network, size, batch, bf16, "cuda" if gpu else "cpu", Path(temporary))
        write_images(setting.folder / "shards", "shapes", generate(batch, size, seed=0), batch)
        ratios = measure(setting, rounds, steps, options.quick)
    common.print_ratios(ratios)


if __name__ == "__main__":
    main()
