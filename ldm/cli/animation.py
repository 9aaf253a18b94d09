"""``ldm interpolate`` and ``ldm attention``: images between two prompts or seeds, and where the model attends to each word."""

from __future__ import annotations

import argparse
from dataclasses import replace
from typing import TYPE_CHECKING

from ldm.cli.parser import Commands, Parser, add_command
from ldm.cli.sample import sampling, say_recommended
from ldm.errors import UsageError
from ldm.progress import Progress
from ldm.terminal import printable, say

if TYPE_CHECKING:
    from ldm.inference.settings import GenerationSettings
    from ldm.pipeline import LatentDiffusionPipeline


def add(commands: Commands) -> None:
    interpolate = add_command(
        commands,
        "interpolate",
        run_interpolate,
        "interpolate between prompts or seeds: frames, a GIF, an MP4",
        'ldm interpolate pipeline "a red circle" "a blue square" --out between --frames 48 --gif --mp4\n'
        '  ldm interpolate pipeline "a red circle" --seeds 1 2 3 --loop --out seeds --gif',
    )
    interpolate.add_argument("model", help="pipeline directory")
    interpolate.add_argument("prompts", nargs="+", metavar="prompt", help="two or more; or one with several --seeds")
    interpolate.add_argument("--out", required=True, help="new folder for the frames, interpolation.gif and interpolation.mp4")
    interpolate.add_argument("--frames", type=int, default=24, metavar="N", help="first and last included (default: 24)")
    interpolate.add_argument("--seeds", type=int, nargs="+", default=[0], help="one, or one per prompt (default: 0)")
    interpolate.add_argument("--loop", action="store_true", help="go back to the first image at the end")
    interpolate.add_argument("--gif", action="store_true", help="write interpolation.gif, too")
    interpolate.add_argument("--mp4", action="store_true", help="write interpolation.mp4, too: pip install 'ldm[video]'")
    interpolate.add_argument("--fps", type=float, default=12.0, help="frames per second of GIF and MP4 (default: 12)")
    add_settings(interpolate)
    interpolate.add_argument("--scheduler", metavar="NAME", help="one that adds no noise (default: the pipeline's own)")
    interpolate.add_argument("--batch-size", type=int, default=8, metavar="N", help="frames generated at a time (default: 8)")

    attention = add_command(
        commands,
        "attention",
        run_attention,
        "show where the model attends to each word of a prompt",
        'ldm attention pipeline "a large red circle" --out words --seed 1',
    )
    attention.add_argument("model", help="pipeline directory")
    attention.add_argument("prompt")
    attention.add_argument("--out", required=True, help="new folder for image.png, attention.png and attention.npz")
    attention.add_argument("--seed", type=int, default=0)
    attention.add_argument(
        "--times",
        type=float,
        nargs=2,
        default=[0.0, 1.0],
        metavar=("LOW", "HIGH"),
        help="mean over the steps at these times, 0 (data) to 1 (noise) (default: all)",
    )
    add_settings(attention)


def add_settings(command: Parser) -> None:
    command.add_argument("--steps", type=int, help="of the scheduler (default: those recommended for the model, else 30)")
    command.add_argument("--guidance", type=float, help="guidance scale; 1 is none (default: that recommended, else 3)")
    command.add_argument("--negative", default="", help="negative prompt")
    command.add_argument("--size", metavar="WxH", help="in pixels, or one number (default: what the model was trained on)")
    command.add_argument("--device", help="cpu, cuda or cuda:N (default: the GPU, where there is one)")


def run_interpolate(options: argparse.Namespace) -> None:
    from ldm.files import atomic_folder, require_new_folder
    from ldm.inference.animation import even_steps, generate_frames, key_settings, require_rate, require_video, write_animation
    from ldm.inference.generate import open_pipeline, scheduler_for
    from ldm.inference.metadata import provenance_of

    if options.batch_size < 1:
        raise UsageError(f"--batch-size is {options.batch_size}; give 1 or more")
    settings = settings_of(options, options.prompts[0], options.seeds[0])
    keys = key_settings(settings, options.prompts, options.seeds)
    frames = even_steps(len(keys), options.frames, options.loop)
    require_rate(options.fps, gif=options.gif)
    if options.mp4:
        require_video()
    out = require_new_folder(options.out, "the frames")
    pipeline = open_pipeline(options.model, options.device)
    keys = key_settings(with_recommended(pipeline, options, settings), options.prompts, options.seeds)
    images = generate_frames(pipeline, keys, options.frames, options.loop, options.batch_size)
    provenance = provenance_of(pipeline, options.model).of_scheduler(scheduler_for(pipeline, keys[0]))
    formats = ["gif"] * options.gif + ["mp4"] * options.mp4
    with atomic_folder(out) as folder, Progress("generating", options.frames) as progress:
        films = write_animation(folder, images, keys, frames, provenance, formats, options.fps, progress.update)
    say(f"{', '.join([f'{options.frames} frames', *films])}: {printable(out)}")


def run_attention(options: argparse.Namespace) -> None:
    from ldm.files import atomic_folder, require_new_folder
    from ldm.inference.attention_maps import attention_grid, generate_with_attention, save_maps
    from ldm.inference.generate import open_pipeline
    from ldm.inference.metadata import provenance_of, save_png

    low, high = options.times
    if not 0 <= low < high <= 1:
        raise UsageError(f"--times is {low:g} to {high:g}; give 0 <= LOW < HIGH <= 1")
    settings = settings_of(options, options.prompt, options.seed)
    out = require_new_folder(options.out, "the maps")
    pipeline = open_pipeline(options.model, options.device)
    settings = with_recommended(pipeline, options, settings)
    with atomic_folder(out) as folder:
        image, maps = generate_with_attention(pipeline, settings, (low, high))
        provenance = provenance_of(pipeline, options.model)
        save_png(image, folder / "image.png", settings, provenance)
        save_png(
            attention_grid(image, options.prompt, maps), folder / "attention.png", [settings], provenance, times=[low, high]
        )
        save_maps(folder / "attention.npz", maps)
    say(f"image.png, attention.png of {len(maps.words)} words, attention.npz: {printable(out)}")


def settings_of(options: argparse.Namespace, prompt: str, seed: int) -> GenerationSettings:
    from ldm.inference.prompts import parse_size
    from ldm.inference.settings import GenerationSettings

    width, height = (None, None) if options.size is None else parse_size(options.size)
    given = {name: value for name, value in sampling(options).items() if value is not None}
    return GenerationSettings(prompt, negative=options.negative, seed=seed, width=width, height=height, **given)


def with_recommended(
    pipeline: LatentDiffusionPipeline, options: argparse.Namespace, settings: GenerationSettings
) -> GenerationSettings:
    """The settings, with what the model recommends where the options say nothing."""
    given = sampling(options)
    say_recommended(pipeline, given)
    return replace(settings, **{name: value for name, value in pipeline.with_recommended(given).items() if value is not None})
