"""Paired comparisons: exact where the answer is known, and rarely wrong where there is nothing to find."""

from __future__ import annotations

import math

import numpy as np
import pytest

from ldm.ablation.comparison import AGREEING, Estimate, NoiseLevels, StopRule, at_seconds
from ldm.ablation.look import noise_places
from ldm.errors import UsageError

SAMPLES, LOOKS, TRIALS = 128, 8, 200


@pytest.fixture(scope="module")
def levels() -> NoiseLevels:
    return NoiseLevels(noise_places(SAMPLES))


def test_proportional_errors_differ_by_their_ratio_exactly_at_every_level(levels: NoiseLevels) -> None:
    first = np.random.default_rng(0).lognormal(size=SAMPLES)
    found = levels.difference(first, 1.1 * first)
    assert len(found.levels) == levels.count == 10
    for estimate in (found.overall, *found.levels):
        assert estimate.value == pytest.approx(math.log(1.1)) and estimate.error == pytest.approx(0, abs=1e-12)
    fourth = (noise_places(SAMPLES) * 10).astype(int) == 3
    found = levels.difference(first, first * np.where(fourth, 2.0, 1.0))
    assert found.overall.value == pytest.approx(math.log(2) * fourth.mean()) and found.overall.error == pytest.approx(
        0, abs=1e-12
    )
    assert [round(level.value, 6) for level in found.levels] == [0.693147 * (number == 3) for number in range(10)]
    ratios = np.random.default_rng(1).normal(0, 0.1, SAMPLES)
    there, back = levels.difference(first, first * np.exp(ratios)), levels.difference(first * np.exp(ratios), first)
    assert there.overall.value == pytest.approx(-back.overall.value) == pytest.approx(ratios.mean())
    # as the bootstrap over samples has it
    resampled = np.random.default_rng(2).choice(ratios, (4000, SAMPLES)).mean(1)
    assert there.overall.error == pytest.approx(resampled.std(), rel=0.06)


def null(random: np.random.Generator, effect: float = 0.0) -> tuple[np.ndarray, np.ndarray]:
    """Errors of two equal trainings: samples are hard or easy for both, with a spread of their own of 20% each."""
    hard = random.lognormal(0, 1, SAMPLES)
    first, second = (hard * random.lognormal(0, 0.2, SAMPLES) for _ in range(2))
    return first, math.exp(effect) * second


def test_where_nothing_differs_the_rule_stops_in_at_most_one_of_twenty_ablations(levels: NoiseLevels) -> None:
    """Looks are independent here, the worst case; without a correction eight of them find something in a third of all."""
    random, rule = np.random.default_rng(0), StopRule(LOOKS, 1, margin=0.0)
    covered, naive, corrected, stopped = 0, 0, 0, 0
    for _ in range(TRIALS):
        looks = [levels.difference(*null(random)).overall for _ in range(LOOKS)]
        excludes = [estimate.interval()[0] > 0 or estimate.interval()[1] < 0 for estimate in looks]
        covered += LOOKS - sum(excludes)
        naive += any(excludes)
        corrected += any(rule.verdict(estimate) for estimate in looks)
        stopped += any(rule.is_clear(looks[:end]) for end in range(1, LOOKS + 1))
    assert covered / (TRIALS * LOOKS) == pytest.approx(0.95, abs=0.02)
    assert naive / TRIALS > 0.25
    # 5%, and two and a half standard deviations of 200 trials
    assert corrected / TRIALS < 0.09 and stopped <= corrected


def test_between_recipes_the_interval_of_several_seeds_holds_where_that_of_one_does_not(levels: NoiseLevels) -> None:
    """Each training is better or worse by 3%, by its seed."""
    random, missed = np.random.default_rng(1), {1: 0, 4: 0}
    for _ in range(TRIALS // 2):
        for seeds in missed:
            pairs = [null(random, random.normal(0, 0.03 * 2**0.5)) for _ in range(seeds)]
            low, high = levels.over_seeds(*zip(*pairs, strict=True)).overall.interval()
            missed[seeds] += low > 0 or high < 0
    assert missed[1] / (TRIALS // 2) > 0.2 and missed[4] / (TRIALS // 2) < 0.09
    with pytest.raises(UsageError, match="12 validation samples are too few"):
        NoiseLevels(noise_places(12))


def test_an_answer_is_clear_beyond_the_margin_at_two_looks_that_agree_and_do_not_shrink() -> None:
    rule = StopRule(10, 2, margin=0.01)
    assert rule.level_of_a_look == pytest.approx(1 - 0.05 / 20) and AGREEING == 2
    better, worse, tiny = (Estimate(value, 0.002) for value in (-0.05, 0.05, -0.01))
    assert [rule.verdict(one) for one in (better, worse, tiny)] == [-1, 1, 0]
    assert rule.is_clear([tiny, better, better]) and rule.is_clear([worse, worse])
    assert not any(rule.is_clear(looks) for looks in ([], [better], [better, worse], [better, better, tiny], [worse, better]))
    assert not rule.is_clear([Estimate(-0.2, 0.002), better])  # it only started faster
    three = [Estimate(value, 0.001) for value in (-0.05, -0.06, -0.04)]
    joined = Estimate.over_seeds(three)
    assert joined.value == pytest.approx(-0.05) and joined.freedom == 2
    assert joined.error == pytest.approx(math.hypot(0.01 / 3**0.5, 0.001)) and not rule.verdict(joined)
    assert Estimate.over_seeds(three[:1]) == three[0]


def test_errors_after_some_seconds_lie_between_those_of_two_looks() -> None:
    errors = [np.array([4.0, 1.0]), np.array([2.0, 1.0])]
    assert at_seconds([10, 20], errors, 15) == pytest.approx(np.array([3.0, 1.0]))
    assert at_seconds([10, 20], errors, 10) is errors[0] and at_seconds([10, 20], errors, 20) is errors[1]
    assert at_seconds([10, 20], errors, 9) is None and at_seconds([10, 20], errors, 21) is None
    assert at_seconds([], [], 1) is None
