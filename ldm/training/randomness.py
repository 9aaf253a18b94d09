"""Where the randomness of training comes from, and how it goes on after a stop.

What a step draws for a sample (its time, its noise, its place in the posterior) is a function of the run's seed and of the
number of the draw alone (:class:`ldm.data.plan.PlannedSample`). So a step is the same on one process, on many, and in a run
that was stopped and resumed, and nothing has to be remembered for it. Whatever a network draws itself (dropout) comes from
torch's global generators, one state for each process, which checkpoints carry.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from hashlib import blake2b
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from ldm.data.plan import PlannedSample


def draw_generators(seed: int, draws: Sequence[PlannedSample]) -> list[torch.Generator]:
    """A generator on the CPU for every sample of a batch: a GPU then trains on the same noise as a CPU."""
    return [_generator(seed, b"draw", draw.number) for draw in draws]


def step_generator(seed: int, step: int) -> torch.Generator:
    """For what a step draws once for all samples of all processes."""
    return _generator(seed, b"step", step)


def _generator(seed: int, use: bytes, number: int) -> torch.Generator:
    digest = blake2b(b"%d %s %d" % (seed, use, number), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)  # seeds are signed


def global_states() -> list[dict[str, Any]]:
    """The states of the global generators of every process, in plain types and tensors; all processes must ask."""
    kind, keys, *rest = np.random.get_state()
    state = {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else [],
        "python": random.getstate(),
        "numpy": (kind, keys.tolist(), *rest),
    }
    if not (dist.is_available() and dist.is_initialized()):
        return [state]
    states: list[dict[str, Any]] = [{}] * dist.get_world_size()
    dist.all_gather_object(states, state)
    return states


def set_global_state(state: dict[str, Any]) -> None:
    """Go on with one of :func:`global_states`."""
    torch.set_rng_state(state["torch"])
    if len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(state["cuda"])
    version, numbers, gauss = state["python"]
    random.setstate((version, tuple(numbers), gauss))
    kind, keys, *rest = state["numpy"]
    np.random.set_state((kind, np.array(keys, np.uint32), *rest))
