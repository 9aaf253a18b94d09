import gzip
import io
import json
import pickle
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from ldm import images
from ldm.data import decode
from ldm.data.decode import (
    DecodeError,
    captions_of,
    decode_image,
    decode_json,
    decode_pixels,
    decode_text,
    is_plain_rgb,
)
from tests.samples import encoded


def set_limit(monkeypatch, name, value):
    monkeypatch.setattr(decode, name, value)
    monkeypatch.setattr(images, name, value)


@pytest.fixture
def pixels():
    return np.random.default_rng(0).integers(0, 256, (6, 8, 3), dtype=np.uint8)  # (H, W, 3)


@pytest.mark.parametrize(("format", "options"), [("PNG", {}), ("WEBP", {"lossless": True})])
def test_lossless_formats_come_back_exactly(pixels, format, options):
    image = decode_image(encoded(Image.fromarray(pixels), format, **options))
    assert image.mode == "RGB"
    assert np.array_equal(np.asarray(image), pixels)


def test_images_are_known_by_their_names_or_their_first_bytes():
    image = Image.new("RGB", (4, 4))
    for name in ("a.jpg", "a.JFIF", "a.jpe", "b/a.v1.PNG", "a.webp", "a.ppm", "a.tga", "a.apng", "a.heic"):
        assert images.is_image(name)
    for format in ("JPEG", "PNG", "WEBP", "GIF", "TIFF", "AVIF", "JPEG2000"):
        assert images.is_image("noext", encoded(image, format)[:64]), format
    for name, start in (("a.txt", b"a red square"), ("png", b""), ("a.json", b"{}"), ("a.wav", b"RIFF\0\0\0\0WAVEfmt ")):
        assert not images.is_image(name, start)


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


def test_transparency_shows_the_background(pixels):
    alpha = np.zeros((6, 8, 1), np.uint8)
    data = encoded(Image.fromarray(np.concatenate([pixels, alpha], axis=2)))
    assert np.all(np.asarray(decode_image(data)) == 255)
    assert np.all(np.asarray(decode_image(data, background=(1, 2, 3))) == (1, 2, 3))
    palette = Image.new("P", (2, 2), 0)
    assert np.all(np.asarray(decode_image(encoded(palette, transparency=0))) == 255)


