"""Image grids, charts and pages."""
