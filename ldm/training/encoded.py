"""What the trainings on latents and captions share: the denoiser's and the matcher's."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from ldm.data.datamodule import ShardDataModule
from ldm.diffusion.conditioning import Condition
from ldm.errors import UsageError
from ldm.models.autoencoder import downsampling_factor
from ldm.models.dit import transformer_blocks
from ldm.models.text_encoder import TextChoice
from ldm.training.base import TrainingModule
from ldm.training.encoders import FrozenEncoders, Statistics, encoders_of_images, encoders_of_latents
from ldm.training.optimiser import MuonConfig


class EncodedTraining(TrainingModule):
    """Training on normalised latents and encoded captions: from latent shards, or from images encoded at each step.

    The network's config has ``in_channels``, ``sample_size``, ``patch_size`` and ``caption_channels``.
    """

    encoders: FrozenEncoders
    optimiser: MuonConfig

    def __init__(
        self, autoencoder: str, online: bool, online_precision: Literal["fp32", "bf16"], text_encoder: TextChoice | None
    ):
        """See :class:`ldm.training.denoiser.DenoiserTraining`."""
        super().__init__()
        self.autoencoder_path = Path(autoencoder)
        if online_precision != "fp32" and not online:
            raise UsageError(f"online_precision {online_precision}, but nothing is encoded; set online, or leave it out")
        self.online, self.text_encoder = online, text_encoder
        self.online_precision: Literal["fp32", "bf16"] = online_precision
        self.statistics: Statistics | None = None  # of the latents, from a checkpoint or of the initial weights

    def encode(self, batch: dict[str, Any]) -> tuple[Tensor, Condition]:
        """Normalised latents (B, C, h, w) and the captions' condition.

        Latents are sampled from their posteriors with the batch's noise; without noise they are the modes. The loader
        replaces a dropped caption by the empty one: by its embedding in latent shards, by "" in image shards.
        """
        if self.online:
            batch = batch | self.encoders.encode_images(batch["image"], self.online_precision)
            batch |= self.encode_captions(batch["caption"])
        z = batch["mean"].float()
        if "posterior_noise" in batch:
            z = z + batch["std"].float() * batch["posterior_noise"]
        return self.encoders.normalizer.normalize(z), Condition(batch["text"].float(), batch["text_mask"])

    def encode_captions(self, captions: list[str]) -> dict[str, Tensor]:
        """``text`` (B, L, D) and ``text_mask`` (B, L) of captions, with ``online``."""
        return self.encoders.encode_captions(captions, self.online_precision)

    @property
    def config(self) -> Mapping[str, Any]:
        """That of the network."""
        return cast(Any, self.averaged()).config

    @property
    def token_side(self) -> int:
        factor = downsampling_factor(self.encoders.autoencoder) if self.online else 1
        return factor * self.config["patch_size"]

    def blocks(self) -> list[nn.Module]:
        """The transformer blocks: each is compiled, and under FSDP gathered, by itself."""
        return transformer_blocks(self.averaged())

    def learning_rates(self) -> Mapping[str, float]:
        """Factors on the learning rate of the parameters whose names contain a text."""
        return {}

    def configure_optimizers(self) -> tuple[list[Optimizer], list[LRScheduler]]:
        blocks = () if self.optimiser.muon_learning_rate is None else self.blocks()
        optimiser, schedule = self.optimiser.build(
            self.trained(), self.trainer.max_steps, blocks, self.compute_dtype, rates=self.learning_rates()
        )
        self.keep_settings([optimiser])
        return [optimiser], [schedule]

    def setup(self, stage: str) -> None:
        super().setup(stage)
        self.encoders.to(self.trainer.strategy.root_device, networks=self.online)

    def prepare(self, data: ShardDataModule) -> None:
        """Load the frozen encoders, and refuse data that do not fit them or the network."""
        if self.online:
            device = self.trainer.strategy.root_device if self.statistics is None else torch.device("cpu")
            text_encoder = self.text_encoder or "minilm"
            self.encoders = encoders_of_images(
                data, self.autoencoder_path, text_encoder, self.config, self.statistics, device, self.command
            )
        else:
            self.encoders = encoders_of_latents(data, self.autoencoder_path, self.config, self.text_encoder, self.command)
        if self.statistics is not None:
            self.encoders.set_statistics(*self.statistics)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        # with them, another run can start from these weights
        checkpoint["latent_statistics"] = [list(values) for values in self.encoders.statistics]
        checkpoint["trained_on"] = self.encoders.trained_on

    def restore_statistics(self, checkpoint: dict[str, Any]) -> None:
        """Normalise latents as the run that wrote the checkpoint did."""
        self.statistics = mean, std = checkpoint["latent_statistics"]
        if hasattr(self, "encoders"):  # in training, the encoders are loaded before the checkpoint
            self.encoders.set_statistics(mean, std)


def split_batch(batch: dict[str, Any], parts: int) -> list[dict[str, Any]]:
    """A batch of tensors, arrays and lists, split into at most ``parts`` micro-batches."""
    total, divisible = len(batch["draws"]), (Tensor, np.ndarray, list)
    size = -(-total // parts)
    return [
        {
            name: value[start : start + size] if isinstance(value, divisible) and len(value) == total else value
            for name, value in batch.items()
        }
        for start in range(0, total, size)
    ]


def fixed_noise(first: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """Times (B,) and noise like ``like`` (B, C, h, w) for consecutive validation samples from number ``first``.

    They depend on a sample's number only, so that a loss does not change with the batch size or the samples before. The times
    are multiples of the golden ratio modulo 1, which spreads any number of samples evenly over [0, 1).
    """
    numbers = range(first, first + len(like))
    eps = [torch.randn(like.shape[1:], generator=torch.Generator().manual_seed(number)) for number in numbers]
    t = (torch.tensor(numbers, dtype=torch.float64) + 0.5) * (5**0.5 - 1) / 2 % 1
    return t.to(like), torch.stack(eps).to(like)


def by_time(values: Tensor, t: Tensor, intervals: int) -> dict[int, Tensor]:
    """The mean of ``values`` (N,) in each interval of the times (N,) that has any, by its number."""
    numbers = (t * intervals).long().clamp(max=intervals - 1)
    return {number: values[numbers == number].mean() for number in numbers.unique().tolist()}
