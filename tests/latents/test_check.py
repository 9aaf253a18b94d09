"""Stored latents agree with the autoencoder and the images, and what does not agree is reported."""

import shutil
from dataclasses import replace

import numpy as np
import pytest
from safetensors.numpy import load, save

from ldm.data.latent_dataset import LatentDataset
from ldm.data.latent_schema import LatentShard, latent_info
from ldm.data.manifest import Manifest
from ldm.data.shards import ShardReader
from ldm.data.sources import open_source
from ldm.data.writer import ShardWriter, write_images
from ldm.errors import UsageError
from ldm.latents.check import compare
from ldm.latents.export import export_latents
from ldm.latents.samples import sample_latents
from ldm.shapes.scenes import generate


def rewrite(folder, change, words=lambda data: data):
    """Let ``change`` alter the tensors of every chunk, ``words`` its keys and captions, and the manifest say so."""
    manifest, entries = Manifest.load(folder), []
    for number, entry in enumerate(manifest.shards):
        with ShardReader(folder / entry.name) as reader:
            chunks = [(reader.key(index), reader[index].files) for index in range(len(reader))]
        with ShardWriter(folder, "latents", samples_per_shard=None, first_index=number) as writer:
            for key, files in chunks:
                tensors = save(change(load(files["safetensors"])))
                writer.write(key, {"safetensors": tensors, "json": words(files["json"])})
        entries.append(replace(writer.entries[0], samples=entry.samples))
    replace(manifest, shards=tuple(entries)).save(folder)


def test_a_sample_is_spread_evenly_over_all_shards(exported):
    source = open_source(exported)
    everything = [(stored.shard, stored.key) for stored in sample_latents(source, 99)]
    dataset = LatentDataset(exported)
    assert len(everything) == 10 and [key for _, key in everything] == [f"{n:08d}" for n in range(10)]
    for row, stored in enumerate(sample_latents(source, 10)):
        assert all(np.array_equal(stored.latents[name], dataset[row][name]) for name in ("mean", "std"))
    for count in range(1, 11):
        rows = [everything.index((stored.shard, stored.key)) for stored in sample_latents(source, count)]
        assert len(rows) == count and set(np.diff(rows)) <= {10 // count, 10 // count + 1}
        assert 0 <= rows[0] - (9 - rows[-1]) <= 1  # as far from one end as from the other


def test_what_was_exported_agrees(exported, autoencoder, image_shards):
    steps = []
    found = compare(exported, autoencoder, on_progress=lambda *step: steps.append(step))
    assert found.problems == () and found.note == ""
    assert (found.decoded, found.compared, found.skipped) == (10, 10, 0) and steps == [(n, 10) for n in range(1, 11)]
    for view in ("images", "mirrored"):
        measured = found.measured[view]
        assert 0 < measured["mean, average error"] <= measured["mean, largest error"] < 2**-9  # of float16, values below 4
        assert measured["std, largest error"] < 2**-9
        stored, again = (measured[f"PSNR of {which} (dB)"] for which in ("stored latents", "re-encoded images"))
        assert stored == pytest.approx(again, abs=0.1)


def test_the_errors_are_those_of_one_pass_over_all(exported, autoencoder):
    """Errors of zeros are the latents themselves."""
    info = latent_info(open_source(exported))
    means = np.stack([stored.latents["mean"] for stored in sample_latents(open_source(exported), 10)])
    rewrite(exported, lambda tensors: tensors | {"mean": np.zeros_like(tensors["mean"])})
    measured = compare(exported, autoencoder).measured["images"]
    std = np.array(info.latents_std)[:, None, None]
    assert measured["mean, largest error"] == pytest.approx(np.abs(means).max(), rel=1e-3)
    assert measured["mean, average error"] == pytest.approx(np.abs(means).mean(), rel=1e-3)
    in_std = "mean, average error (standard deviations of the set)"
    assert measured[in_std] == pytest.approx((np.abs(means) / std).mean(), rel=1e-3)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_what_dtype_and_precision_round_off_is_no_error(autoencoder, tiny_text_encoder, image_shards, tmp_path, precision):
    settings = {"dtype": "float32", "precision": precision, "mode": True}
    export_latents(autoencoder, image_shards, tmp_path / "out", tiny_text_encoder, **settings)
    found = compare(tmp_path / "out", autoencoder)
    assert found.problems == () and found.compared == 10 and found.measured.keys() == {"images"}
    error = found.measured["images"]["mean, largest error"]
    assert error < 1e-4 if precision == "fp32" else error > 1e-4
    assert not any(name.startswith("std") for name in found.measured["images"])


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("mean", lambda mean, info: mean[np.roll(np.arange(len(mean)), 1)]),  # of another image
        ("mean", lambda mean, info: (mean - centre(info.latents_mean)) / centre(info.latents_std)),
        ("mean", lambda mean, info: mean * 0.18215),
        ("mean_flip", lambda mean, info: mean[..., ::-1]),  # mirrored is not encoded mirrored
        ("std", lambda std, info: 2 * np.log(std)),
        ("std_flip", lambda std, info: 1.2 * std),
    ],
)
def test_other_images_and_other_normalisations_are_told(exported, autoencoder, precision, name, change):
    info = latent_info(open_source(exported))
    manifest = Manifest.load(exported)
    replace(manifest, extra=manifest.extra | {"precision": precision}).save(exported)
    rewrite(exported, lambda tensors: tensors | {name: np.ascontiguousarray(change(tensors[name], info), np.float16)})
    found = compare(exported, autoencoder)
    (problem,) = found.problems
    assert problem.where.startswith("latents-0000") and f"stores a {name} that is on average" in problem.what
    assert f"{precision} explains" in problem.what and "export again" in problem.fix
    assert problem.samples >= 6


