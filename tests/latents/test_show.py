"""The page says what is true of the set, and any set makes a page."""

import base64
import io
import os
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from ldm.data.latent_schema import Chunk, TextInfo, latent_info
from ldm.data.manifest import LATENT_SHARDS, Manifest
from ldm.data.moments import Moments
from ldm.data.sources import open_source
from ldm.data.writer import ShardWriter, write_images
from ldm.errors import LdmError, UsageError
from ldm.latents.samples import StoredLatent, sample_latents
from ldm.latents.show import CELL, COLUMNS, Counts, Space, Vectors, show
from ldm.models.autoencoder import (
    decode_latents,
    images_to_pil,
    load_autoencoder,
    set_latent_statistics,
)
from ldm.shapes.scenes import generate

LENGTHS = (2, 5, 3)  # tokens of captions, over and over


def write(make_info, folder, channels, sizes, mode=False, encoders=1, flips=False):
    """Latents of so many images of each size ((h, w) -> images), with one or two captions each, without an autoencoder."""
    rng, moments, number = np.random.default_rng(0), [], 0
    folder.mkdir()
    with ShardWriter(folder, "latents", None) as writer:
        for (height, width), count in sizes.items():
            names = ["mean"] + ([] if mode else ["std"])
            names += [f"{name}_flip" for name in names] if flips else []
            captions = [[f"words {n}", "<b>more</b> & more"][: 1 + n % 2] for n in range(count)]
            lengths = [LENGTHS[n % 3] for n in range(sum(map(len, captions)))]
            chunk = Chunk(
                keys=[f"{number + n:04d}" for n in range(count)],
                captions=captions,
                latents={name: rng.uniform(0.1, 2, (count, channels, height, width)).astype(np.float16) for name in names},
                texts=[[np.ones((length, 6), np.float16) for length in lengths] for _ in range(encoders)],
                original_size=np.ones((count, 2)),
                crop=np.array([[0, 0, 1, 1]] * count),
            )
            writer.write(f"{number:08d}", chunk.members())
            moments.append(chunk.moments())
            number += count
    total = Moments.merge(moments)
    info = make_info(
        text_encoders=tuple(TextInfo(f"encoder<{n}>", "t" * 64, 6, 5, 7 * n) for n in range(encoders)),
        latent_shapes=tuple((channels, *size) for size in sizes),
        posterior="mode" if mode else "gaussian",
        flips=flips,
        latents_mean=tuple(total.mean.tolist()),
        latents_std=tuple(total.std.tolist()),
    )
    Manifest(LATENT_SHARDS, (replace(writer.entries[0], samples=number),), info.as_extra()).save(folder)
    return folder


def page(folder, **arguments):
    show(folder, folder / "report.html", **arguments)
    return (folder / "report.html").read_text()


def make_images(text):
    data = re.findall(r"data:image/png;base64,([^\"]+)", text)
    return [np.asarray(Image.open(io.BytesIO(base64.b64decode(one)))) for one in data]


