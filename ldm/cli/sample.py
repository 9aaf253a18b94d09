"""``ldm sample``: images from words."""

from __future__ import annotations

import argparse
import sys
from dataclasses import fields, replace
from typing import TYPE_CHECKING, Any

from ldm.cli.parser import Commands, add_command
from ldm.errors import LdmError, UsageError
from ldm.progress import Progress

if TYPE_CHECKING:
    from ldm.inference.metadata import Provenance
    from ldm.inference.output_folder import OutputFolder
    from ldm.inference.prompts import Check
    from ldm.inference.settings import GenerationSettings
    from ldm.pipeline import LatentDiffusionPipeline

EXAMPLE = """ldm sample pipeline "a red ring" --out images --seed 1
  ldm sample pipeline --prompts prompts.txt --out images --batch-size 8
  ldm sample pipeline --from-image images/0000-a-red-ring.png --out again

A prompt file has a prompt a line (.txt; blank lines and those that begin with # are passed over), or a JSON object a line
(.jsonl): {"prompt": "a red ring", "seed": 7, "size": "512x768", "count": 2}, with the names of the options below. The same
command again draws what is missing."""


def add(commands: Commands) -> None:
    """The command."""
    sample = add_command(commands, "sample", run_sample, "draw images from words", EXAMPLE)
    sample.add_argument("model", help="pipeline directory")
    words = sample.add_argument("words", nargs="+", metavar="prompt", help="what to draw")
    # "*" would match nothing right behind the model, and prompts behind an option would be one too many
    words.required = False
    sample.add_argument("--prompts", metavar="FILE", help=".txt or .jsonl of prompts, in the place of those")
    sample.add_argument("--from-image", metavar="PNG", help="draw an image of ldm sample again; options given beside it differ")
    sample.add_argument("--out", required=True, help="folder for the images, their grid and index.html")
    sample.add_argument("--keep-going", action="store_true", help="draw the rest of a prompt file with broken lines")
    sample.add_argument("--strict", action="store_true", help="refuse long prompts and another model's image, not only warn")

    image = sample.add_argument_group("images")
    image.add_argument("--count", type=int, default=1, help="images per prompt")
    image.add_argument("--seed", type=int, help="of the first image; the next ones count on (default: 0)")
    image.add_argument("--negative", help="what to lead away from")
    image.add_argument("--size", metavar="WxH", help="in pixels, or one number (default: what the model was trained on)")
    image.add_argument("--image", metavar="FILE", help="image to start from")
    image.add_argument("--strength", type=float, help="how far to leave it, 0 to 1")
    image.add_argument("--mask", metavar="FILE", help="image that is white where --image is drawn anew")

    sampler = sample.add_argument_group("sampling")
    sampler.add_argument("--steps", type=int, help="steps of the scheduler (default: 30)")
    names = "ddim, ddpm, euler, euler-ancestral, heun, dpm++2m, dpm++2m-sde, unipc, those that fit the model"
    sampler.add_argument("--scheduler", metavar="NAME", help=f"{names} (default: the pipeline's own)")
    sampler.add_argument("--eta", type=float, metavar="E", help="of ddim: 0 (deterministic) to 1 (as much new noise as ddpm)")
    sampler.add_argument("--guidance", type=float, help="guidance scale; 1 is none (default: 3)")
    sampler.add_argument("--guidance-rule", metavar="RULE", help="classifier-free (default), zero-star or apg")
    sampler.add_argument("--guidance-rescale", type=float, metavar="PHI", help="against over-exposure, 0 (default) to 1")
    sampler.add_argument(
        "--guidance-interval", type=float, nargs=2, metavar=("LOW", "HIGH"), help="guide at these times, 0 (data) to 1 (noise)"
    )
    sampler.add_argument("--weak", metavar="PIPELINE", help="earlier checkpoint to lead away from (autoguidance)")

    machine = sample.add_argument_group("machine")
    machine.add_argument(
        "--batch-size",
        type=int,
        default=1,
        help="images at a time: more are faster, and differ by rounding from those drawn alone (default: 1)",
    )
    machine.add_argument("--dtype", choices=("fp32", "bf16", "fp16"), help="of the weights (default: fp32)")
    machine.add_argument("--device", help="cpu, cuda or cuda:N (default: the GPU, where there is one)")
    machine.add_argument("--compile", action="store_true", help="compile the denoiser: minutes at first, then faster")
    machine.add_argument("--tiled", action="store_true", help="decode images larger than the model's in tiles, to save memory")
    machine.add_argument("--preview-every", type=int, default=0, metavar="N", help="write preview.png every N steps")
    machine.add_argument("--no-metadata", action="store_true", help="PNGs of pixels alone, without what they were drawn with")


