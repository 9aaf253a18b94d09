"""Guided sampling, from words to PIL images: our pipeline against diffusers' stock ``PixArtAlphaPipeline``.

    python tools/bench/sample.py [--quick] [--rounds R] [--precision bf16|fp32]

Three pipelines share text encoder, autoencoder, scheduler (DPM-Solver++ 2M), steps, guidance and starting noise:

- ``ours``: ``LatentDiffusionPipeline`` round a ``PixArtTransformer2DModel``;
- ``theirs``: ``PixArtAlphaPipeline`` round that very network;
- ``dit``: ``LatentDiffusionPipeline`` round our DiT, its parameters within 2 % of PixArt's.

One image at a time and sixteen at once, of four prompts in turn. Texts are as each pipeline comes: ours as long as the
longest prompt of the batch, theirs padded to 120 tokens (``padded``); and theirs cut to the longest prompt. In bf16 all have
their weights in bf16.

The images of ours and theirs are compared; they differ a little, because theirs tells the network its time in whole
thousandths and ours exactly. Where the time goes (text encoder, denoiser, decoding, and the rest) is measured in a pass of its
own, which counts for no ratio. Ends with `ratio NAME MEDIAN MIN MAX`: seconds of theirs over ours, and over our DiT's, at each
batch and precision.
"""

from __future__ import annotations

# isort: off
import ldm  # noqa: F401 - first: it settles how OpenMP waits, for both that are compared

# isort: on
import argparse
import itertools
import statistics
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import wraps
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline, PixArtAlphaPipeline
from dit import DIFFUSION, PADDED, PRECISION, PROMPTS, Setting, build, precisions_of, quieten
from PIL import Image
from torch import Tensor

from ldm.diffusion.scheduler import make_scheduler
from ldm.machine import machine_info
from ldm.models.autoencoder import AutoencoderConfig
from ldm.models.text_encoder import TextEncoder
from ldm.pipeline import LatentDiffusionPipeline

BATCHES = (1, 16)
GUIDANCE = 4.0
# of the decoder; its time is part of an image's
AUTOENCODERS = {"quick": ([32, 64, 64, 64], 1), "cpu": ([64, 128, 256, 256], 1), "gpu": ([128, 256, 512, 512], 2)}


@dataclass(frozen=True)
class Contestant:
    """A pipeline, and how it is asked."""

    pipeline: DiffusionPipeline
    setting: Setting
    longest: int | None  # tokens that theirs pads texts to; ours takes them at their length

    def draw(self, noise: Tensor) -> list[Image.Image]:
        """An image for each row of noise, of the prompts in turn."""
        prompts = list(itertools.islice(itertools.cycle(PROMPTS), len(noise)))
        options: dict[str, Any] = {"num_inference_steps": self.setting.sampling_steps, "guidance_scale": GUIDANCE}
        if self.longest is not None:
            options |= {"max_sequence_length": self.longest, "use_resolution_binning": False, "clean_caption": False}
        return self.pipeline(prompts, latents=noise.to(self.pipeline.dtype), **options).images

    def seconds(self, noise: Tensor) -> float:
        """Of one run."""
        began = self.setting.now()
        self.draw(noise)
        return self.setting.now() - began

    def shares(self, noise: Tensor) -> dict[str, float]:
        """Where the seconds of one run go, each part over the whole."""
        with stopwatch(self.pipeline, self.setting) as parts:
            whole = self.seconds(noise)
        shares = {part: spent / whole for part, spent in parts.items()}
        return shares | {"rest": 1 - sum(shares.values())}


@contextmanager
def stopwatch(pipeline: DiffusionPipeline, setting: Setting) -> Iterator[dict[str, float]]:
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
        for network, name in places:  # the class's own show again
            delattr(network, name)


