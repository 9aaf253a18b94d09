"""The network of stage two: our DiT against diffusers' ``PixArtTransformer2DModel``.

    python tools/bench/dit.py [--quick] [--rounds R] [--precision bf16|fp32] [--compile]

Both have the same width, depth, heads, tokens and text, and numbers of parameters within 2% of each other. The training step
is the same (rectified flow, mean squared error, AdamW, clipping); only the network differs. Guided sampling goes from prompts
to latents with the same text encoder, scheduler (DPM-Solver++ 2M), steps and guidance: ours through our pipeline, theirs
through ``PixArtAlphaPipeline``. In bf16 both train under autocast and sample with weights in bf16; with --compile the blocks
of both are compiled.

Texts have two lengths. ``padded``: to 120 tokens, as ``PixArtAlphaPipeline`` and its training pad them; both networks get the
same tensors, and ours drops the padding by the mask. Otherwise theirs are cut to the longest prompt, too.

The outputs of two different networks are not compared. Compared are the latents of both pipelines with the same PixArt inside,
and those of our DiT with the text's keys and values computed once or at every step. Ends with `ratio NAME MEDIAN MIN MAX`:
theirs over ours, of time per training step and per sampling run, in each precision.
"""

from __future__ import annotations

import argparse
import copy
import itertools
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import common
import torch
from diffusers import DPMSolverMultistepScheduler, PixArtAlphaPipeline, PixArtTransformer2DModel
from torch import Tensor, nn

from ldm.diffusion.conditioning import Condition
from ldm.diffusion.objective import DenoisingObjective
from ldm.diffusion.path import RectifiedFlow
from ldm.diffusion.prediction import Velocity
from ldm.diffusion.scheduler import make_scheduler
from ldm.diffusion.timesteps import LogitNormal
from ldm.machine import bf16_is_faster, machine_info
from ldm.models.autoencoder import AutoencoderConfig
from ldm.models.compiling import compile_blocks
from ldm.models.dit import DiT, transformer_blocks
from ldm.models.text_encoder import TextEncoder
from ldm.pipeline import LatentDiffusionPipeline
from ldm.training.optimiser import OptimiserConfig

DIFFUSION = RectifiedFlow(), Velocity()
PADDED = 120  # tokens, of PixArtAlphaPipeline
PRECISION = "default: fp32, and bf16 where the machine supports it; with --quick on a CPU only the last of them"
PROMPTS = [
    "a large red circle at the center and a small cyan heart at the left on a black background",
    "a large yellow ring at the top of a gray background with a tiny blue star in the middle of it",
    "a small green star at the right on a beige background",
    "two orange triangles, one of them upside down, above a wide purple rectangle on a white background",
]


@dataclass(frozen=True)
class Setting:
    """The sizes of the networks and of what they are given."""

    width: int
    layers: int
    heads: int
    side: int  # of the latents; a token is 2 x 2 of them
    batch: int  # of a training step
    sampling_steps: int
    compiled: bool
    device: str

    def now(self) -> float:
        return common.now(self.device)

    def autocast(self, precision: str) -> torch.autocast:
        return torch.autocast(self.device, torch.bfloat16, enabled=precision == "bf16")

    def ready(self, network: nn.Module) -> nn.Module:
        """``network`` on the device, compiled if that is asked for."""
        network.to(self.device)
        if self.compiled:
            compile_blocks(network, transformer_blocks(network), True, torch.device(self.device))
        return network


# -- the two networks ----------------------------------------------------------------------------------------------------


def build(side: str, setting: Setting, caption_channels: int) -> nn.Module:
    """A network with random weights everywhere, adaLN's zero gates included."""
    torch.manual_seed(0)
    sizes: dict[str, Any] = dict(in_channels=4, sample_size=setting.side, patch_size=2, num_layers=setting.layers)
    if side == "ours":
        network = DiT(width=setting.width, num_attention_heads=setting.heads, caption_channels=caption_channels, **sizes)
    else:
        network = PixArtTransformer2DModel(
            num_attention_heads=setting.heads,
            attention_head_dim=setting.width // setting.heads,
            cross_attention_dim=setting.width,
            caption_channels=caption_channels,
            out_channels=4,
            use_additional_conditions=False,
            **sizes,
        )
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    return setting.ready(network)


