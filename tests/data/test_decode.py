import io

import numpy as np
import pytest
from PIL import Image

from ldm.data import decode
from ldm.data.decode import DecodeError, decode_image, decode_text


def encoded(image, format="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


@pytest.fixture
def picture():
    return np.random.default_rng(0).integers(0, 256, (6, 8, 3), dtype=np.uint8)  # (H, W, 3)


@pytest.mark.parametrize(("format", "options"), [("PNG", {}), ("WEBP", {"lossless": True})])
def test_lossless_formats_come_back_exactly(picture, format, options):
    image = decode_image(encoded(Image.fromarray(picture), format, **options))
    assert image.mode == "RGB"
    assert np.array_equal(np.asarray(image), picture)


def test_sixteen_bit_grey_is_scaled_not_clipped():
    grey = np.linspace(0, 65535, 64).astype(np.uint16).reshape(8, 8)
    rgb = np.asarray(decode_image(encoded(Image.fromarray(grey))))
    assert np.abs(rgb - grey[..., None] / 257).max() <= 0.5


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA"])
def test_other_modes_become_rgb(mode):
    image = decode_image(encoded(Image.new("RGB", (4, 4), "white").convert(mode)))
    assert image.mode == "RGB" and np.all(np.asarray(image) == 255)


def test_cmyk_keeps_its_colour():
    image = decode_image(encoded(Image.new("CMYK", (16, 16), (0, 255, 255, 0)), "JPEG", quality=95))
    red, green, blue = np.asarray(image).reshape(-1, 3).mean(axis=0)
    assert red > 240 and green < 15 and blue < 15


def test_transparency_shows_the_background(picture):
    alpha = np.zeros((6, 8, 1), np.uint8)
    data = encoded(Image.fromarray(np.concatenate([picture, alpha], axis=2)))
    assert np.all(np.asarray(decode_image(data)) == 255)
    assert np.all(np.asarray(decode_image(data, background=(1, 2, 3))) == (1, 2, 3))
    palette = Image.new("P", (2, 2), 0)
    assert np.all(np.asarray(decode_image(encoded(palette, transparency=0))) == 255)


def test_exif_orientation_is_applied_and_nothing_else_is_carried_on(picture):
    exif = Image.Exif()
    exif[0x0112], exif[0x010E] = 6, "where I live"
    image = decode_image(encoded(Image.fromarray(picture), "PNG", exif=exif))
    assert np.array_equal(np.asarray(image), np.rot90(picture, -1))
    assert image.info == {}


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
def test_broken_exif_does_not_spoil_the_pixels(picture):
    image = decode_image(encoded(Image.fromarray(picture), "PNG", exif=b"Exif\0\0MM\0\x2a\xff\xff\xff\xff"))
    assert np.array_equal(np.asarray(image), picture)


def test_a_second_picture_inside_a_jpeg_is_not_an_animation(picture):
    image = Image.fromarray(picture)
    data = encoded(image, "MPO", save_all=True, append_images=[image])
    assert decode_image(data).size == (8, 6)


@pytest.mark.parametrize("format", ["PNG", "WEBP"])
def test_animations_are_refused(format):
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("red", "blue")]
    with pytest.raises(DecodeError, match="animated"):
        decode_image(encoded(frames[0], format, save_all=True, append_images=frames[1:]))


def test_size_is_judged_by_the_header(monkeypatch):
    def no_pixels(self):
        raise AssertionError("pixels were read")

    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", no_pixels)
    for size in (14000, 9000):  # a few kilobytes each; Pillow raises for the first, says nothing to the second
        data = encoded(Image.new("1", (size, size)))
        with pytest.raises(DecodeError, match="limit"):
            decode_image(data)


def test_member_sizes_are_limited(monkeypatch):
    monkeypatch.setattr(decode, "MAX_IMAGE_BYTES", 10)
    with pytest.raises(DecodeError, match="limit is 10"):
        decode_image(bytes(11))
    with pytest.raises(DecodeError, match="limit"):
        decode_text(b"a" * (decode.MAX_TEXT_BYTES + 1))


def test_every_cut_of_a_file_is_a_decode_error_or_an_image(picture):
    for format in ("PNG", "JPEG", "WEBP"):
        data = encoded(Image.fromarray(picture), format)
        for cut in range(0, len(data) - 1, 7):
            try:
                decode_image(data[:cut])
            except DecodeError as error:
                assert "\n" not in str(error)


@pytest.mark.parametrize("format", ["GIF", "BMP", "TIFF"])
def test_formats_not_named_are_refused_whatever_the_file_is_called(picture, format):
    with pytest.raises(DecodeError, match="not a JPEG, PNG or WebP"):
        decode_image(encoded(Image.fromarray(picture), format))


def test_text_is_strict_utf8_and_stripped():
    assert decode_text("  a café\r\n".encode()) == "a café"
    assert decode_text(b"\xef\xbb\xbfa dog") == "a dog"
    assert decode_text(b" \n") == ""
    for bad in (b"caf\xe9", "a dog".encode("utf-16"), b"a\0b"):
        with pytest.raises(DecodeError):
            decode_text(bad)
