import io
import struct

import numpy as np
import pytest
from PIL import Image, ImageCms

from ldm.data import colour
from ldm.data.colour import is_srgb, to_srgb
from ldm.data.decode import decode_image, decode_pixels, is_plain_rgb
from tests.samples import encoded

# Primaries in XYZ adapted to D50, one column each.
SRGB = np.array([[0.43607, 0.38515, 0.14307], [0.22249, 0.71687, 0.06061], [0.01392, 0.09708, 0.71410]])
DISPLAY_P3 = np.array([[0.51512, 0.29198, 0.15710], [0.24120, 0.69225, 0.06657], [-0.00105, 0.04189, 0.78407]])
SRGB_ICC = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()


def fixed(*values):
    return struct.pack(f">{len(values)}i", *(round(value * 65536) for value in values))


def icc(space, tags, kind=b"mntr", pcs=b"XYZ "):
    """An ICC profile, version 2.4: the header, the table of tags, the tags."""
    table, body = struct.pack(">I", len(tags)), b""
    for name, data in tags.items():
        table += name + struct.pack(">II", 132 + 12 * len(tags) + len(body), len(data))
        body += data + bytes(-len(data) % 4)
    size = 128 + len(table) + len(body)
    header = struct.pack(">I4xI", size, 0x02400000) + kind + space + pcs + bytes(12) + b"acsp" + bytes(28)
    return (header + fixed(0.9642, 1, 0.8249)).ljust(128, b"\0") + table + body


def gamma(value):
    return b"curv" + struct.pack(">4xIH", 1, round(value * 256))


def xyz(column):
    return b"XYZ \0\0\0\0" + fixed(*column)


def rgb_icc(primaries, exponent):
    tags = {b"wtpt": xyz((0.9642, 1, 0.8249))}
    for name, column in zip((b"r", b"g", b"b"), primaries.T, strict=True):
        tags |= {name + b"XYZ": xyz(column), name + b"TRC": gamma(exponent)}
    return icc(b"RGB ", tags)


def black_only_icc():
    """A press that prints no colours: L* falls with the black ink, whatever the others do."""
    grid = b"".join(bytes((255 * (1 - k), 128, 128)) for _ in range(8) for k in (0, 1))
    lut = b"mft1\0\0\0\0" + bytes((4, 3, 2, 0)) + fixed(1, 0, 0, 0, 1, 0, 0, 0, 1) + bytes(range(256)) * 4 + grid
    tags = {b"wtpt": xyz((0.9642, 1, 0.8249)), b"A2B0": lut + bytes(range(256)) * 3}
    return icc(b"CMYK", tags, kind=b"prtr", pcs=b"Lab ")


GAMMA = 2.25  # profiles hold it in 256ths
P3_ICC = rgb_icc(DISPLAY_P3, GAMMA)
GREY_GAMMA = 1.75
GREY_ICC = icc(b"GRAY", {b"wtpt": xyz((0.9642, 1, 0.8249)), b"kTRC": gamma(GREY_GAMMA)})


def srgb_levels(linear):
    linear = np.clip(linear, 0, 1)
    return 255 * np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)


def p3_levels(pixels):
    """Display P3 pixels (..., 3) => levels of sRGB, by the definition of both."""
    linear = (pixels / 255) ** GAMMA
    return srgb_levels(linear @ (np.linalg.inv(SRGB) @ DISPLAY_P3).T)


@pytest.fixture
def pixels():
    return np.random.default_rng(0).integers(0, 256, (12, 20, 3), dtype=np.uint8)  # (H, W, 3)


def far(image, levels):
    return np.abs(np.asarray(image) - levels).max()


@pytest.mark.parametrize(("format", "options"), [("PNG", {}), ("WEBP", {"lossless": True})])
def test_a_wide_gamut_comes_out_as_its_definition_says(pixels, format, options):
    data = encoded(Image.fromarray(pixels), format, icc_profile=P3_ICC, **options)
    assert far(decode_image(data), p3_levels(pixels)) <= 2
    assert far(pixels, p3_levels(pixels)) > 20  # so there was something to do


def test_a_jpeg_takes_the_way_past_the_fast_one(pixels):
    data = encoded(Image.fromarray(pixels), "JPEG", quality=95, icc_profile=P3_ICC)
    raw = np.asarray(Image.open(io.BytesIO(data)))
    assert far(decode_pixels(data), p3_levels(raw)) <= 2
    assert not is_plain_rgb(data)


