import json

import numpy as np
import pytest
import torch
from PIL import Image

from ldm.data.buckets import Buckets
from ldm.data.check import index_here
from ldm.data.decode import decode_pixels
from ldm.data.image_dataset import Augmentation, ImageDataset, resize, square
from ldm.data.loader import batch_loader
from ldm.data.manifest import IMAGE_SHARDS, Manifest
from ldm.data.plan import PlannedSample
from ldm.data.quarantine import BadSample
from ldm.data.shards import ShardReader
from ldm.data.sources import open_source
from ldm.data.writer import ShardWriter, encode_png, write_images
from ldm.errors import LdmError
from ldm.latents.images import CaptionedImages
from ldm.shapes.scenes import generate
from tests.samples import encoded, same, write_photographs, write_tar


def write(folder, samples, **extra):
    """Shards of two samples each, from bytes."""
    folder.mkdir(exist_ok=True)
    with ShardWriter(folder, "x", samples_per_shard=2) as writer:
        for key, files in samples:
            writer.write(key, files)
    Manifest(IMAGE_SHARDS, tuple(writer.entries), extra).save(folder)
    return folder


def fit(pixels, size, **how):
    return resize(pixels, square(*pixels.shape[:2], size=size, **how), (size, size))


def png(size, colour: str | tuple[int, int, int] = "red"):
    return encode_png(Image.new("RGB", size, colour))


def test_samples_come_in_the_order_of_the_manifest(image_shards):
    dataset = ImageDataset(image_shards)
    drawn = list(generate(10, 32, seed=0))
    assert len(dataset) == 10 and len(dataset.sources[0].manifest.shards) == 3
    for index in [*range(10), 7, 0]:  # and in any order
        sample = dataset[index]
        assert sample["key"] == drawn[index].key and sample["caption"] == drawn[index].caption
        assert sample["image"].dtype == np.uint8 and np.array_equal(sample["image"].transpose(1, 2, 0), drawn[index].image)
    for index in (-1, 10):
        with pytest.raises(IndexError):
            dataset[index]


def test_manifest_order_counts_not_that_of_the_names(image_shards, tmp_path):
    write_images(tmp_path / "x", "x", generate(4, 32, seed=0), samples_per_shard=2)
    manifest = Manifest.load(tmp_path / "x")
    Manifest(IMAGE_SHARDS, manifest.shards[::-1]).save(tmp_path / "x")
    keys = [ImageDataset(tmp_path / "x")[index]["key"] for index in range(4)]
    assert keys == ["00000002", "00000003", "00000000", "00000001"]


def test_images_are_fitted_by_cutting_the_longer_side(tmp_path):
    image = np.zeros((8, 24, 3), np.uint8)
    image[:, 8:16] = 255  # the centre third
    folder = write(tmp_path / "x", [("a", {"png": encode_png(Image.fromarray(image))}), ("b", {"png": png((8, 8))})])
    dataset = ImageDataset(folder, image_size=8)
    assert np.array_equal(dataset[0]["image"], np.full((3, 8, 8), 255))
    assert dataset[1]["image"].shape == (3, 8, 8)
    assert ImageDataset(folder, image_size=4)[1]["image"].shape == (3, 4, 4)
    assert ImageDataset(folder)[0]["image"].shape == (3, 8, 24)


def test_a_batch_is_uint8_images_and_lists(image_shards):
    dataset = ImageDataset(image_shards)
    batch = dataset.collate([dataset[1], dataset[5]])
    assert batch["image"].dtype == torch.uint8 and batch["image"].shape == (2, 3, 32, 32)
    assert batch["key"] == ["00000001", "00000005"] and batch["caption"] == [dataset[1]["caption"], dataset[5]["caption"]]


def test_several_sizes_in_a_batch_say_how_to_fix_it_in_one_line(tmp_path):
    dataset = ImageDataset(write(tmp_path / "x", [("a", {"png": png((8, 8))}), ("b", {"png": png((9, 8))})]))
    with pytest.raises(LdmError) as error:
        dataset.collate([dataset[0], dataset[1]])
    assert "(8 x 8, 9 x 8)" in str(error.value) and "set image_size" in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("workers", [0, 1])
