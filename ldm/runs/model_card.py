"""A model card: the ``README.md`` by which the Hugging Face hub, and whoever reads it there, knows a model.

What it says is read from the run, from its log and from the very folder it describes, which is opened as its readers will open
it; what no program can know is left to the author in marked lines (Mitchell et al. 2019, Model Cards, arXiv 1810.03993).
"""

from __future__ import annotations

import csv
import re
import shlex
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import torch
import yaml
from diffusers import DiffusionPipeline, PixArtAlphaPipeline
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from PIL import Image

from ldm.diffusion.guidance import ClassifierFree
from ldm.errors import UsageError
from ldm.files import read_json
from ldm.machine import machine_info
from ldm.models.autoencoder import downsampling_factor
from ldm.reporting.grids import captioned_grid
from ldm.runs.layout import RunFolder

if TYPE_CHECKING:
    from ldm.training.denoiser import DenoiserTraining

CARD, SAMPLES = "README.md", "samples.png"
TO_WRITE = "**To be written by the author:**"
VERSIONS = ("ldm", "torch", "diffusers", "transformers", "lightning")
# where a run stood on its machine, and what its terminal showed
OF_THE_RUN_ALONE = ("out", "export", "title", "ckpt_path", "weights_only", "resume")
HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w.-]+")


@dataclass(frozen=True)
class CardFields:
    """What a model's author says of it.

    Attributes:
        license: as the hub names it, such as ``apache-2.0``; ``unknown`` where none was given.
        datasets: names on the hub, such as ``owner/name``.
        report: ``report.json`` of the quickstart that measured the prompt accuracy of this model.

    Raises:
        UsageError: for a licence that is no name, or a report without prompt accuracy.
    """

    license: str = "unknown"
    datasets: tuple[str, ...] = ()
    report: Path | None = None

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[a-z0-9][a-z0-9.+-]*", self.license):
            raise UsageError(f"--license {self.license!r} is not a name of the hub's; give one such as apache-2.0 or cc-by-4.0")
        if self.report is not None and not isinstance(self.prompt_accuracy, float):
            raise UsageError(f"{self.report} has no prompt_accuracy; give the report.json that ldm quickstart wrote")

    @property
    def prompt_accuracy(self) -> float | None:
        """Share of prompts whose image shows all that they name; None where nobody measured it."""
        content = None if self.report is None else read_json(self.report)
        return content.get("prompt_accuracy") if isinstance(content, dict) else None


def write_model_card(folder: Path, name: str, model: DenoiserTraining, run: Path, fields: CardFields) -> None:
    """Write ``README.md`` and ``samples.png`` into ``folder``, and no path of this machine.

    Args:
        folder: of a pipeline that ``model`` was just saved as, ours or a ``PixArtAlphaPipeline``.
        name: of the model.
        model: as its run trained it.
        run: that run's folder, with ``logs/config.yaml`` and, where it is still there, ``logs/metrics.csv``.
    """
    config = yaml.safe_load((RunFolder(run).config).read_text())
    config = without_paths({key: value for key, value in config.items() if key not in OF_THE_RUN_ALONE})
    pipeline = DiffusionPipeline.from_pretrained(folder, local_files_only=True)
    settings = sampling_settings(pipeline, model)
    validation = last_validation(run, model.average.step)
    prompts = model.preview_prompts
    if prompts:
        images = draw_samples(pipeline, prompts, settings)
        cell = min(max(images[0].width, 160), 512)
        captioned_grid(images, prompts, cell=cell).save(folder / SAMPLES)
    sections = [
        f"# {name}",
        _what_it_is(pipeline, model),
        _samples(prompts, settings),
        _how_to_open(pipeline, prompts, settings),
        _figures(model, validation, fields),
        _parts(pipeline, model),
        _training(model, config),
        _for_the_author(fields),
    ]
    data = _metadata(name, pipeline, config, validation, fields)
    ModelCard(f"---\n{data.to_yaml()}\n---\n\n" + "\n\n".join(filter(None, sections)) + "\n").save(folder / CARD)


# -- what goes into it -----------------------------------------------------------------------------------------------


def without_paths(value: Any, name: str = "") -> Any:
    """A configuration with the last part of every path and URL in it alone; the rest may name people, and carry passwords."""
    if isinstance(value, dict):
        return {key: without_paths(part, key) for key, part in value.items()}
    if isinstance(value, list):
        return [without_paths(part, name) for part in value]
    if not isinstance(value, str) or name == "preview_prompts" or (name == "text_encoder" and HUB_NAME.fullmatch(value)):
        return value
    return base_name(value)


