"""One image file and its captions => the members of a sample.

A sample is ``jpg``, ``png`` or ``webp``, ``txt`` (the first caption; absent without captions) and ``json``: the source file's
name, the original size, all captions where there are several, and what else the source says.
"""

from __future__ import annotations

import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

import numpy as np
import simplejpeg
from PIL import Image, ImageColor, ImageOps

from ldm.data.decode import (
    MAX_PIXELS,
    MAX_SAMPLE_JSON_BYTES,
    DecodeError,
    decode_image,
    decode_pixels,
    decode_text,
    is_plain_rgb,
)
from ldm.data.writer import encode_png
from ldm.errors import UsageError

RESIZES = ("square", "shorter", "none")
FORMATS = ("auto", "jpg", "png", "webp")
MAX_SIZE = 4096
PNG_UP_TO = 128
NO_EXTRAS: Mapping[str, Any] = MappingProxyType({})

_SIGNATURES = {b"\xff\xd8": "jpg", b"\x89P": "png", b"RI": "webp"}


@dataclass(frozen=True)
class Prepared:
    """A sample's members, (height, width) of its image, whether that had to be scaled up, and the names of its extras."""

    files: dict[str, bytes]
    size: tuple[int, int]
    enlarged: bool
    extras: Sequence[str] = ()


@dataclass(frozen=True)
class Preparation:
    """How every image is prepared. The EXIF orientation is applied, colours are converted to sRGB, metadata is dropped.

    Attributes:
        size: pixels, see ``resize``.
        resize: ``square`` (default with ``size``): scale the shorter side to ``size`` and crop the centre. ``shorter``: the
            same without the crop. ``none`` (default without ``size``): no change. Lanczos.
        min_size: images whose shorter side has fewer pixels are refused.
        keep_bytes: where nothing has to change, store the file's own bytes, its metadata included.
        format: ``jpg``, ``png``, ``webp``; ``auto``: PNG up to 128 pixels a side (lossless, and as small), else JPEG.
        quality: of JPEG (without chroma subsampling) and WebP, 1 to 100.
        background: colour behind transparent images: a name or ``#rrggbb``.
        captions: False: images alone, for an autoencoder; none needs a caption, and none is stored.
        caption: of images that have none; without it they are refused.
    """

    size: int | None = None
    resize: str | None = None
    min_size: int | None = None
    keep_bytes: bool = False
    format: str = "auto"
    quality: int = 95
    background: str = "white"
    captions: bool = True
    caption: str | None = None

    def checked(self) -> Preparation:
        """The same, with the default ``resize`` filled in. Raises :class:`UsageError` for invalid values."""
        sizes = (("size", self.size, MAX_SIZE), ("min_size", self.min_size, MAX_SIZE), ("quality", self.quality, 100))
        for name, value, most in sizes:
            if value is not None and not 1 <= value <= most:
                raise UsageError(f"{name} must be 1 to {most}, not {value}")
        for name, value, values in (("resize", self.resize or "none", RESIZES), ("format", self.format, FORMATS)):
            if value not in values:
                raise UsageError(f"{name} must be one of {', '.join(values)}, not {value}")
        if self.resize not in (None, "none") and self.size is None:
            raise UsageError(f"resize {self.resize} needs a size in pixels; give one")
        if self.resize == "none" and self.size is not None:
            raise UsageError(f"resize none leaves images as they are, but size is {self.size}; give one of the two")
        if self.caption is not None and not (self.captions and self.caption.strip()):
            raise UsageError(f"caption is {self.caption!r} for images without one; give a text, and pack with captions")
        self.colour()
        return replace(self, resize=self.resize or ("none" if self.size is None else "square"))

    def colour(self) -> tuple[int, int, int]:
        """``background`` as RGB, 0..255."""
        try:
            rgb = ImageColor.getrgb(self.background)
        except ValueError:
            rgb = ()
        if len(rgb) != 3:  # an unknown name, or a colour with transparency
            raise UsageError(f"background must be white, black or #rrggbb, not {self.background}")
        return rgb

    def __call__(self, file: str, data: bytes, captions: Sequence[str], extras: Mapping[str, Any] = NO_EXTRAS) -> Prepared:
        """Prepare the image ``data`` called ``file``; ``extras`` are added to its json. Raises :class:`DecodeError`."""
        texts = [text for text in map(_clean, captions if self.captions else ()) if text]
        if not texts and self.caption is not None:
            texts = [_clean(self.caption)]
        if self.captions and not texts:
            raise DecodeError("empty caption")
        # Decided by the header. decode_pixels releases the GIL, and refuses broken JPEGs that Pillow accepts.
        plain = (self.keep_bytes or data.startswith(b"\xff\xd8")) and is_plain_rgb(data)
        image = Image.fromarray(decode_pixels(data)) if plain else decode_image(data, background=self.colour())
        if min(image.size) < (self.min_size or 1):
            raise DecodeError(f"{image.width} x {image.height} pixels, smaller than the least size of {self.min_size}")
        resized = self._resized(image)
        origin = {"file": file, "width": image.width, "height": image.height}
        if taken := extras.keys() & {*origin, "caption", "captions"}:
            raise DecodeError(f"extras called {', '.join(sorted(taken))}, which packing writes itself")
        fields = {**origin, **({"captions": texts} if len(texts) > 1 else {}), **extras}
        about = json.dumps(fields, ensure_ascii=False).encode()
        if len(about) > MAX_SAMPLE_JSON_BYTES:
            raise DecodeError(f"captions of {len(about)} bytes, the limit is {MAX_SAMPLE_JSON_BYTES}")
        kind = _SIGNATURES.get(data[:2], "")
        keep = self.keep_bytes and plain and resized.size == image.size and self.format in ("auto", kind)
        files = {kind: data} if keep else self._encoded(resized)
        enlarged = min(resized.size) > min(image.size)
        files |= {"txt": texts[0].encode()} if texts else {}
        return Prepared(files | {"json": about}, (resized.height, resized.width), enlarged, [*extras])

    def _resized(self, image: Image.Image) -> Image.Image:
        if self.resize == "none" or self.size is None:
            return image
        if self.resize == "square":
            return ImageOps.fit(image, (self.size, self.size), Image.Resampling.LANCZOS)
        width, height = (round(side * self.size / min(image.size)) for side in image.size)
        if width * height > MAX_PIXELS:  # an extreme aspect ratio, scaled up
            raise DecodeError(
                f"{image.width} x {image.height} pixels would become {width} x {height}, the limit is {MAX_PIXELS}"
            )
        return image.resize((width, height), Image.Resampling.LANCZOS)

    def _encoded(self, image: Image.Image) -> dict[str, bytes]:
        kind = self.format
        if kind == "auto":
            kind = "png" if max(image.size) <= PNG_UP_TO else "jpg"
        if kind == "png":
            return {"png": encode_png(image)}
        try:
            if kind == "jpg":
                # the bytes that Pillow writes, but without the GIL
                pixels = np.asarray(image)
                return {kind: simplejpeg.encode_jpeg(pixels, self.quality, colorsubsampling="444", fastdct=False)}
            buffer = io.BytesIO()
            image.save(buffer, "WEBP", quality=self.quality)
            return {kind: buffer.getvalue()}
        except (OSError, ValueError) as error:  # sides that the format cannot hold
            raise DecodeError(f"{image.width} x {image.height} pixels cannot be written as {kind} ({error})") from None


def _clean(caption: str) -> str:
    try:
        return decode_text(caption.encode())
    except UnicodeEncodeError:
        raise DecodeError("caption is not UTF-8 text") from None
