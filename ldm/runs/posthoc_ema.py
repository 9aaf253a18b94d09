"""Post-hoc EMA: averages of any length, made of stored ones (Karras et al. 2024, arXiv 2312.02696, section 3.2, appendix C).

A power-function average of exponent gamma at step t weighs step s by its profile p(s) = (gamma + 1)·s^gamma / t^(gamma + 1),
s ≤ t. The profiles of the snapshots are combined to the least-squares fit of the wanted profile, and the snapshots are summed
with the same coefficients. Unlike in the paper the coefficients sum to one, so that few snapshots do not shrink the network.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ldm.errors import LdmError, UsageError, first_line
from ldm.files import atomic_folder, open_regular, require_new_folder
from ldm.reporting.metrics_csv import MAX_STEPS
from ldm.runs.export import SavedRun, require_finite
from ldm.runs.layout import RunFolder
from ldm.runs.lineage import write_lineage
from ldm.terminal import printable, say
from ldm.training.base import TrainingModule, require_weights
from ldm.training.ema import SNAPSHOTS, gamma_of

MOVE = "move it away: the others do without it"


class Snapshot(NamedTuple):
    """A stored average."""

    file: Path
    step: int
    sigma_rel: float


def find_snapshots(run: str | Path) -> list[Snapshot]:
    """The snapshots of a run, the oldest first. Raises :class:`UsageError` if there are none."""
    found = []
    for file in sorted((Path(run) / SNAPSHOTS).glob("*.safetensors")):
        with open_regular(file, MOVE):  # safe_open would wait for a pipe
            pass
        try:
            with safe_open(file, "pt", backend="pread") as tensors:
                metadata = tensors.metadata()
            step, sigma_rel = int(metadata["step"]), float(metadata["sigma_rel"])
            if not 1 <= step <= MAX_STEPS:
                raise ValueError(f"its step is {step}")
            gamma_of(sigma_rel)  # checks its range
        except (OSError, SafetensorError, KeyError, TypeError, ValueError, UsageError) as error:
            raise LdmError(f"{file} is not a whole snapshot of an average ({first_line(error)}); {MOVE}") from None
        found.append(Snapshot(file, step, sigma_rel))
    if not found:
        raise UsageError(f"{Path(run) / SNAPSHOTS} holds no averages; train with model.power_averages, which stores them")
    return found


def inner_product(steps: np.ndarray, gammas: np.ndarray, step: np.ndarray, gamma: np.ndarray) -> np.ndarray:
    """∫ p(s)·p'(s) ds of the profiles that end at ``steps`` with exponents ``gammas`` and at ``step`` with ``gamma``."""
    earlier, later = np.minimum(steps, step), np.maximum(steps, step)
    of_later = np.where(steps < step, gamma, gammas)
    return (gammas + 1) * (gamma + 1) / (gammas + gamma + 1) * (earlier / later) ** of_later / later


def combine(steps: Sequence[int], sigma_rels: Sequence[float], step: int, sigma_rel: float) -> tuple[np.ndarray, float]:
    """The combination of averages of lengths ``sigma_rels`` at ``steps`` that is closest to ``sigma_rel`` at ``step``.

    Returns:
        A coefficient for each, whose sum is 1, and the root mean square error of the profile relative to the wanted one.
    """
    # time in units of the wanted step, so that the system is well scaled
    times, gammas = np.asarray(steps, np.float64) / step, np.array([gamma_of(length) for length in sigma_rels])
    gamma = np.array(gamma_of(sigma_rel))
    products = inner_product(times[:, None], gammas[:, None], times, gammas)  # (n, n)
    wanted = inner_product(times, gammas, np.ones(()), gamma)  # (n,)
    norm = inner_product(np.ones(()), gamma, np.ones(()), gamma)
    # with a Lagrange multiplier for the sum; snapshots of the same step and length make the system singular
    ones = np.ones(len(times))
    system = np.block([[products, ones[:, None]], [ones[None], np.zeros((1, 1))]])
    coefficients = np.linalg.lstsq(system, np.append(wanted, 1), rcond=None)[0][:-1]
    square = norm - 2 * coefficients @ wanted + coefficients @ products @ coefficients
    return coefficients, float(np.sqrt(max(square, 0) / norm))