def base_name(path: str) -> str:
    """The last part of a path or a URL."""
    if "://" in path:
        url = urlsplit(path)
        path = url.path.strip("/") or url.hostname or ""
    return re.split(r"[/\\]", path.rstrip("/\\"))[-1]


def sampling_settings(pipeline: DiffusionPipeline, model: DenoiserTraining) -> dict[str, Any]:
    """Those of the training's previews; a ``PixArtAlphaPipeline`` has a scale alone, and is told to draw as ours does."""
    stock = isinstance(pipeline, PixArtAlphaPipeline)
    rule = plain = model.preview_guidance
    while hasattr(plain, "inner"):
        plain = plain.inner
    settings: dict[str, Any] = {"num_inference_steps": model.preview_steps}
    settings |= {"guidance_scale": plain.scale} if stock or isinstance(rule, ClassifierFree) else {"guidance": rule}
    return settings | ({"use_resolution_binning": False, "clean_caption": False} if stock else {})


def draw_samples(pipeline: DiffusionPipeline, prompts: Sequence[str], settings: dict[str, Any]) -> list[Image.Image]:
    """One image per prompt, the first from seed 0, the next from 1 and so on, as in the training's previews."""
    pipeline.to("cuda" if torch.cuda.is_available() else "cpu").set_progress_bar_config(disable=True)
    generators = [torch.Generator().manual_seed(seed) for seed in range(len(prompts))]
    return pipeline(list(prompts), generator=generators, **settings).images


def last_validation(run: Path, step: int) -> dict[str, float]:
    """The figures of the last validation in the run's log up to ``step``, and its ``step``; empty where there is none."""
    log = RunFolder(run).metrics
    if not log.is_file():
        return {}
    with open(log, newline="") as file:
        # Lightning counts steps from 0
        rows = [row for row in csv.DictReader(file) if row.get("val/loss") and int(row["step"]) < step]
    if not rows:
        return {}
    figures = {name: float(value) for name, value in rows[-1].items() if value and name.startswith("val/")}
    return figures | {"step": int(rows[-1]["step"]) + 1}


# -- its sections ----------------------------------------------------------------------------------------------------


def _metadata(
    name: str, pipeline: DiffusionPipeline, config: dict[str, Any], validation: dict[str, float], fields: CardFields
) -> ModelCardData:
    shown = config["data"]["validation"]
    held_out = shown if isinstance(shown, str) else ", ".join(source["path"] for source in shown)
    measured = []
    if validation:
        measured.append(_result(held_out, "loss", "validation loss", validation["val/loss"]))
    if fields.prompt_accuracy is not None:
        measured.append(_result("ldm shapes, pairs held out", "accuracy", "prompt accuracy", fields.prompt_accuracy))
    return ModelCardData(
        license=fields.license,
        library_name="diffusers",
        pipeline_tag="text-to-image",
        tags=["text-to-image", "latent-diffusion", "ldm", f"diffusers:{type(pipeline).__name__}"],
        datasets=list(fields.datasets) or None,
        model_name=name,
        eval_results=measured or None,
    )


def _result(dataset: str, kind: str, name: str, value: float) -> EvalResult:
    return EvalResult(
        task_type="text-to-image",
        dataset_type=re.sub(r"\W+", "-", dataset).strip("-"),
        dataset_name=dataset,
        metric_type=kind,
        metric_name=name,
        metric_value=round(value, 4),
    )


def _what_it_is(pipeline: DiffusionPipeline, model: DenoiserTraining) -> str:
    channels, height, width = model.frozen.trained_on["latent_shape"]
    factor = downsampling_factor(pipeline.vae)
    path, prediction = (type(part).__name__ for part in (model.objective.path, model.objective.prediction))
    return (
        f"A text-to-image latent diffusion model, trained with `ldm`. A {type(pipeline.transformer).__name__} of "
        f"{_count(pipeline.transformer)} parameters ({path}, predicting {prediction}) makes latents of {channels} x {height} x "
        f"{width}, which the autoencoder decodes to images of {width * factor} x {height * factor} pixels."
    )


def _samples(prompts: Sequence[str], settings: dict[str, Any]) -> str:
    if not prompts:
        return ""
    seeds = "seed 0" if len(prompts) == 1 else f"seeds 0 to {len(prompts) - 1}"
    guidance = settings.get("guidance_scale", settings.get("guidance"))
    return (
        f"![Images of this model, each with its prompt beneath it]({SAMPLES})\n\nThe prompts of the training's previews, "
        f"{settings['num_inference_steps']} steps, guidance {guidance}, {seeds}; none was chosen."
    )