def png(bits: int, colour_type: int, row: bytes, width: int, transparent: bytes) -> bytes:
    """One row of pixels as a PNG with a transparent colour, of depths that Pillow does not write."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, 1, bits, colour_type, 0, 0, 0)
    chunks = (b"IHDR", header), (b"tRNS", transparent), (b"IDAT", zlib.compress(b"\0" + row)), (b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*one) for one in chunks)


@pytest.mark.parametrize(
    ("bits", "row", "transparent", "expected"),
    [
        (1, b"\x40", 1, [0, None]),
        (2, b"\x1b", 1, [0, None, 170, 255]),
        (4, b"\x05\xaf", 5, [0, None, 170, 255]),
        (8, b"\0\x64\xff", 100, [0, None, 255]),
        # the third pixel has the same high byte as the transparent one
        (16, b"\0\0\x64\x64\x64\x65\xff\xff", 0x6464, [0, None, 100, 255]),
    ],
)
def test_the_transparent_colour_of_a_grey_png_of_any_depth(bits, row, transparent, expected):
    data = png(bits, 0, row, len(expected), struct.pack(">H", transparent))
    assert not is_plain_rgb(data)
    pixels = np.asarray(decode_image(data, background=(1, 2, 3)))
    assert pixels[0].tolist() == [[1, 2, 3] if level is None else [level] * 3 for level in expected]


@pytest.mark.parametrize("bits", [8, 16])
def test_the_transparent_colour_of_an_rgb_png_of_any_depth(bits):
    levels = [(1, 2, 3), (1, 2, 4), (9, 9, 9)]
    row = b"".join(struct.pack(">3B" if bits == 8 else ">3H", *level) for level in levels)
    data = png(bits, 2, row, 3, struct.pack(">3H", *levels[0]))
    pixels = np.asarray(decode_image(data, background=(250, 251, 252))).tolist()
    assert pixels == [[[250, 251, 252], *([list(level) for level in levels[1:]] if bits == 8 else [[0, 0, 0]] * 2)]]


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
def test_broken_exif_does_not_spoil_the_pixels(pixels):
    image = decode_image(encoded(Image.fromarray(pixels), "PNG", exif=b"Exif\0\0MM\0\x2a\xff\xff\xff\xff"))
    assert np.array_equal(np.asarray(image), pixels)


def test_a_second_image_inside_a_jpeg_is_not_an_animation(pixels):
    image = Image.fromarray(pixels)
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
    set_limit(monkeypatch, "MAX_IMAGE_BYTES", 10)
    with pytest.raises(DecodeError, match="limit is 10"):
        decode_image(bytes(11))
    with pytest.raises(DecodeError, match="limit"):
        decode_text(b"a" * (decode.MAX_TEXT_BYTES + 1))


def test_every_cut_of_a_file_is_a_decode_error_or_an_image(pixels):
    for format in ("PNG", "JPEG", "WEBP"):
        data = encoded(Image.fromarray(pixels), format)
        for cut in range(0, len(data) - 1, 7):
            try:
                decode_image(data[:cut])
            except DecodeError as error:
                assert "\n" not in str(error)


@pytest.mark.parametrize("format", ["GIF", "BMP", "TIFF"])
def test_formats_not_named_are_refused_whatever_the_file_is_called(pixels, format):
    with pytest.raises(DecodeError, match="not a JPEG, PNG or WebP"):
        decode_image(encoded(Image.fromarray(pixels), format))


def test_text_is_strict_utf8_and_stripped():
    assert decode_text("  a café\r\n".encode()) == "a café"
    assert decode_text(b"\xef\xbb\xbfa dog") == "a dog"
    assert decode_text(b" \n") == ""
    for bad in (b"caf\xe9", "a dog".encode("utf-16"), b"a\0b"):
        with pytest.raises(DecodeError):
            decode_text(bad)


class Explosive:
    def __reduce__(self):
        return pytest.fail, ("a pickle was opened",)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "empty file"),
        (b"<!DOCTYPE html><title>503 Service Unavailable</title>", "HTML"),
        (b"\xef\xbb\xbf\r\n <html><body>Not found", "HTML"),
        (b'{"error": "no such key"}', "JSON"),
        *((pickle.dumps(Explosive(), protocol), "pickle") for protocol in range(2, 6)),
        (gzip.compress(bytes(1000), mtime=0), "gzip"),
        (bytes(1000), "zero bytes"),
        (b"PK\x03\x04" + bytes(100), "zip"),
        (b"\x93NUMPY\x01\x00v\x00{'descr': '|O'", "NumPy"),
        (b"\xff\xd8\xff\xe0" + bytes(10), "broken header of a JPEG"),
        (b"\x89PNG\r\n\x1a\n" + bytes(10), "broken header of a PNG"),
        (b"just words", "not a JPEG, PNG or WebP image$"),
    ],
)
def test_what_is_no_image_is_refused_with_the_right_reason(data, reason):
    for way in (decode_image, decode_pixels):
        with pytest.raises(DecodeError, match=reason):
            way(data)
    assert not is_plain_rgb(data)


@pytest.mark.parametrize("format", ["PNG", "WEBP", "JPEG"])
def test_the_limit_of_pixels_holds_for_every_format(pixels, format, monkeypatch):
    data = encoded(Image.fromarray(pixels), format)
    set_limit(monkeypatch, "MAX_PIXELS", 48)
    assert decode_image(data).size == decode_pixels(data).shape[1::-1] == (8, 6)
    set_limit(monkeypatch, "MAX_PIXELS", 47)
    for way in (decode_image, decode_pixels):
        with pytest.raises(DecodeError, match="8 x 6 pixels, the limit is 47"):
            way(data)


PLAIN = {
    ("RGB", "PNG"): True,
    ("RGB", "WEBP"): True,
    ("RGB", "JPEG"): True,
    ("L", "PNG"): True,
    ("L", "JPEG"): True,
    ("1", "PNG"): False,
    ("P", "PNG"): False,
    ("LA", "PNG"): False,
    ("RGBA", "PNG"): False,
    ("RGBA", "WEBP"): False,
    ("I;16", "PNG"): False,
    ("CMYK", "JPEG"): False,
}


@pytest.mark.parametrize(("mode", "format"), PLAIN)
def test_bytes_may_be_kept_where_decoding_changes_nothing(pixels, mode, format):
    image = Image.fromarray(pixels)
    if mode == "RGBA":
        image.putalpha(128)
    if mode == "I;16":
        image = Image.fromarray(pixels[..., 0].astype(np.uint16) * 256)
    data = encoded(
        image if image.mode == mode else image.convert(mode), format, **({"lossless": True} if format == "WEBP" else {})
    )
    assert is_plain_rgb(data) == PLAIN[mode, format]
    if PLAIN[mode, format]:
        assert np.array_equal(np.asarray(decode_image(data)), np.asarray(Image.open(io.BytesIO(data)).convert("RGB")))


@pytest.mark.parametrize("format", ["PNG", "WEBP", "JPEG"])
def test_bytes_may_not_be_kept_where_the_image_lies_on_its_side(pixels, format):
    exif = Image.Exif()
    for orientation in range(1, 9):
        exif[0x0112] = orientation
        assert is_plain_rgb(encoded(Image.fromarray(pixels), format, exif=exif)) == (orientation == 1)


def test_bytes_may_not_be_kept_with_transparent_colours_frames_or_too_many_pixels(pixels, monkeypatch):
    image = Image.fromarray(pixels)
    assert not is_plain_rgb(encoded(image, transparency=(0, 0, 0)))
    assert not is_plain_rgb(encoded(image, save_all=True, append_images=[Image.new("RGB", image.size)]))
    set_limit(monkeypatch, "MAX_PIXELS", 47)
    assert not is_plain_rgb(encoded(image)) and not is_plain_rgb(encoded(image, "JPEG"))
    set_limit(monkeypatch, "MAX_PIXELS", 48)
    assert is_plain_rgb(encoded(image)) and is_plain_rgb(encoded(image, "JPEG"))


def test_orientations_undo_what_they_say(pixels):
    # orientation n means: this transformation of the stored pixels is the pixels
    upright = {
        1: pixels,
        2: pixels[:, ::-1],
        3: pixels[::-1, ::-1],
        4: pixels[::-1],
        5: pixels.transpose(1, 0, 2),
        6: np.rot90(pixels, -1),
        7: np.rot90(pixels, 2).transpose(1, 0, 2),
        8: np.rot90(pixels),
    }
    for orientation, expected in upright.items():
        exif = Image.Exif()
        exif[0x0112], exif[0x010E] = orientation, "where I live"
        image = decode_image(encoded(pixels, exif=exif))
        assert np.array_equal(np.asarray(image), expected) and image.info == {}


def test_json_is_an_object_in_utf8():
    assert decode_json('\ufeff{"caption": "a café", "width": 3}'.encode()) == {"caption": "a café", "width": 3}
    assert decode_json(b"{}") == {}


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b'{"caption": "caf\xe9"}', "UTF-8"),
        (b"", "cannot be decoded"),
        (b'{"caption": ', "cannot be decoded"),
        (b'["a"]', "not an object"),
        (b"null", "not an object"),
        (b"[" * 200_000, "nested"),
        (b'{"a":' * 150_000, "nested"),
        (b'{"a": ' + b"9" * 100_000 + b"}", "cannot be decoded"),
        (b'{"a": "' + bytes(2**20) + b'"}', "limit is 1048576"),
    ],
    ids=["latin-1", "empty", "cut", "list", "null", "deep list", "deep object", "long number", "large"],
)
def test_json_that_cannot_be_used(data, reason):
    with pytest.raises(DecodeError, match=reason) as caught:
        decode_json(data)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 200
    with pytest.raises(DecodeError):
        captions_of(b"a dog", data)


@pytest.mark.parametrize(
    ("txt", "fields", "captions"),
    [
        (None, None, []),
        (b" a dog\n", None, ["a dog"]),
        (b" \n", None, []),
        (b"a dog", {"caption": "a cat"}, ["a dog"]),
        (None, {"caption": " a cat "}, ["a cat"]),
        (None, {"caption": None}, []),
        (None, {"width": 3}, []),
        (b"a dog", {"width": 3}, ["a dog"]),
        (b"a dog", {"captions": ["a dog", " a hound ", "", None], "caption": "a cat"}, ["a dog", "a hound"]),
        (b"a dog", {"captions": None}, ["a dog"]),
        (b"a dog", {"captions": []}, ["a dog"]),
        (b"a dog", {"captions": "a hound"}, ["a hound"]),
        (b" \n", {"captions": ["", None], "caption": ["a cat", "a kitten"]}, ["a cat", "a kitten"]),
        (b"a dog", {"caption": 3}, ["a dog"]),
        (None, {"captions": "a hound"}, ["a hound"]),
        (b"a dog", {"tags": ["cat"]}, ["a dog"]),
        (None, {"caption": "a cat", "tags": ["dog"]}, ["a cat"]),
        (None, {"caption": "", "tags": ["dog", "red collar"]}, ["dog, red collar"]),
        (None, {"tags": "dog, red collar"}, ["dog, red collar"]),
        (None, {"tags": {"general": ["dog"]}}, []),
    ],
)
def test_all_captions_of_a_sample(txt, fields, captions):
    assert captions_of(txt, None if fields is None else json.dumps(fields).encode()) == captions


@pytest.mark.parametrize(
    "fields",
    [
        {"captions": [["a dog"]]},
        {"captions": 3},
        {"captions": {"a": "dog"}},
        {"caption": 3},
        {"caption": "a\0dog"},
        {"caption": "\ud800"},
        {"caption": "a" * (decode.MAX_TEXT_BYTES + 1)},
    ],
)
def test_captions_that_are_no_text(fields):
    with pytest.raises(DecodeError, match="caption"):
        captions_of(None, json.dumps(fields).encode())
