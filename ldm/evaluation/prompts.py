"""How well a pipeline follows prompts, on images whose contents can be read back from their pixels."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image

from ldm.pipeline import LatentDiffusionPipeline
from ldm.shapes.scorer import score


def generate_from_captions(
    pipeline: LatentDiffusionPipeline,
    prompts: Sequence[str],
    seed: int,
    batch_size: int = 16,
    on_progress: Callable[[int, int], None] | None = None,
    **settings: Any,
) -> list[Image.Image]:
    """One image per prompt; image i starts from noise of seed ``seed + i``, whatever the batch it is generated in.

    Args:
        settings: of the pipeline (``num_inference_steps``, ``guidance_scale``, ``negative_prompt``, …).
    """
    pipeline.set_progress_bar_config(disable=True)
    images: list[Image.Image] = []
    for start in range(0, len(prompts), batch_size):
        batch = prompts[start : start + batch_size]
        generators = [torch.Generator().manual_seed(seed + start + row) for row in range(len(batch))]
        (generated,) = pipeline(batch, generator=generators, return_dict=False, **settings)
        images += generated
        if on_progress is not None:
            on_progress(len(images), len(prompts))
    return images


def shape_accuracy(images: Sequence[Image.Image], prompts: Sequence[str]) -> dict[str, float]:
    """The share of images in which the shapes scorer finds what the prompt says, per attribute; ``prompt_accuracy`` is that of
    images in which every attribute is right."""
    return score([np.asarray(image.convert("RGB")) for image in images], list(prompts))
