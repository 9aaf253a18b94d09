"""``ldm sample``: images from prompts."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import TYPE_CHECKING, Any

from ldm.cli.parser import Commands, add_command, add_force
from ldm.errors import LdmError, UsageError
from ldm.terminal import printable, say

if TYPE_CHECKING:
    from ldm.inference.prompts import Check, Complete
    from ldm.inference.settings import GenerationSettings
    from ldm.pipeline import LatentDiffusionPipeline

EXAMPLE = """ldm sample pipeline "a red ring" --out images --seed 1
  ldm sample pipeline --prompts prompts.txt --out images --batch-size 8
  ldm sample pipeline --from-image images/0000-a-red-ring.png --out again

A prompt file has a prompt a line (.txt; blank lines and those that begin with # are skipped), or a JSON object a line
(.jsonl): {"prompt": "a red ring", "seed": 7, "size": "512x768", "count": 2}, with the names of the options below. The same
command again generates what is missing."""


ONE_OF = "give one of: prompts, --prompts FILE, --from-image PNG; see ldm sample --help"


def add(commands: Commands) -> None:
    sample = add_command(commands, "sample", run_sample, "generate images from prompts", EXAMPLE)
    sample.add_argument("model", help="pipeline directory")
    prompts = sample.add_argument(
        "given_prompts",
        nargs="+",
        metavar="prompt",
        help="what to generate; of a class model a class, of an unconditional one none",
    )
    # "*" would match nothing right behind the model, and prompts behind an option would be one too many
    prompts.required = False
    sample.add_argument("--prompts", metavar="FILE", help=".txt or .jsonl of prompts, in the place of those")
    sample.add_argument(
        "--from-image",
        metavar="PNG",
        help="repeat an image of ldm sample; options override its settings, and give the files it was made from",
    )
    sample.add_argument("--out", required=True, help="folder for the images, their grid and index.html")
    sample.add_argument("--copy-inputs", action="store_true", help="copy --image and --mask to OUT/inputs, for --from-image")
    sample.add_argument("--keep-going", action="store_true", help="generate the rest of a prompt file with broken lines")
    sample.add_argument("--strict", action="store_true", help="refuse long prompts, unknown words and another model's image")

    image = sample.add_argument_group("images")
    image.add_argument("--count", type=int, default=1, help="images per prompt")
    image.add_argument("--seed", type=int, help="of the first image; the next ones count on (default: 0)")
    image.add_argument("--negative", help="negative prompt")
    image.add_argument("--size", metavar="WxH", help="in pixels, or one number (default: what the model was trained on)")
    original = "of a model with micro-conditioning: size of the image it would have been made from (default: --size)"
    image.add_argument("--original-size", metavar="WxH", help=original)
    for name in ("left", "top"):
        image.add_argument(
            f"--crop-{name}", type=int, metavar="N", help="likewise, where it would have been cropped (default: 0)"
        )
    image.add_argument("--image", metavar="FILE", help="image to start from")
    image.add_argument("--strength", type=float, help="how far to leave it, 0 to 1")
    image.add_argument("--mask", metavar="FILE", help="image that is white where --image is regenerated")

    adapters = "adapter of the model and its weight (default: 1), such as runs/lora/adapter=0.8; repeatable"
    image.add_argument("--lora", metavar="FILE[=W]", action="append", help=adapters)
    add_force(image)
    tokens = (
        "learned token of ldm embedding fit, A1111 or diffusers, which prompts hold, such as runs/new/embedding; repeatable"
    )
    image.add_argument("--embedding", metavar="FILE", action="append", help=tokens)

    sampler = sample.add_argument_group("sampling")
    sampler.add_argument("--steps", type=int, help="steps of the scheduler (default: those recommended for the model, else 30)")
    sampler.add_argument("--scheduler", metavar="NAME", help="such as euler; a wrong one lists them (default: the pipeline's)")
    sampler.add_argument("--eta", type=float, metavar="E", help="of ddim: 0 (deterministic) to 1 (as much new noise as ddpm)")
    sampler.add_argument("--guidance", type=float, help="guidance scale; 1 is none (default: that recommended, else 3)")
    sampler.add_argument("--guidance-rule", metavar="RULE", help="classifier-free (default), zero-star or apg")
    sampler.add_argument("--guidance-rescale", type=float, metavar="PHI", help="against over-exposure, 0 (default) to 1")
    sampler.add_argument(
        "--guidance-interval", type=float, nargs=2, metavar=("LOW", "HIGH"), help="guide at these times, 0 (data) to 1 (noise)"
    )
    sampler.add_argument("--weak", metavar="PIPELINE", help="weaker checkpoint for autoguidance")

    machine = sample.add_argument_group("machine")
    machine.add_argument(
        "--batch-size",
        type=int,
        default=1,
        help="images at a time: more are faster, and differ by rounding from those generated alone (default: 1)",
    )
    machine.add_argument("--dtype", choices=("fp32", "bf16", "fp16"), help="of the weights (default: fp32)")
    machine.add_argument("--device", help="cpu, cuda or cuda:N (default: the GPU, where there is one)")
    machine.add_argument("--compile", action="store_true", help="compile the denoiser: minutes at first, then faster")
    machine.add_argument("--cuda-graphs", action="store_true", help="compile and use CUDA graphs: for few images at a time")
    machine.add_argument("--tiled", action="store_true", help="decode images larger than the model's in tiles, to save memory")
    machine.add_argument("--preview-every", type=int, default=0, metavar="N", help="write preview.png every N steps")
    machine.add_argument(
        "--max-images", type=int, default=100_000, metavar="N", help="refuse more images in all (default: 100000)"
    )
    machine.add_argument(
        "--max-steps",
        type=int,
        default=1_000,
        metavar="N",
        help="refuse more steps, in a prompt file or an image (default: 1000)",
    )
    machine.add_argument("--no-metadata", action="store_true", help="PNGs of pixels alone, without settings and provenance")


def run_sample(options: argparse.Namespace) -> None:
    from ldm.inference.output_folder import require_images_folder
    from ldm.locks import hold_folder

    for name, least in (("count", 1), ("batch_size", 1), ("preview_every", 0)):
        if getattr(options, name) < least:
            raise UsageError(f"--{name.replace('_', '-')} is {getattr(options, name)}; give {least} or more")
    if sum(map(bool, (options.given_prompts, options.prompts, options.from_image))) > 1:
        raise UsageError(ONE_OF)
    require_images_folder(options.out)
    with hold_folder(options.out, f"generating images into {options.out}"):
        sample_into_folder(options)


def sample_into_folder(options: argparse.Namespace) -> None:
    from ldm.inference.generate import ImageGenerator, batch_key, open_pipeline
    from ldm.inference.inputs import Inputs
    from ldm.inference.metadata import provenance_of, read_png
    from ldm.inference.output_folder import OutputFolder, generate_missing
    from ldm.models.adapter_file import AdapterFile
    from ldm.models.text_encoder import listed

    inputs, made_by = Inputs(options.force), None
    given = given_settings(options)
    if options.from_image:
        stored, made_by = read_png(options.from_image)
        given = stored.to_json() | given | inputs.restore(options.from_image, stored, given)
    dtype = options.dtype or {"bfloat16": "bf16", "float16": "fp16"}.get(made_by.dtype if made_by else "", "fp32")
    tiled = options.tiled or (made_by is not None and made_by.tiled)
    compiled = "cuda_graphs" if options.cuda_graphs else options.compile
    pipeline = open_pipeline(options.model, options.device, dtype, compiled, tiled)
    if not (options.given_prompts or options.prompts or options.from_image or pipeline.is_unconditional):
        raise UsageError(ONE_OF if pipeline.classes is None else f"give one or more classes: {listed(pipeline.classes)}")
    provenance = provenance_of(pipeline, options.model)
    if made_by is not None:
        mismatch = made_by.mismatch(options.from_image, options.model, provenance)
        if mismatch and options.strict:
            raise UsageError(mismatch)
        if mismatch:
            warn(mismatch)
    if options.from_image:
        if given.get("scheduler") is None:  # it was generated with the pipeline's own, before another one was recommended
            pipeline.forget_recommended()
    else:
        say_recommended(pipeline, given)
    generator = ImageGenerator(pipeline, options.strict, warn, inputs)
    settings = plan(options, given, generator.check, pipeline.with_recommended)
    broken = [error for error in settings if isinstance(error, UsageError)]
    for error in broken:
        if not options.keep_going:
            raise error
        say(f"ldm: {printable(error)}", sys.stderr)
    # a broken line keeps its number, so that the others keep theirs when it is fixed
    planned = {number: inputs.named(one) for number, one in enumerate(settings) if not isinstance(one, UsageError)}
    if planned:
        folder, metadata = OutputFolder(options.out, planned, provenance), not options.no_metadata
        missing = len(folder.missing())
        for adapter in {file: inputs.file(file) for one in planned.values() for file, _ in one.adapters()}.values():
            if words := AdapterFile.read(adapter).trigger_words:
                say(printable(f"trigger words of {adapter}: {', '.join(words)}"), sys.stderr)
        if options.copy_inputs:
            for one in {batch_key(one) for one in planned.values()}:
                inputs.copy(folder.path, one)
        try:
            generate_missing(generator, folder, options.batch_size, options.preview_every, metadata)
        except KeyboardInterrupt:
            done = missing - len(folder.missing())
            say(f"ldm: {done} of {missing} images are generated; the same command generates the rest", sys.stderr)
            raise
        shown = folder.finish(options.count if options.count > 1 else None, metadata)
        existing = f" ({len(planned) - missing} existed)" if missing < len(planned) else ""
        grid = "grid.png" if shown == len(planned) else f"grid.png of the first {shown}"
        say(f"{len(planned)} images{existing}, {grid} and index.html: {printable(options.out)}")
    if broken:
        raise LdmError(f"{len(broken)} lines of {options.prompts} are broken and were skipped; fix them and run it again")


def given_settings(options: argparse.Namespace) -> dict[str, Any]:
    """The settings that the options give, by their names."""
    from ldm.inference.prompts import parse_size
    from ldm.inference.settings import GenerationSettings

    names = [field.name for field in fields(GenerationSettings)]
    given = {name: value for name, value in vars(options).items() if name in names and value is not None}
    for which in ("", "original_"):
        if (size := getattr(options, f"{which}size")) is not None:
            given[f"{which}width"], given[f"{which}height"] = parse_size(size, f"{which}size")
    return given


def sampling(options: argparse.Namespace) -> dict[str, Any]:
    """The options that a model may recommend; None where they are not given."""
    return {name: getattr(options, name, None) for name in ("scheduler", "steps", "guidance")}


def say_recommended(pipeline: LatentDiffusionPipeline, given: Mapping[str, Any]) -> None:
    """Say which settings that are not given are the recommended ones, and where another scheduler is given without steps."""
    recommended, scheduler = pipeline.recommended_settings(), given.get("scheduler")
    used = {name: value for name, value in pipeline.recommended_settings(scheduler).items() if given.get(name) is None}
    if used:
        shown = (f"{name} {value:g}" if isinstance(value, float) else f"{name} {value}" for name, value in used.items())
        say(f"recommended for this model: {', '.join(shown)}", sys.stderr)
    if "steps" in recommended.keys() - used.keys() and given.get("steps") is None:
        say(f"the {recommended['steps']} steps that are recommended are those of {recommended['scheduler']}", sys.stderr)


def plan(
    options: argparse.Namespace, given: dict[str, Any], check: Check, complete: Complete
) -> Sequence[GenerationSettings | UsageError]:
    """Every image of the run; a broken line of a prompt file as its error."""
    from ldm.inference.prompts import Limits, plan_prompts, read_prompts, repeated

    # steps that are an option are meant
    limits = Limits(options.max_images, max(options.max_steps, options.steps or 0))
    if options.prompts:
        return read_prompts(options.prompts, given, options.count, check, limits, complete)
    if options.from_image:
        return repeated(given, options.count, options.from_image, check, limits)
    return plan_prompts(options.given_prompts or [""], given, options.count, check, limits, complete)


def warn(message: str) -> None:
    say(f"ldm: warning: {printable(message)}", sys.stderr)
