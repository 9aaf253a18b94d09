"""Generating images with a pipeline: settings, prompt files, batches, output folders and metadata."""