def contestants(setting: Setting, autoencoder: tuple[list[int], int], dtype: torch.dtype) -> dict[str, Contestant]:
    """By name, with weights of ``dtype``; ``theirs_padded`` is theirs as it comes."""
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
    print(f"{(setting.side // 2) ** 2} tokens of image, up to {length} of text, padded {PADDED}")
    assert abs(counts["DiT"] / counts["PixArt"] - 1) < 0.02, "the two networks are not of one size"

    def make(kind: type[DiffusionPipeline], network: torch.nn.Module, longest: int | None = None) -> Contestant:
        scheduler = make_scheduler("dpm++2m", *DIFFUSION)
        parts = {"vae": vae, "text_encoder": text_encoder.model, "tokenizer": text_encoder.tokenizer}
        pipeline = kind(**parts, transformer=network, scheduler=scheduler).to(setting.device, dtype)
        pipeline.set_progress_bar_config(disable=True)
        return Contestant(pipeline, setting, longest)

    return {
        "ours": make(LatentDiffusionPipeline, pixart),
        "theirs": make(PixArtAlphaPipeline, pixart, length),
        "theirs_padded": make(PixArtAlphaPipeline, pixart, PADDED),
        "dit": make(LatentDiffusionPipeline, dit),
    }


def state_differences(precision: str, entered: dict[str, Contestant], noise: Tensor) -> None:
    """Print how far apart are the images that ought to be the same."""
    ours, *theirs = (
        np.stack([*map(np.asarray, entered[name].draw(noise))]).astype(int) for name in ("ours", "theirs", "theirs_padded")
    )
    apart = [abs(images - ours).max() for images in theirs]
    print(f"{precision}, one PixArt in both pipelines: images differ by at most {apart[0]} of 255,", end=" ")
    print(f"padded {apart[1]} (their standard deviation is {ours.std():.0f})", flush=True)


def measure(entered: dict[str, dict[str, Contestant]], setting: Setting, rounds: int) -> dict[str, list[float]]:
    """Everything, printed as it comes; returns the ratios. ``entered``: by precision, then by name."""
    noise = torch.randn(max(BATCHES), 4, setting.side, setting.side, generator=torch.Generator().manual_seed(0)).to(
        setting.device
    )
    for precision, those in entered.items():
        state_differences(precision, those, noise[: len(PROMPTS)])
    # those of a figure next to each other
    order = [(batch, precision, name) for batch in BATCHES for precision, those in entered.items() for name in those]
    for batch, precision, name in order:
        entered[precision][name].seconds(noise[:batch])  # the first run of a size is slow
        shares = entered[precision][name].shares(noise[:batch])
        spent = ", ".join(f"{part} {share:.0%}" for part, share in shares.items())
        print(f"batch {batch}, {precision}, {name}: {spent}", flush=True)
    seconds: dict[tuple[int, str, str], list[float]] = {key: [] for key in order}
    for turn in range(rounds):
        for batch, precision, name in order if turn % 2 == 0 else reversed(order):
            seconds[batch, precision, name].append(entered[precision][name].seconds(noise[:batch]))
        print(
            f"round {turn + 1}, s:",
            {" ".join(map(str, key)): round(values[-1], 3) for key, values in seconds.items()},
            flush=True,
        )
    for (batch, precision, name), values in seconds.items():
        median = statistics.median(values)
        print(f"batch {batch}, {precision}, {name}: {median:.3f} s, {batch / median:.2f} images/s")
    ratios = {}
    for batch, precision in itertools.product(BATCHES, entered):
        for theirs, ours in itertools.product(("theirs", "theirs_padded"), ("ours", "dit")):
            name = f"sample_{ours}_{precision}_batch{batch}{theirs.removeprefix('theirs')}"
            pairs = zip(seconds[batch, precision, theirs], seconds[batch, precision, ours], strict=True)
            ratios[name] = [slow / quick for slow, quick in pairs]
    return ratios


def main() -> None:
    """Measure, and print the ratios."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a small network (14M) and few steps, two rounds: under 50 s")
    parser.add_argument("--rounds", type=int, help="default: 5, 2 with --quick")
    parser.add_argument("--precision", choices=["bf16", "fp32"], help=PRECISION)
    options = parser.parse_args()
    quieten()
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
    entered = {precision: contestants(setting, autoencoder, dtypes[precision]) for precision in precisions}
    for name, values in sorted(measure(entered, setting, rounds).items()):
        print(f"ratio {name} {statistics.median(values):.2f} {min(values):.2f} {max(values):.2f}")


if __name__ == "__main__":
    main()