def _how_to_open(pipeline: DiffusionPipeline, prompts: Sequence[str], settings: dict[str, Any]) -> str:
    kind = type(pipeline).__name__
    stock = isinstance(pipeline, PixArtAlphaPipeline)
    opener = kind if stock else "DiffusionPipeline"
    known = "" if stock else f"import ldm  # makes {kind} known to diffusers\n"
    if "guidance" in settings:  # a rule's repr is the Python that makes it
        rules = sorted(set(re.findall(r"(\w+)\(", repr(settings["guidance"]))))
        known += f"from ldm.diffusion.guidance import {', '.join(rules)}\n"
    prompt = prompts[0] if prompts else "what to draw"
    options = ", ".join(f"{name}={value!r}" for name, value in settings.items())
    python = f"""```python
{known}import torch
from diffusers import {opener}

pipeline = {opener}.from_pretrained(".")  # this folder
generator = torch.Generator().manual_seed(0)
image = pipeline({prompt!r}, generator=generator, {options}).images[0]
image.save("image.png")
```"""
    if stock:
        return f"## Use\n\nIn this folder, with nothing but diffusers:\n\n{python}"
    shell = ""
    if "guidance_scale" in settings:
        options = f"--steps {settings['num_inference_steps']} --guidance {settings['guidance_scale']:g} --seed 0 --out images"
        shell = f"```bash\nldm sample . {shlex.quote(prompt)} {options}\n```\n\n"
    return f"## Use\n\nIn this folder, with `ldm` ({machine_info()['ldm']}):\n\n{shell}{python}"


def _figures(model: DenoiserTraining, validation: dict[str, float], fields: CardFields) -> str:
    rows = [("steps", f"{model.average.step:,}"), ("images seen in training", f"{model.num_images_seen:,}")]
    if validation:
        rows.append((f"validation loss, unweighted, at step {validation['step']:,}", f"{validation['val/loss']:.4f}"))
    if fields.prompt_accuracy is not None:
        rows.append(("prompt accuracy, on pairs of shape and colour held out", f"{fields.prompt_accuracy:.3f}"))
    sections = ["## Figures", _table(("figure", "value"), rows)]
    tenths = {name: value for name, value in validation.items() if name.startswith("val/loss_bin_")}
    if tenths:
        numbers = [int(name[-2:]) for name in sorted(tenths)]
        rows = [
            (f"{number / 10:.1f} to {(number + 1) / 10:.1f}", f"{tenths[f'val/loss_bin_{number:02d}']:.4f}")
            for number in numbers
        ]
        sections += ["By the time t, from 0 (data) to 1 (noise):", _table(("t", "validation loss"), rows)]
    return "\n\n".join(sections)


def _parts(pipeline: DiffusionPipeline, model: DenoiserTraining) -> str:
    trained_on = model.frozen.trained_on
    rows = []
    for part, origin, identity in (
        ("transformer", "trained here", ""),
        ("vae", base_name(str(model.autoencoder_path)), trained_on["autoencoder"]),
        ("text_encoder", without_paths(model.frozen.text_encoder.name, "text_encoder"), trained_on["text_encoder"]),
    ):
        network = getattr(pipeline, part)
        rows.append((f"`{part}`", type(network).__name__, _count(network), origin, f"`{identity}`" if identity else ""))
    # an export for another pipeline may have folded the latents' statistics into the autoencoder
    heads = ("part", "class", "parameters", "from", "sha256 of what it was trained with")
    return f"## Parts\n\n{_table(heads, rows)}"


def _training(model: DenoiserTraining, config: dict[str, Any]) -> str:
    averages = config["model"].get("power_averages") or {}
    length = averages.get("product")
    average = (
        f"power-function average of relative length {length:g}"
        if length is not None
        else f"exponential average of decay {config['model']['ema_decay']:g}"
    )
    described = machine_info()
    versions = ", ".join(f"{package} {described[package]}" for package in VERSIONS)
    text = yaml.safe_dump(config, sort_keys=False, allow_unicode=True).strip()
    return (
        f"## Training\n\nThe weights are the {average}, of step {model.average.step:,}. Exported with {versions}.\n\n"
        f"<details><summary>The whole configuration; of paths the last part</summary>\n\n```yaml\n{text}\n```\n\n</details>"
    )


def _for_the_author(fields: CardFields) -> str:
    lines = ["what it draws badly, what it does not know, which prompts it was not made for."]
    if not fields.datasets:
        lines.append("what it was trained on, where the images came from, and by which right.")
    lines.append("whom its images may harm or leave out.")
    if fields.license == "unknown":
        lines.append("the licence, here and at `license:` in the head of this file.")
    return "## Limitations\n\n" + "\n".join(f"- {TO_WRITE} {line}" for line in lines)


def _count(network: torch.nn.Module) -> str:
    """Millions of parameters."""
    return f"{sum(parameter.numel() for parameter in network.parameters()) / 1e6:.2f}M"


def _table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