# -- a training step -----------------------------------------------------------------------------------------------------


class Training:
    """The training step of either network, on a batch held in memory."""

    def __init__(self, network: nn.Module, setting: Setting, text: Condition):
        self.network, self.setting = network, setting
        self.objective = DenoisingObjective(*DIFFUSION, LogitNormal())
        self.optimiser, _ = OptimiserConfig(1e-4).build(network, 1000)
        self.x0 = torch.randn(setting.batch, 4, setting.side, setting.side, device=setting.device)
        rows = torch.arange(setting.batch, device=setting.device) % len(text.mask)
        self.text = Condition(text.embeddings[rows], text.mask[rows])

    def step(self, precision: str) -> None:
        with self.setting.autocast(precision):
            loss = self.objective(self.network, self.x0, self.text).loss.mean()
        loss.backward()
        nn.utils.clip_grad_norm_(self.network.parameters(), 1.0)
        self.optimiser.step()
        self.optimiser.zero_grad()

    def seconds(self, precision: str, steps: int) -> float:
        """Seconds per step after the first one."""
        self.step(precision)
        return common.seconds_of(partial(self.step, precision), self.setting.device, steps)


# -- sampling ------------------------------------------------------------------------------------------------------------


def sampler(
    side: str, network: nn.Module, text_encoder: TextEncoder, setting: Setting, text_length: int, precision: str = "fp32"
) -> Callable[[Tensor], Tensor]:
    """A function from noise (4, 4, h, w) to the latents of the four prompts; our pipeline takes either network.

    ``text_length`` is that of ``PixArtAlphaPipeline``; our pipeline encodes prompts at the length they have.
    """
    dtype, text_model = torch.float32, text_encoder.model
    if precision == "bf16":
        dtype, network, text_model = torch.bfloat16, setting.ready(copy.deepcopy(network)), copy.deepcopy(text_model)
    parts: dict[str, Any] = {
        "vae": AutoencoderConfig([8, 8, 8, 8], 4, 1, 4, False, 32).build().eval(),
        "text_encoder": text_model,
        "tokenizer": text_encoder.tokenizer,
        "transformer": network,
        "scheduler": make_scheduler("dpm++2m", *DIFFUSION),
    }
    assert isinstance(parts["scheduler"], DPMSolverMultistepScheduler)
    pipeline: Any = (LatentDiffusionPipeline if side == "ours" else PixArtAlphaPipeline)(**parts).to(setting.device, dtype)
    pipeline.set_progress_bar_config(disable=True)
    options: dict[str, Any] = {"num_inference_steps": setting.sampling_steps, "guidance_scale": 4.0, "output_type": "latent"}
    if side == "theirs":
        options |= {"max_sequence_length": text_length, "use_resolution_binning": False, "clean_caption": False}

    def sample(noise: Tensor) -> Tensor:
        network.eval()
        latents = pipeline(PROMPTS, latents=noise.to(dtype), **options).images
        network.train()
        return latents

    return sample


def print_differences(networks: dict[str, nn.Module], text_encoder: TextEncoder, setting: Setting, noise: Tensor) -> None:
    """Print the differences between outputs that should be equal, in fp32."""
    pixart = networks["theirs"]
    loops = [sampler(side, pixart, text_encoder, setting, PADDED)(noise) for side in networks]
    apart, spread = (loops[0] - loops[1]).abs().max().item(), loops[1].std().item()
    print(f"one PixArt in both pipelines: latents differ by at most {apart:.1e} (of {spread:.2f}), as theirs rounds the time")
    dit = networks["ours"].eval()
    assert isinstance(dit, DiT)
    text = Condition(*text_encoder.encode(PROMPTS))
    arguments = noise, text.embeddings, torch.full((len(PROMPTS),), 500.0, device=noise.device), text.mask
    with torch.no_grad():
        plain = dit(*arguments).sample
        kept = dit(noise, dit.encode_text(text.embeddings, text.mask), arguments[2]).sample
    apart, spread = (kept - plain).abs().max().item(), plain.std().item()
    print(f"our DiT, text computed once or at every step: outputs differ by at most {apart:.1e} (of {spread:.2f})", flush=True)
    dit.train()


