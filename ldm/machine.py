"""CPU, GPU and installed versions; whether bf16 is faster than fp32; whether fp32 is TF32 on GPUs."""

from __future__ import annotations

import platform
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib.metadata import PackageNotFoundError, version

import torch

PACKAGES = (
    *("ldm", "torch", "lightning", "diffusers", "transformers"),
    *("lpips", "webdataset", "torchmetrics", "torchvision"),
)


def _cpu_info(field: str) -> str:
    """What Linux says of the first core; empty on other systems."""
    with suppress(OSError), open("/proc/cpuinfo") as file:
        return next((line.partition(":")[2].strip() for line in file if line.startswith(field)), "")
    return ""


def cpu_name() -> str:
    """Model name of the CPU."""
    return _cpu_info("model name") or platform.processor() or "CPU"


def device_type(accelerator: str = "auto") -> str:
    """``cuda``, ``mps`` or ``cpu``: the devices of this machine that Lightning's ``accelerator`` stands for.

    ``auto`` and ``gpu`` are the GPUs if there are any. An accelerator that the machine lacks is ``cpu``.
    """
    for device, is_available in (("cuda", torch.cuda.is_available), ("mps", torch.backends.mps.is_available)):
        if accelerator in ("auto", "gpu", device) and is_available():
            return device
    return "cpu"


def bf16_is_faster(device: str) -> bool:
    """Whether bf16 is faster than fp32 on a type of device: a GPU with bf16, or a CPU with AMX or AVX512-BF16.

    Other CPUs emulate bf16, a hundred times slower.
    """
    if device != "cpu":
        return device == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return not {"amx_bf16", "avx512_bf16"}.isdisjoint(_cpu_info("flags").split())


def set_fp32_precision(precision: str) -> None:
    """Of products and convolutions of fp32 tensors on GPUs: ``highest`` is IEEE fp32, ``high`` and ``medium`` are TF32, with 10
    bits of mantissa. torch's own setting leaves convolutions out, which are TF32 by default."""
    torch.set_float32_matmul_precision(precision)
    torch.backends.cudnn.allow_tf32 = (
        precision != "highest"
    )  # after its successor fp32_precision, Inductor could not read this one


@contextmanager
def full_fp32() -> Iterator[None]:
    """IEEE fp32 within it: what is stored as fp32 is fp32, on any GPU. It holds for all threads of the process."""
    products, convolutions = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    set_fp32_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(products)
        torch.backends.cudnn.allow_tf32 = convolutions


def machine_info() -> dict[str, str]:
    """Hardware and package versions, for reports."""
    info = {
        "CPU": f"{cpu_name()}, {torch.get_num_threads()} threads",
        "GPU": torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU",
        "bf16": "yes" if bf16_is_faster("cuda" if torch.cuda.is_available() else "cpu") else "no (fp32)",
        "Python": platform.python_version(),
    }
    for package in PACKAGES:
        try:
            info[package] = version(package)
        except PackageNotFoundError:
            info[package] = "not installed"
    return info
