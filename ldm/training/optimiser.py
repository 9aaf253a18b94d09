"""AdamW, also with moments in 8 bits, and Muon for matrices and convolutions of a network's blocks; learning-rate schedules."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
import torch.distributed as dist
from diffusers.optimization import get_scheduler
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LRScheduler

from ldm.errors import UsageError, first_line
from ldm.training.fsdp import local_tensor, matrices_to_rows, rows_to_matrices

MOMENTUM = 0.95
# root mean square of AdamW's updates, to which Muon's are scaled (Liu et al. 2025, arXiv 2502.16982, section 2.2)
ADAMW_RMS = 0.2
# x -> a x + b x^3 + c x^5 and the number of its iterations (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon)
NEWTON_SCHULZ, ITERATIONS = (3.4445, -4.7750, 2.0315), 5
# layers whose weights Muon can update
MUON_LAYERS = (nn.Linear, nn.Conv2d)
# numbers orthogonalised at once, which bounds the memory
MAX_NUMBERS = 2**26


@dataclass
class OptimiserConfig:
    """AdamW with warm-up.

    Attributes:
        learning_rate: never scaled by batch size or number of processes.
        betas: of AdamW.
        weight_decay: decoupled.
        schedule: of the learning rate after the warm-up, over the run's ``max_steps``; in a run without a number of steps it
            is constant.
        warmup_steps: optimiser steps over which the learning rate rises from 0.
        max_grad_norm: gradients of a larger norm are scaled down to it.
        fused: AdamW's fused kernel, which CPUs and CUDA have.
        eight_bit: keep the moments of weights of 4,096 numbers or more in 8 bits, a quarter of the memory, by bitsandbytes'
            AdamW (Dettmers et al. 2021, arXiv 2110.02861). It waits for the device at every weight. Not with FSDP.
    """

    learning_rate: float = 1e-4
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = 0.0
    schedule: Literal["constant_with_warmup", "cosine", "linear"] = "constant_with_warmup"
    warmup_steps: int = 0
    max_grad_norm: float = 1.0
    fused: bool = True
    eight_bit: bool = False

    def build(
        self, network: nn.Module, num_steps: int, *, rates: Mapping[str, float] | None = None
    ) -> tuple[Optimizer, LRScheduler]:
        """The optimiser of the network's trained parameters and its schedule, stepped once a batch.

        ``rates``: factors on the learning rate of the parameters whose names contain a text.
        """
        settings, groups = self._adamw_settings(), self._groups(network, rates or {})
        return self._with_schedule(adamw_8bit(groups, **settings) if self.eight_bit else AdamW(groups, **settings), num_steps)

    def _groups(self, network: nn.Module, rates: Mapping[str, float]) -> list[dict[str, Any]]:
        """The trained parameters, those of each rate in a group."""
        groups: dict[float, list[nn.Parameter]] = {}
        for name, parameter in network.named_parameters():
            if parameter.requires_grad:
                factor = next((factor for part, factor in rates.items() if part in name), 1.0)
                groups.setdefault(factor, []).append(parameter)
        own = {
            factor: {} if factor == 1 else {"lr": factor * self.learning_rate}
            for factor in sorted(groups, key=lambda factor: factor != 1)
        }
        return [{"params": groups[factor], **settings} for factor, settings in own.items()]

    def _adamw_settings(self) -> dict[str, Any]:
        return {"lr": self.learning_rate, "betas": self.betas, "weight_decay": self.weight_decay, "fused": self.fused}

    def _with_schedule(self, optimiser: Optimizer, num_steps: int) -> tuple[Optimizer, LRScheduler]:
        if num_steps < 0 and self.schedule != "constant_with_warmup":
            raise UsageError(
                f"the schedule {self.schedule} needs the number of steps; give max_steps, or the schedule constant_with_warmup"
            )
        return optimiser, get_scheduler(
            self.schedule, optimiser, num_warmup_steps=self.warmup_steps, num_training_steps=num_steps
        )


@dataclass
class MuonConfig(OptimiserConfig):
    """AdamW, and with ``muon_learning_rate`` Muon for the matrices and convolutions of a network's blocks.

    Attributes:
        muon_learning_rate: of Muon's weights, on AdamW's scale; two (stage one) to four times ``learning_rate`` is a good
            choice. None: AdamW alone.
    """

    muon_learning_rate: float | None = None

    def build(
        self,
        network: nn.Module,
        num_steps: int,
        blocks: Iterable[nn.Module] = (),
        dtype: torch.dtype = torch.float32,
        *,
        rates: Mapping[str, float] | None = None,
    ) -> tuple[Optimizer, LRScheduler]:
        """See the base class. ``blocks``: parts of ``network`` whose weights Muon updates; ``dtype``: see :class:`Muon`."""
        if self.muon_learning_rate is None:
            return super().build(network, num_steps, rates=rates)
        if rates:
            raise UsageError("Muon has one learning rate for all matrices; leave out muon_learning_rate, or the other rates")
        if self.eight_bit:
            raise UsageError("eight_bit is of AdamW's moments, which Muon's weights do not have; give one or the other")
        if self.muon_learning_rate < 0:
            raise UsageError(f"muon_learning_rate is {self.muon_learning_rate:g}; give 0 or more")
        matrices = {id(layer.weight) for block in blocks for layer in block.modules() if isinstance(layer, MUON_LAYERS)}
        groups: tuple[list[nn.Parameter], list[nn.Parameter]] = [], []  # AdamW's, Muon's
        for parameter in _trained(network):
            groups[id(parameter) in matrices].append(parameter)
        return self._with_schedule(Muon(*groups, self.muon_learning_rate, dtype, **self._adamw_settings()), num_steps)


def _trained(network: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in network.parameters() if parameter.requires_grad]


def adamw_8bit(groups: list[dict[str, Any]], fused: bool = True, **settings: Any) -> Optimizer:
    """AdamW with moments in 8 bits; its groups of parameters have the entry ``eight_bit``. ``fused`` has no meaning for it.

    Raises :class:`UsageError` where bitsandbytes is missing, or cannot update these parameters on their device.
    """
    parameters = [parameter for group in groups for parameter in group["params"]]
    if any(local_tensor(parameter) is not parameter for parameter in parameters):
        raise UsageError("eight_bit: bitsandbytes cannot update sharded weights; train with ddp, or set it to false")
    if not all(parameter.is_contiguous() for parameter in parameters):
        raise UsageError("eight_bit: bitsandbytes would undo the memory order channels_last; set one of the two to false")
    try:
        from bitsandbytes.optim import AdamW8bit  # pyright: ignore[reportMissingImports]  not in dev
    except ImportError as error:
        raise UsageError(f"eight_bit needs bitsandbytes ({first_line(error)}): pip install 'ldm[eight-bit]'") from error
    device = parameters[0].device
    trial = nn.Parameter(torch.zeros(4096, device=device))
    trial.grad = torch.zeros_like(trial)
    try:
        AdamW8bit([trial]).step()
    except Exception as error:  # its library may lack this device, or this version of CUDA
        raise UsageError(f"eight_bit: bitsandbytes cannot run on {device} ({first_line(error)}); set it to false") from error
    return AdamW8bit([group | {"eight_bit": True} for group in groups], **settings)


class Muon(AdamW):
    """Updates matrices with their orthogonalised momentum, in which all directions have equal size; AdamW updates the rest.

    Jordan et al. 2024 (https://kellerjordan.github.io/posts/muon), scaled as in Liu et al. 2025 (arXiv 2502.16982), so that
    learning rates are on AdamW's scale. A convolution's weight (O, I, h, w) is the matrix (O, I·h·w). Each process
    orthogonalises a part of the momenta, and the processes exchange the results.

    ``torch.optim.Muon(adjust_lr_fn="match_rms_adamw")`` does the same, but takes matrices only, computes in bf16 even where
    the machine has no support for it, and repeats all the work on every process.
    """

    def __init__(
        self,
        parameters: list[nn.Parameter],
        muon_parameters: list[nn.Parameter],
        muon_learning_rate: float,
        dtype: torch.dtype = torch.float32,
        **adamw: Any,
    ):
        """
        Args:
            parameters: updated by AdamW.
            muon_parameters: updated by Muon; of two dimensions or more, in the same order on all processes.
            muon_learning_rate: on AdamW's scale.
            dtype: to orthogonalise in. bf16 is precise enough, but its results depend on the order of sums more than fp32's.
            adamw: settings of AdamW; ``weight_decay`` is Muon's too.
        """
        super().__init__([{"params": parameters}, {"params": muon_parameters, "lr": muon_learning_rate, "muon": True}], **adamw)
        self.dtype = dtype

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """One step of both; parameters without a gradient stay as they are."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        groups = self.param_groups
        try:
            self.param_groups = [group for group in groups if not group.get("muon")]
            super().step()
        finally:
            self.param_groups = groups
        for group in groups:
            if group.get("muon"):
                self._step_matrices(group)
        return loss

    def _step_matrices(self, group: dict[str, Any]) -> None:
        """One step of a group, in operations on all matrices of a shape: a GPU would wait for the host to start one for each.

        As in AdamW's fused kernel, nothing changes where the attribute ``found_inf`` is 1, and the host need not know.
        """
        void = None if (found := getattr(self, "found_inf", None)) is None else found.bool()
        decay = 1 - group["lr"] * group["weight_decay"]
        if void is not None:
            decay = torch.where(void, 1.0, decay)
        of_shape: dict[torch.Size, list[nn.Parameter]] = defaultdict(list)
        for parameter in group["params"]:
            if parameter.grad is not None:
                of_shape[parameter.shape].append(parameter)
        for shape, parameters in of_shape.items():
            weights = [local_tensor(parameter) for parameter in parameters]
            directions = self._directions(parameters, void)
            if void is not None:
                directions.masked_fill_(void, 0)
            torch._foreach_mul_(weights, decay)
            scale = group["lr"] * ADAMW_RMS * math.sqrt(max(shape[0], shape[1:].numel()))
            for some, theirs in zip(_in_parts(weights), _in_parts(directions), strict=True):
                steps = theirs.to(weights[0].dtype).view(len(some), *weights[0].shape)
                torch._foreach_sub_(some, steps.unbind(), alpha=scale)

    def _directions(self, parameters: list[nn.Parameter], void: Tensor | None) -> Tensor:
        """The orthogonalised momentum of each parameter (number, rows, columns); when sharded, this process's rows."""
        rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        each = math.ceil(len(parameters) / world)  # matrices a process
        updates = self._updates(parameters, void, each * world)
        rows, own_rows = len(parameters[0]), updates.shape[1]
        sharded = local_tensor(parameters[0]) is not parameters[0]
        own = rows_to_matrices(updates, rows) if sharded else updates.split(each)[rank]
        for some in _in_parts(own):
            if rows <= some.shape[2]:
                some.copy_(orthogonalise(some))
            else:
                some.copy_(orthogonalise(some.mT.contiguous()).mT)
        if sharded:
            updates = matrices_to_rows(own)[:, :own_rows]
        elif world > 1:
            dist.all_gather_into_tensor(updates, own)
        return updates[: len(parameters)]

    def _updates(self, parameters: list[nn.Parameter], void: Tensor | None, number: int) -> Tensor:
        """Nesterov's momentum after this step's gradient of each parameter, and zeros up to ``number`` (number, rows, columns).

        When sharded, this process's rows.
        """
        states = [self._state(parameter) for parameter in parameters]
        steps = [state["step"] for state in states]
        torch._foreach_add_(steps, 1)
        if void is not None:
            torch._foreach_sub_(steps, [void.to(steps[0])] * len(steps))
        momenta = [local_tensor(state["momentum_buffer"]) for state in states]
        gradients = [local_tensor(cast(Tensor, parameter.grad)) for parameter in parameters]
        updates = torch.zeros(number, *momenta[0].shape, dtype=self.dtype, device=momenta[0].device)
        for some, theirs, updates_of_some in zip(_in_parts(momenta), _in_parts(gradients), _in_parts(updates), strict=False):
            before, gradient = torch.stack(some), torch.stack(theirs)
            momentum = before.lerp(gradient, 1 - MOMENTUM)
            if void is not None:
                momentum = torch.where(void, before, momentum)
            torch._foreach_copy_(some, momentum.unbind())
            updates_of_some[: len(some)] = gradient.lerp_(momentum, MOMENTUM)
        return updates.flatten(2)

    def _state(self, parameter: nn.Parameter) -> dict[str, Tensor]:
        state = self.state[parameter]
        if "momentum_buffer" not in state:
            # AdamW expects a step in every state that it loads
            step = torch.zeros((), device=local_tensor(parameter).device)
            state |= {"step": step, "momentum_buffer": torch.zeros_like(parameter)}
        return state


def _in_parts(tensors: list[Tensor] | Tensor) -> Iterator[Any]:
    """A list or stack of tensors of one shape in parts of at most ``MAX_NUMBERS`` numbers, which bounds memory."""
    number = max(MAX_NUMBERS // max(tensors[0].numel(), 1), 1)
    return (tensors[start : start + number] for start in range(0, len(tensors), number))


def orthogonalise(matrices: Tensor) -> Tensor:
    """Matrices (B, m, n), m <= n, with singular values moved to between 0.7 and 1.2, except for those close to 0."""
    a, b, c = NEWTON_SCHULZ
    x = matrices / matrices.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for _ in range(ITERATIONS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x
