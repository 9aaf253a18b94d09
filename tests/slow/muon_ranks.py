"""Steps of Muon on one process, on several and on several with sharded weights, with the exchanges between them by name.

torchrun --nproc-per-node 2 muon_ranks.py FILE
"""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh

from ldm.training.fsdp import full_tensor, shard, shard_like
from ldm.training.optimiser import Muon

EXCHANGES = ("all_gather_into_tensor", "all_to_all_single", "all_reduce")


def train(sharded: bool = False) -> tuple[list[Tensor], Counter[str]]:
    """Weights after four steps, of which the third is void, and the exchanges of a step."""
    exchanges: Counter[str] = Counter()
    torch.manual_seed(0)
    # two and three matrices of a shape, wide and tall, of rows that two processes cannot share evenly, and a convolution
    shapes = [(6, 5)] * 3 + [(5, 7)] * 2
    network = nn.Sequential(*(nn.Linear(*shape, bias=False) for shape in shapes), nn.Conv2d(3, 7, 2))
    if sharded:
        shard(network, [], init_device_mesh("cpu", (dist.get_world_size(),)), torch.float32)
    *matrices, bias = network.parameters()
    optimiser = Muon([bias], matrices, 0.02, lr=0.01, weight_decay=0.1, fused=True)
    for step in range(4):
        for parameter in network.parameters():
            gradient = torch.randn(parameter.shape)
            parameter.grad = shard_like(gradient.fill_(torch.nan) if step == 2 else gradient, parameter)
        optimiser.found_inf = torch.tensor(float(step == 2))  # pyright: ignore[reportAttributeAccessIssue]  as GradScaler sets it
        exchanges.clear()
        with mock.patch.multiple(dist, **{name: counting(name, exchanges) for name in EXCHANGES}):
            optimiser.step()
    return [full_tensor(parameter).detach() for parameter in network.parameters()], exchanges


def counting(name: str, counts: Counter[str]) -> Any:
    """The function of torch.distributed of this name, with its calls counted."""
    function = getattr(dist, name)

    def call(*arguments: Any, **options: Any) -> Any:
        counts[name] += 1
        return function(*arguments, **options)

    return call


def main(file: Path) -> None:
    results = {"one process": train()}
    dist.init_process_group("gloo")
    results |= {"several": train(), "sharded": train(sharded=True)}
    if dist.get_rank() == 0:
        torch.save(results, file)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
