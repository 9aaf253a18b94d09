"""The exponential average of the trained network, and of nothing else."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from diffusers.training_utils import EMAModel
from torch import Tensor, nn


class Average:
    """Keeps the average of one network's parameters; swaps it in for validation, previews and export.

    The decay follows (1 + n) / (10 + n) up to ``decay``, so that the first steps are forgotten soon.
    """

    def __init__(self, network: nn.Module, decay: float):
        self.network = network
        self.ema = EMAModel(network.parameters(), decay=decay, foreach=True)

    def update(self) -> None:
        """After each optimiser step."""
        self.ema.step(self.network.parameters())

    @contextmanager
    def applied(self) -> Iterator[None]:
        """The network carries its average inside this context, its trained weights again after it, come what may."""
        self.ema.store(self.network.parameters())
        self.ema.copy_to(self.network.parameters())
        try:
            yield
        finally:
            self.ema.restore(self.network.parameters())

    def trained(self) -> list[Tensor] | None:
        """The trained parameters while the average stands in their place, else None."""
        return self.ema.temp_stored_params

    def to(self, device: object) -> None:
        self.ema.to(device=device)

    def state_dict(self) -> dict:
        return self.ema.state_dict()

    def load_state_dict(self, state: dict) -> None:
        self.ema.load_state_dict(state)
