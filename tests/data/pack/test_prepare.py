import io
import json

import numpy as np
import pytest
from PIL import ExifTags, Image
from PIL.JpegImagePlugin import JpegImageFile

from ldm.data.decode import MAX_TEXT_BYTES, DecodeError, decode_image, is_plain_rgb
from ldm.data.pack.prepare import Preparation
from ldm.errors import UsageError
from tests.samples import encoded


def noise(height, width, channels=3, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, channels), dtype=np.uint8).squeeze()


def smooth(height, width):
    y, x = np.mgrid[0:height, 0:width]
    return np.stack([x * 255 // width, y * 255 // height, (x + y) * 255 // (width + height)], -1).astype(np.uint8)


def prepare(data, captions=("a caption",), **options):
    return Preparation(**options).checked()("x.png", data, captions)


def image_of(prepared):
    (kind,) = prepared.files.keys() - {"txt", "json"}
    return kind, decode_image(prepared.files[kind])


def pixels(prepared):
    return np.asarray(image_of(prepared)[1])


def test_members_of_a_sample():
    prepared = prepare(encoded(noise(20, 30)), [" a caption\n"])
    assert prepared.files.keys() == {"png", "txt", "json"} and not prepared.enlarged
    assert prepared.files["txt"] == b"a caption"
    assert json.loads(prepared.files["json"]) == {"file": "x.png", "width": 30, "height": 20}


@pytest.mark.parametrize(
    ("options", "size"),
    [
        ({}, (60, 45)),
        ({"resize": "none"}, (60, 45)),
        ({"size": 30}, (30, 30)),
        ({"size": 30, "resize": "square"}, (30, 30)),
        ({"size": 30, "resize": "shorter"}, (40, 30)),
        ({"size": 45, "resize": "shorter"}, (60, 45)),
        ({"size": 90, "resize": "shorter"}, (120, 90)),
    ],
)
def test_sizes(options, size):
    prepared = prepare(encoded(noise(45, 60)), **options)
    assert image_of(prepared)[1].size == size and prepared.enlarged == (min(size) > 45)
    origin = json.loads(prepared.files["json"])
    assert (origin["width"], origin["height"]) == (60, 45)
    if size == (60, 45):
        assert np.array_equal(pixels(prepared), noise(45, 60))


@pytest.mark.parametrize("resize", ["square", "shorter"])
def test_the_centre_is_cut_out_of_the_longer_side_and_kept_in_the_middle_without_the_cut(resize):
    stripes = np.zeros((20, 60, 3), np.uint8)
    stripes[:, 20:40] = 255
    result = pixels(prepare(encoded(stripes), size=20, resize=resize))
    assert np.array_equal(result, stripes if resize == "shorter" else stripes[:, 20:40])


def test_scaling_keeps_what_an_image_shows():
    small = pixels(prepare(encoded(smooth(96, 128)), size=48, resize="shorter")).astype(int)
    assert small.shape == (48, 64, 3) and np.abs(small - smooth(48, 64)).max() <= 4


def test_small_images_are_refused_only_where_asked():
    data = encoded(noise(20, 30))
    assert prepare(data, size=40).enlarged
    assert not prepare(data, min_size=20).enlarged
    with pytest.raises(DecodeError, match="30 x 20 pixels, smaller than the least size of 21"):
        prepare(data, min_size=21)


def test_a_line_is_not_scaled_up_to_more_pixels_than_are_read():
    with pytest.raises(DecodeError, match="the limit is"):
        prepare(encoded(np.zeros((1, 8000, 3), np.uint8)), size=256, resize="shorter")


def test_small_images_are_lossless_and_large_ones_jpeg():
    small = prepare(encoded(noise(128, 128)))
    assert image_of(small)[0] == "png" and np.array_equal(pixels(small), noise(128, 128))
    assert image_of(prepare(encoded(noise(129, 300))))[0] == "jpg"


def mean_error(prepared, image):
    return np.abs(pixels(prepared).astype(int) - image).mean()


def test_formats_and_quality():
    image = smooth(150, 200)
    lossless = prepare(encoded(image), format="png")
    assert image_of(lossless)[0] == "png" and np.array_equal(pixels(lossless), image)
    for format in ("jpg", "webp"):
        good, poor = (prepare(encoded(noise(150, 200)), format=format, quality=quality) for quality in (95, 20))
        assert image_of(good)[0] == format and len(good.files[format]) > len(poor.files[format])
        assert mean_error(good, noise(150, 200)) < mean_error(poor, noise(150, 200))
        assert mean_error(prepare(encoded(image), format=format), image) < 2
    # neither chroma plane is halved
    jpeg = Image.open(io.BytesIO(prepare(encoded(image)).files["jpg"]))
    assert isinstance(jpeg, JpegImageFile) and jpeg.layer[1][1:3] == (1, 1)


@pytest.mark.parametrize("format", ["webp", "jpg"])
def test_sides_that_a_format_cannot_hold_are_a_reason(format):
    with pytest.raises(DecodeError, match=f"cannot be written as {format}"):
        prepare(encoded(np.zeros((1, 70_000, 3), np.uint8)), format=format)


@pytest.mark.parametrize("kind", ["jpg", "png", "webp"])
def test_bytes_are_kept_where_nothing_has_to_change(kind):
    format = {"jpg": "JPEG", "png": "PNG", "webp": "WEBP"}[kind]
    exif = Image.Exif()
    exif[ExifTags.Base.Artist] = "somebody"
    data = encoded(noise(40, 50), format, exif=exif)
    for options in ({}, {"format": kind}, {"size": 40, "resize": "shorter"}, {"min_size": 40}):
        assert prepare(data, keep_bytes=True, **options).files[kind] == data
    other = "png" if kind != "png" else "jpg"
    for options in ({"size": 20}, {"size": 40}, {"format": other}):
        changed = prepare(data, keep_bytes=True, **options).files
        assert data not in changed.values() and b"somebody" not in b"".join(changed.values())
    grey = encoded(noise(30, 30, 1), format)
    assert prepare(grey, keep_bytes=True).files[kind] == grey


def awkward():
    """Files whose pixels mean something else than their RGB bytes: name -> data."""
    turned = Image.Exif()
    turned[ExifTags.Base.Orientation] = 6
    return {
        "turned.jpg": encoded(smooth(40, 60), "JPEG", exif=turned),
        "cmyk.jpg": encoded(Image.fromarray(smooth(40, 60)).convert("CMYK"), "JPEG"),
        "16bit.png": encoded(Image.fromarray((np.arange(600, dtype=np.uint16) * 109).reshape(20, 30))),
        "rgba.png": encoded(np.dstack([smooth(40, 60), noise(40, 60, 1)])),
        "rgba.webp": encoded(np.dstack([smooth(40, 60), noise(40, 60, 1)]), "WEBP", lossless=True),
        "palette.png": encoded(Image.fromarray(smooth(40, 60)).quantize(16)),
    }


@pytest.mark.parametrize("name", ["turned.jpg", "cmyk.jpg", "16bit.png", "rgba.png", "rgba.webp", "palette.png"])
@pytest.mark.parametrize("keep_bytes", [False, True])
def test_all_kinds_of_images_become_upright_rgb(name, keep_bytes):
    data = awkward()[name]
    assert not is_plain_rgb(data)
    prepared = prepare(data, keep_bytes=keep_bytes, format="png")
    assert data not in prepared.files.values()
    assert is_plain_rgb(prepared.files["png"]) and Image.open(io.BytesIO(prepared.files["png"])).mode == "RGB"
    assert np.array_equal(pixels(prepared), np.asarray(decode_image(data)))
    if name == "turned.jpg":
        assert pixels(prepared).shape == (60, 40, 3)


@pytest.mark.parametrize(("background", "colour"), [("white", 255), ("black", 0), ("#102030", (16, 32, 48))])
def test_transparency_shows_the_background(background, colour):
    clear = np.zeros((10, 10, 4), np.uint8)
    clear[:5] = 200, 100, 50, 255
    result = pixels(prepare(encoded(clear), background=background))
    assert (result[:5] == (200, 100, 50)).all() and (result[5:] == colour).all()


def test_broken_files_are_not_kept():
    data = encoded(noise(64, 64), "JPEG")
    with pytest.raises(DecodeError):
        prepare(data[: len(data) // 2], keep_bytes=True)


def test_metadata_stays_behind():
    exif = Image.Exif()
    exif[ExifTags.Base.Artist] = "somebody"
    for format in ("jpg", "png", "webp"):
        prepared = prepare(encoded(noise(30, 30), "JPEG", exif=exif, comment=b"somewhere"), format=format)
        assert b"some" not in b"".join(prepared.files.values())


def test_several_captions_are_all_kept():
    prepared = prepare(encoded(noise(8, 8)), ["one", " ", "zwei ", "三"])
    assert prepared.files["txt"] == b"one"
    assert json.loads(prepared.files["json"])["captions"] == ["one", "zwei", "三"]


@pytest.mark.parametrize(
    ("captions", "words"),
    [
        ([], "empty caption"),
        (["", " \n"], "empty caption"),
        (["a\0b"], "NUL"),
        (["\ud800"], "not UTF-8"),
        (["x" * (MAX_TEXT_BYTES + 1)], "the limit is"),
        (["x" * MAX_TEXT_BYTES] * 17, "the limit is"),
    ],
)
def test_captions_that_cannot_be_stored_are_a_reason(captions, words):
    with pytest.raises(DecodeError, match=words):
        prepare(encoded(noise(8, 8)), captions)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"size": 0}, "size must be 1 to"),
        ({"size": 10**6}, "size must be 1 to"),
        ({"min_size": 0}, "min_size must be 1 to"),
        ({"quality": 101}, "quality must be 1 to 100"),
        ({"resize": "longer", "size": 8}, "resize must be one of square, shorter, none"),
        ({"resize": "square"}, "needs a size in pixels"),
        ({"resize": "none", "size": 8}, "give one of the two"),
        ({"format": "gif"}, "format must be one of"),
        ({"background": "mauve-ish"}, "background must be"),
        ({"background": "#ff00ff80"}, "background must be"),
    ],
)
def test_choices_that_make_no_sense_are_one_line(options, words):
    with pytest.raises(UsageError, match=words) as error:
        Preparation(**options).checked()
    assert "\n" not in str(error.value)