def padded(text: Condition) -> Condition:
    """``text`` with padding after it."""
    extra = PADDED - text.mask.shape[1]
    return Condition(nn.functional.pad(text.embeddings, (0, 0, 0, extra)), nn.functional.pad(text.mask, (0, extra)))


# -- side by side --------------------------------------------------------------------------------------------------------


def measure(setting: Setting, precisions: list[str], rounds: int, steps: int) -> dict[str, list[float]]:
    """Print all measurements as they come; return the ratios."""
    text_encoder = TextEncoder.load("minilm", setting.device)
    networks = {side: build(side, setting, text_encoder.width) for side in ("ours", "theirs")}
    counts = {side: sum(parameter.numel() for parameter in network.parameters()) for side, network in networks.items()}
    text = Condition(*text_encoder.encode(PROMPTS))
    print(f"parameters: ours {counts['ours'] / 1e6:.2f}M, theirs {counts['theirs'] / 1e6:.2f}M", end="; ")
    print(f"{(setting.side // 2) ** 2} tokens of the image, {text.mask.shape[1]} of the text, padded {PADDED}")
    assert abs(counts["ours"] / counts["theirs"] - 1) < 0.02, "the two networks differ in size"
    noise = torch.randn(len(PROMPTS), 4, setting.side, setting.side, generator=torch.Generator().manual_seed(0))
    noise = noise.to(setting.device)
    print_differences(networks, text_encoder, setting, noise)

    texts = {"": text, "_padded": padded(text)}
    timed: dict[tuple[str, str, str, str], Callable[[], float]] = {}
    for (side, network), (length, condition) in itertools.product(networks.items(), texts.items()):
        training = Training(network, setting, condition)
        for precision in precisions:
            sample = sampler(side, network, text_encoder, setting, condition.mask.shape[1], precision)
            timed["step", precision, length, side] = partial(training.seconds, precision, steps)
            if not (side == "ours" and length):  # our pipeline pads nothing
                timed["sampling", precision, length, side] = partial(common.seconds_of, partial(sample, noise), setting.device)
            if setting.compiled:  # compilation is not timed
                training.step(precision)
                sample(noise)
    # sorted: the two sides of a ratio next to each other
    seconds = common.time_in_turn({key: timed[key] for key in sorted(timed)}, rounds)
    suffix = "_compiled" if setting.compiled else ""
    ratios = {}
    for (what, precision, length, side), theirs in seconds.items():
        if side == "theirs":
            ours = seconds[what, precision, length if what == "step" else "", "ours"]
            ratios[f"dit_{what}_{precision}{length}{suffix}"] = [b / a for a, b in zip(ours, theirs, strict=True)]
    return ratios


def precisions_of(options: argparse.Namespace) -> list[str]:
    """Of ``--precision``, with the default that ``PRECISION`` states."""
    if options.precision:
        return [options.precision]
    all_of_them = ["fp32"] + ["bf16"] * bf16_is_faster("cuda" if torch.cuda.is_available() else "cpu")
    return all_of_them[-1:] if options.quick and not torch.cuda.is_available() else all_of_them


def main() -> None:
    """Measure, and print the ratios."""
    parser = common.bench_parser(__doc__, "small networks (14M), few tokens, three rounds: under 50 s")
    parser.add_argument("--rounds", type=int, help="default: 5, 3 with --quick")
    parser.add_argument("--precision", choices=["bf16", "fp32"], help=PRECISION)
    parser.add_argument("--compile", action="store_true", help="compile the blocks of both; takes minutes on a CPU")
    options = parser.parse_args()
    common.quieten()
    gpu = torch.cuda.is_available()
    precisions = precisions_of(options)
    if options.quick:
        sizes, rounds, steps = (256, 12, 4, 16, 8, 6), options.rounds or 3, 1
    else:  # DiT-S of the paper, on a GPU DiT-B, on latents of 32 x 32
        sizes, rounds, steps = ((768, 12, 12, 32, 64, 20) if gpu else (384, 12, 6, 32, 8, 8)), options.rounds or 5, 3
    setting = Setting(*sizes, options.compile, "cuda" if gpu else "cpu")
    print(machine_info())
    print(setting, f"{rounds} rounds of {steps} steps and a sampling of {len(PROMPTS)} prompts")
    ratios = measure(setting, precisions, rounds, steps)
    common.print_ratios(ratios)


if __name__ == "__main__":
    main()
