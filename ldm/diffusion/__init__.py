"""The diffusion maths. Time t is in [0, 1]: t = 0 is data, t = 1 is noise; ``x_t = alpha(t)·x0 + sigma(t)·eps``."""
