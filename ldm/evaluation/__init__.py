"""Metrics of autoencoders and pipelines."""
