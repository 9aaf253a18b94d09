"""The built-in data set, and the scorer that reads a scene back from pixels."""
