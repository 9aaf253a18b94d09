"""Weights that a denoiser starts from instead of random ones, fitted to a network of another size."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor

from ldm.errors import UsageError
from ldm.models.directories import model_name
from ldm.training.base import FREE, require_settings, require_weights
from ldm.training.encoders import Statistics

log = logging.getLogger(__name__)

# of a DiT and of PixArt: the layer that reads the latents' channels, and the one that writes them
INPUT_LAYERS = ("patch_embed.weight", "patch_embed.0.weight", "pos_embed.proj.weight")
OUTPUT_LAYER = "proj_out."
# of a DiT: weights that a network may have besides those of the source, and those of them that begin at zero
NEW, ZERO = "size_embed.", "size_embed.linear_2."
# entries of a config that the fitted weights follow, or that the weights themselves show
FITTED = FREE | {"in_channels", "out_channels", "use_additional_conditions", "micro_conditioning"}


@dataclass
class InitialWeights:
    """Weights of another model, and what is known of its training.

    Attributes:
        source: where they are from, for messages.
        config: of their network.
        weights: of its parameters, by name.
        statistics: that its latents were normalised with.
        trained_on: fingerprints, as :attr:`ldm.training.encoders.FrozenEncoders.trained_on`.
        diffusion: its path and prediction, as :func:`ldm.diffusion.scheduler.diffusion_config` gives them.
    """

    source: str
    config: Mapping[str, Any]
    weights: dict[str, Tensor]
    statistics: Statistics | None = None
    trained_on: Mapping[str, Any] = field(default_factory=dict)
    diffusion: Mapping[str, Any] | None = None

    def load(self, network: ModelMixin) -> str:
        """Load the weights into ``network``. Returns a line that says what was loaded, resized, and is new.

        Further channels of the latents begin with weights of zero, and so does micro-conditioning, which changes nothing at
        first. A learned variance, which follows the prediction in the output of some models, is left out. Sine-cosine and
        rotary positions are computed from the network's config.

        Raises:
            UsageError: lists the settings or weights that differ otherwise.
        """
        own, theirs = {name: value for name, value in network.config.items() if not name.startswith("_")}, self.config
        free = FITTED if own["sample_size"] == theirs.get("sample_size") else FITTED | {"interpolation_scale"}
        require_settings({name: value for name, value in own.items() if name not in free}, theirs, self.source)
        expected = dict(network.named_parameters())
        fitted = {
            name: self._fit(name, weight, expected[name]) if name in expected else weight
            for name, weight in self.weights.items()
        }
        new = {
            name: torch.zeros_like(weight) if name.startswith(ZERO) else weight
            for name, weight in expected.items()
            if name.startswith(NEW) and name not in fitted
        }
        require_weights(network, {name: weight.shape for name, weight in (fitted | new).items()}, self.source)
        network.load_state_dict(fitted | new, strict=False)  # without buffers
        resized = [
            f"{name}: {tuple(weight.shape)} -> {tuple(fitted[name].shape)}"
            for name, weight in self.weights.items()
            if weight.shape != fitted[name].shape
        ]
        if own["sample_size"] != theirs.get("sample_size", own["sample_size"]):
            resized.append(f"positions: sample_size {theirs['sample_size']} -> {own['sample_size']}")
        resized_or_new = f"resized: {', '.join(resized) or 'none'}; new: {', '.join(new) or 'none'}"
        return f"{len(fitted)} weights loaded from {self.source}; {resized_or_new}"

    def statistics_for(self, trained_on: Mapping[str, Any], same: bool = False) -> Statistics | None:
        """The statistics that latents of ``trained_on`` are to be normalised with, so that the weights read what they know.

        None: those of the data, because another autoencoder made these latents, or because the weights' are unknown. Encoders
        other than the weights' are named in the log; with ``same`` they are refused by a :class:`UsageError`.
        """
        for name in ("autoencoder", "text_encoder"):
            before, now = self.trained_on.get(name), trained_on[name]
            if same and before not in (None, now):
                raise UsageError(
                    f"{self.source} was trained with the {name} {before[:12]}, and these data are of {now[:12]}; an adapter is "
                    f"used with the {name} of its base: export the data with that one"
                )
            if before not in (None, now):
                log.warning("%s was trained with %s %s, and this run's is %s", self.source, name, before[:12], now[:12])
        return self.statistics if self.trained_on.get("autoencoder") in (None, trained_on["autoencoder"]) else None

    @property
    def name(self) -> str:
        """Of the model, without the folders that it lies in."""
        return model_name(self.source)

    def require_same(self, network: ModelMixin, diffusion: Mapping[str, Any]) -> None:
        """Raise :class:`UsageError` unless ``network``, trained with ``diffusion``, is used as that of these weights was: what
        is trained beside them is used with that."""
        for name in ("sample_size", "in_channels", "micro_conditioning", "use_additional_conditions"):
            own, theirs = network.config.get(name), self.config.get(name)
            if own is not None and theirs is not None and own != theirs:
                raise UsageError(
                    f"{name} of the denoiser is {own}, and {theirs} in {self.source}, beside whose weights an adapter is "
                    "trained; leave the denoiser out, to have that one's"
                )
        if self.diffusion is not None and self.diffusion != diffusion:
            raise UsageError(
                f"{self.source} was trained with {self.diffusion}, and an adapter of it is to be trained with {diffusion}; "
                "give the same path, prediction and base_side of timesteps"
            )

    def _fit(self, name: str, weight: Tensor, like: Tensor) -> Tensor:
        """A weight with as many channels of the latents as ``like``, where it is of the first or the last layer."""
        channels = self.config["in_channels"]
        if name in INPUT_LAYERS and weight.ndim == like.ndim == 4 and weight.shape[1] == channels < like.shape[1]:
            return _resized(weight, 1, like.shape[1], channels)
        pixels = self.config["patch_size"] ** 2
        if name.startswith(OUTPUT_LAYER) and not len(weight) % pixels and not len(like) % pixels:
            # rows are those of a patch's pixels, and in each of these those of the channels
            rows, wanted = weight.unflatten(0, (pixels, -1)), len(like) // pixels
            if channels <= wanted and rows.shape[1] in (channels, 2 * channels) and rows.shape[1] != wanted:
                return _resized(rows, 1, wanted, channels).flatten(0, 1)
        return weight


def _resized(weight: Tensor, dim: int, size: int, kept: int) -> Tensor:
    """The first ``kept`` entries of a dimension, and zeros up to ``size``."""
    shape = [*weight.shape]
    shape[dim] = size
    made = torch.zeros(shape, dtype=weight.dtype)
    made.narrow(dim, 0, kept).copy_(weight.narrow(dim, 0, kept))
    return made
