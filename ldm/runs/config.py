"""The config of ``fit`` before anything is made of it: how much YAML may grow, values out of range, names that have changed.

A config names classes and their arguments, so it is code: read those of strangers before you run them.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import yaml
from jsonargparse import ArgumentError, Namespace

import ldm
from ldm.errors import LdmError, UsageError, first_line
from ldm.files import MAX_YAML_BYTES, check_yaml, read_bytes
from ldm.machine import device_type
from ldm.runs.layout import MAX_STEPS
from ldm.terminal import printable

#: packages whose classes are built from a run's config without asking
TRUSTED = ("ldm", "torch", "diffusers", "lightning")
MAX_PROCESSES = 256  # on the CPU
# characters of a message that quotes a config
MAX_MESSAGE = 500

# -- YAML ----------------------------------------------------------------------------------------------------------------


def limit_yaml() -> None:
    """Make jsonargparse refuse what :func:`ldm.files.check_yaml` refuses, in config files and in values."""
    from jsonargparse import _loaders_dumpers, set_loader

    if getattr(_loaders_dumpers.yaml_load, "limited", False):
        return
    load = _loaders_dumpers.yaml_load

    def load_limited(stream: str) -> Any:
        check_yaml(stream)
        try:
            return load(stream)
        except (ValueError, TypeError) as error:  # a number of thousands of digits, a list as a key
            raise yaml.YAMLError(first_line(error)) from error

    load_limited.limited = True  # pyright: ignore[reportFunctionMemberAccess]
    set_loader("yaml", load_limited, exceptions=(yaml.YAMLError,))
    _loaders_dumpers.yaml_load = load_limited  # for texts inside a config, which have no public setting


def require_config_files(arguments: Sequence[str]) -> None:
    """Refuse what cannot be read as a config: jsonargparse would wait for a pipe, and read a device for ever.

    ``--config`` is not the only option that takes a file: ``--model``, ``--data`` and every class do.
    """
    for number, word in enumerate(arguments):
        name, equals, value = word.partition("=")
        path = value if equals else word
        if os.path.exists(path) and not os.path.isfile(path) and not os.path.isdir(path):
            raise UsageError(f"{printable(path)} is a pipe, a socket or a device; give a regular file or a folder")
        if name == "--config" and (equals or number + 1 < len(arguments)):
            path = value if equals else arguments[number + 1]
            try:
                read_bytes(path, MAX_YAML_BYTES, "give --config a YAML file").decode()
            except UnicodeDecodeError as error:
                raise UsageError(f"{printable(path)} is not UTF-8 ({error.reason}); save it as UTF-8") from None
            except LdmError as error:
                raise UsageError(str(error)) from None


# -- values --------------------------------------------------------------------------------------------------------------

_MODEL_OPTIMISERS = ("model.optimiser", "model.discriminator_optimiser")
# the range in words, a test, and the keys; constructors check what depends on other values
RANGES: tuple[tuple[str, Callable[[float], bool], set[str]], ...] = (
    (
        "0 or more",
        lambda value: value >= 0,
        {
            *("data.validation_samples", "data.max_wait_seconds", "data.seed", "data.max_bad_in_a_row", "data.text_encoder"),
            *(f"{each}.{name}" for each in _MODEL_OPTIMISERS for name in ("learning_rate", "weight_decay", "warmup_steps")),
            *("model.optimiser.muon_learning_rate", "model.max_skipped"),
            *("model.perceptual_weight", "model.kl_weight", "model.kl_warmup"),
            *(f"model.adversary.{name}" for name in ("start", "discriminator_warmup", "generator_ramp", "weight")),
            *("model.adversary.max_adaptive_weight", "trainer.log_every_n_steps"),
        },
    ),
    (
        "1 or more",
        lambda value: value >= 1,
        {
            *("data.batch_size", "data.max_tokens", "data.shuffle_window", "model.accumulate"),
            *("trainer.val_check_interval", "trainer.num_nodes"),
        },
    ),
    (
        "a number above 0",
        lambda value: value > 0,
        {"data.cache_gib", *(f"{each}.max_grad_norm" for each in _MODEL_OPTIMISERS)},
    ),
    (
        "0 to 1",
        lambda value: 0 <= value <= 1,
        {"data.flip", "data.caption_dropout", "data.max_bad_share", "model.ema_decay"},
    ),
    ("0 or more and less than 1", lambda value: 0 <= value < 1, {f"{each}.betas" for each in _MODEL_OPTIMISERS}),
    ("0 to 1000000", lambda value: 0 <= value <= 1e6, {"data.train.weight"}),
    ("0 to 1024", lambda value: 0 <= value <= 1024, {"data.workers"}),
    ("1 to 65536", lambda value: 1 <= value <= 65536, {"data.image_size"}),
    ("1 to 10000", lambda value: 1 <= value <= 10_000, {"model.preview_steps"}),
    ("0 to 4294967295", lambda value: 0 <= value < 2**32, {"seed_everything"}),  # numpy's
)
# options of Lightning's trainer that do not fit an endless loader and manual optimisation: what may stand there, and the fix
_ENDLESS = "the loader never ends; give the number of steps as trainer.max_steps"
TRAINER_OPTIONS: dict[str, tuple[tuple[Any, ...], str]] = {
    "accumulate_grad_batches": ((1,), "give the whole batch as data.batch_size and split it with model.accumulate"),
    "gradient_clip_val": ((None, 0), "give model.optimiser.max_grad_norm"),
    "gradient_clip_algorithm": ((None,), "give model.optimiser.max_grad_norm"),
    "max_epochs": ((None, -1), _ENDLESS),
    "min_epochs": ((None,), _ENDLESS),
    "limit_train_batches": ((None, 1.0), _ENDLESS),
    "check_val_every_n_epoch": ((None,), "the loader never ends; give trainer.val_check_interval in steps"),
    "reload_dataloaders_every_n_epochs": ((0,), "the loader never ends"),
    "overfit_batches": ((0,), "pack a few images by themselves and give their folder as data.train"),
    "fast_dev_run": ((False,), "give --dry-run"),
    "barebones": ((False,), "give --dry-run, which measures steps"),
    "enable_checkpointing": ((None, True), "a run needs checkpoints; checkpoints.keep_last says how many to keep"),
}


def require_values(options: Namespace) -> None:
    """Raise :class:`UsageError`, naming the key and the fix, for the first value of ``fit`` that cannot be meant."""
    trainer = options.trainer
    interval = trainer.val_check_interval
    if isinstance(interval, bool) or not isinstance(interval, int | None):
        raise UsageError(
            f"trainer.val_check_interval is {interval}: the loader never ends, and clocks of processes differ; give a whole "
            "number of batches"
        )
    for key, value in _numbers(options):
        no_limit = value == math.inf and key.endswith(".max_grad_norm")
        if not (no_limit or (-(2**63) <= value < 2**63 if isinstance(value, int) else math.isfinite(value))):
            raise UsageError(f"{key} is {printable(value)[:40]}; give a finite number, a whole one of at most 64 bits")
        for words, fits, keys in RANGES:
            if key in keys and not fits(value):
                raise UsageError(f"{key} is {value:g}; give {words}")
    for name, (allowed, fix) in TRAINER_OPTIONS.items():
        if trainer[name] not in allowed:
            raise UsageError(f"trainer.{name} {trainer[name]}: {fix}")
    _require_an_end(options)
    if re.search("_(spawn|fork|notebook)", str(trainer.strategy)):
        raise UsageError(f"trainer.strategy {trainer.strategy} starts processes that cannot take the run over; give ddp")
    _require_devices(trainer)


def _numbers(value: Any, key: str = "") -> Iterator[tuple[str, int | float]]:
    """Every number of the config with its key, such as ``data.train.weight``; ``init_args`` and positions are left out."""
    if isinstance(value, Namespace):
        value = vars(value)
    if isinstance(value, dict):
        for name, each in value.items():
            yield from _numbers(each, key if name == "init_args" else f"{key}.{name}" if key else str(name))
    elif isinstance(value, list | tuple):
        for each in value:
            yield from _numbers(each, key)
    elif hasattr(value, "__dataclass_fields__"):
        yield from _numbers(vars(value), key)
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield key, value


def _require_an_end(options: Namespace) -> None:
    steps, trainer = options.trainer.max_steps, options.trainer
    if steps != -1 and not 1 <= steps <= MAX_STEPS:
        raise UsageError(f"trainer.max_steps is {steps}; give 1 to {MAX_STEPS}, or -1 with trainer.max_time")
    if steps == -1 and trainer.max_time is None and not trainer.callbacks:
        raise UsageError("trainer.max_steps is -1, so the run would never end; give trainer.max_time, or a number of steps")


def _require_devices(trainer: Namespace) -> None:
    """Refuse devices that this machine does not have, before a launcher starts a process for each."""
    accelerator, devices = str(trainer.accelerator), trainer.devices
    device = device_type(accelerator)
    if accelerator in ("gpu", "cuda", "mps") and device == "cpu":
        raise UsageError(f"trainer.accelerator is {accelerator}, but torch finds no GPU here; give cpu or auto")
    text = "".join(str(devices).split()).strip("[]")
    if text not in ("auto", "-1") and not re.fullmatch(r"\d+(,\d+)*,?", text):
        raise UsageError(f"trainer.devices is {devices}; give a number, a list such as [0, 2], or auto")
    on_gpus = device == "cuda"
    if text == "auto" or (on_gpus and ("," in text or isinstance(devices, list) or text == "-1")):
        return
    most = torch.cuda.device_count() if on_gpus else MAX_PROCESSES
    if not text.isdigit() or isinstance(devices, list) or not 1 <= int(text[:9]) <= most:
        raise UsageError(f"trainer.devices is {devices}; give 1 to {most}{', the GPUs of this machine' if on_gpus else ''}")


# -- errors --------------------------------------------------------------------------------------------------------------


@contextmanager
def config_errors(what: str) -> Iterator[None]:
    """Turn whatever a class of the config, or its library, raises into one line: the config chose both.

    jsonargparse wraps an error of ours in many lines of its own; that is raised as it is.
    """
    try:
        yield
    except (LdmError, ArgumentError):
        raise
    except Exception as error:
        cause: BaseException | None = error
        while cause is not None and not isinstance(cause, LdmError):
            cause = cause.__cause__ or cause.__context__
        if cause is not None:
            raise cause from None
        raise UsageError(f"{what}: {_short(error) or 'no reason given'} ({type(error).__name__})") from error


# options and classes of older configs
RENAMED = {
    "direction_weight": "auxiliary_losses with ldm.losses.auxiliary.DirectionLoss",
    "product": "selected",
    "widths": "block_out_channels",
    "norm_groups": "norm_num_groups",
    "mid_attention": "mid_block_add_attention",
    "num_heads": "num_attention_heads",
    "text_width": "caption_channels",
    "alone": "discriminator_warmup",
    "adversary.warmup": "adversary.generator_ramp",
    "model.caption_dropout": "data.caption_dropout",
    "model.discriminator": "model.adversary.discriminator",
    "adversarial": "adversary.loss",
    "adversarial_weight": "adversary.weight",
    "adversarial_delay": "adversary.discriminator_warmup",
    "adversarial_warmup": "adversary.generator_ramp",
    "discriminator_start": "adversary.start",
    "model.max_adaptive_weight": "model.adversary.max_adaptive_weight",
    "ldm.diffusion.guidance.ClassifierFreeGuidance": "ldm.diffusion.guidance.ClassifierFree",
    "ldm.training.optimiser.DenoiserOptimiserConfig": "ldm.training.optimiser.MuonConfig",
}
_UNKNOWN = re.compile(r"unrecognized arguments: --([\w.]+)|[Oo]ption '([\w.]+)'( is not accepted)?")


def explain(error: ArgumentError) -> str:
    """An error of jsonargparse as one line, with the present name of what an older config names."""
    said = printable(" ".join(str(error).split()))
    return "; ".join([_short(error), *_key_hints(said), *_class_hints(said)])


def _short(error: Exception) -> str:
    """One line without what jsonargparse repeats: every type that the value could have had, and the value."""
    said = printable(" ".join(str(error).split()))
    for noise in (
        r"- Expected a path but .*? either not accessible or invalid ",
        r"Does not validate against any of the Union subtypes Subtypes: \[.*?\] Errors: ",
        r" - Expected a <class 'NoneType'>",
        r" Given value type: <class '[^']*'> Given value: .*",
        r'(?<=": )(- )+',
    ):
        said = re.sub(noise, "", said)
    return said if len(said) <= MAX_MESSAGE else f"{said[:MAX_MESSAGE]} …"


def _key_hints(said: str) -> Iterator[str]:
    for found in _UNKNOWN.finditer(said):
        key = found[1] or found[2]
        for old, new in RENAMED.items():
            if f".{key}".endswith(f".{old}"):
                yield f"{old} is now {new}"


def _class_hints(said: str) -> Iterator[str]:
    for path in dict.fromkeys(re.findall(r"class_path '?(ldm(?:\.\w+)+)", said)):
        module, _, name = path.rpartition(".")
        if path in RENAMED:
            yield f"{path} is now {RENAMED[path]}"
            continue
        root = Path(ldm.__file__).parent
        for file in sorted(root.rglob("*.py")):
            if re.search(rf"^class {name}\b", file.read_text(encoding="utf-8"), re.MULTILINE):
                there = ".".join(("ldm", *file.relative_to(root).with_suffix("").parts))
                if there != module:
                    yield f"{path} is now {there}.{name}"
