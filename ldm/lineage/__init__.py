"""Where a model or an image comes from: its runs, networks, latents and images, found and compared by their fingerprints."""
