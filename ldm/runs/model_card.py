"""A model card (Mitchell et al. 2019, arXiv 1810.03993): the ``README.md`` of a model on the Hugging Face hub.

Its content comes from the run, its log and the exported folder, which is opened as a reader opens it. What no program knows
is left to the author in marked lines. The text is in ``ldm/reporting/templates/model_card.md``.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import yaml
from diffusers import DiffusionPipeline, PixArtAlphaPipeline, PixArtTransformer2DModel
from huggingface_hub import EvalResult, ModelCard, ModelCardData, try_to_load_from_cache
from PIL import Image
from pydantic import Field
from typing_extensions import TypedDict

from ldm.diffusion.guidance import ClassifierFree
from ldm.errors import UsageError
from ldm.files import read_json, read_yaml
from ldm.machine import machine_info
from ldm.models.adapter_file import AdapterFile
from ldm.models.adapters import own_weights
from ldm.models.autoencoder import downsampling_factor
from ldm.models.directories import is_hub_name
from ldm.pipeline import TEXT_PARTS, LatentDiffusionPipeline
from ldm.reporting.grids import captioned_grid
from ldm.reporting.metrics_csv import read_metrics
from ldm.reporting.pages import render
from ldm.runs.layout import RunFolder
from ldm.runs.lineage import base_name
from ldm.training.denoiser import DenoiserTraining

CARD, SAMPLES = "README.md", "samples.png"
TO_WRITE = "**To be written by the author:**"
VERSIONS = ("ldm", "torch", "diffusers", "transformers", "lightning")
# options that say nothing about the model
OF_THE_RUN_ALONE = ("out", "export", "title", "ckpt_path", "weights_only", "resume")
HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w.-]+")


class QuickstartReport(TypedDict):
    """What is read of the ``report.json`` of the quickstart."""

    prompt_accuracy: Annotated[float, Field(ge=0, le=1)]


@dataclass(frozen=True)
class CardFields:
    """What the author of a model states about it.

    Attributes:
        license: its name on the hub, such as ``apache-2.0``, or ``unknown``.
        datasets: names on the hub, such as ``owner/name``.
        report: ``report.json`` of the quickstart that measured the model's prompt accuracy.
        base_model: name on the hub of the model that it was fine-tuned from; unless given, what the run started from, where
            that was downloaded from there.

    Raises:
        UsageError: for a license or a base model that is no such name.
        LdmError: for a report without prompt accuracy.
    """

    license: str = "unknown"
    datasets: tuple[str, ...] = ()
    report: Path | None = None
    base_model: str | None = None

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[a-z0-9][a-z0-9.+-]*", self.license):
            raise UsageError(
                f"--license {self.license!r} is not a name of a license on the hub; give one such as apache-2.0 or cc-by-4.0"
            )
        if self.base_model is not None and not HUB_NAME.fullmatch(self.base_model):
            raise UsageError(f"--base-model {self.base_model!r} is not a name on the hub; give one such as owner/name")
        _ = self.prompt_accuracy  # raises for a broken report before the work

    @property
    def prompt_accuracy(self) -> float | None:
        """Share of prompts whose image shows all that they name; None if it was not measured."""
        return None if self.report is None else read_json(self.report, QuickstartReport)["prompt_accuracy"]


def write_model_card(folder: Path, name: str, module: DenoiserTraining, run: Path, fields: CardFields) -> None:
    """Write ``README.md`` and ``samples.png`` into ``folder``, without any path of this machine.

    Args:
        folder: of what ``module`` was just saved as: a pipeline, ldm's or a ``PixArtAlphaPipeline``, or an adapter.
        name: of the model.
        module: as its run trained it.
        run: that run's folder, with ``logs/config.yaml`` and, if it is still there, ``logs/metrics.csv``.
    """
    RunFolder(run).read_config()  # refuses what is none
    config = read_yaml(RunFolder(run).config, dict[str, Any])
    base = fields.base_model or downloaded_base(config["model"].get("init_from") or "")
    config = without_paths({key: value for key, value in config.items() if key not in OF_THE_RUN_ALONE})
    adapter = AdapterFile.read(folder) if module.adapter is not None else None
    opened = DiffusionPipeline.from_pretrained(folder, local_files_only=True) if adapter is None else module.pipeline()
    pipeline: Any = opened
    settings = sampling_settings(pipeline, module)
    validation = last_validation(run, module.average.step)
    prompts = module.preview_prompts
    if prompts:
        images = generate_samples(pipeline.to(module.device), prompts, settings)
        cell = min(max(images[0].width, 160), 512)
        captioned_grid(images, prompts, cell=cell).save(folder / SAMPLES)
    text = render(
        "model_card.md",
        **{"name": name, "fields": fields, "prompts": prompts, "samples": SAMPLES, "to_write": TO_WRITE},
        **_network(pipeline, module),
        **_usage(pipeline, prompts, settings, base or base_name(module.init_from or "") if adapter else None),
        **_adapter(module, adapter),
        **_metrics(module, validation, fields),
        **_training(pipeline, module, config, base),
    )
    data = _metadata(name, pipeline, config, validation, fields, base, adapter)
    ModelCard(f"---\n{data.to_yaml()}\n---\n\n{text}").save(folder / CARD)


def downloaded_base(init_from: str) -> str | None:
    """The hub name that a run started from, if its files are in the cache of downloads: a path of another folder may look like
    one."""
    files = ("model_index.json", "config.json")
    if is_hub_name(init_from) and any(isinstance(try_to_load_from_cache(init_from, file), str) for file in files):
        return init_from
    return None


def without_paths(value: Any, name: str = "") -> Any:
    """A configuration with every path and URL cut to its last part; the rest may hold names and passwords."""
    if isinstance(value, dict):
        return {key: without_paths(part, key) for key, part in value.items()}
    if isinstance(value, list):
        return [without_paths(part, name) for part in value]
    if not isinstance(value, str) or name == "preview_prompts" or (name == "text_encoder" and HUB_NAME.fullmatch(value)):
        return value
    return base_name(value)


def sampling_settings(pipeline: DiffusionPipeline, module: DenoiserTraining) -> dict[str, Any]:
    """Those of the training's previews; ``PixArtAlphaPipeline`` takes a guidance scale alone, and no clean-up of prompts."""
    stock = isinstance(pipeline, PixArtAlphaPipeline)
    rule: Any = module.preview_guidance
    innermost = rule
    while hasattr(innermost, "inner"):
        innermost = innermost.inner
    settings: dict[str, Any] = {"num_inference_steps": module.preview_steps}
    settings |= {"guidance_scale": innermost.scale} if stock or isinstance(rule, ClassifierFree) else {"guidance": rule}
    return settings | ({"use_resolution_binning": False, "clean_caption": False} if stock else {})


