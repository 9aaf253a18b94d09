"""Images to start from, as users give them, and what is drawn from them brought back to their own size and pixels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from ldm.errors import UsageError
from ldm.models.autoencoder import images_to_pil, pixels_to_images

Images = Image.Image | Tensor | Sequence[Image.Image | Tensor]


@dataclass(frozen=True)
class PreparedImages:
    """Images of one size, ready for the autoencoder.

    Attributes:
        images: (B, 3, H, W) in [−1, 1]; H and W are multiples of what the model can draw.
        mask: (B, 1, H, W), 1 where they are redrawn, 0 where they are kept; None where all of them are.
        height, width: of the images themselves; what lies beyond was added.
    """

    images: Tensor
    mask: Tensor | None
    height: int
    width: int

    @classmethod
    def of(cls, image: Images, mask: Images | None, height: int | None, width: int | None, unit: int) -> PreparedImages:
        """
        Args:
            image: PIL images, transparent where they are to be redrawn, or tensors (3, H, W) or (B, 3, H, W) in [0, 1].
            mask: of the same size, white where the image is to be redrawn: PIL, or tensors (H, W), (1, H, W), (B, 1, H, W).
            height, width: the images are scaled to fill them and cut at the centre; their own size unless given, with
                their last row and column repeated up to the next multiple of ``unit``.
            unit: what the sides of an image must be multiples of.

        Raises:
            UsageError: for anything else, or sizes that differ.
        """
        images, hole = _images(image)
        images = filled(images, 1 - hole)
        if mask is not None:
            white = _mask(mask, tuple(images.shape[-2:]))
            if white.shape[0] not in (1, len(images)):
                raise UsageError(f"{len(white)} masks for {len(images)} images; give one, or one per image")
            hole = torch.maximum(hole, white)
            if not hole.any():
                raise UsageError("mask_image has no white: nothing would be redrawn; paint white what is to change")
        size = (height or images.shape[-2], width or images.shape[-1])
        images, hole = fit(images, *size).clamp(-1, 1), (fit(hole, *size) >= 0.5).float()
        beyond = (0, -size[1] % unit, 0, -size[0] % unit)
        images, hole = (F.pad(part, beyond, mode="replicate") for part in (images, hole))
        return cls(images, hole if hole.any() else None, *size)

    def to(self, device: torch.device, count: int) -> PreparedImages:
        """On a device, as ``count`` images; each is repeated as often as it takes."""
        repeats = count // len(self.images)
        images, mask = (
            None if part is None else part.to(device).repeat_interleave(repeats, 0) for part in (self.images, self.mask)
        )
        return PreparedImages(images, mask, self.height, self.width)

    def finish(self, drawn: Tensor, band: int) -> Tensor:
        """What was drawn (B, 3, H, W), with the images' own pixels back where they are kept, at their own size.

        Args:
            band: width in pixels of the border on the kept side of the mask in which the two are blended; beyond it the
                images' pixels are identical.
        """
        if self.mask is not None:
            drawn = torch.lerp(self.images, drawn, feathered(self.mask, band))
        return drawn[..., : self.height, : self.width]


def feathered(mask: Tensor, band: int) -> Tensor:
    """A mask (B, 1, H, W) of 0 and 1 that falls off evenly over the ``band`` pixels around what is 1, and is 0 beyond them."""
    weight = mask
    for _ in range(band):
        weight = torch.maximum(weight, F.max_pool2d(weight, 3, stride=1, padding=1) - 1 / (band + 1))
    return weight


def filled(images: Tensor, known: Tensor) -> Tensor:
    """Images (B, 3, H, W) with colours from around where ``known`` (B, 1, H, W) is 0: a hole's edge would reach the rest."""
    if known.all() or images.shape[-2:] == (1, 1):
        return images
    weight = F.avg_pool2d(known, 2, ceil_mode=True)
    coarse = F.avg_pool2d(images * known, 2, ceil_mode=True) / weight.clamp(min=1e-6)
    around = F.interpolate(filled(coarse, (weight > 0).float()), scale_factor=2)[..., : images.shape[-2], : images.shape[-1]]
    return torch.where(known > 0, images, around)