def cells(grid, rows):
    """The images of 32 pixels on a grid of :func:`ldm.reporting.grids.paired_grid`, where they are thrice as large."""
    step = CELL + CELL // 12
    tops = range(CELL // 12, grid.shape[0] - CELL, step)
    lefts = range(grid.shape[1] - COLUMNS * step, grid.shape[1], step)
    found = np.array([[grid[y : y + CELL : 3, x : x + CELL : 3] for x in lefts] for y in tops])
    assert len(found) == rows
    return found


@pytest.mark.parametrize(
    ("channels", "sizes", "options"),
    [
        (1, {(8, 8): 1}, {}),
        (2, {(1, 1): 3}, {"encoders": 0}),
        (3, {(4, 6): 5, (6, 4): 2}, {"mode": True, "flips": True}),
        (4, {(4, 4): 30}, {"encoders": 2, "flips": True}),
        (17, {(2, 3): 2}, {"mode": True}),
        (128, {(4, 4): 3}, {}),
    ],
)
def test_any_set_makes_a_page_of_its_own(make_info, tmp_path, channels, sizes, options):
    text = page(write(make_info, tmp_path / "latents", channels, sizes, **options))
    assert "<script" not in text and "<b>more" not in text and not re.search(r"\bnan\b|\binf\b", text)
    assert len(re.findall(r"<figcaption>channel \d+: ", text)) == channels
    assert len(re.findall(r"<figcaption>encoder&lt;", text)) == options.get("encoders", 1)
    assert ("Sizes" in text) == (len(sizes) > 1)
    assert "Give the autoencoder" in text and "decoded, mirrored" not in text
    assert text.count("<img") == 2


def test_what_is_counted_is_the_whole_set(make_info, tmp_path):
    folder = write(make_info, tmp_path / "latents", 4, {(4, 6): 5, (6, 4): 8}, encoders=2)
    source = open_source(folder)
    counts = Counts.of(source, latent_info(source))
    assert counts.shapes == {(4, 6, 4): 8, (4, 4, 6): 5} and [*counts.shapes] == [(4, 6, 4), (4, 4, 6)]
    # 5 + 2 and 8 + 4 captions
    expected = np.bincount([LENGTHS[n % 3] for size in (7, 12) for n in range(size)])
    assert all(np.array_equal(lengths, expected) for lengths in counts.lengths)
    text = page(folder, samples=1)
    assert "encoder&lt;1&gt;: 19 captions" in text and "at most 5; 7 truncated to 5" in text


def test_a_broken_shard_is_named(make_info, tmp_path):
    folder = write(make_info, tmp_path / "latents", 4, {(4, 4): 3})
    manifest = Manifest.load(folder)
    replace(manifest, shards=(replace(manifest.shards[0], samples=4),)).save(folder)
    with pytest.raises(LdmError, match=r"latents-00000.tar holds 3 latents, its manifest says 4; export again"):
        page(folder)


def test_values_as_training_sees_them_are_normal_where_the_statistics_are_right(make_info, tmp_path):
    folder = write(make_info, tmp_path / "latents", 4, {(16, 16): 40})
    info = latent_info(open_source(folder))
    vectors = Vectors(info.latents_mean, info.latents_std)
    for stored in sample_latents(open_source(folder), 40):
        vectors.add(stored)
    values = vectors.sample()
    assert values.shape == (40 * 256, 4)
    np.testing.assert_allclose(values.mean(0), 0, atol=5 / 100)
    np.testing.assert_allclose(values.std(0), 1, atol=5 / 100)


def test_principal_axes_are_those_along_which_the_values_were_spread():
    rng = np.random.default_rng(0)
    axes = np.linalg.qr(rng.normal(size=(8, 8)))[0]  # columns
    deviations = np.array([3, 2, 1, 0.1, 0.1, 0.1, 0.1, 0.1])
    values = (rng.normal(size=(100, 64, 8)) * deviations) @ axes.T
    latents = values.transpose(0, 2, 1).reshape(100, 8, 8, 8).astype(np.float32)
    vectors = Vectors(np.zeros(8), np.ones(8))
    for latent in latents:
        vectors.add(StoredLatent("", "", [], {"mean": latent}))
    space = Space.of(vectors)
    np.testing.assert_allclose(np.abs((space.axes * axes[:, :3]).sum(0)), 1, atol=1e-3)
    np.testing.assert_allclose(space.deviations, deviations[:3], rtol=0.03)
    np.testing.assert_allclose(space.shares, deviations[:3] ** 2 / (deviations**2).sum(), rtol=0.06)
    # nothing is mean grey, and along the first axis red alone changes
    flat = np.asarray(space.colours(np.zeros((8, 1, 1), np.float32)))
    red = np.asarray(space.colours((3 * space.axes[:, :1, None]).astype(np.float32)))
    np.testing.assert_allclose(flat, np.full((1, 1, 3), 127.5), atol=2)
    np.testing.assert_allclose(red, [[[178.5, 127.5, 127.5]]], atol=4)


def test_images_stand_beside_what_their_latents_decode_to(exported, autoencoder):
    text = page(exported, autoencoder_path=autoencoder)
    assert "not available" not in text and "Give the autoencoder" not in text
    grid = cells(make_images(text)[0], rows=8)
    network, info = load_autoencoder(autoencoder), latent_info(open_source(exported))
    set_latent_statistics(network, list(info.latents_mean), list(info.latents_std))
    center, scale = (np.array(values, np.float32)[:, None, None] for values in (info.latents_mean, info.latents_std))
    for number, (stored, sample) in enumerate(
        zip(sample_latents(open_source(exported), 10), generate(10, 32, seed=0), strict=True)
    ):
        row, column = divmod(number, COLUMNS)
        assert np.array_equal(grid[4 * row, column], np.asarray(sample.image))
        # by another way: normalised, and decoded as the pipeline does
        for below, name in ((1, "mean"), (2, "mean_flip")):
            normalised = torch.from_numpy((stored.latents[name] - center) / scale)[None]
            with torch.no_grad():
                decoded = np.asarray(images_to_pil(decode_latents(network, normalised))[0])
            np.testing.assert_allclose(grid[4 * row + below, column], decoded, atol=1)


def test_without_the_images_latents_are_decoded_all_the_same(exported, autoencoder, image_shards):
    whole = cells(make_images(page(exported, autoencoder_path=autoencoder))[0], rows=8)
    manifest = Manifest.load(exported)
    replace(manifest, extra=manifest.extra | {"source_shards": "/no/where"}).save(exported)
    text = page(exported, autoencoder_path=autoencoder)
    assert "The image shards (/no/where) are not available; give them" in text
    assert np.array_equal(cells(make_images(text)[0], rows=6), np.delete(whole, (0, 4), axis=0))
    text = page(exported, autoencoder_path=autoencoder, shards=image_shards)
    assert np.array_equal(cells(make_images(text)[0], rows=8), whole)


def test_what_does_not_belong_together_is_refused(exported, autoencoder, tmp_path):
    write_images(tmp_path / "others", "x", generate(10, 32, seed=1), samples_per_shard=4)
    with pytest.raises(UsageError, match="holds latents of image shards"):
        page(exported, autoencoder_path=autoencoder, shards=tmp_path / "others")
    manifest = Manifest.load(exported)
    replace(manifest, extra=manifest.extra | {"autoencoder": "a" * 64, "fingerprint": None}).save(exported)
    with pytest.raises(UsageError, match="holds latents of autoencoder aaaaaaaaaaaa, but"):
        page(exported, autoencoder_path=autoencoder)
    with pytest.raises(UsageError, match=r"^samples is 0; give 1 or more"):
        page(exported, samples=0)
    with pytest.raises(UsageError, match=r" is a folder; give a file, for example .*report.html"):
        show(exported, tmp_path)
    os.mkfifo(tmp_path / "pipe.html")
    with pytest.raises(UsageError, match=r"pipe.html is a named pipe, which is not overwritten"):
        show(exported, tmp_path / "pipe.html")


def test_progress_counts_latents(make_info, tmp_path):
    steps = []
    page(write(make_info, tmp_path / "latents", 4, {(4, 4): 9}), samples=5, on_progress=lambda *step: steps.append(step))
    assert steps == [(n, 5) for n in range(1, 6)]