def test_a_grey_profile_and_a_grey_image_with_an_rgb_profile():
    grey = np.arange(256, dtype=np.uint8)[None]  # (1, 256)
    rgb = decode_image(encoded(Image.fromarray(grey), icc_profile=GREY_ICC))
    assert far(rgb, srgb_levels((grey / 255) ** GREY_GAMMA)[..., None]) <= 2
    rgb = decode_image(encoded(Image.fromarray(grey), icc_profile=P3_ICC))
    assert far(rgb, p3_levels(np.repeat(grey[..., None], 3, axis=2))) <= 2


def test_sixteen_bit_grey_is_converted_too():
    grey = np.linspace(0, 65535, 64).astype(np.uint16)[None]
    rgb = decode_image(encoded(Image.fromarray(grey), icc_profile=GREY_ICC))
    assert far(rgb, srgb_levels((grey / 65535) ** GREY_GAMMA)[..., None]) <= 2


@pytest.mark.parametrize("black", [0, 60, 128, 200, 255])
def test_a_press_profile_says_what_ink_looks_like(black):
    image = Image.new("CMYK", (16, 16), (200, 30, 90, black))
    level = srgb_levels(((100 * (1 - black / 255) + 16) / 116) ** 3 if black < 230 else 0)
    assert far(decode_image(encoded(image, "JPEG", quality=100, icc_profile=black_only_icc())), level) <= 4


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_colours_are_converted_and_transparency_is_not(mode):
    profile = P3_ICC if mode == "RGBA" else GREY_ICC
    opaque = Image.fromarray(np.arange(0, 240, 10, dtype=np.uint8).reshape(4, 6)).convert("RGB" if mode == "RGBA" else "L")
    image = opaque.copy()
    image.putalpha(Image.fromarray(np.repeat(np.array([[255], [255], [0], [0]], np.uint8), 6, axis=1)))
    assert image.mode == mode
    rgb = np.asarray(decode_image(encoded(image, icc_profile=profile), background=(1, 2, 3)))
    assert np.array_equal(rgb[:2], np.asarray(decode_image(encoded(opaque, icc_profile=profile)))[:2])
    assert np.all(rgb[2:] == (1, 2, 3))


def test_palettes_are_converted(pixels):
    palette = Image.fromarray(pixels).quantize(16)
    assert far(decode_image(encoded(palette, icc_profile=P3_ICC)), p3_levels(np.asarray(palette.convert("RGB")))) <= 2


def test_srgb_by_whatever_profile_is_left_alone_to_the_bit(pixels):
    assert is_srgb(SRGB_ICC, "RGB") and is_srgb(SRGB_ICC, "L") and is_srgb(None, "RGB") and is_srgb(b"", "L")
    assert not is_srgb(rgb_icc(SRGB, 2.2), "RGB") and not is_srgb(rgb_icc(SRGB, 2.2), "L")
    data = encoded(Image.fromarray(pixels), icc_profile=SRGB_ICC)
    assert np.array_equal(np.asarray(decode_image(data)), pixels)
    assert is_plain_rgb(data) and not is_plain_rgb(encoded(Image.fromarray(pixels), icc_profile=P3_ICC))


@pytest.mark.parametrize(
    "profile",
    [b"no profile", P3_ICC[:200], P3_ICC[:128] + bytes(200), GREY_ICC, black_only_icc(), b"\0" * 100],
    ids=["text", "cut", "empty", "of grey", "of a press", "zeros"],
)
def test_a_profile_that_cannot_be_meant_is_ignored(pixels, profile):
    assert np.array_equal(np.asarray(decode_image(encoded(Image.fromarray(pixels), icc_profile=profile))), pixels)


def test_every_cut_of_a_profile_leaves_an_image(pixels):
    for cut in range(1, len(P3_ICC), 11):
        assert decode_image(encoded(Image.fromarray(pixels), icc_profile=P3_ICC[:cut])).size == (20, 12)


def test_a_press_without_a_profile_is_converted_by_pillow():
    image = Image.new("CMYK", (4, 4), (10, 200, 30, 40))
    assert to_srgb(image, None).tobytes() == to_srgb(image, P3_ICC).tobytes() == image.convert("RGB").tobytes()


def test_few_transforms_are_kept_and_large_profiles_are_not_read(pixels, monkeypatch):
    image = Image.fromarray(pixels)
    for step in range(3 * colour.CACHED_PROFILES):
        to_srgb(image, rgb_icc(DISPLAY_P3, 1.5 + step / 16))
    assert colour._transform.cache_info().currsize == colour.CACHED_PROFILES
    monkeypatch.setattr(colour, "MAX_PROFILE_BYTES", 100)
    colour._transform.cache_clear()
    assert np.array_equal(np.asarray(to_srgb(image, P3_ICC)), pixels)
    colour._transform.cache_clear()
