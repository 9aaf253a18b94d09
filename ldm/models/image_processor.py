"""From users' images and masks to tensors for editing, and from results back to the images' size and kept pixels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch import Tensor

from ldm.errors import UsageError
from ldm.images import grey_to_8_bits
from ldm.models.autoencoder import images_to_pil, pixels_to_images

MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "RGBa", "CMYK", "YCbCr", "HSV")
Images = Image.Image | np.ndarray | Tensor | Sequence[Image.Image | np.ndarray | Tensor]


@dataclass(frozen=True)
class PreparedImages:
    """Images of one size, padded for the model.

    Attributes:
        images: (B, 3, H, W) in [−1, 1].
        mask: (B, 1, H, W), 1 where the images are regenerated, 0 where they are kept; None to regenerate all.
        height, width: of the images before padding.
    """

    images: Tensor
    mask: Tensor | None
    height: int
    width: int

    @classmethod
    def of(cls, image: Images, mask: Images | None, height: int | None, width: int | None, unit: int) -> PreparedImages:
        """
        Args:
            image: PIL images, turned upright by their EXIF data, or tensors (3, H, W) or (B, 3, H, W) or arrays (H, W, 3) or
                (B, H, W, 3) in [0, 1]. What is less than half opaque in a PIL image is regenerated; elsewhere transparency
                shows white.
            mask: of the same size, white where to regenerate: PIL images, or tensors or arrays (H, W), (1, H, W) or
                (B, 1, H, W). What is transparent in a PIL mask is not painted, and counts as black.
            height, width: the images are scaled to fill this size and cropped at the centre; default: their own size.
            unit: the last row and column are repeated up to the next multiple of it.

        Raises:
            UsageError: for anything else, images of different sizes, or a mask or transparency of which nothing is left to
                regenerate.
        """
        images, hole = _images(image)
        images = filled(images, 1 - hole)
        if mask is not None:
            white = _mask(mask, images.shape[-2], images.shape[-1])
            if white.shape[0] not in (1, len(images)):
                raise UsageError(f"{len(white)} masks for {len(images)} images; give one, or one per image")
            hole = torch.maximum(hole, white)
            if not hole.any():
                raise UsageError(
                    "mask_image has no white, so nothing would be regenerated; paint white what is to change (transparent "
                    "parts of a mask count as black)"
                )
        size, inpaints = (height or images.shape[-2], width or images.shape[-1]), bool(hole.any())
        images, hole = fit(images, *size).clamp(-1, 1), fit_mask(hole, *size)
        empty = [number for number, each in enumerate(hole, 1) if not each.any()]
        if inpaints and empty:
            which = f"image {empty[0]} of {len(hole)}" if len(hole) > 1 else "the image"
            raise UsageError(
                f"{which} has no white of a mask and no transparency within its {size[1]}x{size[0]} pixels, so nothing would "
                "be regenerated; paint white what is to change, or give a size that does not crop it off"
            )
        beyond = (0, -size[1] % unit, 0, -size[0] % unit)
        images, hole = (F.pad(part, beyond, mode="replicate") for part in (images, hole))
        return cls(images, hole if inpaints else None, *size)

    def to(self, device: torch.device, count: int) -> PreparedImages:
        """Repeat each image to make ``count`` of them, on a device."""

        def repeated(part: Tensor) -> Tensor:
            return part.to(device).repeat_interleave(count // len(self.images), 0)

        return replace(self, images=repeated(self.images), mask=None if self.mask is None else repeated(self.mask))

    def finish(self, generated: Tensor, band: int) -> Tensor:
        """Generated images (B, 3, H, W) without padding, with the original pixels where they are kept.

        Args:
            band: width in pixels of the border on the kept side of the mask in which the two are blended.
        """
        if self.mask is not None:
            generated = torch.lerp(self.images, generated, feathered(self.mask, band))
        return generated[..., : self.height, : self.width]


def feathered(mask: Tensor, band: int) -> Tensor:
    """A mask (B, 1, H, W) of 0 and 1, with linear edges of ``band`` pixels outside the ones."""
    weight = mask
    for _ in range(band):
        weight = torch.maximum(weight, F.max_pool2d(weight, 3, stride=1, padding=1) - 1 / (band + 1))
    return weight


def filled(images: Tensor, known: Tensor) -> Tensor:
    """Images (B, 3, H, W) whose unknown pixels, ``known`` (B, 1, H, W) = 0, take colours from around them.

    The encoder's receptive field would otherwise carry the content of a hole into the latents of kept pixels.
    """
    if known.all() or images.shape[-2:] == (1, 1):
        return images
    weight = F.avg_pool2d(known, 2, ceil_mode=True)
    coarse = F.avg_pool2d(images * known, 2, ceil_mode=True) / weight.clamp(min=1e-6)
    around = F.interpolate(filled(coarse, (weight > 0).float()), scale_factor=2)[..., : images.shape[-2], : images.shape[-1]]
    return torch.where(known > 0, images, around)


def fit(images: Tensor, height: int, width: int) -> Tensor:
    """Scale (B, C, H, W) to fill height x width, and crop at the centre."""
    if images.shape[-2:] == (height, width):
        return images
    size = _filling(images, height, width)
    return _cropped(F.interpolate(images, size, mode="bicubic", antialias=True, align_corners=False), height, width)


def fit_mask(mask: Tensor, height: int, width: int) -> Tensor:
    """:func:`fit` for a mask of 0 and 1: a pixel is 1 where any part of it was, so that thin lines stay."""
    return _cropped(F.adaptive_max_pool2d(mask, _filling(mask, height, width)), height, width)


def _filling(images: Tensor, height: int, width: int) -> tuple[int, int]:
    """The smallest height and width of the images' proportions that fill height x width."""
    scale = max(height / images.shape[-2], width / images.shape[-1])
    return max(round(images.shape[-2] * scale), height), max(round(images.shape[-1] * scale), width)


