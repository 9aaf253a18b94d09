"""Training under Lightning: the two stages, their averages, callbacks."""
