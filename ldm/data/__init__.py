"""Shards: what they hold, how they are written, read, ordered and served. Knows no models."""