def fit(images: Tensor, height: int, width: int) -> Tensor:
    """Scale (B, C, H, W) to fill height x width, and cut the rest off on both sides alike."""
    if images.shape[-2:] == (height, width):
        return images
    scale = max(height / images.shape[-2], width / images.shape[-1])
    size = [max(round(side * scale), least) for side, least in zip(images.shape[-2:], (height, width), strict=True)]
    images = F.interpolate(images, size, mode="bicubic", antialias=True, align_corners=False)
    top, left = (size[0] - height) // 2, (size[1] - width) // 2
    return images[..., top : top + height, left : left + width]


def to_output(images: Tensor, output_type: str) -> list[Image.Image] | np.ndarray | Tensor:
    """Images (B, 3, H, W) in [−1, 1] as ``pil``; ``np``, (B, H, W, 3) in [0, 1]; or ``pt``, (B, 3, H, W) in [0, 1]."""
    if output_type == "pil":
        return images_to_pil(images)
    images = (images + 1) / 2
    return images.permute(0, 2, 3, 1).cpu().numpy() if output_type == "np" else images


def _images(image: Images) -> tuple[Tensor, Tensor]:
    """Images (B, 3, H, W) in [−1, 1], and 1 where they are transparent (B, 1, H, W)."""
    parts = [_image(part) for part in (image if isinstance(image, (list, tuple)) else [image])]
    if len({part.shape[-2:] for part in parts}) != 1:
        sizes = ", ".join(dict.fromkeys(f"{part.shape[-1]}x{part.shape[-2]}" for part in parts))
        raise UsageError(f"image holds images of {sizes or 'no size at all'}; give one or more, all of one size")
    both = torch.cat(parts)
    return both[:, :3], both[:, 3:]


def _image(image: Image.Image | Tensor) -> Tensor:
    """(B, 4, H, W): three colours in [−1, 1], and 1 where nothing is seen."""
    if isinstance(image, Image.Image):
        rgba = torch.from_numpy(np.array(image.convert("RGBA"))).permute(2, 0, 1)[None]
        return torch.cat([pixels_to_images(rgba[:, :3]), (rgba[:, 3:] < 128).float()], 1)
    if not isinstance(image, Tensor):
        raise UsageError(f"image is a {type(image).__name__}; give PIL images, or tensors (3, H, W) or (B, 3, H, W) in [0, 1]")
    images = image.detach().float().cpu()
    images = images[None] if images.ndim == 3 else images
    if images.ndim != 4 or images.shape[1] != 3 or not image.is_floating_point():
        raise UsageError(
            f"image is a tensor {tuple(image.shape)} of {image.dtype}; give floats (3, H, W) or (B, 3, H, W) in [0, 1]"
        )
    if not (images.min() >= 0 and images.max() <= 1):  # so written, NaN is refused too
        raise UsageError(f"image has values from {images.min():.3g} to {images.max():.3g}; give them in [0, 1]")
    return torch.cat([images * 2 - 1, torch.zeros_like(images[:, :1])], 1)


def _mask(mask: Images, size: tuple[int, int]) -> Tensor:
    """(B, 1, H, W), 1 where it is white."""
    parts = []
    for part in mask if isinstance(mask, (list, tuple)) else [mask]:
        if isinstance(part, Image.Image):
            part = torch.from_numpy(np.array(part.convert("L"))) / 255
        if not isinstance(part, Tensor):
            raise UsageError(f"mask_image is a {type(part).__name__}; give a PIL image, or a tensor (H, W) in [0, 1]")
        if part.shape[-2:] != size or part.ndim not in (2, 3, 4) or (part.ndim > 2 and part.shape[-3] != 1):
            found = f"{part.shape[-1]}x{part.shape[-2]}" if part.ndim > 1 else f"a tensor {tuple(part.shape)}"
            raise UsageError(f"mask_image is {found}, but the image {size[1]}x{size[0]}; give a mask of the image's size")
        parts.append(part.detach().float().cpu().reshape(-1, 1, *size))
    return (torch.cat(parts) >= 0.5).float()