def centre(values):
    return np.array(values)[:, None, None]


def test_other_image_shards_are_named_with_the_right_ones(exported, autoencoder, image_shards, tmp_path):
    write_images(tmp_path / "others", "shapes", generate(10, 32, seed=1), samples_per_shard=4)
    right, other = Manifest.load(image_shards).hash[:12], Manifest.load(tmp_path / "others").hash[:12]
    with pytest.raises(UsageError, match=rf"of image shards {right}, but {tmp_path / 'others'} is {other}; give the shards"):
        compare(exported, autoencoder, tmp_path / "others")
    with pytest.raises(UsageError, match=r"nowhere is not a folder"):
        compare(exported, autoencoder, tmp_path / "nowhere")


@pytest.mark.parametrize("place", ["", "/no/where", "https://no.where/shards"])
def test_without_images_latents_are_decoded_at_least(exported, autoencoder, image_shards, place):
    manifest = Manifest.load(exported)
    replace(manifest, extra=manifest.extra | {"source_shards": place}).save(exported)
    found = compare(exported, autoencoder, samples=5)
    assert (found.decoded, found.compared, found.measured, found.problems) == (5, 0, {}, ())
    assert f"({place or 'unknown'}) are not available; give them" in found.note
    assert compare(exported, autoencoder, image_shards, samples=5).compared == 5


def test_a_latent_that_decodes_to_nothing_is_told(exported, autoencoder):
    def broken(tensors):
        mean = tensors["mean"].copy()
        mean[0, 0, 0, 0] = np.nan
        return tensors | {"mean": mean}

    rewrite(exported, broken)
    (problem,) = compare(exported, autoencoder).problems
    assert problem.what == "decodes to values that are not finite" and problem.where.endswith("and 2 others")


def test_a_key_that_the_image_shard_does_not_have_is_told(exported, autoencoder, image_shards):
    rewrite(exported, lambda tensors: tensors, lambda words: words.replace(b"00000002", b"00000007"))  # of another shard
    found = compare(exported, autoencoder)
    assert [(problem.where, problem.what, problem.samples) for problem in found.problems] == [
        ("latents-00000.tar: 00000007", f"is not among the images of {image_shards}", 1)
    ]
    assert found.compared == 9


def test_images_of_several_sizes_and_windows_of_larger_ones(autoencoder, tiny_text_encoder, tmp_path):
    rng = np.random.default_rng(0)
    sizes = [(16, 24), (33, 16), (21, 40), (16, 24)]  # (height, width), of which the factor leaves even numbers
    items = [(f"{n}", rng.integers(0, 255, (*size, 3), dtype=np.uint8), "noise") for n, size in enumerate(sizes)]
    write_images(tmp_path / "images", "x", items, samples_per_shard=3)
    for name, size in (("as-they-are", None), ("fitted", 16)):
        export_latents(autoencoder, tmp_path / "images", tmp_path / name, tiny_text_encoder, image_size=size)
        found = compare(tmp_path / name, autoencoder)
        assert found.compared == 4 and found.problems == ()
    shapes = {LatentShard(path, 3).tensors(0)["mean"].shape[1:] for path in (tmp_path / "fitted").glob("*-00000.tar")}
    assert shapes == {(4, 8, 8)}


def test_an_image_that_can_no_longer_be_decoded_is_skipped_and_counted(exported, autoencoder, image_shards, tmp_path):
    shutil.copytree(image_shards, tmp_path / "images")
    path = next(iter(sorted((tmp_path / "images").glob("*.tar"))))
    data = bytearray(path.read_bytes())
    offset, _ = ShardReader(path).spans(1)["png"]
    data[offset] ^= 1  # the PNG signature
    path.write_bytes(data)
    found = compare(exported, autoencoder, tmp_path / "images")
    assert (found.decoded, found.compared, found.skipped, found.problems) == (10, 9, 1, ())


def test_no_samples_are_refused(exported, autoencoder):
    with pytest.raises(UsageError, match=r"^samples is 0; give 1 or more"):
        compare(exported, autoencoder, samples=0)
