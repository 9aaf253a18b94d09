"""Parts of a network compiled in place by ``torch.compile``: a graph for every size, shared by parts of one structure."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

import torch
import torch._dynamo  # the options below are documented there only
from torch import Tensor, nn

from ldm.errors import UsageError

#: not, or part by part; ``cuda_graphs``: and each part is replayed as a CUDA graph, see :func:`compile_blocks`
Compile = bool | Literal["cuda_graphs"]
# torch counts the graphs of all modules together, because they share the code of nn.Module's call, and compiles no more beyond
# a limit, 8 by default; a stage one of four levels needs 14 for each of training, validation, its last batch and previews, and
# a stage two needs two for each of these and each size of image, of which there may be a hundred
MAX_GRAPHS = 1024


def compile_modules(modules: Iterable[nn.Module], any_size: bool = False, mode: str | None = None) -> None:
    """Compile modules in place, each by itself; the names of weights stay.

    Args:
        any_size: one graph for batches of all sizes, which is slower than one for each; for sizes that hardly repeat.
        mode: of ``torch.compile``.
    """
    torch._dynamo.config.recompile_limit = torch._dynamo.config.accumulated_recompile_limit = MAX_GRAPHS
    # DDP would have graphs cut where its buckets of gradients end, to exchange one while the next is computed. Modules as small
    # as these overlap uncut, and cut in different places they share no graph.
    torch._dynamo.config.optimize_ddp = False
    for module in modules:
        # dynamic=False, not None, by which a size that once differed, between previews and training, is dynamic from then on
        module.compile(dynamic=any_size, mode=mode)


def compile_blocks(network: nn.Module, blocks: Iterable[nn.Module], choice: Compile, device: torch.device) -> None:
    """Compile the ``blocks`` of a ``network``, which is or will be on ``device``, and its last layers, as ``choice`` says.

    With CUDA graphs the kernels of a block are launched together. That is faster where the batch is so small that launching
    them takes longer than running them, and takes memory for each size. Raises UsageError on other devices.
    """
    if choice == "cuda_graphs":
        if device.type != "cuda":
            raise UsageError(f"CUDA graphs do not run on the device {device}; compile without them")
        # the outputs of blocks may be overwritten from here on, and not before the next block reads them
        network.register_forward_pre_hook(lambda *_: torch.compiler.cudagraph_mark_step_begin())
        compile_modules(blocks, mode="reduce-overhead")  # without the last layers: the caller may keep what they return
    elif choice:
        output = getattr(network, "output", None)  # a DiT's
        compile_modules([*blocks, *([output] if isinstance(output, nn.Module) else [])])


def any_length(tensor: Tensor, dim: int) -> None:
    """Let compiled modules take this tensor with any size in dimension ``dim`` by one graph."""
    if not torch.compiler.is_compiling():
        torch._dynamo.maybe_mark_dynamic(tensor, dim)
