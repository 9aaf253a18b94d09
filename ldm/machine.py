"""What this machine is: devices, and whether bf16 is worth it on them."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version

import torch

PACKAGES = (
    "ldm",
    "torch",
    "lightning",
    "diffusers",
    "transformers",
    "lpips",
    "webdataset",
    "torchmetrics",
    "torchvision",
)

# torch's CPU allocator, CUDA outside of torch's allocator, and cuBLAS for its workspace
OUT_OF_MEMORY = ("allocate memory", "out of memory", "STATUS_ALLOC_FAILED")


def cpu_flags() -> set[str]:
    """Instruction sets of the CPU, as Linux names them; empty where that cannot be told."""
    try:
        with open("/proc/cpuinfo") as file:
            return set(next((line for line in file if line.startswith("flags")), "").split())
    except OSError:
        return set()


def cpu_name() -> str:
    """The model of the CPU."""
    try:
        with open("/proc/cpuinfo") as file:
            return next((line.split(":", 1)[1].strip() for line in file if line.startswith("model name")), "CPU")
    except OSError:
        return platform.processor() or "CPU"


def bf16_pays() -> bool:
    """Whether bf16 is faster than fp32 here: a GPU that has it, or a CPU with AMX or AVX512-BF16.

    On other CPUs it is emulated, and a hundred times slower.
    """
    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return bool(cpu_flags() & {"amx_bf16", "avx512_bf16"})


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that the memory of a GPU or of the machine did not suffice (for a CPU torch has no class of it)."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in OUT_OF_MEMORY)


def machine_info() -> dict[str, str]:
    """The machine and the versions, for reports."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    described = {
        "CPU": f"{cpu_name()}, {torch.get_num_threads()} threads",
        "GPU": device,
        "bf16": "yes" if bf16_pays() else "no (fp32)",
        "Python": platform.python_version(),
    }
    for package in PACKAGES:
        try:
            described[package] = version(package)
        except PackageNotFoundError:
            described[package] = "not installed"
    return described
