"""What is installed: versions, packages that come up, weights, extras, ways for processes to talk."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import torch
from packaging.requirements import Requirement

from ldm.doctor.finding import FAIL, OK, WARN, Finding
from ldm.errors import LdmError, UsageError, first_line
from ldm.machine import PACKAGES, machine_info

IMPORTED = ("torchvision", "lightning", "diffusers", "transformers", "lpips", "torchmetrics", "webdataset", "simplejpeg")
# not only broken: malicious
STOLEN = {"lightning": ("2.6.2", "2.6.3")}


def version_findings(installed: Mapping[str, str], required: Iterable[str]) -> Iterator[Finding]:
    """Which of the installed versions are known to be bad, or others than those that are asked for.

    Args:
        installed: by package.
        required: as packages ask for one another: ``torch>=2.9,<3``.
    """
    asked = {requirement.name: requirement.specifier for requirement in map(Requirement, required)}
    for name, found in installed.items():
        if found in STOLEN.get(name, ()):
            said = f"{found} is a malicious release (pytorch-lightning issue 21691)"
            mend = f"pip install -U '{name}!={',!='.join(STOLEN[name])}'; then change the passwords and keys of this machine"
            yield Finding(name, FAIL, said, mend)
        elif name in asked and found not in asked[name]:
            yield Finding(name, FAIL, f"{found}; this program needs {asked[name]}", f"pip install '{name}{asked[name]}'")
    yield Finding("versions", OK, ", ".join(f"{name} {found}" for name, found in installed.items()))


def installed_versions() -> dict[str, str]:
    """Of Python and of what training stands on, as far as it is installed."""
    return {name: found for name, found in machine_info().items() if name in ("Python", *PACKAGES) and found != "not installed"}


def requirements() -> list[str]:
    """What an installed ldm asks for, without its extras."""
    try:
        return [each for each in importlib.metadata.requires("ldm") or [] if "extra ==" not in each]
    except importlib.metadata.PackageNotFoundError:  # a checkout that was never installed
        return []


def import_findings(names: Iterable[str]) -> Iterator[Finding]:
    """Whether packages come up at all: builds of torch and torchvision that do not belong together do not."""
    fine = []
    for name in names:
        try:
            importlib.import_module(name)
            fine.append(name)
        except Exception as error:  # whatever a broken package raises
            said, mend = first_line(error), f"pip install --force-reinstall {name}"
            if "torchvision::" in said:
                said = f"{said}: this torchvision was built for another torch than {torch.__version__}"
                build = f"cu{torch.version.cuda.replace('.', '')}" if torch.version.cuda else "cpu"
                index = f"https://download.pytorch.org/whl/{build}"
                mend = f"pip install --force-reinstall torch torchvision --index-url {index}"
            yield Finding(f"import {name}", FAIL, said, mend)
    if fine:
        yield Finding("imports", OK, ", ".join(fine))


# torchvision's checkpoint of each trunk of LPIPS
TRUNKS = {"alex": "AlexNet_Weights", "vgg": "VGG16_Weights"}


def weights_findings() -> Iterator[Finding]:
    """The text encoder that comes in a package, and the trunks of LPIPS."""
    try:
        import torchvision.models

        from ldm.models.text_encoder import minilm_folder
    except (ImportError, RuntimeError):  # said among the imports
        return
    try:
        minilm_folder()
    except LdmError as error:
        absent = isinstance(error, UsageError)
        yield Finding("text encoder minilm", WARN if absent else FAIL, str(error), "pip install 'ldm[quickstart]'")
    else:
        yield Finding("text encoder minilm", OK, "there, as it was published")
    cache = Path(torch.hub.get_dir()) / "checkpoints"
    for trunk, weights in TRUNKS.items():
        file = cache / getattr(torchvision.models, weights).IMAGENET1K_V1.url.rsplit("/", 1)[1]
        if file.is_file():
            yield Finding(f"LPIPS trunk {trunk}", OK, str(file))
        else:
            mend = f"stage one downloads it; offline copy it there, or set model.perceptual.init_args.weights: random ({trunk})"
            yield Finding(f"LPIPS trunk {trunk}", WARN, f"{file} is not there", mend)


EXTRAS = {
    "serve": (("fastapi", "uvicorn"), "ldm serve"),
    "video": (("av",), "the MP4 of ldm interpolate"),
    "datasets": (("datasets",), "ldm shards pack of a Hugging Face data set"),
    "s3": (("s3fs",), "shards at s3:// addresses"),
}


def extra_findings() -> Iterator[Finding]:
    """What can be installed beside."""
    for extra, (packages, what) in EXTRAS.items():
        missing = [package for package in packages if importlib.util.find_spec(package) is None]
        if missing:
            yield Finding(f"extra {extra}", OK, f"not installed; for {what}", f"pip install 'ldm[{extra}]'")
        else:
            yield Finding(f"extra {extra}", OK, f"there; for {what}")


def network_findings() -> Iterator[Finding]:
    """What several processes would talk through."""
    if not torch.distributed.is_available():
        yield Finding("torch.distributed", WARN, "not in this torch", "one process still trains; else another build of torch")
        return
    for name, there, needed in (
        ("gloo", torch.distributed.is_gloo_available(), True),
        ("nccl", torch.distributed.is_nccl_available(), torch.cuda.device_count() > 1),
    ):
        mend = "one process still trains; else another build of torch" if needed and not there else ""
        yield Finding(name, WARN if mend else OK, "there" if there else "not in this torch", mend)
