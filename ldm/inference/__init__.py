"""Drawing images with a pipeline: what decides an image, prompt files, batches, and what is kept of a run."""
