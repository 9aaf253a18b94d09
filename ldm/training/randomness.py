"""Random numbers of training that do not depend on the number of processes, and that resume exactly.

The random numbers of a sample (time, noise, sample of the posterior) depend only on the run's seed and on the sample's number
in the training order (:class:`ldm.data.plan.PlannedSample`). A step is therefore the same on one process, on many, and after
a resume, without any saved state. Dropout uses torch's global generators; checkpoints hold their state for each process.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from hashlib import blake2b
from typing import Any, cast

import numpy as np
import torch
import torch.distributed as dist

from ldm.data.plan import PlannedSample
from ldm.errors import LdmError, first_line


def sample_generators(seed: int, samples: Sequence[PlannedSample]) -> list[torch.Generator]:
    """One generator for each sample of a batch. They are on the CPU, so that a GPU trains on the same noise as a CPU."""
    return [_generator(seed, b"draw", planned.number) for planned in samples]


def step_generator(seed: int, step: int) -> torch.Generator:
    """For random numbers that all samples of a step share, on all processes."""
    return _generator(seed, b"step", step)


def _generator(seed: int, use: bytes, number: int) -> torch.Generator:
    digest = blake2b(b"%d %s %d" % (seed, use, number), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)  # seeds are signed


def global_states() -> list[dict[str, Any]]:
    """The states of every process's global generators, in plain types and tensors; a collective operation."""
    kind, keys, *rest = cast("tuple[str, np.ndarray, int, int, float]", np.random.get_state())
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
    """Set this process's global generators to one of :func:`global_states`. Raises :class:`LdmError` if it is none."""
    try:
        torch.set_rng_state(state["torch"])
        if len(state["cuda"]) == torch.cuda.device_count():
            torch.cuda.set_rng_state_all(state["cuda"])
        version, numbers, gauss = state["python"]
        random.setstate((version, tuple(numbers), gauss))
        kind, keys, *rest = state["numpy"]
        np.random.set_state((kind, np.array(keys, np.uint32), *rest))
    except (KeyError, TypeError, ValueError, OverflowError, RuntimeError) as error:
        raise LdmError(f"the checkpoint's random states are broken ({first_line(error)}); resume from another one") from error
