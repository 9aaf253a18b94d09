"""Images go into the bucket that crops least of them, of the largest tier that they fill."""

from itertools import pairwise

import numpy as np
import pytest
from diffusers.training_utils import generate_aspect_ratio_buckets

from ldm.data.buckets import Buckets, crop_box, cropped_share, enlargement, scaled_side
from ldm.data.decode import DecodeError
from ldm.errors import UsageError

SIZES = np.random.default_rng(0).integers(20, 3000, (400, 2))


@pytest.mark.parametrize("base, step", [(256, 32), (512, 64), (1024, 16), (32, 8)])
def test_up_to_two_to_one_the_table_is_diffusers(base, step):
    assert set(Buckets((base,), step).table) == set(generate_aspect_ratio_buckets(base, step))


def test_a_table_grows_with_the_aspect_ratio_and_holds_the_square():
    assert Buckets((64,), 64, 1.0).table == ((64, 64),)
    tables = [set(Buckets((512,), 32, aspect).table) for aspect in (1, 1.5, 2, 2.5, 4)]
    assert all(a < b for a, b in pairwise(tables))
    wide = Buckets((512, 1024), 32, 4.0)
    assert len(set(wide.table)) == len(wide.table) and {(512, 512), (1024, 1024)} < set(wide.table)
    assert {(width, height) for height, width in wide.table} == set(wide.table)  # as many upright as wide ones
    assert all(side % 32 == 0 for size in wide.table for side in size)


@pytest.mark.parametrize("bases, upscale", [((256,), 1.0), ((256, 512), 1.0), ((64, 256, 1024), 1.5)])
def test_an_images_bucket_is_the_one_of_its_tier_that_crops_least(bases, upscale):
    buckets = Buckets(bases, 32, max_upscale=upscale)
    numbers = buckets.assign(SIZES)
    assert buckets.assign(np.array([[0, 0], [0, 9]])).tolist() == [-1, -1]  # unknown
    assert 0 < (numbers < 0).sum() < len(SIZES)
    for (height, width), number in zip(SIZES.tolist(), numbers.tolist(), strict=True):
        serve = [[s for s in tier if enlargement(height, width, s) <= upscale] for tier in buckets.tiers]
        assert buckets.choose(height, width) == (None if number < 0 else number)
        if number < 0:
            assert not any(serve)
            with pytest.raises(DecodeError, match=f"is {width} x {height} pixels, too small for every bucket"):
                buckets.size_for(height, width)
        else:
            size, best = buckets.table[number], next(filter(None, serve))
            assert size in best
            assert cropped_share(height, width, size) == min(cropped_share(height, width, other) for other in best)


def test_images_that_would_be_cropped_too_much_are_left_out_or_go_to_a_smaller_tier():
    buckets, limited = (Buckets((256, 512), 32, max_crop=limit) for limit in (None, 0.05))
    assert repr(buckets) == "Buckets(bases=(256, 512), step=32, max_aspect=2.0, max_upscale=1.0)"  # by which runs are known
    chosen = []
    for height, width in SIZES.tolist():
        tiers = [[size for size in tier if enlargement(height, width, size) <= 1] for tier in buckets.tiers]
        best = [min((cropped_share(height, width, size), size) for size in tier) for tier in tiers if tier]
        within = [size for share, size in best if share <= 0.05]
        chosen.append(limited.choose(height, width))
        assert chosen[-1] == (buckets.table.index(within[0]) if within else None)
        if best and not within:
            with pytest.raises(
                DecodeError, match=r"cropped too much in every bucket: that takes a max_crop of 0.\d+, it is 0.05"
            ):
                limited.size_for(height, width)
    assert {None} < {*chosen} and buckets.assign(SIZES).tolist() != limited.assign(SIZES).tolist()


def test_a_part_has_the_buckets_proportions_and_one_side_of_the_image():
    for height, width in SIZES.tolist():
        for size in Buckets((256,), 32, 3.0).table:
            top, left, high, wide = crop_box(height, width, size)
            assert (high == height) or (wide == width)
            assert 0 <= 2 * top <= height - high <= 2 * top + 1 and 0 <= 2 * left <= width - wide <= 2 * left + 1
            assert abs(high * size[1] - wide * size[0]) <= max(size)  # half a pixel
            scale = enlargement(height, width, size)
            assert scaled_side(height, width, size) == pytest.approx(np.ceil(min(height, width) * scale - 1e-9))
        assert crop_box(height, width, (8, 8))[2:] == (min(height, width),) * 2


def test_what_crops_nothing_or_is_scaled_by_one_stays_whole():
    buckets = Buckets((256,), 32)
    for size in buckets.table:
        assert buckets.size_for(*size) == size and crop_box(*size, size) == (0, 0, *size) and cropped_share(*size, size) == 0


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"bases": ()}, "without a side"),
        ({"bases": (250,)}, r"hold the side 250, which their step 32 does not divide; give 256"),
        ({"bases": (0,)}, "hold the side 0; give 1 to 8192"),
        ({"bases": (2**14,)}, "hold the side 16384; give 1 to 8192"),
        ({"step": 0}, "step of buckets is 0; give 1 or more"),
        ({"max_aspect": 0.5}, "aspect ratio of buckets is 0.5; give 1 to 16"),
        ({"max_aspect": float("nan")}, "aspect ratio of buckets is nan; give 1 to 16"),
        ({"max_upscale": 0.9}, "enlarged 0.9 times; give 1 to 1024"),
        ({"max_upscale": float("inf")}, "enlarged inf times; give 1 to 1024"),
    ],
)
def test_settings_that_make_no_table_are_refused(settings, message):
    with pytest.raises(UsageError, match=message):
        Buckets(**{"bases": (256,)} | settings)


def test_sides_that_a_factor_does_not_divide_are_named():
    Buckets((256,), 32).require_multiples(16, "the patch")
    with pytest.raises(UsageError, match=r"sides of 176, 208, 336, 368 pixels, which the factor \(32\) does not divide"):
        Buckets((256,), 16).require_multiples(32, "the factor")
