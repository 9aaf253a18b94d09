"""Opening image files, whose bytes are untrusted: an allowlist of formats and limits on memory."""

from __future__ import annotations

import contextlib
import io
import os
import re
from collections.abc import Iterator

import numpy as np
from PIL import Image

from ldm.errors import LdmError
from ldm.files import read_bytes

MAX_IMAGE_BYTES = 128 * 2**20
# 8192 x 8192: a JPEG takes up to 0.4 GB, CMYK or RGBA 0.8, RGBA with a profile 1.1. Pillow says nothing at 89 megapixels.
MAX_PIXELS = 2**26
FORMATS = ("JPEG", "PNG", "WEBP")
# How many bytes of a file :func:`kind_of` wants.
KIND_BYTES = 64

_NAMES = {"WEBP": "WebP"}
# Other contents common in files named like images, for messages.
_OTHERS = (
    (b"<", "an HTML or XML page"),
    (b"{", "JSON"),
    (b"\0\0\0\0", "zero bytes"),
    (b"\x1f\x8b", "gzip data"),
    (b"PK\3\4", "a zip archive"),
    *((bytes((0x80, protocol)), "a pickle") for protocol in (2, 3, 4, 5)),
    (b"\x93NUMPY", "a NumPy array"),
)
# Files of these names are images, of formats that are read or not: those are counted and named, never passed over.
_EXTENSIONS = (
    "jpg jpeg jpe jfif jif pjpeg png apng webp gif bmp dib tif tiff heic heics heif heifs hif avif avifs jxl jp2 j2k j2c jpc "
    "jpx jpf mpo ppm pgm pbm pnm pam pfm tga ico cur icns psd exr hdr dds qoi pcx sgi xbm xpm svg svgz eps "
    "cr2 cr3 crw nef nrw arw srf sr2 dng orf raf raw rw2 pef srw x3f 3fr"
)
_SUFFIXES = frozenset(f".{extension}" for extension in _EXTENSIONS.split())
# How files of images begin, of the formats that open_image knows and of others.
_KINDS = {
    kind: re.compile(start, re.DOTALL)
    for kind, start in {
        "JPEG": rb"\xff\xd8\xff",
        "PNG": rb"\x89PNG\r\n\x1a\n",
        "WebP": rb"RIFF....WEBP",
        "GIF": rb"GIF8[79]a",
        "BMP": rb"BM....\0\0\0\0",
        "TIFF": rb"II[*+]\0|MM\0[*+]",
        "AVIF": rb"....ftypavi[fs]",
        "HEIC": rb"....ftyp(?:hei[cxms]|hev[cxms]|mif1|msf1)",
        "JPEG XL": rb"\xff\x0a|\0\0\0\x0cJXL \r\n\x87\n",
        "JPEG 2000": rb"\xffO\xffQ|\0\0\0\x0cjP  \r\n\x87\n",
        "PNM": rb"P[1-6]\s+(?:#[^\n]*\n\s*)*\d+\s+\d+\s|P7\nWIDTH|P[Ff]\n",
        "EPS": rb"%!PS-Adobe[^\n]*EPSF|\xc5\xd0\xd3\xc6",
        "Photoshop": rb"8BPS\0",
        "icon": rb"\0\0[\1\2]\0[^\0]\0",
        "OpenEXR": rb"v/1\x01",
        "QOI": rb"qoif",
        "Radiance": rb"#\?RADIANCE|#\?RGBE",
        "DDS": rb"DDS \x7c\0\0\0",
    }.items()
}


class DecodeError(LdmError):
    """An image or caption that cannot be used; the message is a short reason that follows the file's name."""


@contextlib.contextmanager
def open_image(source: str | os.PathLike | bytes, formats: tuple[str, ...] = FORMATS) -> Iterator[Image.Image]:
    """Open an image by its header; pixels are read on demand inside the block. The only place that calls ``Image.open``.

    Pillow without a list of formats runs Ghostscript on a file that begins as PostScript does, whatever its name.

    Args:
        source: a file, or the bytes of one, of at most ``MAX_IMAGE_BYTES`` bytes.
        formats: those of Pillow that are tried.

    Raises:
        DecodeError: no image of these formats, a broken one, or one of more than ``MAX_PIXELS`` pixels; also for whatever
            Pillow raises inside the block. Of a file, the message names it.
        LdmError: the file cannot be read.
    """
    named = "" if isinstance(source, bytes) else f"{os.fspath(source)}: "
    data = source if isinstance(source, bytes) else read_bytes(source, MAX_IMAGE_BYTES)
    try:
        if len(data) > MAX_IMAGE_BYTES:
            raise DecodeError(f"image file of {len(data)} bytes, the limit is {MAX_IMAGE_BYTES}")
        if not data:
            raise DecodeError(f"{named}empty file")
        with Image.open(io.BytesIO(data), formats=formats) as image:
            check_pixels(image.height, image.width, named)
            yield image
    except LdmError:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise DecodeError(f"{named}more pixels than the limit of {MAX_PIXELS}") from None
    except Image.UnidentifiedImageError:
        raise DecodeError(named + _describe(data, formats)) from None
    # broken bytes raise OSError, SyntaxError, ValueError, struct.error, zlib.error, EOFError and more from Pillow
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise DecodeError(f"{named}cannot be decoded ({reason})") from None


def kind_of(data: bytes) -> str | None:
    """The format of an image file by its first ``KIND_BYTES`` bytes, such as ``JPEG`` or ``GIF``; None for all else."""
    return next((kind for kind, start in _KINDS.items() if start.match(data)), None)


def is_image(name: str, start: bytes = b"") -> bool:
    """Whether a file is an image, of whatever format: by the extension of its name, or its first ``KIND_BYTES`` bytes."""
    return os.path.splitext(name)[1].lower() in _SUFFIXES or kind_of(start) is not None


def grey_to_8_bits(image: Image.Image) -> Image.Image:
    """Grey of 16 bits scaled to 8; Pillow's own conversion clips at 255."""
    grey = np.asarray(image).astype(np.int64).clip(0, 65535)  # (H, W)
    return Image.fromarray(((grey * 255 + 32767) // 65535).astype(np.uint8))


def check_pixels(height: int, width: int, named: str = "") -> None:
    """Raise :class:`DecodeError` for more than ``MAX_PIXELS`` pixels; ``named`` precedes the reason."""
    if width * height > MAX_PIXELS:
        raise DecodeError(f"{named}{width} x {height} pixels, the limit is {MAX_PIXELS}")


def _describe(data: bytes, formats: tuple[str, ...]) -> str:
    """What these bytes are, if not an image of these formats."""
    names = [_NAMES.get(format, format) for format in formats]
    kind = kind_of(data[:KIND_BYTES])
    if kind in names:
        return f"broken header of a {kind} file"
    start = data[:256].removeprefix(b"\xef\xbb\xbf").lstrip(b" \t\r\n")
    kind = kind or next((name for signature, name in _OTHERS if start.startswith(signature)), None)
    guess = f" (but {kind})" if kind else ""
    return f"not a {' or '.join(filter(None, (', '.join(names[:-1]), names[-1])))} image{guess}"