def generate_samples(pipeline: Any, prompts: Sequence[str], settings: dict[str, Any]) -> list[Image.Image]:
    """One image per prompt, from seeds 0, 1 and so on, as in the training's previews."""
    pipeline.set_progress_bar_config(disable=True)
    generators = [torch.Generator().manual_seed(seed) for seed in range(len(prompts))]
    return pipeline(list(prompts), generator=generators, **settings).images


def last_validation(run: Path, step: int) -> dict[str, float]:
    """The metrics of the run's last logged validation up to ``step``, with its ``step``; empty without one."""
    curves = read_metrics(RunFolder(run).metrics)
    last = max((logged for logged in curves.get("val/loss", ([], []))[0] if logged <= step), default=None)
    if last is None:
        return {}
    at_last = {name: dict(zip(*curve, strict=True)).get(last) for name, curve in curves.items() if name.startswith("val/")}
    return {name: value for name, value in at_last.items() if value is not None} | {"step": int(last)}


# -- values of the template ----------------------------------------------------------------------------------------------


def _network(pipeline: Any, module: DenoiserTraining) -> dict[str, Any]:
    shape = module.encoders.trained_on["latent_shape"]
    return {
        "kind": _task(pipeline).removesuffix("-image-generation"),
        "network": type(pipeline.transformer).__name__,
        "parameters": _millions(pipeline.transformer),
        "path": type(module.objective.path).__name__,
        "prediction": type(module.objective.prediction).__name__,
        "latent_shape": shape,
        "image_size": [side * downsampling_factor(pipeline.vae) for side in reversed(shape[1:])],
    }


def _adapter(module: DenoiserTraining, adapter: AdapterFile | None) -> dict[str, Any]:
    """What an adapter's card says beside a model's."""
    if adapter is None or module.adapter is None:
        return {"adapter": None}
    return {"adapter": module.adapter.summary(), "trigger_words": adapter.trigger_words}


def _usage(pipeline: Any, prompts: Sequence[str], settings: dict[str, Any], base: str | None) -> dict[str, Any]:
    """How to open the pipeline, which is of the ``base`` of an adapter: a command, where the guidance is plain, and Python."""
    stock, kind = isinstance(pipeline, PixArtAlphaPipeline), type(pipeline).__name__
    classes, command = None if stock else pipeline.classes, ""
    prompt = "" if classes == [] else next(iter([*prompts, *(classes or ())]), "what to generate")
    # whose class in diffusers has no methods for adapters
    by_peft = base is not None and isinstance(pipeline.transformer, PixArtTransformer2DModel)
    if not stock and not by_peft and "guidance_scale" in settings:
        options = f"--steps {settings['num_inference_steps']} --guidance {settings['guidance_scale']:g} --seed 0 --out images"
        model = "." if base is None else shlex.quote(base)
        adapter = base and "--lora ."
        command = " ".join(filter(None, ["ldm sample", model, prompt and shlex.quote(prompt), adapter, options]))
    return {
        "base": base,
        "by_peft": by_peft,
        "stock": stock,
        "pipeline": kind,
        "opener": kind if stock else "DiffusionPipeline",
        "prompt": prompt,
        "command": command,
        "settings": settings,
        # the repr of a guidance rule is Python
        "rules": sorted(set(re.findall(r"(\w+)\(", repr(settings.get("guidance", ""))))),
    }


