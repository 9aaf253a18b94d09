"""Losses of both stages, on images (B, 3, H, W) in [−1, 1] and on a denoiser's activations; each is a mean."""
