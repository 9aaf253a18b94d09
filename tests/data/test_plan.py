"""The planner: every sample exactly once per epoch, whoever shares the work and wherever it was cut."""

import runpy
from dataclasses import replace
from itertools import chain, islice
from pathlib import Path

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from ldm.data.plan import START, Plan, Position
from ldm.errors import UsageError

mixing = runpy.run_path(str(Path(__file__).parents[2] / "tools" / "bench" / "mixing.py"))["mixing"]
sizes = st.lists(st.integers(0, 12), min_size=1, max_size=7).filter(any)
windows = st.sampled_from([1, 5, 17, 10_000])


@st.composite
def plans(draw, weighted=False, groups=0):
    shards = tuple(draw(sizes))
    weights = None
    if weighted:
        weights = tuple(draw(st.lists(st.sampled_from([0.1, 0.5, 1, 1.3, 2, 3]), min_size=len(shards), max_size=len(shards))))
    of = np.array(draw(st.lists(st.integers(-1, groups - 1), min_size=sum(shards), max_size=sum(shards)))) if groups else None
    return Plan(shards, weights, draw(st.integers(0, 2**31)), draw(windows), of)


@st.composite
def shares(draw, plan):
    """A batch size and a world size that the plan can fill."""
    together = draw(st.integers(1, plan.samples))
    world_size = draw(st.sampled_from([n for n in (1, 2, 3, 4) if n <= together]))
    return together // world_size, world_size


def delivered(plan, batch_size, world_size, steps, position=START):
    """The draws of all ranks in step order, [step][rank] -> batch."""
    ranks = [plan.batches(batch_size, rank, world_size, position) for rank in range(world_size)]
    return [[next(rank) for rank in ranks] for _ in range(steps)]


@given(plans(), st.integers(0, 5))
@settings(max_examples=100, deadline=None)
def test_an_epoch_is_every_sample_once(plan, epoch):
    order = np.concatenate(list(plan.order(epoch)))
    assert sorted(order.tolist()) == list(range(plan.samples))
    assert plan.epoch_samples(epoch) == plan.samples