def _metrics(module: DenoiserTraining, validation: dict[str, float], fields: CardFields) -> dict[str, Any]:
    metrics = [("steps", f"{module.average.step:,}"), ("images seen in training", f"{module.num_images_seen:,}")]
    if validation:
        metrics.append((f"validation loss, unweighted, at step {validation['step']:,}", f"{validation['val/loss']:.4f}"))
    if fields.prompt_accuracy is not None:
        metrics.append(("prompt accuracy, on held-out pairs of shape and colour", f"{fields.prompt_accuracy:.3f}"))
    bins = [(int(name[-2:]), loss) for name, loss in sorted(validation.items()) if name.startswith("val/loss_bin_")]
    return {"metrics": metrics, "bins": bins}


def _training(pipeline: Any, module: DenoiserTraining, config: dict[str, Any], base: str | None) -> dict[str, Any]:
    source = base or (base_name(module.init_from) if module.init_from else None)
    trained_on = module.encoders.trained_on
    # an export for another pipeline may have folded the latents' statistics into the autoencoder
    made = "the base" if module.adapter else "fine-tuned here from"
    parts = [
        ("transformer", f"{made} {source}" if source else "trained here", ""),
        ("vae", base_name(str(module.autoencoder_path)), trained_on["autoencoder"]),
        *(
            (part, without_paths(encoder.name, "text_encoder"), trained_on[part])
            for part, encoder in zip(TEXT_PARTS, module.encoders.text_encoders, strict=False)
        ),
    ]
    networks = {part: getattr(pipeline, part) for part, _, _ in parts}
    length = (config["model"].get("power_averages") or {}).get("selected")
    average = f"exponential average of decay {config['model']['ema_decay']:g}"
    if length is not None:
        average = f"power-function average of relative length {length:g}"
    return {
        "parts": [
            (f"`{part}`", type(networks[part]).__name__, _millions(networks[part]), origin, f"`{identity}`" if identity else "")
            for part, origin, identity in parts
        ],
        "average": average,
        "step": f"{module.average.step:,}",
        "versions": {package: machine_info()[package] for package in VERSIONS},
        "config": yaml.safe_dump(config, sort_keys=False, allow_unicode=True).strip(),
    }


def _millions(network: torch.nn.Module) -> str:
    """Parameters, without those of adapters, such as ``1.25M``."""
    return f"{sum(parameter.numel() for parameter in own_weights(network).values()) / 1e6:.2f}M"


def _metadata(
    name: str,
    pipeline: DiffusionPipeline,
    config: dict[str, Any],
    validation: dict[str, float],
    fields: CardFields,
    base: str | None,
    adapter: AdapterFile | None,
) -> ModelCardData:
    held_out, task = config["data"]["validation"], _task(pipeline)
    measured = []
    if validation:
        measured.append(_result(task, held_out, "loss", "validation loss", validation["val/loss"]))
    if fields.prompt_accuracy is not None:
        measured.append(_result(task, "ldm shapes, pairs held out", "accuracy", "prompt accuracy", fields.prompt_accuracy))
    tags, of_adapter = [task, "latent-diffusion", "ldm", f"diffusers:{type(pipeline).__name__}"], {}
    if adapter is not None:
        tags = [task, "lora", "diffusers", "ldm"]
        of_adapter = {"base_model_relation": "adapter" if base else None, "instance_prompt": ", ".join(adapter.trigger_words)}
    return ModelCardData(
        **{name: value for name, value in of_adapter.items() if value},
        base_model=base,
        license=fields.license,
        library_name="diffusers",
        pipeline_tag=task,
        tags=tags,
        datasets=list(fields.datasets) or None,
        model_name=name,
        eval_results=measured or None,
    )


def _task(pipeline: DiffusionPipeline) -> str:
    """By the hub's names of tasks."""
    unconditional = isinstance(pipeline, LatentDiffusionPipeline) and pipeline.is_unconditional
    return "unconditional-image-generation" if unconditional else "text-to-image"


def _result(task: str, dataset: str, kind: str, name: str, value: float) -> EvalResult:
    return EvalResult(
        task_type=task,
        dataset_type=re.sub(r"\W+", "-", dataset).strip("-"),
        dataset_name=dataset,
        metric_type=kind,
        metric_name=name,
        metric_value=round(value, 4),
    )
