"""Bytes to images and captions: an allowlist of formats and limits on memory.

The data is untrusted. The format is detected from the bytes, never from a name; the header is read before the pixels; what
cannot be used is a :class:`DecodeError` with a short reason.
"""

from __future__ import annotations

import contextlib
import json as jsonlib
from collections.abc import Iterator
from typing import Any

import numpy as np
from PIL import ExifTags, Image

from ldm.data.colour import as_mode, is_srgb, to_srgb
from ldm.data.jpeg import can_hold, decode_plain, has_too_many_scans, plain_size
from ldm.images import MAX_IMAGE_BYTES, MAX_PIXELS, DecodeError, check_pixels, grey_to_8_bits, open_image

IMAGE_EXTENSIONS = ("jpg", "jpeg", "jpe", "jfif", "png", "webp")
MAX_TEXT_BYTES = 64 * 2**10
MAX_SAMPLE_JSON_BYTES = 2**20
# EXIF orientation => the transpose to upright; 1 is upright
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_SWAPS_SIDES = frozenset(_TURNS[orientation] for orientation in (5, 6, 7, 8))


def decode_image(data: bytes, background: tuple[int, int, int] | None = (255, 255, 255)) -> Image.Image:
    """Decode JPEG, PNG or WebP bytes to an 8-bit RGB image in sRGB, (H, W, 3) as an array, values 0..255.

    The EXIF orientation is applied, colours are converted as an embedded ICC profile says, transparency (alpha, or the
    transparent colour of a PNG) is composited on ``background``, or kept as RGBA where that is None, 16-bit grey is scaled to
    8 bits. Raises :class:`DecodeError` for other formats, broken files, animations and more than ``MAX_PIXELS`` pixels.
    """
    with _opened(data) as image:
        image.load()
        turn, alpha = _turn(image), _alpha_of_colour(image, data)
        if turn is not None:
            image, alpha = image.transpose(turn), alpha and alpha.transpose(turn)
        rgb = _to_rgb(image, background, alpha)
        # Metadata (EXIF with locations and names, comments) must not reach files written later.
        rgb.info.clear()
        return rgb


def decode_pixels(data: bytes, out: np.ndarray | None = None, min_side: int | None = None) -> np.ndarray:
    """The pixels of :func:`decode_image`, decoded faster: uint8 (H, W, 3), values 0..255, C-contiguous.

    Plain JPEGs (:func:`is_plain_rgb`) are decompressed by libjpeg-turbo without Pillow, to the same pixels. Of these,
    a broken one is refused for any warning of the decompressor; Pillow accepts damage as long as the stream is complete.

    Args:
        data: JPEG, PNG or WebP bytes.
        out: uint8 (H, W, 3), C-contiguous. An image of exactly this size is written there and ``out`` itself is returned;
            otherwise the result is a new array. After an error ``out`` may hold part of the image.
        min_side: the size to which the caller will scale down the shorter side. A large plain JPEG may then be decoded at 1/2,
            1/4 or 1/8 of its size (rounded up), but no smaller than twice ``min_side``. After scaling the difference is small
            (45 dB and more for photographs); where a side was rounded, its far end moves by less than half a pixel.

    Raises :class:`DecodeError` as :func:`decode_image` does.
    """
    size = _plain_size(data)
    if size is None:
        pixels = np.asarray(decode_image(data))
        if out is None or not can_hold(out, pixels.shape):
            return pixels.copy()  # Pillow's is read-only
        np.copyto(out, pixels)
        return out
    check_pixels(*size)
    try:
        return decode_plain(data, size, out, min_side)
    except ValueError as error:
        raise DecodeError(f"cannot be decoded ({error})") from None


def image_size_of(data: bytes) -> tuple[int, int]:
    """(height, width) of the image that :func:`decode_image` returns, from the header alone. Raises as that does."""
    if (size := _plain_size(data)) is not None:
        check_pixels(*size)
        return size
    with _opened(data) as image:
        width, height = image.size
        return (width, height) if _turn(image) in _SWAPS_SIDES else (height, width)


def is_plain_rgb(data: bytes) -> bool:
    """Whether any decoder gives the image that :func:`decode_image` gives, so that the bytes may be kept.

    True for a still JPEG, PNG or WebP of 8-bit RGB or grey, upright, opaque, without an ICC profile or with one that
    means sRGB, within the limits. Only the header is read; :func:`decode_pixels` finds broken pixels. Kept bytes keep their
    EXIF metadata, including locations and names.
    """
    if (size := _plain_size(data)) is not None:
        return size[0] * size[1] <= MAX_PIXELS
    try:
        with _opened(data) as image:
            return (
                image.format in ("PNG", "WEBP")
                and image.mode in ("L", "RGB")
                and not (image.format == "PNG" and data[24] != 8)  # bits, in IHDR
                and not image.has_transparency_data
                and is_srgb(image.info.get("icc_profile"), image.mode)
                and _turn(image) is None
            )
    except DecodeError:
        return False


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


