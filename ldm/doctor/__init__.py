"""``ldm doctor``: whether this machine can train, what is wrong with it, and the mend."""