def sum_snapshots(snapshots: Sequence[Snapshot], coefficients: Sequence[float]) -> dict[str, Tensor]:
    """Parameters of the weighted sum by name, float32; one snapshot is in memory at a time."""
    total: dict[str, Tensor] = {}
    for snapshot, coefficient in zip(snapshots, coefficients, strict=True):
        try:
            with safe_open(snapshot.file, "pt", backend="pread") as tensors:
                weights = {name: tensors.get_tensor(name).float() for name in sorted(tensors.keys())}
        except (OSError, SafetensorError) as error:
            raise LdmError(f"{snapshot.file} is not a whole snapshot of an average ({first_line(error)}); {MOVE}") from None
        total = total or {name: torch.zeros_like(weight) for name, weight in weights.items()}
        if {name: weight.shape for name, weight in weights.items()} != {name: weight.shape for name, weight in total.items()}:
            raise UsageError(f"{snapshot.file} is of another network than {snapshots[0].file}; move the wrong one away")
        for name, weight in weights.items():
            total[name].add_(weight, alpha=float(coefficient))
    return total


def reconstruct(snapshots: Sequence[Snapshot], sigma_rel: float, step: int | None = None) -> tuple[dict[str, Tensor], str]:
    """The average of length ``sigma_rel`` at ``step`` (default: the last one stored): parameters by name, and a description.

    Raises :class:`UsageError` if nothing was stored at ``step``.
    """
    steps = sorted({snapshot.step for snapshot in snapshots})
    step = steps[-1] if step is None else step
    if step not in steps:
        raise UsageError(f"no average was stored at step {step}; give one of {', '.join(map(str, steps))}")
    used = [snapshot for snapshot in snapshots if snapshot.step <= step]
    coefficients, error = combine([one.step for one in used], [one.sigma_rel for one in used], step, sigma_rel)
    how = f"sigma_rel {sigma_rel:g} at step {step}, of {len(used)} stored averages, with a profile error of {error:.2%}"
    return sum_snapshots(used, coefficients.tolist()), how


def export_average(
    module_class: type[TrainingModule],
    run: Path,
    out: Path,
    sigma_rel: float,
    step: int | None = None,
    trust: bool = False,
    moved: Mapping[str, str] | None = None,
) -> None:
    """Export a run's model with an average of any length, made of the averages that it stored.

    ``trust``, ``moved``: as of :class:`ldm.runs.export.SavedRun`.
    ``sigma_rel`` is relative to the training up to ``step`` (default: the last one stored, up to the last checkpoint).
    """
    gamma_of(sigma_rel)
    stored = find_snapshots(run)
    require_new_folder(out, "what is exported")
    module = SavedRun(module_class, run, trust=trust, moved=moved).load()
    # later ones are of a training that was resumed from an earlier checkpoint
    snapshots = [snapshot for snapshot in stored if snapshot.step <= module.average.step]
    weights, how = reconstruct(snapshots, sigma_rel, step)
    network = module.averaged().eval()
    kept = {*dict(network.named_parameters())} - {*module.average.names}  # beside an adapter
    shapes = {name: weight.shape for name, weight in weights.items()}
    require_weights(network, shapes, str(snapshots[0].file.parent), kept.__contains__)
    network.load_state_dict(weights, strict=False)  # without buffers
    require_finite(network, str(snapshots[0].file.parent))
    with atomic_folder(out) as folder:
        module.save(folder)
        last = max(snapshot.step for snapshot in snapshots) if step is None else step
        write_lineage(folder, module.command, last, RunFolder(run).read_starts())
    say(f"{module.artifact}: {printable(out)}, the average of {how}")
