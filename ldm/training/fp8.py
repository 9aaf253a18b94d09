"""Matrix products of the denoiser's blocks in 8-bit floating point (Micikevicius et al. 2022, arXiv 2209.05433), by torchao.

Weights stay in fp32 under their names, so that averages, optimisers, checkpoints and exports do not change. Each product casts
its two matrices, scaled row by row, and sums in fp32; so do those of the backward pass.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import torch
from torch import nn

from ldm.errors import UsageError, first_line

# NVIDIA's Ada Lovelace; the kernels take sizes that are multiples of 16
COMPUTE_CAPABILITY, MULTIPLE = (8, 9), 16


def require_fp8(device: torch.device, compute_dtype: torch.dtype, compiled: bool) -> None:
    """Raise :class:`UsageError` where products in fp8 cannot run, or would be slower than in bf16 whatever the sizes."""
    found = torch.cuda.get_device_capability(device) if device.type == "cuda" else (0, 0)
    if found < COMPUTE_CAPABILITY:
        what = device.type if device.type != "cuda" else f"one of {found[0]}.{found[1]}"
        raise UsageError(f"fp8 needs a GPU of compute capability 8.9 or more (RTX 4090, L40S, H100), and this is {what}")
    if compute_dtype is not torch.bfloat16:
        raise UsageError("fp8 takes what bf16 leaves; give precision bf16-mixed")
    if not compiled:
        raise UsageError("fp8 without compile is slower than bf16, because every cast is a kernel of its own; give compile too")


def to_fp8(blocks: Iterable[nn.Module]) -> int:
    """Let the linear layers of ``blocks`` multiply in fp8; returns the number of layers.

    Layers whose sizes are not multiples of 16 stay as they are.
    """
    try:
        from torchao.float8 import (  # pyright: ignore[reportMissingImports]  not in dev
            Float8LinearConfig,
            convert_to_float8_training,
        )
    except ImportError as error:
        raise UsageError(f"fp8 needs torchao ({first_line(error)}): pip install 'ldm[fp8]'") from error
    config = replace(Float8LinearConfig.from_recipe_name("rowwise"), pad_inner_dim=True)  # the number of tokens may be any
    converted = 0

    def fits(layer: nn.Module, _: str) -> bool:
        nonlocal converted
        fitting = type(layer) is nn.Linear and layer.in_features % MULTIPLE == 0 == layer.out_features % MULTIPLE
        converted += fitting
        return fitting

    for block in blocks:
        convert_to_float8_training(block, module_filter_fn=fits, config=config)
    if not converted:
        raise UsageError(
            f"fp8 needs a width that is a multiple of {MULTIPLE}, of which the blocks have no layer; set it to false"
        )
    return converted
