"""Conversion from an embedded ICC profile to sRGB, which all code downstream assumes.

Relative colorimetric intent with black point compensation: colours within sRGB are exact, others are clipped, and the black of
a press profile becomes black. (By the perceptual intent the ICC's own sRGB profile of version 4 would move colours by 100
levels of 255.)
"""

from __future__ import annotations

import io
from functools import lru_cache

import numpy as np
from PIL import Image, ImageCms

# Profiles of presses reach 3 MB. The last CACHED_PROFILES used are kept with their transforms (5 to 50 ms to build).
MAX_PROFILE_BYTES = 4 * 2**20
CACHED_PROFILES = 16

# Colour space of the profile -> modes that it can describe. Grey images carry RGB profiles often enough.
_MODES = {"GRAY": ("L",), "RGB ": ("RGB", "L"), "CMYK": ("CMYK",)}
# The many profiles called sRGB differ by rounding: one level of 255.
_SAME = 1


def to_srgb(image: Image.Image, profile: bytes | None) -> Image.Image:
    """The RGB image in sRGB that ``profile`` (ICC) makes of an image of mode L, RGB or CMYK.

    Without a profile, and with one that is broken, larger than ``MAX_PROFILE_BYTES`` or for another colour space than the
    image's, the pixels are assumed to be sRGB (CMYK is converted as Pillow does).
    """
    transform = _transform(profile, image.mode) if profile else None
    return as_mode(image, "RGB") if transform is None else transform.apply(as_mode(image, transform.input_mode))


def is_srgb(profile: bytes | None, mode: str) -> bool:
    """Whether :func:`to_srgb` leaves the colours of an image of ``mode`` (L or RGB) unchanged."""
    return not profile or _transform(profile, mode) is None


def as_mode(image: Image.Image, mode: str) -> Image.Image:
    """The image in ``mode``: the same object where it has that mode already, which Pillow would copy."""
    return image if image.mode == mode else image.convert(mode)


@lru_cache(maxsize=CACHED_PROFILES)
def _transform(profile: bytes, mode: str) -> ImageCms.ImageCmsTransform | None:
    """The transform to sRGB; None where the profile changes nothing or cannot be used."""
    if len(profile) > MAX_PROFILE_BYTES:
        return None
    try:
        source = ImageCms.getOpenProfile(io.BytesIO(profile))
        assert isinstance(source.profile, ImageCms.core.CmsProfile)
        space = source.profile.xcolor_space
        if mode not in _MODES.get(space, ()):
            return None
        transform = ImageCms.buildTransform(
            source,
            ImageCms.createProfile("sRGB"),
            "RGB" if space == "RGB " else mode,
            "RGB",
            ImageCms.Intent.RELATIVE_COLORIMETRIC,
            ImageCms.Flags.BLACKPOINTCOMPENSATION,
        )
    except ImageCms.PyCMSError:  # a broken profile
        return None
    return None if _changes_nothing(transform) else transform


def _changes_nothing(transform: ImageCms.ImageCmsTransform) -> bool:
    if transform.input_mode == "CMYK":
        return False
    levels = np.arange(0, 256, 15, dtype=np.uint8)
    if transform.input_mode == "L":
        colours = Image.fromarray(levels[None])
    else:
        colours = Image.fromarray(np.stack(np.meshgrid(levels, levels, levels), axis=-1).reshape(len(levels), -1, 3))
    before = np.asarray(colours.convert("RGB"), dtype=np.int16)
    return bool(np.abs(np.asarray(transform.apply(colours), dtype=np.int16) - before).max() <= _SAME)
