"""Latents of several sizes: each image in its bucket, in the order of the table, and the manifest says which are where."""

import os
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ldm.cli import main
from ldm.data.buckets import Buckets, crop_box
from ldm.data.check import check_folder, index_here
from ldm.data.image_dataset import ImageDataset
from ldm.data.latent_dataset import LatentDataset
from ldm.data.latent_schema import common_info, latent_info, sample_shapes
from ldm.data.manifest import IMAGE_SHARDS, LATENT_SHARDS, Manifest
from ldm.data.quarantine import QUARANTINE_NAME, read_quarantine
from ldm.data.sources import open_source
from ldm.data.writer import ShardWriter
from ldm.errors import LdmError, UsageError
from ldm.latents.check import compare
from ldm.latents.decode import decode_latent_shards
from ldm.latents.export import export_latents
from ldm.latents.show import show
from ldm.models.autoencoder import encode, load_autoencoder, pixels_to_images
from tests.samples import contents, encoded

BUCKETS = Buckets((16, 32), 8, 2.0, max_upscale=1.25)
# (height, width): of both tiers, one to be enlarged, one too small, one far too wide
SHAPES = ((32, 32), (60, 33), (16, 18), (31, 47), (13, 16), (5, 8), (90, 20), (28, 30))
SMALL, ENLARGED = 5, {4, 6, 7}
BROKEN = 32  # would be larger than its bucket


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    folder, rng = tmp_path_factory.mktemp("shapes"), np.random.default_rng(0)
    with ShardWriter(folder, "x", samples_per_shard=15) as writer:
        for number in range(40):
            height, width = SHAPES[number % len(SHAPES)]
            image = Image.fromarray(rng.integers(0, 256, (height, width, 3), np.uint8))
            format = ("PNG", "JPEG")[number % 2]
            data = b"no image" if number == BROKEN else encoded(image, format)
            writer.write(f"{number:03d}", {format.lower(): data, "txt": b"a caption"})
    Manifest(IMAGE_SHARDS, tuple(writer.entries), {"captioned": 40}).save(folder)
    return folder


@pytest.fixture(scope="module")
def export(autoencoder_once, tiny_text_encoder):
    how = {"buckets": BUCKETS, "max_bad_share": 0.2, "batch_size": 3}
    return lambda *a, **b: export_latents(autoencoder_once, *a, text_encoder=tiny_text_encoder, **how | b)


@pytest.fixture(scope="module")
def folder(export, shards, tmp_path_factory):
    folder = tmp_path_factory.mktemp("bucketed") / "latents"
    export(shards, folder, flip=True)
    return folder


def stored(folder):
    """All that the shards hold: (shard, key, mean, crop), in order."""
    dataset = LatentDataset(folder)
    for number, entry in enumerate(dataset.sources[0].manifest.shards):
        shard = dataset.open_shard(folder / entry.name, entry)
        for chunk in range(len(shard.spans)):
            tensors = shard.tensors(chunk)
            yield from zip(
                [number] * len(tensors["mean"]),
                shard.metadata(chunk)["keys"],
                tensors["mean"][:],
                tensors["crop"][:],
                strict=True,
            )


def test_each_image_is_once_in_its_bucket_and_as_the_loader_crops_it(folder, shards, autoencoder):
    """Conservation, and the same pixels as those of a data set that fits images by the same buckets."""
    images, network = ImageDataset(shards, buckets=BUCKETS), load_autoencoder(autoencoder)
    keys = []
    for shard, key, mean, crop in stored(folder):
        number = int(key)
        height, width = SHAPES[number % len(SHAPES)]
        size = BUCKETS.size_for(height, width)
        pixels = images[number]["image"]
        assert pixels.shape[1:] == size and shard == number // 15 and crop.tolist() == [*crop_box(height, width, size)]
        with torch.no_grad():
            expected = encode(network, pixels_to_images(torch.from_numpy(pixels.copy())[None])).mean[0]
        np.testing.assert_allclose(mean, expected, rtol=1e-2, atol=1e-2)
        keys.append(number)
    small = [number for number in range(40) if number % len(SHAPES) == SMALL]
    assert sorted([*keys, *small, BROKEN]) == [*range(40)]
    manifest = Manifest.load(folder, LATENT_SHARDS)
    assert manifest.extra["quarantined"] - 1 == manifest.extra["too_small"] == len(small)
    assert manifest.extra["enlarged"] == sum(number % len(SHAPES) in ENLARGED for number in range(40))
    bad, _ = read_quarantine(folder / QUARANTINE_NAME)
    assert {int(sample.key) for sample in bad} == {*small, BROKEN}
    assert {sample.reason for sample in bad if int(sample.key) != BROKEN} == {
        "is 8 x 5 pixels, too small for every bucket: that takes a max_upscale of 3, it is 1.25"
    }