def run_sample(options: argparse.Namespace) -> None:
    from ldm.inference.generate import open_pipeline
    from ldm.inference.metadata import provenance_of, read_png
    from ldm.inference.output_folder import OutputFolder

    for name, least in (("count", 1), ("batch_size", 1), ("preview_every", 0)):
        if getattr(options, name) < least:
            raise UsageError(f"--{name.replace('_', '-')} is {getattr(options, name)}; give {least} or more")
    if sum(map(bool, (options.words, options.prompts, options.from_image))) != 1:
        raise UsageError("give one of: prompts, --prompts FILE, --from-image PNG; see ldm sample --help")
    settings, drawn_by = read_png(options.from_image) if options.from_image else (None, None)
    dtype = options.dtype or {"bfloat16": "bf16", "float16": "fp16"}.get(drawn_by.dtype if drawn_by else "", "fp32")
    tiled = options.tiled or (drawn_by is not None and drawn_by.tiled)
    pipeline = open_pipeline(options.model, options.device, dtype, options.compile, tiled)
    provenance = provenance_of(pipeline, options.model)
    if drawn_by is not None and drawn_by.model_hash != provenance.model_hash:
        warn(
            f"{options.from_image} was drawn by {drawn_by.model} ({drawn_by.model_hash[:12]}), but {options.model} is "
            f"{provenance.model_hash[:12]}; give that model",
            options.strict,
        )
    asked = plan(options, settings, checker(pipeline, options.strict))
    broken = [error for error in asked if isinstance(error, UsageError)]
    for error in broken:
        if not options.keep_going:
            raise error
        print(f"ldm: {error}", file=sys.stderr)
    # a broken line keeps its number, so that the others keep theirs when it is mended
    planned = {number: one for number, one in enumerate(asked) if not isinstance(one, UsageError)}
    if planned:
        folder = OutputFolder(options.out, planned, provenance)
        missing = folder.missing()
        draw(options, pipeline, provenance, folder, missing)
        shown = folder.finish(options.count if options.count > 1 else None)
        there = f" ({len(planned) - len(missing)} were there)" if len(missing) < len(planned) else ""
        grid = "grid.png" if shown == len(planned) else f"grid.png of the first {shown}"
        print(f"{len(planned)} images{there}, {grid} and index.html: {options.out}")
    if broken:
        raise LdmError(f"{len(broken)} lines of {options.prompts} are broken and were left out; mend them and draw again")


def plan(
    options: argparse.Namespace, settings: GenerationSettings | None, check: Check
) -> list[GenerationSettings | UsageError]:
    """Every image of the run; a broken line of a prompt file as its error."""
    from ldm.inference.prompts import parse_size, read_prompts, repeated
    from ldm.inference.settings import GenerationSettings

    names = [field.name for field in fields(GenerationSettings)]
    given: dict[str, Any] = {name: value for name, value in vars(options).items() if name in names and value is not None}
    if options.size is not None:
        given["width"], given["height"] = parse_size(options.size)
    if options.prompts:
        return read_prompts(options.prompts, given, options.count, check)
    if settings is not None:
        images = repeated(settings.to_json() | given, options.count, str(options.from_image))
        check(images[0])
        return [*images]
    asked: list[GenerationSettings | UsageError] = []
    for words in options.words:
        counted_on = {"prompt": words, "seed": given.get("seed", 0) + len(asked)}
        images = repeated(given | counted_on, options.count, "the command line")
        check(images[0])
        asked += images
    return asked


def checker(pipeline: LatentDiffusionPipeline, strict: bool) -> Check:
    """What looks at settings before anything is drawn, and says which words of a long prompt are cut."""
    from ldm.inference.generate import check_settings, in_common
    from ldm.inference.prompts import fit_prompt

    good: set[GenerationSettings] = set()
    said: set[str] = set()

    def check(settings: GenerationSettings) -> None:
        for text in (settings.prompt, settings.negative):
            fit = fit_prompt(pipeline.tokenizer, text)
            if fit.cut and (strict or text not in said):
                said.add(text)
                warn(f"the prompt {text[:40]!r}… is too long for the text encoder, which does not see: {fit.cut!r}", strict)
        common = in_common(settings)
        if common not in good:
            check_settings(pipeline, common)
            good.add(common)

    return check


def warn(message: str, strict: bool) -> None:
    if strict:
        raise UsageError(message)
    print(f"ldm: warning: {message}", file=sys.stderr)


def draw(
    options: argparse.Namespace,
    pipeline: LatentDiffusionPipeline,
    provenance: Provenance,
    folder: OutputFolder,
    missing: list[int],
) -> None:
    """Draw what is missing; whatever ends it, the images so far stay, and the same command draws the rest."""
    from ldm.inference.generate import GenerationStep, generate_images, scheduler_for
    from ldm.inference.metadata import scheduler_name

    done = 0
    with Progress("drawing", len(missing)) as progress:

        def on_step(step: GenerationStep) -> None:
            progress.update(done, figures={"step": step.done, "of": step.total})
            if step.guesses:
                folder.preview(step.guesses, [settings.prompt for settings in step.settings])

        wanted = [folder.planned[number] for number in missing]
        try:
            for index, settings, image in generate_images(pipeline, wanted, options.batch_size, on_step, options.preview_every):
                scheduler = scheduler_for(pipeline, settings)
                by = replace(provenance, scheduler=scheduler_name(scheduler), sampler=type(scheduler).__name__)
                folder.save(missing[index], image, by, metadata=not options.no_metadata)
                done += 1
                progress.update(done)
        except OSError as error:
            raise LdmError(
                f"{folder.path} cannot be written ({error.strerror}) after {done} of {len(missing)} images; make room, then "
                "the same command draws the rest"
            ) from error
        except KeyboardInterrupt:
            print(f"ldm: {done} of {len(missing)} images are drawn; the same command draws the rest", file=sys.stderr)
            raise
