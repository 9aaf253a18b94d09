import io
import struct
from functools import partial
from typing import Any

import numpy as np
import pytest
import simplejpeg
from PIL import Image, ImageCms

from ldm.data import jpeg
from ldm.data.decode import DecodeError, decode_image, decode_pixels, is_plain_rgb
from ldm.data.jpeg import plain_size
from tests import samples

encoded = partial(samples.encoded, format="JPEG")
SRGB_ICC = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()


def natural(height, width, seed=0):
    """An image with large soft shapes and a little grain, as photographs have: uint8 (H, W, 3)."""
    random = np.random.default_rng(seed)
    coarse = Image.fromarray(random.integers(0, 256, (7, 9, 3), dtype=np.uint8))
    soft = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC), dtype=np.float64)
    return np.clip(soft + random.normal(0, 2, (height, width, 1)), 0, 255).astype(np.uint8)


def by_pillow(data):
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


def segment(marker, body):
    return struct.pack(">HH", marker, len(body) + 2) + body


def with_segment(data, *segments):
    return data[:2] + b"".join(segments) + data[2:]


def outcome(decode, data):
    try:
        return np.asarray(decode(data))
    except DecodeError as error:
        assert str(error) and "\n" not in str(error)
        return None


def psnr(a, b):
    return 10 * np.log10(255**2 / np.mean((a.astype(float) - b.astype(float)) ** 2))


@pytest.mark.parametrize("progressive", [False, True])
@pytest.mark.parametrize("subsampling", ["4:4:4", "4:2:2", "4:2:0", "grey"])
@pytest.mark.parametrize("size", [(1, 1), (8, 8), (17, 31), (64, 48), (33, 100), (255, 256)])
def test_a_plain_jpeg_has_the_pixels_that_pillow_sees(size, subsampling, progressive):
    image = natural(*size)
    if subsampling == "grey":
        data = encoded(image[..., 0], progressive=progressive)
    else:
        data = encoded(image, subsampling=subsampling, progressive=progressive, quality=90)
    assert plain_size(data) == size and is_plain_rgb(data)
    pixels = decode_pixels(data)
    assert pixels.dtype == np.uint8 and pixels.flags.c_contiguous and pixels.flags.writeable
    assert np.array_equal(pixels, by_pillow(data))
    assert np.array_equal(pixels, np.asarray(decode_image(data)))


@pytest.mark.parametrize("subsampling", ["440", "411"])
def test_rare_subsamplings_are_no_exception(subsampling):
    data = simplejpeg.encode_jpeg(natural(45, 67), colorsubsampling=subsampling)
    assert np.array_equal(decode_pixels(data), by_pillow(data))


def test_rgb_without_a_colour_transform_and_restart_markers():
    several: list[dict[str, Any]] = [{"keep_rgb": True}, {"restart_marker_rows": 1}, {"optimize": True, "comment": b"a note"}]
    for options in several:
        data = encoded(natural(40, 40), **options)
        assert plain_size(data) == (40, 40)
        assert np.array_equal(decode_pixels(data), by_pillow(data))


@pytest.mark.parametrize("format", ["PNG", "WEBP"])
def test_other_formats_give_the_same_pixels_too(format):
    data, out = encoded(natural(20, 30), format=format), np.zeros((20, 30, 3), np.uint8)
    pixels = decode_pixels(data)
    assert np.array_equal(pixels, np.asarray(decode_image(data)))
    assert pixels.flags.c_contiguous and pixels.flags.writeable
    assert decode_pixels(data, out) is out and np.array_equal(out, pixels)


