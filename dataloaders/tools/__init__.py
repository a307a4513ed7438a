"""Tools for packed sets: `cavmae verify`, `cavmae inspect`, and synthetic videos."""
