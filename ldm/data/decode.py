"""Bytes to images and captions: named formats only, and no more memory than agreed beforehand.

Whatever a shard or a folder holds may come from anyone. The header is read before the pixels, the formats are listed
here, and whatever cannot be used is a :class:`DecodeError` with a short reason.
"""

from __future__ import annotations

import contextlib
import io

import numpy as np
from PIL import ExifTags, Image, ImageOps

from ldm.errors import LdmError

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp")
MAX_IMAGE_BYTES = 128 * 2**20
MAX_TEXT_BYTES = 64 * 2**10
# 8192 x 8192: about 270 MB while an RGBA image is composited. Pillow alone would say nothing at 89 megapixels.
MAX_PIXELS = 2**26

_FORMATS = ("JPEG", "PNG", "WEBP")


class DecodeError(LdmError):
    """An image or caption that cannot be used; the message is a short reason, to be put behind the file's name."""


def decode_image(data: bytes, max_pixels: int = MAX_PIXELS, background: tuple[int, int, int] = (255, 255, 255)) -> Image.Image:
    """Decode JPEG, PNG or WebP bytes to an 8-bit RGB image, (H, W, 3) as an array, values 0..255.

    The EXIF orientation is applied, transparency is composited on ``background``, 16-bit grey is scaled to 8 bits.
    Raises :class:`DecodeError` for other formats, broken files, animations and more than ``max_pixels`` pixels.
    """
    if len(data) > MAX_IMAGE_BYTES:
        raise DecodeError(f"image file of {len(data)} bytes, the limit is {MAX_IMAGE_BYTES}")
    if not data:
        raise DecodeError("empty file")
    try:
        with Image.open(io.BytesIO(data), formats=_FORMATS) as image:
            width, height = image.size
            if width * height > max_pixels:
                raise DecodeError(f"{width} x {height} pixels, the limit is {max_pixels}")
            # A JPEG with a second picture inside (MPO: depth or gain map of a phone) is not an animation.
            if image.format in ("PNG", "WEBP") and getattr(image, "n_frames", 1) > 1:
                raise DecodeError(f"animated ({image.n_frames} frames); still images only")
            image.load()
            upright = image
            # Many real files carry a broken EXIF block around good pixels.
            with contextlib.suppress(Exception):
                if image.getexif().get(ExifTags.Base.Orientation, 1) != 1:
                    upright = ImageOps.exif_transpose(image)
            rgb = _to_rgb(upright, background)
            # What the file carried along (EXIF with places and names, comments) must not reach files written later.
            rgb.info.clear()
            return rgb
    except DecodeError:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise DecodeError(f"more pixels than the limit of {max_pixels}") from None
    except Image.UnidentifiedImageError:
        raise DecodeError("not a JPEG, PNG or WebP image") from None
    # Broken bytes raise OSError, SyntaxError, ValueError, struct.error, zlib.error, EOFError and more from Pillow.
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise DecodeError(f"cannot be decoded ({reason})") from None


def decode_text(data: bytes) -> str:
    """Decode a caption: strict UTF-8 (a leading byte order mark is dropped), stripped. It may be empty."""
    if len(data) > MAX_TEXT_BYTES:
        raise DecodeError(f"caption of {len(data)} bytes, the limit is {MAX_TEXT_BYTES}")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DecodeError(f"caption is not UTF-8 text (byte {error.start})") from None
    if "\0" in text:
        raise DecodeError("caption holds a NUL character")
    return text.strip()


def _to_rgb(image: Image.Image, background: tuple[int, int, int]) -> Image.Image:
    if image.mode == "I" or image.mode.startswith("I;16"):
        # Pillow's own conversion clips at 255.
        grey = np.clip(np.asarray(image).astype(np.int64), 0, 65535)  # (H, W)
        image = Image.fromarray(((grey * 255 + 32767) // 65535).astype(np.uint8))
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", rgba.size, (*background, 255)), rgba).convert("RGB")
    return image if image.mode == "RGB" else image.convert("RGB")
