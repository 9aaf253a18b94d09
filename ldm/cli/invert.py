"""``ldm invert``: the noise that an image would be drawn from, to draw it again or as other words say."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from ldm.cli.parser import Commands, add_command
from ldm.progress import Progress

if TYPE_CHECKING:
    from PIL import Image


def add(commands: Commands) -> None:
    """The command."""
    invert = add_command(
        commands,
        "invert",
        run_invert,
        "find the noise that an image would be drawn from, and draw it again, with other words an edited image",
        'ldm invert pipeline image.png "a red ring" --out inverted --edit "a blue ring"',
    )
    invert.add_argument("model", help="pipeline directory")
    invert.add_argument("image", help="JPEG, PNG or WebP image")
    invert.add_argument("prompt", nargs="?", default="", help="what the image shows (default: nothing is said)")
    invert.add_argument(
        "--out",
        required=True,
        help="new folder for noise.safetensors, reconstruction.png, redrawn.png, edit-1.png and on",
    )
    invert.add_argument("--edit", action="append", default=[], metavar="PROMPT", help="draw it as this says; may be repeated")
    invert.add_argument("--guidance", type=float, default=3.0, help="guidance scale of --edit; 1 is none (default: 3)")
    invert.add_argument("--steps", type=int, default=50, help="of each way (default: 50)")
    invert.add_argument("--width", type=int, metavar="PIXELS", help="to draw it at (default: the image's own)")
    invert.add_argument("--height", type=int, metavar="PIXELS")


def run_invert(options: argparse.Namespace) -> None:
    import numpy as np
    import torch
    from safetensors.torch import save_file
    from torchmetrics.functional.image import peak_signal_noise_ratio

    from ldm.diffusion.scheduler import SAMPLERS, make_scheduler, samplers_for
    from ldm.files import atomic_folder, require_new_folder
    from ldm.models.image_processor import PreparedImages, to_output
    from ldm.pipeline import load_pipeline, read_image

    out = require_new_folder(options.out, "the noise and the images")
    image = read_image(options.image).convert("RGB")
    pipeline = load_pipeline(options.model)
    pipeline.set_progress_bar_config(disable=True)
    for prompt in options.edit:
        pipeline.check_prompt(prompt)
    name = next(name for name in samplers_for(*pipeline.diffusion) if SAMPLERS[name].invertible)
    pipeline.scheduler = make_scheduler(name, *pipeline.diffusion)
    size = {"height": options.height, "width": options.width}
    # without what the pipeline adds to fill its sizes
    original = PreparedImages.of(image, None, **size, unit=1).images
    original = to_output(original, "pil")[0]

    def nearness(drawn: Image.Image, to: Image.Image) -> float:
        both = (torch.from_numpy(np.array(each, dtype=np.float32)) for each in (drawn, to))
        return float(peak_signal_noise_ratio(*both, data_range=255.0))

    # the folder first: that it cannot be written should be known before the work
    with atomic_folder(out) as folder, Progress("inverting", 3 + len(options.edit)) as progress:
        reconstruction = pipeline.decode(pipeline.encode_images(image, **size))[0].crop((0, 0, *original.size))
        reconstruction.save(folder / "reconstruction.png")
        progress.update(1)
        noise = pipeline.invert(image, options.prompt, options.steps, **size)
        save_file({"noise": noise.cpu()}, folder / "noise.safetensors")
        progress.update(2)
        edits = [(prompt, options.guidance, f"edit-{number}.png") for number, prompt in enumerate(options.edit, start=1)]
        drawn = []
        for prompt, guidance, name in [(options.prompt, 1.0, "redrawn.png"), *edits]:
            settings = {"num_inference_steps": options.steps, "guidance_scale": guidance}
            drawn.append(pipeline(prompt, latents=noise, **settings).images[0].crop((0, 0, *original.size)))
            drawn[-1].save(folder / name)
            progress.update(2 + len(drawn))
    print(f"reconstruction.png: {nearness(reconstruction, original):.1f} dB from the image, by the autoencoder alone")
    print(
        f"redrawn.png: {nearness(drawn[0], reconstruction):.1f} dB from the reconstruction, from noise in {options.steps} steps"
    )
    print(f"noise of deviation {noise.std():.2f}, {len(edits)} edited images: {out}")
