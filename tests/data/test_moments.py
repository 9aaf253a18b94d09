"""Statistics gathered in parts are those of one float64 pass, however the parts are cut and grouped."""

from functools import partial

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ldm.data.moments import Moments

assert_allclose = partial(np.testing.assert_allclose, rtol=1e-12, atol=1e-12)


def latents(count, seed, dtype=np.float64, far=0.0):
    """Means and deviations (n, 3, 2, 5), channels of different location and scale."""
    rng = np.random.default_rng(seed)
    scale = np.array([0.1, 1, 20])[:, None, None]
    mean = rng.normal(size=(count, 3, 2, 5)) * scale + scale + far
    return mean.astype(dtype), rng.uniform(0.01, 2, size=mean.shape).astype(dtype)


def test_of_values_themselves_they_are_numpys_mean_and_deviation():
    mean, _ = latents(7, 0)
    found = Moments.of(mean)
    assert found.count == 7 * 10
    assert_allclose(found.mean, mean.mean((0, 2, 3)))
    assert_allclose(found.std, mean.std((0, 2, 3)))


def test_of_posteriors_they_are_those_of_what_is_drawn_from_them():
    """Two values at mean ± std have its mean and its deviation: as good as all that could be drawn."""
    mean, std = latents(7, 1)
    found, drawn = Moments.of(mean, std), np.concatenate([mean - std, mean + std])
    assert_allclose(found.mean, drawn.mean((0, 2, 3)))
    assert_allclose(found.std, drawn.std((0, 2, 3)))


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_stored_floats_are_added_up_in_float64(dtype):
    mean, std = latents(50, 2, dtype)
    found, exact = Moments.of(mean, std), Moments.of(mean.astype(np.float64), std.astype(np.float64))
    assert found.mean.dtype == found.squares.dtype == np.float64
    assert np.array_equal(found.mean, exact.mean) and np.array_equal(found.squares, exact.squares)


@settings(deadline=None, max_examples=60)
@given(st.lists(st.integers(1, 9), min_size=1, max_size=8), st.integers(0, 999), st.randoms(use_true_random=False))
def test_any_grouping_is_one_pass(sizes, seed, random):
    mean, std = latents(sum(sizes), seed)
    whole = Moments.of(mean, std)
    cuts = np.cumsum(sizes)[:-1]
    parts = [Moments.of(*part) for part in zip(np.split(mean, cuts), np.split(std, cuts), strict=True)]
    random.shuffle(parts)
    while len(parts) > 1:  # some of them together, as ranks and shards do, until one is left
        few = random.randint(2, len(parts))
        parts = [Moments.merge(parts[:few]), *parts[few:]]
        random.shuffle(parts)
    assert parts[0].count == whole.count
    np.testing.assert_allclose(parts[0].mean, whole.mean)
    np.testing.assert_allclose(parts[0].std, whole.std)


def test_parts_of_several_sizes_count_by_their_values():
    """Images of several sizes: each position weighs the same."""
    parts = [latents(3, 3)[0], latents(4, 4)[0][..., :1, :2]]
    values = np.concatenate([part.transpose(1, 0, 2, 3).reshape(3, -1) for part in parts], axis=1)
    found = Moments.merge(map(Moments.of, parts))
    assert found.count == values.shape[1] == 3 * 10 + 4 * 2
    assert_allclose(found.mean, values.mean(1))
    assert_allclose(found.std, values.std(1))


def test_far_from_zero_nothing_cancels():
    """Where mean² swallows the variance, E[x²] - E[x]² would have no digit left."""
    mean, _ = latents(64, 5, far=1e8)
    found = Moments.merge(Moments.of(part) for part in np.split(mean, 16))
    assert_allclose(found.std, mean.std((0, 2, 3)), rtol=1e-7)


def test_from_its_statistics_it_is_itself_again():
    mean, std = latents(9, 6)
    whole, parts = Moments.of(mean, std), [Moments.of(mean[:4], std[:4]), Moments.of(mean[4:], std[4:])]
    again = Moments.merge(Moments.from_statistics(part.count, part.mean.tolist(), part.std.tolist()) for part in parts)
    np.testing.assert_allclose(again.mean, whole.mean)
    np.testing.assert_allclose(again.std, whole.std)
    assert Moments.merge([whole]) is whole