@given(st.data())
@settings(max_examples=100, deadline=None)
def test_ranks_share_every_epoch_without_overlap_or_gap_in_equal_steps(data):
    plan = data.draw(plans())
    batch_size, world_size = data.draw(shares(plan))
    epochs = 3
    steps = -(-plan.samples * epochs // (batch_size * world_size))
    dealt = delivered(plan, batch_size, world_size, steps)
    assert {len(batch) for ranks in dealt for batch in ranks} == {batch_size}  # no rank waits for another
    draws = list(chain.from_iterable(chain.from_iterable(dealt)))
    assert [draw.number for draw in draws] == list(range(len(draws)))  # each draw once, to one rank
    for epoch in range(epochs):
        seen = [draw.sample for draw in draws[epoch * plan.samples : (epoch + 1) * plan.samples]]
        assert sorted(seen) == list(range(plan.samples))


@given(st.data())
@settings(max_examples=100, deadline=None)
def test_killed_and_resumed_twice_is_never_killed(data):
    plan = data.draw(plans(weighted=True))
    batch_size, world_size = data.draw(shares(plan))
    cuts = sorted(data.draw(st.lists(st.integers(0, 25), min_size=2, max_size=2)))
    whole = delivered(plan, batch_size, world_size, cuts[1] + 4)
    position, at = Position(), 0
    for cut in cuts:
        assert delivered(plan, batch_size, world_size, cut - at, position) == whole[at:cut]
        for _ in range(cut - at):
            position = plan.advance(position, batch_size * world_size)
        at = cut
    assert delivered(plan, batch_size, world_size, 4, position) == whole[at : at + 4]


@given(st.data())
@settings(max_examples=100, deadline=None)
def test_resumed_on_other_ranks_and_batches_what_is_left_comes_exactly_once(data):
    plan = data.draw(plans())
    first, second = data.draw(shares(plan)), data.draw(shares(plan))
    steps = data.draw(st.integers(0, 12))
    before = [draw for ranks in delivered(plan, first[0], first[1], steps) for batch in ranks for draw in batch]
    position = plan.advance(Position(), steps * first[0] * first[1])
    more = -(-2 * plan.samples // (second[0] * second[1]))
    after = [draw for ranks in delivered(plan, second[0], second[1], more, position) for batch in ranks for draw in batch]
    draws = before + after
    assert [draw.number for draw in draws] == list(range(len(draws)))
    for epoch in range(len(draws) // plan.samples):
        seen = [draw.sample for draw in draws[epoch * plan.samples : (epoch + 1) * plan.samples]]
        assert sorted(seen) == list(range(plan.samples))


@given(plans(weighted=True), st.integers(1, 12))
@settings(max_examples=100, deadline=None)
def test_weights_hold_exactly_in_the_long_run(plan, epochs):
    if not plan.epoch_samples(0):  # weights so small that the first epochs are empty
        epochs = 10 * epochs
    draws = [sample for epoch in range(epochs) for window in plan.order(epoch) for sample in window.tolist()]
    assert len(draws) == plan.draws_before(epochs)
    counts = np.bincount(draws, minlength=plan.samples)
    starts = np.cumsum([0, *plan.shard_samples])
    for shard, weight in enumerate(plan.weights):
        of_shard = counts[starts[shard] : starts[shard + 1]]
        if len(of_shard):
            assert of_shard.max() - of_shard.min() <= 1  # no sample falls behind
            assert abs(of_shard.sum() - weight * epochs * len(of_shard)) <= 1


@given(plans(), st.integers(0, 3), st.integers(0, 60))
@settings(max_examples=100, deadline=None)
def test_an_order_entered_in_the_middle_is_the_rest_of_it(plan, epoch, start):
    start %= plan.samples
    whole = np.concatenate(list(plan.order(epoch)))
    assert np.array_equal(np.concatenate(list(plan.order(epoch, start))), whole[start:])


def test_epochs_and_seeds_differ_and_are_repeatable():
    def orders(seed, epoch):
        return tuple(np.concatenate(list(Plan((40, 60), None, seed).order(epoch))).tolist())

    assert len({orders(seed, epoch) for seed in (3, 4) for epoch in (0, 1)}) == 4
    assert orders(3, 1) == orders(3, 1)


def test_a_set_within_the_window_is_mixed_as_if_drawn_at_random():
    found = mixing(Plan((100,) * 50), batch_size=32)
    # the standard error of a rank correlation over n samples is 1/sqrt(n - 1)
    assert abs(found["rank_correlation"]) < 4 / 5000**0.5
    assert abs(found["shards_per_batch"] - found["shards_per_batch_ideal"]) < 0.5


def test_a_window_bounds_the_shards_in_hand_and_still_mixes():
    plan = Plan((100,) * 64, window=800)  # eight shards at a time
    found = mixing(plan, batch_size=32)
    assert abs(found["rank_correlation"]) < 0.5  # shards come in random order; within eight of them all is mixed
    assert 7 < found["shards_per_batch"] <= 8
    for window in plan.order(0):
        assert len(set((window // 100).tolist())) <= 8
    first, second = (next(iter(plan.order(epoch))) for epoch in (0, 1))
    assert set((first // 100).tolist()) != set((second // 100).tolist())  # other shards meet in the next epoch


def test_skipping_ahead_in_a_huge_set_is_arithmetic():
    plan = Plan((1000,) * 100_000, window=20_000)  # a hundred million samples: seconds here would be hours of reading
    windows = plan.order(0, start=99_999_990)
    assert len(np.concatenate(list(windows))) == 10
    assert len(next(plan.batches(8, 0, 2, Position(3, 50_000_000)))) == 8


def test_too_few_samples_for_one_batch_are_refused():
    with pytest.raises(UsageError, match=r"10 samples do not fill one batch of 12 .*lower batch_size"):
        next(Plan((4, 6)).batches(6, 0, 2))
    assert len(next(Plan((4, 6)).batches(5, 0, 2))) == 5
    with pytest.raises(UsageError, match="no sample to train on"):
        Plan((0, 0))


def test_a_batch_may_span_epochs():
    batch = list(islice(Plan((3,), seed=1).batches(2), 3))
    samples = [draw.sample for draws in batch for draw in draws]
    assert sorted(samples[:3]) == sorted(samples[3:]) == [0, 1, 2]


@pytest.mark.parametrize("weight", [-1.0, float("nan"), float("inf"), 1e300])
def test_weights_that_mean_nothing_are_refused(weight):
    with pytest.raises(UsageError, match=r"a weight of the training data is .*; give 0 to 1,000,000"):
        Plan((3, 4), (1.0, weight))


# -- groups ----------------------------------------------------------------------------------------------------------


def stream(plan, count):
    """The first draws of a plan: their samples."""
    return list(islice((sample for _, samples in plan.draws() for sample in samples.tolist()), count))


@st.composite
def group_batches(draw, plan):
    """Batch sizes of each group, of which an epoch fills at least one, and a world size."""
    counts = np.bincount(plan.groups[plan.groups >= 0], minlength=3)
    assume(counts.any())
    world_size = draw(st.sampled_from([n for n in (1, 2, 3) if n <= counts.max()]))
    sizes = draw(st.lists(st.integers(1, 4), min_size=3, max_size=3))
    sizes[counts.argmax()] = min(sizes[counts.argmax()], int(counts.max()) // world_size)
    return sizes, world_size


@given(st.data())
@settings(max_examples=100, deadline=None)
def test_a_step_is_of_one_group_and_each_draw_comes_once_or_waits_whatever_the_kills(data):
    """Resumed with the same batches the steps are those of a run without a kill; with others, nothing is lost or repeated."""
    plan = data.draw(plans(weighted=data.draw(st.booleans()), groups=3))
    first, second = data.draw(group_batches(plan)), data.draw(group_batches(plan))
    cut, steps = data.draw(st.integers(0, 12)), 12
    before = list(islice(plan.steps(*first), cut))
    position = before[-1][1] if cut else START
    whole, resumed = islice(plan.steps(*first), cut + steps), islice(plan.steps(*first, position), steps)
    for (ours, at), (theirs, there) in zip(chain(before, resumed), whole, strict=True):
        assert np.array_equal(ours, theirs) and at[:2] == there[:2]
        assert (at.waiting is None) == (there.waiting is None) and np.array_equal(at.waiting, there.waiting)
    after = list(islice(plan.steps(*second, position), steps))
    for taken, (sizes, world_size) in ((before, first), (after, second)):
        for draws, _ in taken:
            (group,) = set(plan.groups[draws[:, 0]].tolist())
            assert len(draws) == sizes[group] * world_size
    epoch, consumed, waiting = after[-1][1]
    planned = [
        (sample, n) for n, sample in enumerate(stream(plan, plan.draws_before(epoch) + consumed)) if plan.groups[sample] >= 0
    ]
    delivered = [tuple(draw) for draws, _ in before + after for draw in draws.tolist()]
    left = [] if waiting is None else [tuple(draw) for draw in waiting.tolist()]
    assert sorted(delivered + left) == sorted(planned) and left == sorted(left, key=lambda draw: draw[1])
    for group in range(3):  # in the order of the stream
        numbers = [number for sample, number in delivered if plan.groups[sample] == group]
        assert numbers == sorted(numbers)


@given(st.data())
@settings(max_examples=30, deadline=None)
def test_one_group_is_a_plan_without_groups(data):
    plan = data.draw(plans(weighted=True))
    batch_size, world_size = data.draw(shares(plan))
    grouped = replace(plan, groups=np.zeros(plan.samples, np.int32))
    for (ours, at), (theirs, there) in islice(
        zip(plan.steps(batch_size, world_size), grouped.steps([batch_size], world_size), strict=True), 12
    ):
        assert np.array_equal(ours, theirs) and at == there and at.waiting is None


def test_the_mix_of_groups_is_uniform_all_along():
    shares, epoch, together = np.array([0.6, 0.3, 0.1]), 6000, np.array([32, 64, 128])
    groups = np.repeat(np.arange(3), (shares * epoch).astype(int))  # sorted: the shards hold one group each
    plan, taken = Plan((1000,) * 6, groups=groups), np.zeros(3)
    # of the draws so far: the standard deviation of a sample without replacement, at its largest in the middle of an epoch
    bound = together + 4 * np.sqrt(epoch * shares * (1 - shares)) / 2
    for draws, (number, consumed, _) in islice(plan.steps((together // 4).tolist(), 4), 500):
        taken[groups[draws[0, 0]]] += len(draws)
        assert (abs(taken - shares * (number * epoch + consumed)) < bound).all()


def test_batches_that_no_group_fills_are_refused():
    plan = Plan((4, 6), groups=np.array([0] * 4 + [1] * 3 + [-1] * 3))
    assert len(next(plan.batches([5, 3]))) == 3
    with pytest.raises(UsageError, match=r"^4 samples of the most frequent size do not fill one batch of 8 .*lower batch_size"):
        next(plan.batches(4, 0, 2))
    with pytest.raises(UsageError, match="batch of all processes together is 0"):
        next(plan.batches([0, 3]))