def test_samples_are_ordered_by_size_and_the_manifest_says_where(folder):
    source = open_source(folder, LATENT_SHARDS)
    info, order = latent_info(source), [(height // 2, width // 2) for height, width in BUCKETS.table]
    found = [(shard, mean.shape, int(key)) for shard, key, mean, _ in stored(folder)]
    assert found == sorted(found, key=lambda one: (one[0], order.index(one[1][1:]), one[2]))
    numbers = sample_shapes([source])
    assert numbers is not None and numbers.dtype == np.int32
    assert [info.latent_shapes[number] for number in numbers] == [shape for _, shape, _ in found]
    assert info.buckets == BUCKETS and info.resolution is None and info.latent_shape is None
    for name, runs in info.shard_shapes.items():  # one run for each size
        assert len({place for place, _ in runs}) == len(runs) and (folder / name).is_file()


def test_interruptions_and_threads_change_no_byte(export, folder, shards, tmp_path):
    for samples in (3, 33):

        def stop(done, total, samples=samples):
            if done >= samples:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            export(shards, tmp_path / "out", flip=True, threads=1, on_progress=stop)
    for name, buckets in (("buckets", None), ("buckets", replace(BUCKETS, max_upscale=1.0))):
        with pytest.raises(UsageError, match=f"unfinished export with other settings .{name}: "):
            export(shards, tmp_path / "out", flip=True, buckets=buckets)
    export(shards, tmp_path / "out", flip=True, threads=1)
    ours, theirs = contents(tmp_path / "out"), contents(folder)
    assert {name for name in ours if ours[name] != theirs[name]} <= {
        Path("manifest.json")
    }  # which has the way to the image shards
    assert Manifest.load(tmp_path / "out").extra["fingerprint"] == Manifest.load(folder).extra["fingerprint"]


def test_sizes_that_the_image_shards_tell_change_no_byte(export, folder, shards, tmp_path):
    """And too many small images are refused before any is encoded."""
    shutil.copytree(shards, tmp_path / "sized")
    index_here(tmp_path / "sized")
    plain = export(tmp_path / "sized", tmp_path / "out", flip=True).extra
    strict = export(tmp_path / "sized", tmp_path / "strict", buckets=replace(BUCKETS, max_crop=0.1), max_bad_share=1).extra
    bad, _ = read_quarantine(tmp_path / "strict" / QUARANTINE_NAME)
    long = sum("cropped too much in every bucket: that takes a max_crop of " in sample.reason for sample in bad)
    assert 0 < long == strict["too_long"] == strict["quarantined"] - 1 - strict["too_small"]
    assert strict["buckets"]["max_crop"] == 0.1 and not {"max_crop", "too_long"} & {*plain["buckets"], *plain}
    ours, theirs = contents(tmp_path / "out"), contents(folder)
    assert {name for name in ours if ours[name] != theirs[name]} == {Path("manifest.json"), Path(QUARANTINE_NAME)}
    with pytest.raises(UsageError, match=r"5 of 40 images in .*sized fit no bucket.* max_bad_share to 0.13 to leave them out"):
        export(tmp_path / "sized", tmp_path / "new", max_bad_share=0.1)
    assert not (tmp_path / "new").exists()


def test_one_square_bucket_is_the_image_size(export, shards, tmp_path):
    square = Buckets((32,), 32, 1.0, max_upscale=100)
    export(shards, tmp_path / "buckets", buckets=square)
    export(shards, tmp_path / "square", buckets=None, image_size=32)
    buckets, plain = contents(tmp_path / "buckets"), contents(tmp_path / "square")
    # the batch in which the broken image is not has other rounding errors
    assert {name for name in plain if plain[name] != buckets[name]} == {Path("manifest.json"), Path("latents-00002.tar")}
    for one, other in zip(stored(tmp_path / "buckets"), stored(tmp_path / "square"), strict=True):
        assert one[:2] == other[:2] and one[3].tolist() == other[3].tolist()
        np.testing.assert_allclose(one[2], other[2], rtol=1e-2, atol=2e-3)
    both = [open_source(tmp_path / name, LATENT_SHARDS) for name in ("buckets", "square")]
    assert sample_shapes(both) is sample_shapes(both[:1]) is None
    assert not {"buckets", "shard_shapes", "enlarged", "too_small"} & both[1].manifest.extra.keys()


def test_several_sets_of_several_sizes_are_one(export, folder, shards, tmp_path):
    """Groups count through all sources; the statistics are those over all values."""
    export(shards, tmp_path / "tall", flip=True, buckets=Buckets((24,), 8, 2.0, 8.0))
    sources = [open_source(path, LATENT_SHARDS) for path in (folder, tmp_path / "tall")]
    info, numbers = common_info(sources), sample_shapes(sources)
    means = [mean for path in (folder, tmp_path / "tall") for _, _, mean, _ in stored(path)]
    assert numbers is not None and [info.latent_shapes[number] for number in numbers] == [mean.shape for mean in means]
    every = np.concatenate([mean.reshape(4, -1) for mean in means], 1).astype(np.float64)
    np.testing.assert_allclose(info.latents_mean, every.mean(1), atol=1e-6)


def test_the_set_is_checked_compared_decoded_and_shown(folder, shards, autoencoder, tmp_path, capsys):
    problems, checked = check_folder(folder, deep=True)
    assert not problems and all(not shard.problems for shard in checked)
    comparison = compare(folder, autoencoder, samples=20)
    assert comparison.compared == 20 and not comparison.problems
    assert decode_latent_shards(folder, tmp_path / "images", autoencoder) == 34
    sizes = {Image.open(path).size[::-1] for path in (tmp_path / "images").glob("*.png")}
    assert sizes == {BUCKETS.size_for(*shape) for number, shape in enumerate(SHAPES) if number != SMALL}
    show(folder, tmp_path / "page.html", autoencoder)
    text = (tmp_path / "page.html").read_text()
    for part in ("Image proportions", "Buckets", "Largest crops", "buckets of 16 and 32 pixels", "of these too small"):
        assert part in text


def test_a_manifest_that_tells_other_sizes_is_found_out(folder, tmp_path):
    source = open_source(folder, LATENT_SHARDS)
    info, extra = latent_info(source), source.manifest.extra
    (tmp_path / "bad").mkdir()
    for path in folder.glob("latents*"):
        os.link(path, tmp_path / "bad" / path.name)
    os.link(folder / "null_text.safetensors", tmp_path / "bad" / "null_text.safetensors")

    def save(runs):
        changed = replace(info, shard_shapes=info.shard_shapes | {"latents-00000.tar": runs})
        replace(source.manifest, extra=extra | changed.as_extra()).save(tmp_path / "bad")

    first = info.shard_shapes["latents-00000.tar"]
    save(first[::-1])
    problems = [problem for shard in check_folder(tmp_path / "bad")[1] for problem in shard.problems]
    assert problems and "is in a chunk of another size than the manifest says" in problems[0].what
    for wrong in (first[1:], ((len(info.latent_shapes), first[0][1]), *first[1:])):
        save(wrong)
        with pytest.raises(LdmError, match=r"does not say which size each sample of latents-00000\.tar has"):
            latent_info(open_source(tmp_path / "bad"))
    # of before: several sizes, and no word of where
    older = {name: value for name, value in extra.items() if name not in ("shard_shapes", "fingerprint")}
    replace(source.manifest, extra=older).save(tmp_path / "bad")
    with pytest.raises(UsageError, match="older manifest does not say which are where; export again"):
        sample_shapes([open_source(tmp_path / "bad")])


def test_what_cannot_be_asked_is_refused_in_one_line(export, shards, autoencoder, tmp_path, capsys):
    with pytest.raises(UsageError, match="image_size and buckets are two ways to fit images; give one"):
        export(shards, tmp_path / "out", image_size=16)
    with pytest.raises(UsageError, match=r"sides of 15, 21 pixels, which the autoencoder's factor \(2\) does not divide"):
        export(shards, tmp_path / "out", buckets=Buckets((15,), 3))
    with pytest.raises(LdmError, match=r"5 of 40 samples fit no bucket, more than 10.00%, .* or raise max_bad_share"):
        export(shards, tmp_path / "out", max_bad_share=0.03)
    base = ["latents", "export", f"--autoencoder={autoencoder}", f"--shards={shards}", f"--out={tmp_path / 'new'}"]
    for more, said in (
        (["--buckets=32", "--image-size=16"], "image_size and buckets are two ways"),
        (["--bucket-step=8"], "describe buckets; give --buckets too"),
        (["--buckets=16,x"], "16,x"),
        (["--buckets=20", "--bucket-step=8"], "hold the side 20, which their step 8 does not divide; give 16"),
    ):
        with pytest.raises(SystemExit):
            main([*base, *more])
        assert said in capsys.readouterr().err
    assert not (tmp_path / "new").exists()
