"""What moves the weights: AdamW, and for those that turn features into features Muon."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.distributed as dist
from diffusers.optimization import get_scheduler
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LRScheduler

from ldm.errors import UsageError
from ldm.training.fsdp import local, piece_like, whole

MOMENTUM = 0.95
# an update's root mean square is then about what AdamW's is (Liu et al. 2025, arXiv 2502.16982, section 2.2)
ADAMW_RMS = 0.2
# of x -> a x + b x^3 + c x^5, and how often (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon)
NEWTON_SCHULZ, ITERATIONS = (3.4445, -4.7750, 2.0315), 5
# layers whose weight, rows of output by inputs, is a matrix
WITH_MATRIX = (nn.Linear, nn.Conv2d)
# that are iterated on at once, for the memory's sake
MAX_NUMBERS = 2**26


@dataclass
class OptimiserConfig:
    """AdamW with warm-up.

    Attributes:
        learning_rate: as given; never scaled by batch size or number of processes.
        betas: of Adam.
        weight_decay: decoupled.
        schedule: after the warm-up, over the run's ``max_steps``.
        warmup_steps: in steps, each of as many batches as are accumulated.
        max_grad_norm: gradients are scaled down to this norm.
        fused: all weights in one kernel, where the device has it; CPUs and CUDA do.
    """

    learning_rate: float = 1e-4
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = 0.0
    schedule: Literal["constant_with_warmup", "cosine", "linear"] = "constant_with_warmup"
    warmup_steps: int = 0
    max_grad_norm: float = 1.0
    fused: bool = True

    def build(self, network: nn.Module, num_steps: int) -> tuple[Optimizer, LRScheduler]:
        """The optimiser of ``network``'s parameters and its schedule, stepped once a batch."""
        return self._with_schedule(AdamW(_trained(network), **self._of_adamw()), num_steps)

    def _of_adamw(self) -> dict[str, Any]:
        return {"lr": self.learning_rate, "betas": self.betas, "weight_decay": self.weight_decay, "fused": self.fused}

    def _with_schedule(self, optimiser: Optimizer, num_steps: int) -> tuple[Optimizer, LRScheduler]:
        return optimiser, get_scheduler(
            self.schedule, optimiser, num_warmup_steps=self.warmup_steps, num_training_steps=num_steps
        )


@dataclass
class MuonConfig(OptimiserConfig):
    """AdamW with warm-up, and Muon for the matrices and convolutions of a network's blocks where a rate is given.

    Attributes:
        muon_learning_rate: of these weights, in AdamW's units; two (stage one) to four times ``learning_rate`` serves.
            None: all is AdamW's.
    """

    muon_learning_rate: float | None = None

    def build(
        self, network: nn.Module, num_steps: int, blocks: Iterable[nn.Module] = (), dtype: torch.dtype = torch.float32
    ) -> tuple[Optimizer, LRScheduler]:
        """``blocks``: parts of ``network`` between its first layers and its last, for Muon; ``dtype``: :class:`Muon`'s.

        Raises:
            UsageError: for a rate below 0.
        """
        if self.muon_learning_rate is None:
            return super().build(network, num_steps)
        if self.muon_learning_rate < 0:
            raise UsageError(f"model.optimiser.muon_learning_rate is {self.muon_learning_rate:g}; give 0 or more")
        hidden = {id(layer.weight) for block in blocks for layer in block.modules() if isinstance(layer, WITH_MATRIX)}
        of_muon = [parameter for parameter in _trained(network) if id(parameter) in hidden]
        others = [parameter for parameter in _trained(network) if id(parameter) not in hidden]
        return self._with_schedule(Muon(others, of_muon, self.muon_learning_rate, dtype, **self._of_adamw()), num_steps)


def _trained(network: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in network.parameters() if parameter.requires_grad]


