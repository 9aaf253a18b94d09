"""Interpolation between prompts and between seeds, as frames, GIF and MP4.

Between two prompts their *predictions* are mixed, ``(1 − a)·f(x_t, first) + a·f(x_t, second)``, not their embeddings: tokens at
the same place stand for different words, and where one prompt is longer there is nothing to mix with. A mixture of
predictions is defined for any two prompts and any network, and is as smooth in ``a`` as the network is in x_t; its score is
that of p(x | first)^(1 − a) · p(x | second)^a (Liu et al. 2022, arXiv 2206.01714). It costs one more row per frame that lies
between two prompts. Between two seeds the noise is interpolated spherically (Shoemake 1985; White 2016, arXiv 1609.04468).
"""

from __future__ import annotations

import os
import struct
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from fractions import Fraction
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from diffusers.utils.torch_utils import randn_tensor
from PIL import Image
from PIL.GifImagePlugin import getdata, getheader
from torch import Tensor, nn

from ldm.diffusion.conditioning import Condition, denoise
from ldm.diffusion.guidance import Conversion, Guidance, GuidedDenoiser
from ldm.diffusion.sampler import Sampler
from ldm.diffusion.scheduler import adds_noise, make_scheduler, samplers_for
from ldm.errors import UsageError
from ldm.files import atomic_file
from ldm.images import open_image
from ldm.inference.generate import scheduler_for
from ldm.inference.metadata import Provenance, save_png, xmp_packet
from ldm.inference.settings import GenerationSettings

if TYPE_CHECKING:
    from av.container import OutputContainer

    from ldm.pipeline import LatentDiffusionPipeline

XMP_BOX = bytes.fromhex("be7acfcb97a942e89c71999491e3afac")  # the id of an MP4's box with XMP (XMP specification, part 3)
LEAST_SIDE = 320  # smaller images are enlarged for GIF and MP4: programs show them small, or blurred
MAX_FRAMES = 100_000
MOST_GIF_FPS = 50  # browsers show frames of less than 2/100 s for 10/100 s


class Frame(NamedTuple):
    """A position between two key images, by their numbers: ``amount`` 0 is the first, 1 the second."""

    first: int
    second: int
    amount: float


def even_steps(keys: int, count: int, loop: bool = False) -> list[Frame]:
    """``count`` frames at even steps from the first of ``keys`` to the last, both included.

    With ``loop`` they lead on from the last key back to the first, and end one step before it. Raises UsageError for fewer than
    two keys, or fewer frames than keys.
    """
    if count > MAX_FRAMES:
        raise UsageError(f"{count} frames are more than {MAX_FRAMES}; give fewer")
    if keys < 2:
        raise UsageError("there is nothing between one image and itself; give two prompts or two seeds")
    if count < keys:
        raise UsageError(f"{count} frames cannot hold {keys} key images; give {keys} frames or more")
    legs, steps = (keys, count) if loop else (keys - 1, count - 1)
    frames = []
    for number in range(count):
        # integers first: at a key the amount is 0 or 1, without a rounding error
        leg, rest = divmod(number * legs, steps)
        frames.append(Frame(leg - 1, leg, 1.0) if leg == legs else Frame(leg, (leg + 1) % keys, rest / steps))
    return frames


def slerp(first: Tensor, second: Tensor, amount: float) -> Tensor:
    """Spherical interpolation from one noise to the other; the norm is interpolated linearly.

    The middle of a straight line between two noises has 0.71 of their norm, which no noise has: the denoiser makes flat images
    of it. Exact at 0 and 1, and where both are the same.
    """
    if amount in (0, 1):
        return second if amount else first
    one, other = first.double(), second.double()
    norms = one.norm(), other.norm()
    angle = ((one * other).sum() / (norms[0] * norms[1])).clamp(-1, 1).acos()
    if angle.sin() < 1e-6:
        return first.lerp(second, amount)
    direction = ((1 - amount) * angle).sin() * one / norms[0] + (amount * angle).sin() * other / norms[1]
    return (direction / angle.sin() * norms[0].lerp(norms[1], amount)).to(first)


class BlendedDenoiser(GuidedDenoiser):
    """Mixes the predictions of several captions, and guides the mixture. All in one call; an image of a single caption costs no
    more than in :class:`ldm.diffusion.guidance.GuidedDenoiser`."""

    def __init__(
        self,
        denoiser: nn.Module,
        condition: Condition,
        weights: Tensor,
        null: Condition,
        guidance: Guidance,
        conversion: Conversion | None = None,
    ):
        """
        Args:
            condition: that of T captions.
            weights: (B, T), of each caption in each image; an image's sum to 1, and those that are 0 cost nothing.
            null: the null condition (or a negative prompt), one row.
        """
        self.images, texts = weights.nonzero(as_tuple=True)
        self.weights = weights[self.images, texts][:, None, None, None]
        super().__init__(denoiser, condition.rows(texts), null.repeat(len(weights)), guidance, conversion)

    def __call__(self, x_t: Tensor, timestep: Tensor, t: Tensor) -> Tensor:
        inputs, times = x_t[self.images], timestep[self.images]
        if not self.guidance.guides(t):
            return self._blend(denoise(self.denoiser, inputs, times, self._conditional), len(x_t))
        both = denoise(self.denoiser, torch.cat([x_t, inputs]), torch.cat([timestep, times]), self._both)
        return self.combine(self._blend(both[len(x_t) :], len(x_t)), both[: len(x_t)].float(), x_t, t)

    def _blend(self, predictions: Tensor, count: int) -> Tensor:
        weighted = self.weights * predictions.float()
        return weighted.new_zeros(count, *weighted.shape[1:]).index_add(0, self.images, weighted)


