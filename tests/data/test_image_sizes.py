import json

import numpy as np
import pytest
from PIL import Image

from ldm.data.check import check_folder, index_elsewhere, index_here
from ldm.data.decode import decode_image
from ldm.data.image_sizes import image_sizes
from ldm.data.manifest import MANIFEST_NAME, SIZES_NAME, Manifest
from ldm.data.pack.packer import pack
from ldm.data.sources import open_source
from ldm.errors import LdmError, UsageError
from tests.samples import encoded, write_tar

TURNED = Image.Exif()
TURNED[0x0112] = 6  # a quarter turn


@pytest.fixture
def folder(tmp_path):
    """Two tars from elsewhere: images of several formats and shapes, some of which cannot be used."""
    (tmp_path / "x").mkdir()
    images = {
        "a.png": encoded(Image.new("RGB", (5, 9))),
        "b.jpg": encoded(Image.new("RGB", (7, 3)), "JPEG"),
        "c.jpg": encoded(Image.new("RGB", (7, 3)), "JPEG", exif=TURNED),
        "d.png": b"no image",
        "e.txt": b"a text alone",
    }
    write_tar(tmp_path / "x" / "x-0.tar", images.items())
    write_tar(tmp_path / "x" / "x-1.tar", [("f.webp", encoded(Image.new("RGBA", (40, 1)), "WEBP"))])
    return tmp_path / "x"


SIZES = [[9, 5], [3, 7], [7, 3], [0, 0], [0, 0], [1, 40]]


def test_an_index_has_the_sizes_of_the_upright_images(folder, tmp_path):
    index_here(folder)
    sizes = image_sizes(open_source(folder))
    assert sizes.dtype == np.int32 and sizes.tolist() == SIZES
    assert np.array_equal(np.load(folder / SIZES_NAME), sizes)
    before = (folder / SIZES_NAME).read_bytes()
    index_here(folder)  # again
    assert (folder / SIZES_NAME).read_bytes() == before
    index_elsewhere(str(folder), tmp_path / "elsewhere")
    assert image_sizes(open_source(tmp_path / "elsewhere")).tolist() == SIZES


def test_a_pattern_has_the_sizes_of_its_shards(folder):
    index_here(folder)
    assert image_sizes(open_source(folder / "x-1.tar")).tolist() == SIZES[5:]
    manifest = Manifest.load(folder)
    Manifest(manifest.format, manifest.shards[::-1], sizes=np.array(SIZES[5:] + SIZES[:5])).save(folder)
    assert image_sizes(open_source(folder / "x-0.tar")).tolist() == SIZES[:5]


def test_packed_sizes_are_those_of_the_images_as_packed(tmp_path):
    photos = tmp_path / "photos"
    photos.mkdir()
    for number in range(12):
        image = Image.new("RGB", (20 + 3 * number, 40 - 2 * number))
        (photos / f"{number}.jpg").write_bytes(encoded(image, "JPEG", exif=TURNED if number % 3 == 0 else Image.Exif()))
        (photos / f"{number}.txt").write_text("a photo")
    pack(photos, tmp_path / "x", size=16, resize="shorter", shard_size=5, validation=3)
    pack(photos, tmp_path / "kept", keep_bytes=True)
    for shards in (tmp_path / "x", tmp_path / "x" / "validation", tmp_path / "kept"):
        source = open_source(shards)
        packed = np.load(shards / SIZES_NAME)
        assert np.array_equal(image_sizes(source), packed) and len(packed) == source.manifest.samples
        index_here(shards)  # from the headers
        assert np.array_equal(np.load(shards / SIZES_NAME), packed)
        assert all(problems == () for problems in (checked.problems for checked in check_folder(shards, deep=True)[1]))


def test_a_manifest_without_sizes_says_how_to_get_them(folder):
    index_here(folder)
    value = json.loads((folder / MANIFEST_NAME).read_text())
    del value["sizes"]  # of before there were any
    (folder / MANIFEST_NAME).write_text(json.dumps(value))
    with pytest.raises(UsageError, match=r"has no sizes of its images; .*ldm shards index") as error:
        image_sizes(open_source(folder))
    assert "\n" not in str(error.value) and check_folder(folder)[0] == []


def change(folder, data):
    """Another sizes.npy of which the manifest knows."""
    manifest = Manifest.load(folder)
    Manifest(manifest.format, manifest.shards, sizes=np.array(data)).save(folder)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda path: path.unlink(), "does not exist"),
        (lambda path: path.write_bytes(path.read_bytes()[:-1]), "other bytes than the manifest's sha256"),
        (lambda path: path.write_bytes(bytes(10_000)), "larger than the limit"),
        (lambda path: change(path.parent, [[1, 2]]), "no array of 6 pairs"),
        (lambda path: change(path.parent, [1, 2, 3]), "no array of 6 pairs"),
    ],
)
def test_missing_and_other_sizes_are_named_in_one_line(folder, spoil, message):
    index_here(folder)
    spoil(folder / SIZES_NAME)
    with pytest.raises(LdmError, match=message) as error:
        image_sizes(open_source(folder))
    assert "\n" not in str(error.value)
    (problem,) = check_folder(folder)[0]
    assert problem.where == SIZES_NAME and message in str(problem)
    index_here(folder)
    assert image_sizes(open_source(folder)).tolist() == SIZES


def test_the_deep_check_finds_wrong_sizes(folder):
    index_here(folder)
    change(folder, [[9, 5], [3, 7], [3, 7], [0, 0], [0, 0], [1, 40]])
    first, second = (checked.problems for checked in check_folder(folder, deep=True)[1])
    assert any("holds images of other sizes than sizes.npy says" in str(problem) for problem in first) and second == ()


def test_an_array_of_somebody_else_is_not_overwritten(folder):
    np.save(folder / SIZES_NAME, np.zeros(3))
    with pytest.raises(UsageError, match="would be overwritten"):
        index_here(folder)
    assert np.array_equal(np.load(folder / SIZES_NAME), np.zeros(3))


def test_sizes_are_those_of_the_decoded_images(image_shards):
    source = open_source(image_shards)
    assert image_sizes(source).tolist() == [[32, 32]] * 10
    assert decode_image(encoded(Image.new("RGB", (7, 3)), "JPEG", exif=TURNED)).size == (3, 7)
