"""Memory, time and disk of a run before hours are spent on it."""