def key_settings(settings: GenerationSettings, prompts: Sequence[str], seeds: Sequence[int]) -> list[GenerationSettings]:
    """The key images: prompts and seeds in pairs; a single one of either is in every pair. Raises UsageError where their
    numbers differ and neither is 1."""
    count = max(len(prompts), len(seeds))
    if {len(prompts), len(seeds)} - {1, count}:
        raise UsageError(f"{len(prompts)} prompts and {len(seeds)} seeds make no pairs; give one seed, or one per prompt")
    pairs = zip([*prompts] * (count // len(prompts)), [*seeds] * (count // len(seeds)), strict=True)
    return [replace(settings, prompt=prompt, seed=seed) for prompt, seed in pairs]


def deterministic_sampler(pipeline: LatentDiffusionPipeline, settings: GenerationSettings) -> Sampler:
    """The sampler that settings name, the pipeline's own where they name none. UsageError for one that adds noise at every step
    lists those that do not."""
    scheduler, diffusion = scheduler_for(pipeline, settings), pipeline.diffusion
    if adds_noise(scheduler):
        names = [name for name in samplers_for(*diffusion) if not adds_noise(make_scheduler(name, *diffusion))]
        raise UsageError(
            f"scheduler {settings.scheduler or type(scheduler).__name__} adds noise at every step, so that neighbouring frames "
            f"would differ by chance; choose one of: {', '.join(names)}"
        )
    return pipeline.make_sampler(settings.steps, scheduler=scheduler, height=settings.height, width=settings.width)


def generate_frames(
    pipeline: LatentDiffusionPipeline,
    keys: Sequence[GenerationSettings],
    count: int,
    loop: bool = False,
    batch_size: int = 8,
) -> Iterator[Image.Image]:
    """``count`` images from key to key, one after the other; no more than ``batch_size`` are held at once.

    A frame at a key is the image that the pipeline generates from the key's settings.

    Args:
        keys: two or more, which differ in prompt and seed alone.

    Raises:
        UsageError: at once, for keys, a number of frames, a prompt or a size that cannot be used, or a sampler that adds noise.
        LdmError: while generating, when the denoiser's prediction is not finite.
    """
    frames, settings, device = even_steps(len(keys), count, loop), keys[0], pipeline._execution_device
    if len({replace(key, prompt="any", seed=0) for key in keys}) > 1 or settings.image or settings.weak:
        raise UsageError("key images may differ in prompt and seed alone, and need no image and no weak model")
    texts = [*dict.fromkeys(key.prompt for key in keys)]
    tokens = pipeline.tokenize([*texts, settings.negative])
    shape = pipeline.latent_shape(1, settings.height, settings.width)
    sampler, conversion = deterministic_sampler(pipeline, settings), Conversion(*pipeline.diffusion)

    def noise(seed: int) -> Tensor:
        return randn_tensor(shape, generator=torch.Generator().manual_seed(seed), device=device, dtype=torch.float32)

    def generated() -> Iterator[Image.Image]:
        size = tuple(side * pipeline.vae_scale_factor for side in shape[2:])
        condition, null = (pipeline.with_sizes(pipeline.embed(few), size) for few in (tokens[:-1], tokens[-1:]))
        for start in range(0, count, batch_size):
            batch = frames[start : start + batch_size]
            weights, noises = torch.zeros((len(batch), len(texts)), device=device), []
            for row, frame in enumerate(batch):
                first, second = keys[frame.first], keys[frame.second]
                weights[row, texts.index(first.prompt)] += 1 - frame.amount
                weights[row, texts.index(second.prompt)] += frame.amount
                noises.append(slerp(noise(first.seed), noise(second.seed), frame.amount))
            blended = BlendedDenoiser(pipeline.transformer, condition, weights, null, settings.rule(), conversion)
            with torch.no_grad():
                latents = sampler(blended, torch.cat(noises))
            yield from pipeline.decode(latents)
        pipeline.maybe_free_model_hooks()

    return generated()


def frame_settings(keys: Sequence[GenerationSettings], frame: Frame) -> GenerationSettings | list[GenerationSettings]:
    """The settings of a frame: at a key its own, between two keys those of both."""
    if frame.amount in (0, 1):
        return keys[frame.second if frame.amount else frame.first]
    return [keys[frame.first], keys[frame.second]]


def require_rate(fps: float, gif: bool) -> None:
    """Raise UsageError for frames per second that cannot be shown."""
    if not 0.1 <= fps <= 240:
        raise UsageError(f"fps is {fps:g}; give 0.1 to 240 frames per second")
    if gif and fps > MOST_GIF_FPS:
        raise UsageError(f"fps is {fps:g}, but a GIF shows {MOST_GIF_FPS} frames per second at most; lower it, or write an MP4")


def write_animation(
    folder: Path,
    images: Iterable[Image.Image],
    keys: Sequence[GenerationSettings],
    frames: Sequence[Frame],
    provenance: Provenance,
    formats: Sequence[str],
    fps: float,
    on_frame: Callable[[int], None] | None = None,
) -> list[str]:
    """Write frames as ``0000.png`` and so on, then ``interpolation.gif`` and ``interpolation.mp4``, all marked as generated.

    Args:
        images: as :func:`generate_frames` gives them for ``keys``, one for each of ``frames``.
        formats: ``gif``, ``mp4``, both or none.
        on_frame: called with the number of frames written so far.

    Returns:
        The names of the GIF and the MP4, where they are asked for.
    """
    paths = []
    for number, (image, frame) in enumerate(zip(images, frames, strict=True)):
        paths.append(folder / f"{number:04d}.png")
        save_png(image, paths[-1], frame_settings(keys, frame), provenance, amount=frame.amount)
        if on_frame is not None:
            on_frame(len(paths))
    for name in formats:
        # read back one by one, so that a thousand frames take no more memory than one
        write = write_gif if name == "gif" else write_mp4
        write(folder / f"interpolation.{name}", map(_read_frame, paths), fps, xmp_packet(keys[0], provenance))
    return [f"interpolation.{name}" for name in formats]


def _read_frame(path: Path) -> Image.Image:
    with open_image(path, formats=("PNG",)) as image:
        image.load()
        return image


def write_gif(path: Path, images: Iterable[Image.Image], fps: float, xmp: str = "") -> None:
    """A GIF that repeats, written image by image, each with its own palette, and with an XMP packet.

    Durations are whole hundredths of a second, rounded so that their sum is right.
    """
    with atomic_file(path) as file:
        for number, image in enumerate(images):
            # without dithering, whose pattern would change from frame to frame
            indexed = _enlarged(image.quantize(256))
            if number == 0:
                # Pillow's own save holds all frames in memory
                file.writelines(getheader(indexed.copy(), info={"loop": 0})[0])
                if xmp:
                    # the bytes after the packet end it for readers that take it for sub-blocks
                    file.write(b"!\xff\x0bXMP DataXMP" + xmp.encode() + b"\x01" + bytes(range(255, -1, -1)) + b"\x00")
            hundredths = round((number + 1) * 100 / fps) - round(number * 100 / fps)
            file.writelines(getdata(indexed, duration=10 * hundredths, include_color_table=True))
        file.write(b";")


def require_video() -> None:
    """Raise UsageError where PyAV is not installed."""
    if find_spec("av") is None:
        raise UsageError("an MP4 needs the package av: pip install 'ldm[video]'; or write no MP4")


def write_mp4(path: Path, images: Iterable[Image.Image], fps: float, xmp: str = "") -> None:
    """H.264 in yuv420p, which is widely supported. Its sides are even, so the last row or column of odd ones is repeated. An
    XMP packet is in a box of its own at the end.

    The colours are BT.709 and marked so: without a mark, programs guess by the size. Raises UsageError where PyAV is not
    installed.
    """
    require_video()
    import av

    rate = Fraction(fps).limit_denominator(1001)
    with atomic_file(path) as file:
        with av.open(file, "w", format="mp4") as container:
            _encode(container, images, rate)
        if xmp:
            box = XMP_BOX + xmp.encode()
            file.seek(0, os.SEEK_END)
            file.write(struct.pack(">I4s", len(box) + 8, b"uuid") + box)


def _encode(container: OutputContainer, images: Iterable[Image.Image], rate: Fraction) -> None:
    import av
    from av.video.reformatter import ColorPrimaries, ColorRange, Colorspace, ColorTrc

    stream = None
    for image in images:
        pixels = np.asarray(_enlarged(image.convert("RGB")))
        pixels = np.pad(pixels, [(0, pixels.shape[0] % 2), (0, pixels.shape[1] % 2), (0, 0)], mode="edge")
        if stream is None:
            stream = container.add_stream("libx264", rate=rate, options={"crf": "14"})
            stream.height, stream.width = pixels.shape[:2]
            stream.pix_fmt = "yuv420p"
            codec = stream.codec_context
            codec.colorspace, codec.color_range = Colorspace.ITU709, ColorRange.MPEG
            codec.color_primaries, codec.color_trc = ColorPrimaries.BT709, ColorTrc.BT709
        frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
        container.mux(stream.encode(frame.reformat(format="yuv420p", dst_colorspace=Colorspace.ITU709)))
    if stream is not None:
        container.mux(stream.encode())


def _enlarged(image: Image.Image) -> Image.Image:
    """Enlarged to :data:`LEAST_SIDE` or more by an integer factor, so that every pixel stays as it is."""
    factor = -(-LEAST_SIDE // max(image.size))
    return image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)
