"""The matcher of images and captions. Read :meth:`MatcherTraining.training_step` first.

The loss compares all images of a batch with all of its captions, those of other processes and micro-batches included.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, cast

import torch
import torch.distributed as dist
from PIL import Image
from torch import Tensor, nn

from ldm.data.datamodule import ShardDataModule
from ldm.data.loader import BatchNoise
from ldm.diffusion.path import ProbabilityPath, expand
from ldm.diffusion.scheduler import describe
from ldm.diffusion.timesteps import TimestepSampler
from ldm.errors import UsageError
from ldm.losses.contrastive import contrastive_loss, retrieval_accuracy, same_rows, sigmoid_loss
from ldm.models.autoencoder import downsampling_factor
from ldm.models.dit import mean_token
from ldm.models.matcher import ImageTextModel, Matched, Matcher, TrainedOn
from ldm.models.text_encoder import TextEncoderConfig
from ldm.training.encoded import EncodedTraining, by_time, fixed_noise, split_batch
from ldm.training.nonfinite import SkippedSteps
from ldm.training.optimiser import MuonConfig
from ldm.training.randomness import DenoisingNoise
from ldm.training.step import Update

# intervals of t for which the retrieval accuracy of noisy images is logged
NUM_BINS = 10
LOSSES = {"contrastive": contrastive_loss, "sigmoid": sigmoid_loss}


class MatcherTraining(EncodedTraining):
    """A small model of images and text, for metrics of generated images and for guidance; exported as a directory."""

    command, artifact = "matcher", "matcher"
    losses = ()

    def __init__(
        self,
        autoencoder: str,
        matcher: Matcher,
        optimiser: MuonConfig,
        path: ProbabilityPath | None = None,
        timesteps: TimestepSampler | None = None,
        accumulate: int = 1,
        ema_decay: float = 0.999,
        offload_average: bool = False,
        online: bool = False,
        online_precision: Literal["fp32", "bf16"] = "fp32",
        text_encoder: str | TextEncoderConfig | None = None,
        gradient_checkpointing: bool = False,
        max_skipped: int = 10,
    ):
        """
        Args:
            autoencoder: directory of the autoencoder that made the latents, or its name on the Hugging Face hub; it is part of
                the exported directory. ``identity``: the matcher is trained on pixels.
            matcher: the network.
            optimiser: of the matcher.
            path, timesteps: with a matcher that is ``noisy``, where the noise of its images is from (:mod:`ldm.diffusion`),
                as the denoiser's that it is to guide.
            accumulate: micro-batches that a batch is split into, to save memory; the loss still compares the whole batch. The
                network is run once more for each.
            ema_decay: of the exponential average of the matcher's weights, which is validated and exported.
            offload_average: keep the average in the host's memory.
            online: train on image shards, encoding images and captions at each step.
            online_precision: of the computation with ``online``, as in an export.
            text_encoder: of captions: minilm, a directory or a hub name, a ``.txt`` file of class names, or as
                :class:`ldm.models.text_encoder.TextEncoderConfig`. Default: that of the latent shards; with ``online``, minilm.
            gradient_checkpointing: recompute the blocks' activations in the backward pass, to save memory.
            max_skipped: steps in a row with a loss or gradients that are not finite; each is skipped, one more stops the run.
        """
        super().__init__(autoencoder, online, online_precision, text_encoder)
        noisy = matcher.config["noisy"]
        if not noisy == (path is not None) == (timesteps is not None):
            raise UsageError(
                "a noisy matcher needs path and timesteps, from which its noise is; give both"
                if noisy
                else "path and timesteps are of noise, which the matcher does not take; leave them out, or make it noisy"
            )
        self.matcher, self.path, self.timesteps, self.optimiser = matcher, path, timesteps, optimiser
        self.loss = LOSSES[matcher.config["loss"]]
        if gradient_checkpointing:
            matcher.enable_gradient_checkpointing()
        self.accumulate, self.skips = accumulate, SkippedSteps(max_skipped)
        self.start_average(ema_decay, offload=offload_average)

    # -- a step ------------------------------------------------------------------------------------------------------

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        """One step of the optimiser on one batch.

        Micro-batches and processes share one loss: its gradient with respect to the vectors of all is computed first, and then
        propagated through the network that made them (Gao et al. 2021, arXiv 2101.06983).
        """
        optimiser, schedule = self.optimiser_and_schedule()
        optimiser.zero_grad()
        parts = [self.inputs(part) for part in split_batch(batch, self.accumulate)]
        with torch.set_grad_enabled(len(parts) == 1):
            outputs = [self.matcher(*part) for part in parts]
        torch.clear_autocast_cache()  # of weights that were cast without gradients
        gradients, metrics = self.gradients(outputs, torch.cat([pooled(text, mask) for _, _, text, mask in parts]))
        for number, (part, _) in enumerate(self.micro_batches(parts, [len(part[0]) for part in parts])):
            output = outputs[number] if len(parts) == 1 else self.matcher(*part)
            products = (value * gradient for value, gradient in zip(output, gradients[number], strict=True))
            self.manual_backward(torch.stack([product.sum() for product in products]).sum())  # its gradients are the loss's
        update = Update("matcher", optimiser, schedule, self.matcher.parameters(), self.optimiser.max_grad_norm, "train/loss")
        self.finish_step(metrics, [update], batch["draws"])

    def inputs(self, batch: dict[str, Any]) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
        """What the network takes of a batch: latents, noisy where the matcher is, their times, and captions."""
        x0, condition = self.encode(batch)
        t = batch["t"] if self.path else None
        return (x0 if t is None else self.noisy(x0, batch["eps"], t)), t, condition.embeddings, condition.mask

    def noisy(self, x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """Latents with noise, scaled as a denoiser gets them."""
        assert self.path is not None
        return expand(self.path.input_scale(t), x0) * self.path.sample(x0, eps, t)

    def gradients(self, outputs: Sequence[Matched], captions: Tensor) -> tuple[list[Matched], dict[str, Tensor]]:
        """The gradients of the loss of all images and captions of all processes with respect to this one's ``outputs``, times
        the number of processes where their mean will be taken; and the metrics.

        ``captions``: a vector each (B, C), by which equal ones are known.
        """
        vectors = zip(*(output[:2] for output in outputs), strict=True)
        images, texts = (torch.cat(values).detach().requires_grad_() for values in vectors)
        scale, bias = (value.detach().requires_grad_() for value in outputs[0][2:])
        with torch.autocast(self.device.type, enabled=False):
            matched, same = Matched(of_all(images), of_all(texts), scale, bias), same_rows(of_all(captions))
            loss = self.loss(matched.logits, same)
            by_image, by_text, by_scale, by_bias = torch.autograd.grad(loss, [images, texts, scale, bias])
            accuracy = retrieval_accuracy(matched.images, matched.texts, same).mean()
        rows, world = [len(output.images) for output in outputs], self.trainer.world_size
        own = zip((world * by_image).split(rows), (world * by_text).split(rows), strict=True)
        shared = [(number / sum(rows) * by_scale, number / sum(rows) * by_bias) for number in rows]
        metrics = {"train/loss": loss, "train/image_to_text": accuracy, "train/scale": scale.squeeze()}
        return [Matched(*vectors, *scales) for vectors, scales in zip(own, shared, strict=True)], metrics

    # -- setup -------------------------------------------------------------------------------------------------------

    def batch_noise(self) -> BatchNoise | None:
        if self.path is None or self.timesteps is None:
            return None  # latents are the modes of their posteriors
        assert self.seed is not None
        channels, factor = self.encoders.latent_shapes[0][0], downsampling_factor(self.encoders.autoencoder)
        return DenoisingNoise(self.seed, channels, factor, self.path, self.timesteps)

    def averaged(self) -> nn.Module:
        return self.matcher

    def prepare(self, data: ShardDataModule) -> None:
        """Load the frozen encoders, and refuse data that do not fit them or the matcher."""
        if len(data.text_encoders) > 1:
            raise UsageError(f"a matcher takes one text encoder, not {len(data.text_encoders)}; give the number of one")
        super().prepare(data)
        if self.encoders.text_encoders[0].is_unconditional:
            raise UsageError(
                "a matcher compares images with captions, and text encoder none has the same for all; give another"
            )

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(checkpoint)
        if self.online:
            self.restore_statistics(checkpoint)

    # -- validation, export ------------------------------------------------------------------------------------------

    def on_validation_epoch_start(self) -> None:
        self._measured: list[tuple[Tensor, ...]] = []

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        x0, (text, mask, _) = self.encode(batch)
        output = self.matcher(x0, None, text, mask)
        self._scales = output[2:]
        measured = [*output[:2], pooled(text, mask)]
        if self.path is not None:
            t, eps = fixed_noise(sum(len(images) for images, *_ in self._measured), x0)
            measured += [t, self.matcher(self.noisy(x0, eps, t), t, text, mask).images]
        self._measured.append(tuple(measured))

    def on_validation_epoch_end(self) -> None:
        """Log the loss and the retrieval accuracy among all samples, and that of noisy images for each interval of t."""
        images, texts, captions, *noisy = (torch.cat(values) for values in zip(*self._measured, strict=True))
        with torch.autocast(self.device.type, enabled=False):
            same = same_rows(captions)
            metrics = {
                "val/loss": self.loss(Matched(images, texts, *self._scales).logits, same),
                "val/image_to_text": retrieval_accuracy(images, texts, same).mean(),
                "val/text_to_image": retrieval_accuracy(texts, images, same).mean(),
            }
            if noisy:
                t, images = noisy
                right = by_time(retrieval_accuracy(images, texts, same), t, NUM_BINS)
                metrics |= {f"val/image_to_text_bin_{number:02d}": share for number, share in right.items()}
        self.log_dict(metrics)

    def preview(self) -> list[tuple[str, list[Image.Image]]]:
        return []

    def save(self, folder: Path) -> None:
        (text_encoder,), path = self.encoders.text_encoders, None if self.path is None else describe(self.path)
        trained_on = cast(TrainedOn, self.encoders.trained_on)
        ImageTextModel(self.matcher, self.encoders.autoencoder, text_encoder, trained_on, path).save(folder)


def pooled(text: Tensor, mask: Tensor) -> Tensor:
    """A vector (B, C) of each caption (B, L, C), by which equal ones are known."""
    return mean_token(text, mask.float()[..., None])


def of_all(rows: Tensor) -> Tensor:
    """The rows (B, D) of all processes in their order; gradients are those of this process's alone."""
    if not (dist.is_available() and dist.is_initialized()):
        return rows
    gathered = [torch.empty_like(rows) for _ in range(dist.get_world_size())]
    dist.all_gather(gathered, rows.detach().contiguous())
    gathered[dist.get_rank()] = rows
    return torch.cat(gathered)
