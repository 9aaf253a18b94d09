"""Opening images whose bytes may be anything."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from PIL import Image

from ldm import images
from ldm.errors import LdmError
from ldm.images import DecodeError, open_image

POSTSCRIPT = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n"


def png(size: tuple[int, int] = (3, 2), format: str = "PNG") -> bytes:
    file = io.BytesIO()
    Image.new("RGB", size, (1, 2, 3)).save(file, format)
    return file.getvalue()


def test_bytes_and_files_are_opened(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(png())
    for source in (png(), tmp_path / "a.png", str(tmp_path / "a.png")):
        with open_image(source) as image:
            assert image.size == (3, 2) and image.convert("RGB").getpixel((0, 0)) == (1, 2, 3)


def test_ghostscript_is_never_started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from PIL import EpsImagePlugin

    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", lambda *args, **settings: pytest.fail("Ghostscript was started"))
    (tmp_path / "a.png").write_bytes(POSTSCRIPT)
    with pytest.raises(DecodeError, match=r"a\.png: not a JPEG, PNG or WebP image"), open_image(tmp_path / "a.png"):
        pass


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"", "empty file"),
        (b"<html>", r"not a PNG image \(but an HTML or XML page\)"),
        (png()[:20], "broken header of a PNG|cannot be decoded|broken"),
        (png(format="JPEG"), "not a PNG image"),
        (png((9000, 9000)), "9000 x 9000 pixels, the limit is"),
    ],
)
def test_what_is_no_usable_image_is_a_short_reason(data: bytes, said: str) -> None:
    with pytest.raises(DecodeError, match=said), open_image(data, ("PNG",)):
        pass


def test_broken_pixels_are_a_decode_error_too() -> None:
    with pytest.raises(DecodeError, match="cannot be decoded"), open_image(png((64, 64))[:60]) as image:
        image.load()


def test_large_files_and_folders_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(images, "MAX_IMAGE_BYTES", 10)
    (tmp_path / "a.png").write_bytes(png())
    for source in (png(), tmp_path / "a.png", tmp_path):
        with pytest.raises(LdmError), open_image(source):
            pass