class Muon(AdamW):
    """Matrices move along their momentum made orthogonal, so that all its directions count alike; AdamW moves the rest.

    A convolution's weight (O, I, h, w) is the matrix (O, I·h·w).

    Jordan et al. 2024 (https://kellerjordan.github.io/posts/muon), with the scale of Liu et al. 2025 (arXiv 2502.16982), by
    which learning rates count as AdamW's do; ``torch.optim.Muon(adjust_lr_fn="match_rms_adamw")`` is the same for matrices
    alone, in bf16 whether the machine has it or not, and every process does all of its work.

    Each process makes its share of the momenta orthogonal, and they exchange what came of it.
    """

    def __init__(
        self,
        parameters: list[nn.Parameter],
        of_muon: list[nn.Parameter],
        muon_learning_rate: float,
        dtype: torch.dtype = torch.float32,
        **adamw: Any,
    ):
        """
        Args:
            parameters: that AdamW moves.
            of_muon: that Muon moves; of two dimensions or more, in the same order on all processes.
            dtype: to iterate in; bf16 is enough, but rounds by the order of a sum, as a run in fp32 does not.
            adamw: ``lr``, ``betas``, ``weight_decay`` and so on; the weight decay is Muon's too.
        """
        super().__init__([{"params": parameters}, {"params": of_muon, "lr": muon_learning_rate, "muon": True}], **adamw)
        self.dtype = dtype

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """One step of all; parameters without a gradient are left alone."""
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
        of_shape: dict[tuple[int, int], list[nn.Parameter]] = defaultdict(list)
        for parameter in group["params"]:
            if parameter.grad is not None:
                rows, columns = parameter.shape[0], parameter.shape[1:].numel()
                of_shape[min(rows, columns), max(rows, columns)].append(parameter)
        for (short, long), parameters in of_shape.items():
            scale = group["lr"] * ADAMW_RMS * math.sqrt(long)
            for parameter, direction in zip(parameters, self._directions(parameters, short, long), strict=True):
                weight = local(parameter)
                weight.mul_(1 - group["lr"] * group["weight_decay"])
                weight.sub_(piece_like(direction, parameter), alpha=scale)

    def _directions(self, parameters: list[nn.Parameter], short: int, long: int) -> list[Tensor]:
        """Where each goes, orthogonal and whole."""
        rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        share = math.ceil(len(parameters) / world)
        own = torch.zeros(share, short, long, dtype=self.dtype, device=local(parameters[0]).device)
        for number, parameter in enumerate(parameters):
            update = whole(self._momentum(parameter)).flatten(1)
            if number // share == rank:
                own[number % share] = update if len(update) == short else update.mT
        for some in own.split(max(MAX_NUMBERS // (short * long), 1)):
            some.copy_(orthogonalise(some))
        if world > 1:
            all_shares = own.new_empty(world * share, short, long)
            dist.all_gather_into_tensor(all_shares, own)
            own = all_shares
        # what is beyond the parameters filled the last share
        directions = zip(parameters, own, strict=False)
        return [(made if len(weight) == short else made.mT).reshape(weight.shape) for weight, made in directions]

    def _momentum(self, parameter: nn.Parameter) -> Tensor:
        """With this step's gradient, and looking one step ahead (Nesterov)."""
        state, gradient = self.state[parameter], parameter.grad
        if "momentum_buffer" not in state:
            # the steps are for AdamW's eyes, which looks for them in every state that it loads
            state |= {"step": torch.zeros((), device=local(parameter).device), "momentum_buffer": torch.zeros_like(parameter)}
        state["step"] += 1
        momentum = state["momentum_buffer"].lerp_(gradient, 1 - MOMENTUM)
        return gradient.lerp(momentum, MOMENTUM)


def orthogonalise(matrices: Tensor) -> Tensor:
    """Matrices (B, m, n), m <= n, with their singular values brought near to 1 (0.7 to 1.2), those next to 0 excepted."""
    a, b, c = NEWTON_SCHULZ
    x = matrices / matrices.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for _ in range(ITERATIONS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x
