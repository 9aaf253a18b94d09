"""Losses of all trainings: of images (B, 3, H, W) in [−1, 1], of a denoiser's activations, of images and captions."""
