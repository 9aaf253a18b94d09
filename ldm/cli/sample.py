"""``ldm sample``: pictures from words."""

from __future__ import annotations

import argparse

from ldm.cli.parser import Commands, add_command
from ldm.errors import UsageError
from ldm.progress import Progress


def add(commands: Commands) -> None:
    """The command."""
    sample = add_command(
        commands,
        "sample",
        run_sample,
        "draw pictures from words",
        'ldm sample pipeline "a red ring" --out pictures --seed 1',
    )
    sample.add_argument("model", help="pipeline directory")
    sample.add_argument("prompts", nargs="+", metavar="prompt")
    sample.add_argument("--out", required=True, help="new folder for the pictures and their grid")
    sample.add_argument("--steps", type=int, default=30, help="calls of the denoiser (default: 30)")
    sample.add_argument("--guidance", type=float, default=3.0, help="guidance scale; 1 is none (default: 3)")
    names = "ddim, ddpm, euler, euler-ancestral, heun, dpm++2m, dpm++2m-sde, unipc, those that fit the model"
    sample.add_argument("--scheduler", metavar="NAME", help=f"{names} (default: the pipeline's own)")
    sample.add_argument("--eta", type=float, metavar="E", help="of ddim: 0 (deterministic) to 1 (as much new noise as ddpm)")
    sample.add_argument("--seed", type=int, default=0, help="of the first picture; the next ones count on")
    sample.add_argument("--count", type=int, default=1, help="pictures per prompt")
    sample.add_argument("--negative", default="", help="what to lead away from")


def run_sample(options: argparse.Namespace) -> None:
    from ldm.diffusion.scheduler import make_scheduler
    from ldm.evaluate import draw
    from ldm.files import atomic_folder, require_new_folder
    from ldm.pipeline import load_pipeline
    from ldm.report import captioned_grid

    for name, least in (("steps", 1), ("count", 1)):
        if getattr(options, name) < least:
            raise UsageError(f"--{name} is {getattr(options, name)}; give {least} or more")
    if not 0 <= options.seed < 2**63:
        raise UsageError(f"--seed is {options.seed}; give a number from 0 to {2**63 - 1}")
    out = require_new_folder(options.out, "the pictures")
    pipeline = load_pipeline(options.model)
    if options.scheduler is not None:
        choice = {} if options.eta is None else {"eta": options.eta}
        pipeline.scheduler = make_scheduler(options.scheduler, *pipeline.diffusion, **choice)
    elif options.eta is not None:
        raise UsageError("--eta is of the scheduler ddim; give --scheduler ddim, too")
    prompts = [prompt for prompt in options.prompts for _ in range(options.count)]
    for prompt in (*options.prompts, *filter(None, [options.negative])):
        pipeline.check_prompt(prompt)
    # the folder first: that it cannot be written should be known before an hour of drawing
    with atomic_folder(out) as folder:
        with Progress("drawing", len(prompts)) as progress:
            pictures = draw(
                pipeline,
                prompts,
                options.seed,
                negative_prompt=options.negative,
                num_inference_steps=options.steps,
                guidance_scale=options.guidance,
                on_progress=progress.update,
            )
        for number, (prompt, picture) in enumerate(zip(prompts, pictures, strict=True)):
            words = "-".join("".join(c if c.isalnum() else " " for c in prompt.lower()).split())[:60]
            picture.save(folder / f"{number:04d}-{words}.png")
        captioned_grid(pictures, prompts, columns=options.count if options.count > 1 else None).save(folder / "grid.png")
    print(f"{len(pictures)} pictures and grid.png: {out}")
