"""``ldm invert``: the noise that an image would be generated from, to reconstruct it or to edit it by another prompt."""

from __future__ import annotations

import argparse

from ldm.cli.parser import Commands, add_command
from ldm.progress import Progress
from ldm.terminal import printable, say


def add(commands: Commands) -> None:
    invert = add_command(
        commands,
        "invert",
        run_invert,
        "find the noise that an image would be generated from, reconstruct the image from it, and edit it by other prompts",
        'ldm invert pipeline image.png "a red ring" --out inverted --edit "a blue ring"',
    )
    invert.add_argument("model", help="pipeline directory")
    invert.add_argument("image", help="JPEG, PNG or WebP image")
    invert.add_argument("prompt", nargs="?", default="", help="what the image shows (default: none)")
    invert.add_argument(
        "--out",
        required=True,
        help="new folder for noise.safetensors, reconstruction.png, redrawn.png, edit-1.png and on",
    )
    invert.add_argument("--edit", action="append", default=[], metavar="PROMPT", help="edit by this prompt; repeatable")
    invert.add_argument("--guidance", type=float, default=3.0, help="guidance scale of --edit; 1 is none (default: 3)")
    invert.add_argument("--steps", type=int, default=50, help="of the inversion, and of each image (default: 50)")
    invert.add_argument("--width", type=int, metavar="PIXELS", help="of the images (default: the image's own)")
    invert.add_argument("--height", type=int, metavar="PIXELS")


def run_invert(options: argparse.Namespace) -> None:
    from ldm.files import atomic_folder, require_new_folder
    from ldm.inference.inputs import reference
    from ldm.inference.inversion import write_inversion
    from ldm.pipeline import image_of, load_pipeline, read_input

    out = require_new_folder(options.out, "the noise and the images")
    data = read_input(options.image)
    image = image_of(data, options.image, background=(255, 255, 255))
    pipeline = load_pipeline(options.model)
    pipeline.set_progress_bar_config(disable=True)
    for prompt in options.edit:
        pipeline.check_prompt(prompt)
    settings = (options.model, reference(data), options.steps, options.guidance, options.height, options.width)
    # the folder first: an output that cannot be written fails before the work
    with atomic_folder(out) as folder, Progress("inverting", 3 + len(options.edit)) as progress:
        found = write_inversion(pipeline, image, options.prompt, options.edit, folder, *settings, progress.update)
    say(f"reconstruction.png: {found.autoencoder_psnr:.1f} dB from the image, by the autoencoder alone")
    say(f"redrawn.png: {found.sampling_psnr:.1f} dB from the reconstruction, from noise in {options.steps} steps")
    say(f"noise of standard deviation {found.noise_std:.2f}, {len(options.edit)} edited images: {printable(out)}")
