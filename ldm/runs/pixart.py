"""Export of a pipeline as diffusers' ``PixArtAlphaPipeline``, a directory that opens without ldm."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any, cast

import torch
from diffusers import AutoencoderKL, PixArtAlphaPipeline, PixArtTransformer2DModel, SchedulerMixin
from torch import Tensor, nn

from ldm.diffusion.scheduler import make_scheduler, wanted_prediction
from ldm.errors import UsageError
from ldm.models.autoencoder import LatentNormalizer
from ldm.models.text_encoder import reading_of
from ldm.pipeline import LatentDiffusionPipeline

TEXT_TOKENS = 120  # PixArtAlphaPipeline pads and truncates every prompt to this length
CONDITIONED_SIZE = 128  # sample_size at which PixArtAlphaPipeline passes sizes to the denoiser
BINNED_SIZES = (32, 64, 128)  # latent sides that its resolution binning knows


def export_pixart(pipeline: LatentDiffusionPipeline, folder: Path) -> list[str]:
    """Write ``pipeline`` into the empty ``folder`` as a ``PixArtAlphaPipeline`` that generates the same images.

    Its scheduler is DPM-Solver++ on the model's path: that pipeline does not run schedulers made for flows, and DDIM is wrong
    there where the number of steps does not divide 1000. With ``pipeline.scheduler`` set to the same one, images from the
    same noise agree. It lower-cases prompts, truncates them at 120 tokens and, unless called with ``clean_caption=False``,
    cleans them where Beautiful Soup and ftfy are installed.

    Returns:
        Remarks for the caller of that pipeline, one sentence each; empty for most models.

    Raises:
        UsageError: for another denoiser or autoencoder, a text encoder that cannot read prompts of 120 tokens, or a
            prediction that the scheduler does not take.
    """
    transformer, text_config, encoders = pipeline.transformer, pipeline.text_encoder.config, pipeline.text_encoders
    if not isinstance(transformer, PixArtTransformer2DModel):
        raise UsageError(
            f"the denoiser is a {type(transformer).__name__}, but PixArtAlphaPipeline runs a PixArtTransformer2DModel; train "
            "with model.denoiser.class_path: diffusers.PixArtTransformer2DModel, or export without --as"
        )
    if not isinstance(pipeline.vae, AutoencoderKL):
        raise UsageError(
            f"the autoencoder is a {type(pipeline.vae).__name__}, but PixArtAlphaPipeline decodes with an AutoencoderKL; "
            "export without --as"
        )
    if transformer.use_additional_conditions != (transformer.config["sample_size"] == CONDITIONED_SIZE):
        raise UsageError(
            f"PixArtAlphaPipeline passes the sizes of images at sample_size {CONDITIONED_SIZE} alone, but this denoiser has "
            f"sample_size {transformer.config['sample_size']} and use_additional_conditions "
            f"{transformer.use_additional_conditions}; export without --as"
        )
    if len(encoders) > 1 or reading_of(encoders[0].model):
        raise UsageError(
            "PixArtAlphaPipeline takes the output of one text encoder as it is, no class names, and no other layer or prefix; "
            "train with such a text encoder, or export without --as"
        )
    longest = getattr(text_config, "max_position_embeddings", TEXT_TOKENS)  # T5 has no limit
    if longest < TEXT_TOKENS:
        raise UsageError(
            f"PixArtAlphaPipeline pads prompts to {TEXT_TOKENS} tokens, but this {type(pipeline.text_encoder).__name__} reads "
            f"{longest}; train with a text encoder that reads more, such as a T5"
        )
    PixArtAlphaPipeline(
        tokenizer=cast(Any, pipeline.tokenizer),
        text_encoder=pipeline.text_encoder,
        vae=with_normalised_latents(pipeline.vae),
        transformer=transformer,
        scheduler=fitting_scheduler(pipeline),  # pyright: ignore[reportArgumentType]  it runs the one for EDM as well
    ).save_pretrained(folder)
    remarks = []
    if pipeline.resolution_shift.base_side is not None and len(pipeline.trained_sizes) > 1:
        shown = "{1}x{0}".format(*pipeline.default_size)
        remarks.append(f"for other sizes than {shown} change flow_shift in its scheduler's config: it does not follow the size")
    if transformer.config["sample_size"] not in BINNED_SIZES or pipeline.vae_scale_factor != 8:
        remarks.append("call it with use_resolution_binning=False: its list of image sizes does not hold this model's")
    side = transformer.config["sample_size"] * pipeline.vae_scale_factor
    if pipeline.default_size != (side, side):
        height, width = pipeline.default_size
        remarks.append(f"call it with height={height}, width={width}: it was not trained on its default of {side}x{side}")
    if pipeline.tokenizer("A B").input_ids != pipeline.tokenizer("a b").input_ids:
        remarks.append("it lower-cases prompts, and this text encoder is case-sensitive: train on lower-case captions")
    return remarks


def fitting_scheduler(pipeline: LatentDiffusionPipeline) -> SchedulerMixin:
    """DPM-Solver++ 2M (Lu et al. 2022, arXiv 2211.01095) for the pipeline's model, with the shift of its scheduler, and that of
    its default size.

    Raises:
        UsageError: it does not take the network's prediction, which ``PixArtAlphaPipeline`` does not convert.
    """
    config, by_size = pipeline.scheduler.config, pipeline.resolution_shift.at(*pipeline.latent_shape(1, None, None)[2:])
    shift = config.get("shift", 1.0) * by_size
    scheduler = make_scheduler("dpm++2m", *pipeline.diffusion, **({} if shift == 1 else {"flow_shift": shift}))
    predicted, wanted = type(pipeline.diffusion.prediction), type(wanted_prediction(scheduler, pipeline.diffusion.path))
    if predicted is not wanted:
        raise UsageError(
            f"the denoiser predicts {predicted.__name__}, but on its path PixArtAlphaPipeline can only run {wanted.__name__}; "
            f"train with model.prediction.class_path: {wanted.__module__}.{wanted.__name__}, or export without --as"
        )
    return scheduler


def with_normalised_latents(autoencoder: AutoencoderKL) -> AutoencoderKL:
    """A copy whose ``scaling_factor`` alone normalises latents, as older pipelines of diffusers expect.

    Where mean or standard deviation differ between channels they are folded into the 1x1 convolutions around the latents,
    ``W(std·n + mean) + b = (W·std)n + (W·mean + b)`` and likewise for the encoder, and the factor is 1.
    """
    normalizer = LatentNormalizer.of(autoencoder)
    mean, std = normalizer.mean.double(), normalizer.std.double()
    made = copy.deepcopy(autoencoder)
    made.register_to_config(scaling_factor=1.0, shift_factor=None, latents_mean=None, latents_std=None)
    if not mean.any() and (std == std[0]).all():
        made.register_to_config(scaling_factor=float(1 / std[0]))
        return made
    weight, bias = _affine(autoencoder.post_quant_conv, len(mean))
    made.post_quant_conv = _convolution(weight * std, weight @ mean + bias, autoencoder)
    weight, bias = _affine(autoencoder.quant_conv, 2 * len(mean))  # to means and log-variances
    scale = torch.cat([1 / std, torch.ones_like(std)])
    shift = torch.cat([-mean / std, -2 * std.log()])
    made.quant_conv = _convolution(scale[:, None] * weight, scale * bias + shift, autoencoder)
    made.register_to_config(use_quant_conv=True, use_post_quant_conv=True)
    return made


def _affine(convolution: nn.Conv2d | None, channels: int) -> tuple[Tensor, Tensor]:
    """Matrix and bias of a 1x1 convolution, float64; the identity where there is none."""
    if convolution is None:
        return torch.eye(channels, dtype=torch.float64), torch.zeros(channels, dtype=torch.float64)
    assert convolution.bias is not None
    return convolution.weight.detach().cpu().double()[:, :, 0, 0], convolution.bias.detach().cpu().double()


def _convolution(weight: Tensor, bias: Tensor, like: AutoencoderKL) -> nn.Conv2d:
    convolution = nn.Conv2d(weight.shape[1], weight.shape[0], 1).requires_grad_(False)
    convolution.weight.copy_(weight[:, :, None, None])
    assert convolution.bias is not None
    convolution.bias.copy_(bias)
    return convolution.to(device=like.device, dtype=like.dtype)