def exif(orientation=None, order=">"):
    image = Image.Exif()
    image.endian = order
    image[0x010E] = "a place"
    if orientation is not None:
        image[0x0112] = orientation
    return image.tobytes()


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("orientation", [None, *range(10)])
def test_orientation_is_seen_whoever_wrote_it(orientation, order):
    data = encoded(natural(16, 24), exif=exif(orientation, order))
    assert (plain_size(data) is None) == (orientation in range(2, 9))
    assert np.array_equal(decode_pixels(data), np.asarray(decode_image(data)))
    assert decode_pixels(data).shape == ((24, 16, 3) if orientation in (5, 6, 7, 8) else (16, 24, 3))


@pytest.mark.parametrize(
    ("extra", "plain"),
    [
        (segment(0xFFE1, b"http://ns.adobe.com/xap/1.0/\0<x tiff:Orientation='6' tiff:Orientation=\"6\"/>"), False),
        (segment(0xFFE1, b'http://ns.adobe.com/xap/1.0/\0<x tiff:Orientation="1"/>'), True),
        (segment(0xFFE1, b"Exif\0\0MM\0\x2a\xff\xff\xff\xff"), True),
        (segment(0xFFE1, b"Exif\0\0garbage"), False),
        (segment(0xFFE2, b"ICC_PROFILE\0\1\1" + SRGB_ICC), True),
        (segment(0xFFE2, b"ICC_PROFILE\0\1\2" + SRGB_ICC), False),
        (segment(0xFFE2, b"ICC_PROFILE\0\1\1" + b"no profile"), True),
        (segment(0xFFED, b"Photoshop 3.0\0"), True),
        (b"\xff" * 3, False),
        (segment(0xFFC0, struct.pack(">BHHB", 8, 9, 9, 1) + b"\1\x11\0"), False),
        (segment(0xFFFE, b"") * jpeg.MAX_SEGMENTS, False),
    ],
)
@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
def test_what_stands_before_the_image(extra, plain):
    data = with_segment(encoded(natural(16, 24)), extra)
    assert (plain_size(data) is not None) == plain
    pixels, expected = outcome(decode_pixels, data), outcome(decode_image, data)
    assert (pixels is None) == (expected is None)
    assert pixels is None or expected is None or np.array_equal(pixels, expected)


def test_a_second_image_inside_does_not_matter():
    data = encoded(natural(16, 24, 0), format="MPO", save_all=True, append_images=[Image.fromarray(natural(16, 24, 1))])
    assert np.array_equal(decode_pixels(data), by_pillow(data))


def test_pixels_go_straight_into_an_array_of_their_size():
    data = encoded(natural(48, 64))
    batch = np.zeros((3, 48, 64, 3), np.uint8)
    assert decode_pixels(data, batch[1]).base is batch
    assert np.array_equal(batch[1], by_pillow(data))
    assert not batch[0].any() and not batch[2].any()


@pytest.mark.parametrize(
    "out",
    [
        np.zeros((48, 63, 3), np.uint8),
        np.zeros((64, 48, 3), np.uint8),
        np.zeros((48, 64, 3), np.float32),
        np.zeros((48, 128, 3), np.uint8)[:, ::2],
        np.zeros((48, 64, 3), np.uint8, order="F"),
        np.zeros(48 * 64 * 3, np.uint8),
    ],
    ids=["size", "turned", "dtype", "gaps", "order", "flat"],
)
def test_any_other_array_is_left_alone(out):
    data = encoded(natural(48, 64))
    pixels = decode_pixels(data, out)
    assert pixels is not out and not out.any()
    assert np.array_equal(pixels, by_pillow(data))


@pytest.mark.parametrize(
    ("size", "min_side", "decoded"),
    [
        ((512, 512), 256, (512, 512)),
        ((1023, 1500), 256, (1023, 1500)),
        ((1024, 1500), 256, (512, 750)),
        ((1025, 1501), 256, (513, 751)),
        ((2048, 2050), 256, (512, 513)),
        ((1200, 800), 32, (150, 100)),
        ((1200, 800), None, (1200, 800)),
        ((3, 5), 1, (3, 5)),
    ],
)
def test_large_jpegs_come_smaller_but_never_below_twice_the_side(size, min_side, decoded):
    data = encoded(natural(*size))
    assert decode_pixels(data, min_side=min_side).shape == (*decoded, 3)
    out = np.zeros((*decoded, 3), np.uint8)
    assert decode_pixels(data, out, min_side=min_side) is out


