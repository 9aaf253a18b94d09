"""Guided sampling from prompts to PIL images: our pipeline against diffusers' stock ``PixArtAlphaPipeline``.

    python tools/bench/sample.py [--quick] [--rounds R] [--precision bf16|fp32]

Three pipelines share text encoder, autoencoder, scheduler (DPM-Solver++ 2M), steps, guidance and starting noise:

- ``ours``: ``LatentDiffusionPipeline`` with a ``PixArtTransformer2DModel``;
- ``theirs``: ``PixArtAlphaPipeline`` with the same network;
- ``dit``: ``LatentDiffusionPipeline`` with our DiT, whose number of parameters is within 2% of PixArt's.

Batches are of one and of sixteen images, of four prompts in turn. Our pipeline pads texts to the longest prompt of the batch,
theirs to 120 tokens (``padded``); theirs is also timed with texts cut to the longest prompt. In bf16 all weights are bf16.

The images of ours and theirs are compared; they differ a little, because theirs rounds the timestep to a whole thousandth and
ours does not. Where the time goes (text encoder, denoiser, decoding, rest) is measured in a separate pass, which counts for no
ratio. Ends with `ratio NAME MEDIAN MIN MAX`: seconds of theirs over ours, and over our DiT's, for each batch and precision.
"""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial, wraps
from typing import Any

import common
import numpy as np
import torch
from diffusers import PixArtAlphaPipeline
from dit import DIFFUSION, PADDED, PRECISION, PROMPTS, Setting, build, precisions_of
from PIL import Image
from torch import Tensor

from ldm.diffusion.scheduler import make_scheduler
from ldm.machine import machine_info
from ldm.models.autoencoder import AutoencoderConfig
from ldm.models.text_encoder import TextEncoder
from ldm.pipeline import LatentDiffusionPipeline

BATCHES = (1, 16)
GUIDANCE = 4.0
# widths and layers per block; decoding is part of the time of an image
AUTOENCODERS = {"quick": ([32, 64, 64, 64], 1), "cpu": ([64, 128, 256, 256], 1), "gpu": ([128, 256, 512, 512], 2)}


@dataclass(frozen=True)
class TimedPipeline:
    """A pipeline with its options; ``text_length``: tokens that ``PixArtAlphaPipeline`` pads texts to, None for ours."""

    pipeline: Any  # diffusers' base class declares no call and no networks
    setting: Setting
    text_length: int | None

    def sample(self, noise: Tensor) -> list[Image.Image]:
        """An image for each row of noise, from the prompts in turn."""
        prompts = list(itertools.islice(itertools.cycle(PROMPTS), len(noise)))
        options: dict[str, Any] = {"num_inference_steps": self.setting.sampling_steps, "guidance_scale": GUIDANCE}
        if self.text_length is not None:
            options |= {"max_sequence_length": self.text_length, "use_resolution_binning": False, "clean_caption": False}
        return self.pipeline(prompts, latents=noise.to(self.pipeline.dtype), **options).images

    def seconds(self, noise: Tensor) -> float:
        """Seconds of one run."""
        return common.seconds_of(lambda: self.sample(noise), self.setting.device)

    def shares(self, noise: Tensor) -> dict[str, float]:
        """The share of each part in the time of one run."""
        with stopwatch(self.pipeline, self.setting) as parts:
            whole = self.seconds(noise)
        shares = {part: seconds / whole for part, seconds in parts.items()}
        return shares | {"rest": 1 - sum(shares.values())}


@contextmanager
def stopwatch(pipeline: Any, setting: Setting) -> Iterator[dict[str, float]]:
    """The seconds spent in a pipeline's three networks within this context."""
    seconds = {"text": 0.0, "denoiser": 0.0, "decoding": 0.0}

    def timed(part: str, call: Callable) -> Callable:
        @wraps(call)
        def timed_call(*arguments: Any, **options: Any) -> Any:
            began = setting.now()
            answer = call(*arguments, **options)
            seconds[part] += setting.now() - began
            return answer

        return timed_call

    places = [(pipeline.text_encoder, "forward"), (pipeline.transformer, "forward"), (pipeline.vae, "decode")]
    for part, (network, name) in zip(seconds, places, strict=True):
        setattr(network, name, timed(part, getattr(network, name)))
    try:
        yield seconds
    finally:
        for network, name in places:  # uncovers the methods of the class
            delattr(network, name)


