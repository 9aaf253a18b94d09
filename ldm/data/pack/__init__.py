"""Image shards out of files, tables and data sets."""
