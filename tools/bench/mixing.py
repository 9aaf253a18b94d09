"""How well a plan shuffles, as a number."""

from __future__ import annotations

import numpy as np

from ldm.data.plan import Plan


def mixing(plan: Plan, batch_size: int, epoch: int = 0) -> dict[str, float]:
    """How well an epoch is shuffled.

    Returns ``rank_correlation``: Spearman's, between the order of samples in the files and in the epoch; ``shards_per_batch``:
    mean number of different shards in a batch; ``shards_per_batch_ideal``: the same for batches drawn at random from the whole
    set.
    """
    order = np.concatenate(list(plan.order(epoch)))
    shards = np.repeat(np.arange(len(plan.shard_samples)), plan.shard_samples)
    batches = shards[order][: len(order) // batch_size * batch_size].reshape(-1, batch_size)
    share = np.array(plan.shard_samples) / plan.samples
    return {
        "rank_correlation": float(np.corrcoef(order, np.arange(len(order)))[0, 1]),
        "shards_per_batch": float(np.mean([len(np.unique(batch)) for batch in batches])),
        "shards_per_batch_ideal": float(np.sum(1 - (1 - share) ** batch_size)),
    }
