"""Ablations: variants of a training compared sample by sample, on the same draws and the same noise."""
