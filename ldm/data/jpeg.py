"""Fast path for JPEGs that need nothing but decompression: check the markers, then libjpeg-turbo into an array."""

from __future__ import annotations

import re
import struct

import numpy as np
import simplejpeg
from PIL import ExifTags, Image

from ldm.data.colour import is_srgb

# Files from cameras and editors have 10 to 40 segments before the first scan.
MAX_SEGMENTS = 256
# As many as TurboJPEG itself allows on demand; progressive files have about 10. Each may cost a pass over the image.
MAX_SCANS = 500

_SEGMENT = struct.Struct(">HH")  # marker, length
_FRAME = struct.Struct(">HBHHB")  # length, bits, height, width, components
_BASELINE, _EXTENDED, _PROGRESSIVE = 0xFFC0, 0xFFC1, 0xFFC2
_SCAN, _APP1, _APP2 = 0xFFDA, 0xFFE1, 0xFFE2
# DHT, DQT, DRI, COM, and APPn but for those with EXIF, XMP and ICC: nothing that changes what the image looks like.
_HARMLESS = frozenset((0xFFC4, 0xFFDB, 0xFFDD, 0xFFFE, 0xFFE0, *range(0xFFE3, 0xFFF0)))
_EXIF, _XMP, _ICC = b"Exif\0\0", b"http://ns.adobe.com/xap/1.0/\0", b"ICC_PROFILE\0"
_TURNED = range(2, 9)
_TURNED_BY_XMP = re.compile(rb'tiff:Orientation(?:="|>)[2-8]')


def plain_size(data: bytes) -> tuple[int, int] | None:
    """(height, width) in pixels of a JPEG that needs nothing but decompression to be sRGB; None for all others.

    Such a JPEG has 8 bits, one or three components, is upright by EXIF and XMP, and has no ICC profile or one that
    means sRGB. Only markers before the first scan are read, so the pixels may still turn out to be broken. Rare or malformed
    files, and those that are no JPEG, are None as well: Pillow handles them.
    """
    if data[:2] != b"\xff\xd8":
        return None
    at, size, components, progressive, exif, profile = 2, None, 0, False, None, None
    try:
        for _ in range(MAX_SEGMENTS):
            marker, length = _SEGMENT.unpack_from(data, at)
            body, at = at + 4, at + 2 + length
            if marker in _HARMLESS:
                continue
            if marker in (_BASELINE, _EXTENDED, _PROGRESSIVE):
                declared, bits, height, width, components = _FRAME.unpack_from(data, body - 2)
                if size or bits != 8 or components not in (1, 3) or declared != 8 + 3 * components or not height * width:
                    return None
                size, progressive = (height, width), marker == _PROGRESSIVE
            elif marker == _APP1:
                if data.startswith(_EXIF, body):
                    if exif is not None:
                        return None
                    exif = data[body:at]
                elif data.startswith(_XMP, body) and _TURNED_BY_XMP.search(data, body, at):
                    return None
            elif marker == _APP2:
                if data.startswith(_ICC, body):
                    # one profile in one segment: number 1 of 1
                    if profile is not None or data[body + 12 : body + 14] != b"\1\1":
                        return None
                    profile = data[body + 14 : at]
            elif marker == _SCAN:
                if size is None or ((progressive or data[body] != components) and has_too_many_scans(data)):
                    return None
                break
            else:
                return None
        else:
            return None
    except (struct.error, IndexError):
        return None
    if (exif is not None and not _is_upright(exif)) or not is_srgb(profile, "L" if components == 1 else "RGB"):
        return None
    return size


def decode_plain(data: bytes, size: tuple[int, int], out: np.ndarray | None = None, min_side: int | None = None) -> np.ndarray:
    """Decompress a JPEG whose :func:`plain_size` is ``size``: uint8 (H, W, 3); arguments as in ``decode_pixels``.

    Raises ValueError for any error or warning of libjpeg-turbo.
    """
    # DCT scaling: 1/2, 1/4 or 1/8 costs about that share; libjpeg-turbo's fractions between are slower than the whole.
    scale = next((scale for scale in (8, 4, 2) if min_side and min(size) >= 2 * min_side * scale), 1)
    height, width = (-(-side // scale) for side in size)
    if out is None or not can_hold(out, (height, width, 3)):
        return simplejpeg.decode_jpeg(data, "RGB", min_height=height, min_width=width)
    # simplejpeg checks only the length of a buffer
    simplejpeg.decode_jpeg(data, "RGB", min_height=height, min_width=width, buffer=out)
    return out


def can_hold(out: np.ndarray, shape: tuple[int, ...]) -> bool:
    """Whether ``out`` is a writable uint8 array of just this shape, without gaps."""
    return out.shape == shape and out.dtype == np.uint8 and out.flags.c_contiguous and out.flags.writeable


def has_too_many_scans(data: bytes) -> bool:
    """Whether a JPEG has so many scans that decompression would take very long: a small file can require a million passes.

    Scans are counted by their marker, which compressed data cannot contain. Data appended by phones (a video) contains one in
    65,536 bytes by chance, so longer files may have more.
    """
    return data.count(b"\xff\xda") > MAX_SCANS + len(data) // 2**15


def _is_upright(segment: bytes) -> bool:
    exif = Image.Exif()
    try:
        exif.load(segment)
        return exif.get(ExifTags.Base.Orientation, 1) not in _TURNED
    except Exception:  # Pillow raises many exceptions for broken EXIF; decode_image copes with them
        return False