def test_batches_of_other_sizes_may_follow_and_stay_as_they_were(tmp_path, workers):
    sizes = [(8, 8)] * 6 + [(9, 5)] * 6 + [(8, 8)] * 10
    samples = [(f"{number:02d}", {"png": png(size, (number, 0, 9))}) for number, size in enumerate(sizes)]
    dataset = ImageDataset(write(tmp_path / "x", samples))
    batches = list(batch_loader(dataset, np.arange(len(sizes)).reshape(-1, 2).tolist(), num_workers=workers))
    images = [image for batch in batches for image in batch["image"]]
    assert len(images) == len(sizes)
    assert all(np.array_equal(image, dataset[index]["image"]) for index, image in enumerate(images))


@pytest.mark.parametrize("size", [5, 16, 40])
@pytest.mark.parametrize("shape", [(31, 44), (40, 33), (20, 20)])
def test_scaled_to_within_a_step_as_pillow_scales(shape, size):
    pixels = np.random.default_rng(size).integers(0, 256, (*shape, 3), np.uint8)
    side = min(shape)
    y, x = ((length - side) // 2 for length in shape)
    expected = Image.fromarray(pixels[y : y + side, x : x + side]).resize((size, size), Image.Resampling.BICUBIC)
    assert np.abs(fit(pixels, size).astype(int) - np.asarray(expected)).max() <= 1


def test_a_sample_may_lack_its_caption(tmp_path):
    assert ImageDataset(write(tmp_path / "x", [("a", {"png": png((8, 8))})]))[0]["caption"] == ""


def test_a_sample_without_a_caption_cannot_be_used_where_others_have_one(tmp_path):
    samples = [
        ("a", {"png": png((8, 8)), "txt": b"a"}),
        ("b", {"png": png((8, 8)), "txt": b" \n"}),
        ("c", {"png": png((8, 8))}),
    ]
    folder = write(tmp_path / "x", samples, captioned=1)
    dataset = ImageDataset(folder)
    assert dataset[0]["caption"] == "a"
    bad = [BadSample(f"{tmp_path}/x/x-0000{shard}.tar", key, "has no caption") for shard, key in enumerate("bc")]
    assert [dataset.attempt(index) for index in (1, 2)] == bad
    assert ImageDataset(folder, require_captions=False)[2]["caption"] == ""


def test_captions_that_are_not_read_cannot_be_wrong(tmp_path):
    captions = [{"txt": b"a caption"}, {"txt": b"caf\xe9"}, {"txt": b" \n"}, {"json": b"{"}, {}]
    files = [(name, {"png": png((8, 8)), **caption}) for name, caption in zip("abcde", captions, strict=True)]
    folder = write(tmp_path / "x", files, captioned=3)
    dataset = ImageDataset(folder, read_captions=False)
    assert [dataset[index]["caption"] for index in range(5)] == [""] * 5
    assert all(isinstance(ImageDataset(folder).attempt(index), BadSample) for index in range(1, 5))


def test_one_of_several_captions_is_drawn_and_the_draw_alone_says_which(tmp_path):
    captions = ["one", "two", "three"]
    files = {"png": png((8, 8)), "txt": b"one", "json": json.dumps({"captions": captions}).encode()}
    folder = write(tmp_path / "x", [("a", files)])
    dataset = ImageDataset(folder, augmentation=Augmentation(caption="random", seed=1))
    assert dataset[0]["caption"] == "one" == ImageDataset(folder).__getitems__([PlannedSample(0, 7)])[0]["caption"]
    draws = [PlannedSample(0, number) for number in range(300)]
    drawn = [sample["caption"] for sample in dataset.__getitems__(draws)]
    assert drawn[::-1] == [sample["caption"] for sample in dataset.__getitems__(draws[::-1])]
    for caption in captions:
        assert abs(drawn.count(caption) / 300 - 1 / 3) < 4 * (2 / 9 / 300) ** 0.5


def test_random_cuts_lie_anywhere_along_the_longer_side_and_other_cuts_in_the_centre(tmp_path):
    ramp = np.broadcast_to(np.arange(40, dtype=np.uint8)[:, None, None], (40, 8, 3))  # (H, W, 3), rows numbered
    folder = write(tmp_path / "x", [("a", {"png": encode_png(Image.fromarray(np.ascontiguousarray(ramp)))})])
    dataset = ImageDataset(folder, image_size=8, augmentation=Augmentation(crop="random"))
    firsts = []
    for sample in dataset.__getitems__([PlannedSample(0, number) for number in range(200)]):
        rows = sample["image"][0, :, 0]
        assert sample["image"].shape == (3, 8, 8) and np.array_equal(rows, rows[0] + np.arange(8))
        firsts.append(int(rows[0]))
    assert {0, 32} <= set(firsts) and abs(np.mean(firsts) - 16) < 4 * 9.5 / 200**0.5
    for centred in (dataset[0], ImageDataset(folder, image_size=8).__getitems__([PlannedSample(0, 3)])[0]):
        assert centred["image"][0, 0, 0] == 16


def test_windows_come_from_anywhere_in_the_image_as_it_is(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (20, 24, 3), np.uint8)
    pixels[..., 0], pixels[..., 1] = np.mgrid[:20, :24]  # every pixel says where it lies
    folder = write(tmp_path / "x", [("a", {"png": encode_png(Image.fromarray(pixels))})])
    dataset = ImageDataset(folder, image_size=16, augmentation=Augmentation(crop="window", seed=2))
    draws = [PlannedSample(0, number) for number in range(1000)]
    found, corners = dataset.batch(draws)["image"].permute(0, 2, 3, 1).numpy(), set()
    for image in found:
        y, x = map(int, image[0, 0, :2])
        assert np.array_equal(image, pixels[y : y + 16, x : x + 16])
        corners.add((y, x))
    assert corners == {(y, x) for y in range(5) for x in range(9)}
    assert np.array_equal(dataset.batch(draws[7:9])["image"].permute(0, 2, 3, 1), found[7:9])  # the draw alone says which
    assert np.array_equal(dataset[0]["image"].transpose(1, 2, 0), pixels[2:18, 4:20])


def test_windows_of_large_jpegs_are_of_their_full_resolution(tmp_path):
    data = encoded(np.random.default_rng(0).integers(0, 256, (256, 320, 3), np.uint8), "JPEG", quality=95)
    folder = write(tmp_path / "x", [("a", {"jpg": data})])
    found = ImageDataset(folder, image_size=32, augmentation=Augmentation(crop="window"))[0]["image"]
    assert np.array_equal(found.transpose(1, 2, 0), decode_pixels(data)[112:144, 144:176])


@pytest.mark.parametrize("shape", [(12, 24), (24, 12), (16, 24), (12, 12), (1, 9)])
def test_an_image_smaller_than_the_window_is_scaled_up_to_it(shape):
    y, x = np.mgrid[: shape[0], : shape[1]]
    pixels = (8 * np.stack([y, x, x + y / 2], -1)).astype(np.uint8)
    found = fit(pixels, 16, window=True)
    assert found.shape == (16, 16, 3) and np.array_equal(found, fit(pixels, 16))
    # as if it were scaled first and cut then, but for what lies beyond the window's edge
    longer = [round(side * 16 / min(shape)) for side in shape]
    scaled = np.asarray(Image.fromarray(pixels).resize(longer[::-1], Image.Resampling.BICUBIC)).astype(int)
    top, left = ((side - 16) // 2 for side in longer)
    if min(shape) > 1:
        assert np.abs(found - scaled[top : top + 16, left : left + 16]).max() <= 3


def test_what_is_scaled_while_it_is_decompressed_looks_the_same(tmp_path):
    """libjpeg-turbo's own scaling and ours on top of it, against ours alone."""
    y, x = np.mgrid[:256, :320] / 40
    pixels = (127.5 + 120 * np.stack([np.sin(x), np.cos(y), np.sin(x + y)], -1)).astype(np.uint8)
    dataset = ImageDataset(write(tmp_path / "x", [("a", {"jpg": encoded(pixels, "JPEG", quality=95)})]), image_size=32)
    found = dataset[0]["image"].transpose(1, 2, 0).astype(int)
    assert found.shape == (32, 32, 3) and np.abs(found - fit(pixels, 32)).max() <= 6


BUCKETS = Buckets((32,), step=8, max_aspect=2.0)
# wide, tall, square, and one that is too small
PHOTOS = [(90, 60), (60, 90), (64, 64), (150, 100), (40, 60), (20, 20), (33, 33), (90, 61)]


def test_a_batch_of_a_bucket_is_what_an_export_encodes(tmp_path):
    folder = write_photographs(tmp_path / "x", PHOTOS)
    dataset = ImageDataset(folder, augmentation=Augmentation("bucket"), buckets=BUCKETS, read_sizes=True)
    exported = CaptionedImages(open_source(folder), None, 8, "first", BUCKETS)
    assert dataset.groups is not None and dataset.groups.tolist().index(-1) == 5
    assert all(dataset.used_sizes.count(size) == 1 for size in {BUCKETS.table[group] for group in dataset.groups if group >= 0})
    seen = 0
    for rows in dataset.batches_of_one_size(range(8), 4):
        batch = dataset.batch([PlannedSample(row, 0) for row in rows])
        assert tuple(batch["image"].shape[2:]) == BUCKETS.table[dataset.groups[rows[0]]]
        assert batch["image"].nbytes == dataset.batch_bytes(rows)
        for place, row in enumerate(rows):
            assert np.array_equal(batch["image"][place], exported[row]["image"])
            for name in ("original_size", "crop"):
                assert batch[name][place].tolist() == [*exported[row][name]]
        seen += len(rows)
    assert seen == 7
    assert "too small for every bucket" in str(dataset.attempt(5))
    for crop in ("random", "window"):  # what the crop says is what the image shows
        batch = ImageDataset(folder, 16, Augmentation(crop), read_sizes=True).batch([PlannedSample(row, 0) for row in range(8)])
        for row, (image, box) in enumerate(zip(batch["image"], batch["crop"].tolist(), strict=True)):
            whole = ImageDataset(folder)[row]["image"].transpose(1, 2, 0)
            assert np.array_equal(image.permute(1, 2, 0), resize(whole, tuple(box), (16, 16)))


def test_one_square_bucket_crops_as_the_centre_does(tmp_path):
    """JPEGs large enough to be decoded at a part of their size; flips and captions are drawn alike."""
    folder, random = tmp_path / "x", np.random.default_rng(0)
    folder.mkdir()
    sizes = [(90, 60), (260, 300), (64, 64), (513, 700)]
    noise = [encoded(random.integers(0, 256, (height, width, 3), np.uint8), "JPEG") for width, height in sizes]
    write_tar(folder / "x.tar", [member for n, jpg in enumerate(noise) for member in ((f"{n}.jpg", jpg), (f"{n}.txt", b"x"))])
    index_here(folder)
    bucket = ImageDataset(
        folder,
        augmentation=Augmentation("bucket", flip=0.5),
        buckets=Buckets((32,), step=32, max_aspect=1.0),
        read_sizes=True,
    )
    centre = ImageDataset(folder, 32, Augmentation("centre", flip=0.5), read_sizes=True)
    draws = [PlannedSample(row, number) for number in range(3) for row in range(4)]
    assert bucket.groups is not None and bucket.groups.tolist() == [0] * 4 and same(bucket.batch(draws), centre.batch(draws))


def test_what_cannot_be_used_is_replaced_from_its_own_bucket(tmp_path):
    folder = write_photographs(tmp_path / "x", [(90, 60), (60, 90), (90, 60), (60, 90), (90, 60)])
    path = folder / "x-00000.tar"
    data = bytearray(path.read_bytes())
    offset, size = ShardReader(path).spans(2)["png"]
    data[offset + 40 : offset + size] = bytes(size - 40)  # the pixels; its header still has the size
    path.write_bytes(data)
    dataset = ImageDataset(folder, augmentation=Augmentation("bucket"), buckets=BUCKETS)
    batch = dataset.batch([0, 2])
    assert batch["key"] == ["00", "04"] and [len(bad) for bad in batch["bad"]] == [0, 1]