def decode_json(data: bytes) -> dict[str, Any]:
    """Decode a sample's ``.json`` member: one object in strict UTF-8, of at most ``MAX_SAMPLE_JSON_BYTES`` bytes."""
    if len(data) > MAX_SAMPLE_JSON_BYTES:
        raise DecodeError(f"json of {len(data)} bytes, the limit is {MAX_SAMPLE_JSON_BYTES}")
    try:
        value = jsonlib.loads(data.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise DecodeError(f"json is not UTF-8 text (byte {error.start})") from None
    except RecursionError:
        raise DecodeError("json is nested too deeply") from None
    except ValueError as error:
        raise DecodeError(f"json cannot be decoded ({error})") from None
    if not isinstance(value, dict):
        raise DecodeError("json is not an object")
    return value


def captions_of(text: bytes | None, json: bytes | None) -> list[str]:
    """All captions of a sample, from its text file (``.txt``) and its ``.json``; empty ones are dropped.

    The first of these that holds any: ``"captions"`` of the json, the text file, ``"caption"`` of the json (img2dataset), its
    ``"tags"``. In the json each may be one text or a list of them; a list of tags is one caption. Raises :class:`DecodeError`
    for what is no text, and for a broken file.
    """
    fields = {} if json is None else decode_json(json)
    if captions := _texts("captions", fields):
        return captions
    if text is not None and (caption := decode_text(text)):
        return [caption]
    return _texts("caption", fields) or _texts("tags", {"tags": joined_tags(fields.get("tags"))})


def captions_called(name: str, text: bytes | None, json: bytes | None) -> list[str]:
    """The captions of a sample that are called ``name``; empty ones are dropped.

    ``txt`` is its text file, and a number the caption at that place, from 0, among all of :func:`captions_of`. Any other name
    is a field of its json: a text, a whole number (a class), or a list of these. Raises :class:`DecodeError` as that does.
    """
    if name == "txt":
        return [caption] if text is not None and (caption := decode_text(text)) else []
    if name.isdecimal():
        return captions_of(text, json)[int(name) :][:1]
    value = ({} if json is None else decode_json(json)).get(name)
    values = value if isinstance(value, list) else [value]
    return _texts(name, {name: [str(value) if type(value) is int else value for value in values]})


def joined_tags(tags: Any) -> str | None:
    """A list of tags as one caption, joined by commas, and a text as it is; None for anything else."""
    if isinstance(tags, list) and all(isinstance(tag, str) for tag in tags):
        return ", ".join(tags)
    return tags if isinstance(tags, str) else None


def _texts(name: str, fields: dict[str, Any]) -> list[str]:
    """The texts of a field, which is one or a list of them, less the empty ones."""
    value = fields.get(name)
    texts = [text for text in (value if isinstance(value, list) else [value]) if text is not None]
    if wrong := [text for text in texts if not isinstance(text, str)]:
        raise DecodeError(f'"{name}" in its json is not a text or a list of texts ({type(wrong[0]).__name__})')
    try:
        return [text for text in (decode_text(text.encode()) for text in texts) if text]
    except UnicodeEncodeError:
        raise DecodeError(f'"{name}" in its json holds half a surrogate pair') from None


def _plain_size(data: bytes) -> tuple[int, int] | None:
    return plain_size(data) if len(data) <= MAX_IMAGE_BYTES else None


@contextlib.contextmanager
def _opened(data: bytes) -> Iterator[Image.Image]:
    """The image by its header, checked before a pixel is read; a failure inside the block is a DecodeError."""
    with open_image(data) as image:
        # A JPEG with a second image inside (MPO: depth or gain map of a phone) is not an animation.
        if image.format in ("PNG", "WEBP"):
            if (frames := getattr(image, "n_frames", 1)) > 1:
                raise DecodeError(f"animated ({frames} frames); still images only")
        elif has_too_many_scans(data):
            raise DecodeError("cannot be decoded (too many scans)")
        yield image


def _turn(image: Image.Image) -> Image.Transpose | None:
    """The transpose that turns the image upright; None where it is upright."""
    with contextlib.suppress(Exception):  # many real files carry a broken EXIF block around good pixels
        return _TURNS.get(image.getexif().get(ExifTags.Base.Orientation, 1))
    return None


def _alpha_of_colour(image: Image.Image, data: bytes) -> Image.Image | None:
    """The alpha channel that the transparent colour of a PNG of 2, 4 or 16 bits means; ``image`` is without it afterwards.

    None for all other images: Pillow scales the pixels to 8 bits, and then compares them with the colour as the file has it.
    """
    if image.format != "PNG" or (bits := data[24]) in (1, 8) or image.mode not in ("L", "I;16", "RGB"):
        return None
    if (colour := image.info.pop("transparency", None)) is None:
        return None
    pixels = np.asarray(image)
    if bits < 8:
        clear = pixels == colour * 255 // (2**bits - 1)
    elif image.mode == "RGB":
        # Pillow keeps the high bytes; read as little-endian, the low bytes come out
        with _opened(data) as again:
            again.tile = [tile._replace(args="RGB;16L") for tile in again.tile]  # pyright: ignore[reportAttributeAccessIssue]
            clear = (pixels * np.uint16(256) + np.asarray(again) == colour).all(-1)
    else:
        clear = pixels == colour
    return Image.fromarray(np.where(clear, np.uint8(0), np.uint8(255)))


def _to_rgb(image: Image.Image, background: tuple[int, int, int] | None, alpha: Image.Image | None = None) -> Image.Image:
    profile = image.info.get("icc_profile")
    if image.mode == "I" or image.mode.startswith("I;16"):
        image = grey_to_8_bits(image)
    colours = image.mode if image.mode in ("RGB", "CMYK") else "L" if image.mode in ("1", "L", "LA") else "RGB"
    if alpha is not None:
        rgba = to_srgb(as_mode(image, colours), profile)
        rgba.putalpha(alpha)
    elif not image.has_transparency_data:
        return to_srgb(as_mode(image, colours), profile)
    else:
        rgba = as_mode(image, "RGBA")
        if not is_srgb(profile, colours):
            rgb = to_srgb(rgba.convert(colours), profile)
            rgb.putalpha(rgba.getchannel("A"))
            rgba = rgb
    if background is None:
        return rgba.convert("RGB") if rgba.getchannel("A").getextrema() == (255, 255) else rgba
    return Image.alpha_composite(Image.new("RGBA", rgba.size, (*background, 255)), rgba).convert("RGB")
