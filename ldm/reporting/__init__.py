"""Image grids, charts and HTML pages."""
