"""Drawing pictures with a pipeline: what decides a picture, prompt files, batches, and what is kept of a run."""
