from itertools import chain, islice

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ldm.data.plan import Plan
from ldm.errors import UsageError


@st.composite
def plans(draw):
    batch_size, world_size = draw(st.integers(1, 7)), draw(st.integers(1, 4))
    least = batch_size * world_size
    return Plan(draw(st.integers(least, least + 60)), batch_size, draw(st.integers(0, 2**31)), world_size)


def epoch_of(plan, rank, epoch):
    return list(islice(plan.batches(rank, epoch * plan.steps_per_epoch), plan.steps_per_epoch))


@given(plans(), st.integers(0, 5))
@settings(max_examples=100, deadline=None)
def test_an_epoch_is_a_permutation_dealt_to_the_ranks(plan, epoch):
    assert sorted(plan.order(epoch).tolist()) == list(range(plan.samples))
    by_rank = [epoch_of(plan, rank, epoch) for rank in range(plan.world_size)]
    assert {len(batches) for batches in by_rank} == {plan.steps_per_epoch}  # no rank waits for another
    assert {len(batch) for batches in by_rank for batch in batches} == {plan.batch_size}
    seen = [sample for batches in by_rank for batch in batches for sample in batch]
    assert len(seen) == len(set(seen))  # nothing twice, on whatever rank
    assert 0 <= plan.samples - len(seen) < plan.batch_size * plan.world_size  # less than one global batch is left out


@given(plans(), st.integers(0, 40), st.integers(0, 3))
@settings(max_examples=100, deadline=None)
def test_a_run_resumed_at_a_step_goes_on_as_if_it_had_never_stopped(plan, step, rank):
    rank %= plan.world_size
    whole = list(islice(plan.batches(rank), step + 5))
    assert list(islice(plan.batches(rank, first_step=step), 5)) == whole[step:]


@given(plans(), st.integers(0, 3))
@settings(max_examples=50, deadline=None)
def test_the_global_batch_is_the_same_samples_however_many_ranks_share_it(plan, epoch):
    alone = Plan(plan.samples, plan.batch_size * plan.world_size, plan.seed)
    shared = zip(*(epoch_of(plan, rank, epoch) for rank in range(plan.world_size)), strict=True)
    assert [list(chain(*batches)) for batches in shared] == epoch_of(alone, 0, epoch)


def test_epochs_and_seeds_differ_and_are_repeatable():
    plan = Plan(100, 10, seed=3)
    orders = [Plan(100, 10, seed).order(epoch).tolist() for seed in (3, 4) for epoch in (0, 1)]
    assert len({tuple(order) for order in orders}) == 4
    assert plan.order(1).tolist() == orders[1]


def test_every_sample_is_seen_in_the_long_run():
    plan = Plan(11, 4)  # three left out per epoch
    seen = {sample for batch in islice(plan.batches(), 2 * 30) for sample in batch}
    assert seen == set(range(11))


@given(st.integers(1, 8), st.integers(1, 4))
def test_too_few_samples_for_one_batch_are_refused(batch_size, world_size):
    with pytest.raises(UsageError, match=f"data.batch_size {batch_size} on {world_size} process"):
        Plan(batch_size * world_size - 1, batch_size, 0, world_size)
    assert Plan(batch_size * world_size, batch_size, 0, world_size).steps_per_epoch == 1