def timed_pipelines(setting: Setting, autoencoder: tuple[list[int], int], dtype: torch.dtype) -> dict[str, TimedPipeline]:
    """By name, with weights of ``dtype``; ``theirs_padded`` is theirs by default."""
    text_encoder = TextEncoder.load("minilm", setting.device)
    length = max(map(len, text_encoder.tokenizer(PROMPTS)["input_ids"]))
    pixart = build("theirs", setting, text_encoder.width).eval()
    dit = build("ours", setting, text_encoder.width).eval()
    counts = {
        name: sum(weight.numel() for weight in network.parameters()) / 1e6
        for name, network in (("PixArt", pixart), ("DiT", dit))
    }
    widths, layers = autoencoder
    torch.manual_seed(0)
    vae = AutoencoderConfig(widths, 4, layers, sample_size=8 * setting.side).build().eval()
    counts["decoder"] = sum(weight.numel() for weight in vae.decoder.parameters()) / 1e6
    print("parameters:", ", ".join(f"{name} {count:.2f}M" for name, count in counts.items()), end="; ")
    print(f"{(setting.side // 2) ** 2} tokens of the image, up to {length} of the text, padded {PADDED}")
    assert abs(counts["DiT"] / counts["PixArt"] - 1) < 0.02, "the two networks differ in size"

    def make(kind: type, network: torch.nn.Module, text_length: int | None = None) -> TimedPipeline:
        scheduler = make_scheduler("dpm++2m", *DIFFUSION)
        parts = {"vae": vae, "text_encoder": text_encoder.model, "tokenizer": text_encoder.tokenizer}
        pipeline = kind(**parts, transformer=network, scheduler=scheduler).to(setting.device, dtype)
        pipeline.set_progress_bar_config(disable=True)
        return TimedPipeline(pipeline, setting, text_length)

    return {
        "ours": make(LatentDiffusionPipeline, pixart),
        "theirs": make(PixArtAlphaPipeline, pixart, length),
        "theirs_padded": make(PixArtAlphaPipeline, pixart, PADDED),
        "dit": make(LatentDiffusionPipeline, dit),
    }


def print_differences(precision: str, pipelines: dict[str, TimedPipeline], noise: Tensor) -> None:
    """Print the differences between images that should be equal."""
    names = ("ours", "theirs", "theirs_padded")
    ours, *theirs = (np.stack([*map(np.asarray, pipelines[name].sample(noise))]).astype(int) for name in names)
    apart = [abs(images - ours).max() for images in theirs]
    print(f"{precision}, one PixArt in both pipelines: images differ by at most {apart[0]} of 255,", end=" ")
    print(f"padded {apart[1]} (their standard deviation is {ours.std():.0f})", flush=True)


def measure(pipelines: dict[str, dict[str, TimedPipeline]], setting: Setting, rounds: int) -> dict[str, list[float]]:
    """Print all measurements as they come; return the ratios. ``pipelines``: by precision, then by name."""
    noise = torch.randn(max(BATCHES), 4, setting.side, setting.side, generator=torch.Generator().manual_seed(0)).to(
        setting.device
    )
    for precision, those in pipelines.items():
        print_differences(precision, those, noise[: len(PROMPTS)])
    # the sides of a ratio next to each other
    order = [(batch, precision, name) for batch in BATCHES for precision, those in pipelines.items() for name in those]
    for batch, precision, name in order:
        pipelines[precision][name].seconds(noise[:batch])  # the first run of a size is slow
        shares = pipelines[precision][name].shares(noise[:batch])
        parts = ", ".join(f"{part} {share:.0%}" for part, share in shares.items())
        print(f"batch {batch}, {precision}, {name}: {parts}", flush=True)
    timed = {key: partial(pipelines[key[1]][key[2]].seconds, noise[: key[0]]) for key in order}
    seconds = common.time_in_turn(timed, rounds)
    for (batch, precision, name), values in seconds.items():
        median = statistics.median(values)
        print(f"batch {batch}, {precision}, {name}: {median:.3f} s, {batch / median:.2f} images/s")
    ratios = {}
    for batch, precision in itertools.product(BATCHES, pipelines):
        for theirs, ours in itertools.product(("theirs", "theirs_padded"), ("ours", "dit")):
            name = f"sample_{ours}_{precision}_batch{batch}{theirs.removeprefix('theirs')}"
            pairs = zip(seconds[batch, precision, theirs], seconds[batch, precision, ours], strict=True)
            ratios[name] = [slow / fast for slow, fast in pairs]
    return ratios


def main() -> None:
    """Measure, and print the ratios."""
    parser = common.bench_parser(__doc__, "a small network (14M) and few steps, two rounds: under 50 s")
    parser.add_argument("--rounds", type=int, help="default: 5, 2 with --quick")
    parser.add_argument("--precision", choices=["bf16", "fp32"], help=PRECISION)
    options = parser.parse_args()
    common.quieten()
    gpu = torch.cuda.is_available()
    # width, layers, heads and side of the latents: DiT-S of the paper, on a GPU DiT-B
    sizes, steps = ((256, 12, 4, 16), 2) if options.quick else ((768, 12, 12, 32), 20) if gpu else ((384, 12, 6, 32), 8)
    precisions = precisions_of(options)
    setting = Setting(*sizes, max(BATCHES), steps, False, "cuda" if gpu else "cpu")
    rounds = options.rounds or (2 if options.quick else 5)
    print(machine_info())
    print(setting, f"{rounds} rounds")
    autoencoder = AUTOENCODERS["quick" if options.quick else "gpu" if gpu else "cpu"]
    dtypes = {"fp32": torch.float32, "bf16": torch.bfloat16}
    pipelines = {precision: timed_pipelines(setting, autoencoder, dtypes[precision]) for precision in precisions}
    common.print_ratios(measure(pipelines, setting, rounds))


if __name__ == "__main__":
    main()