@pytest.mark.parametrize(("side", "subsampling"), [(512, "4:2:0"), (1000, "4:4:4"), (1030, "4:2:0")])
def test_what_a_smaller_decoding_loses_is_not_seen_after_scaling(side, subsampling):
    data = encoded(natural(side, side + side // 3), quality=90, subsampling=subsampling)
    whole, part = decode_pixels(data), decode_pixels(data, min_side=64)
    assert part.shape[0] < side
    size = (64 + 64 // 3, 64)
    a, b = (np.asarray(Image.fromarray(image).resize(size, Image.Resampling.LANCZOS)) for image in (whole, part))
    assert psnr(a, b) > 40


@pytest.mark.parametrize("progressive", [False, True])
def test_a_cut_file_is_refused_by_both_ways(progressive):
    data = encoded(natural(64, 96), progressive=progressive)
    for cut in [len(data) * part // 20 for part in range(20)] + [len(data) - 2, len(data) - 1]:
        assert outcome(decode_pixels, data[:cut]) is None, cut
        assert outcome(decode_image, data[:cut]) is None, cut


def test_damage_is_refused_or_leaves_the_pixels_that_pillow_sees():
    random = np.random.default_rng(0)
    whole = encoded(natural(64, 64), quality=85)
    refused, total = 0, 400
    for _ in range(total):
        data = bytearray(whole)
        for at in random.integers(2, len(data), random.integers(1, 4)):
            data[at] = random.integers(0, 256)
        pixels, expected = outcome(decode_pixels, bytes(data)), outcome(decode_image, bytes(data))
        if pixels is None:
            refused += 1
        else:
            assert expected is not None and np.array_equal(pixels, expected)
    assert total / 4 < refused < total


@pytest.mark.parametrize("seed", range(20))
def test_garbage_is_never_more_than_refused(seed):
    random = np.random.default_rng(seed)
    head = encoded(natural(8, 8))[: random.integers(2, 700)]
    data = head + random.bytes(2000)
    assert outcome(decode_pixels, data) is None or np.array_equal(decode_pixels(data), np.asarray(decode_image(data)))
    for start in range(0, 40):
        size = plain_size(data[:2] + data[start:])
        assert size is None or min(size) > 0
    assert plain_size(b"") is None and plain_size(b"\xff\xd8") is None


def test_a_bomb_is_judged_by_its_header(monkeypatch):
    data = encoded(natural(16, 16))
    at = data.index(b"\xff\xc0") + 5
    bomb = data[:at] + struct.pack(">HH", 65500, 65500) + data[at + 4 :]
    monkeypatch.setattr(simplejpeg, "decode_jpeg", lambda *args, **kwargs: pytest.fail("pixels were read"))
    assert plain_size(bomb) == (65500, 65500) and not is_plain_rgb(bomb)
    for decode in (decode_pixels, decode_image):
        with pytest.raises(DecodeError, match="limit"):
            decode(bomb)


def test_an_image_that_is_painted_over_and_over_is_refused():
    data = encoded(natural(16, 16), progressive=True)
    last = data.rindex(b"\xff\xda")
    again = data[:last] + data[last:-2] * (jpeg.MAX_SCANS + 1) + b"\xff\xd9"
    assert plain_size(data) is not None and plain_size(again) is None
    for decode in (decode_pixels, decode_image):
        with pytest.raises(DecodeError, match="too many scans"):
            decode(again)
    # a film behind the image, as phones append one, holds scan markers by chance
    film = np.random.default_rng(0).bytes(2**26)
    assert not jpeg.has_too_many_scans(data + film)