def _cropped(images: Tensor, height: int, width: int) -> Tensor:
    top, left = (images.shape[-2] - height) // 2, (images.shape[-1] - width) // 2
    return images[..., top : top + height, left : left + width]


def to_output(images: Tensor, output_type: str) -> list[Image.Image] | np.ndarray | Tensor:
    """Images (B, 3, H, W) in [−1, 1] as ``pil``; ``np``, (B, H, W, 3) in [0, 1]; or ``pt``, (B, 3, H, W) in [0, 1]."""
    if output_type == "pil":
        return images_to_pil(images)
    images = (images + 1) / 2
    return images.permute(0, 2, 3, 1).cpu().numpy() if output_type == "np" else images


def _as_list(images: Images) -> Sequence[Image.Image | np.ndarray | Tensor]:
    return images if isinstance(images, Sequence) else [images]


def _images(image: Images) -> tuple[Tensor, Tensor]:
    """Images (B, 3, H, W) in [−1, 1], and 1 where they are transparent (B, 1, H, W)."""
    parts = [_image(part) for part in _as_list(image)]
    if len({part.shape[-2:] for part in parts}) != 1:
        sizes = ", ".join(dict.fromkeys(f"{part.shape[-1]}x{part.shape[-2]}" for part in parts))
        raise UsageError(f"image holds images of {sizes or 'no size at all'}; give one or more, all of one size")
    both = torch.cat(parts)
    return both[:, :3], both[:, 3:]


def _image(image: Image.Image | np.ndarray | Tensor) -> Tensor:
    """(B, 4, H, W): colours in [−1, 1], and 1 where transparent."""
    if isinstance(image, Image.Image):
        rgba = _rgba(image, "image")
        colours = Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")
        transparent = torch.from_numpy(np.array(rgba.getchannel("A"))) < 128
        pixels = torch.from_numpy(np.array(colours)).permute(2, 0, 1)
        return torch.cat([pixels_to_images(pixels), transparent[None].float()])[None]
    if isinstance(image, np.ndarray) and np.issubdtype(image.dtype, np.floating) and image.ndim > 2:
        image = torch.from_numpy(np.ascontiguousarray(image)).movedim(-1, -3)
    if not isinstance(image, Tensor):
        raise UsageError(
            f"image is a {type(image).__name__}; give PIL images, or tensors (3, H, W) or (B, 3, H, W) or arrays of floats "
            "(H, W, 3) or (B, H, W, 3) in [0, 1]"
        )
    images = image.detach().float().cpu()
    images = images[None] if images.ndim == 3 else images
    if images.ndim != 4 or images.shape[1] != 3 or not image.is_floating_point():
        raise UsageError(
            f"image is a tensor {tuple(image.shape)} of {image.dtype}; give floats (3, H, W) or (B, 3, H, W) in [0, 1]"
        )
    if not images.numel():
        raise UsageError(f"image is a tensor {tuple(image.shape)}, without any pixels; give floats (3, H, W) or (B, 3, H, W)")
    if not (images.min() >= 0 and images.max() <= 1):  # so written, NaN is refused too
        raise UsageError(f"image has values from {images.min():.3g} to {images.max():.3g}; give them in [0, 1]")
    return torch.cat([images * 2 - 1, torch.zeros_like(images[:, :1])], 1)


def _rgba(image: Image.Image, name: str) -> Image.Image:
    """An image as RGBA of 8 bits, upright; 16 bits are scaled, which Pillow would clip."""
    image = ImageOps.exif_transpose(image)
    if not (image.width and image.height):
        raise UsageError(f"{name} is a PIL image of {image.width}x{image.height}, without any pixels; give another")
    if image.mode == "I" or image.mode.startswith("I;16"):
        rgba = grey_to_8_bits(image).convert("RGBA")
        clear = np.asarray(image) == image.info.get("transparency", -1)
        rgba.putalpha(Image.fromarray(np.where(clear, np.uint8(0), np.uint8(255))))
        return rgba
    if image.mode not in MODES:
        raise UsageError(f"{name} is a PIL image of mode {image.mode}; give it in L, RGB or RGBA")
    return image.convert("RGBA")


def _mask(mask: Images, height: int, width: int) -> Tensor:
    """(B, 1, H, W), 1 where it is white."""
    parts = []
    for part in _as_list(mask):
        if isinstance(part, Image.Image):
            rgba = _rgba(part, "mask_image")
            painted = Image.alpha_composite(Image.new("RGBA", rgba.size, "black"), rgba).convert("L")
            part = torch.from_numpy(np.array(painted)) / 255
        if isinstance(part, np.ndarray) and np.issubdtype(part.dtype, np.floating):
            part = torch.from_numpy(np.ascontiguousarray(part))
        if not isinstance(part, Tensor):
            raise UsageError(f"mask_image is a {type(part).__name__}; give a PIL image, or a tensor (H, W) in [0, 1]")
        if part.shape[-2:] != (height, width) or part.ndim not in (2, 3, 4) or (part.ndim > 2 and part.shape[-3] != 1):
            found = f"{part.shape[-1]}x{part.shape[-2]}" if part.ndim > 1 else f"a tensor {tuple(part.shape)}"
            raise UsageError(f"mask_image is {found}, but the image {width}x{height}; give a mask of the image's size")
        parts.append(part.detach().float().cpu().reshape(-1, 1, height, width))
    return (torch.cat(parts) >= 0.5).float()
