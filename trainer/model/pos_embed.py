"""Fixed two-dimensional sine-cosine position tables (He et al. 2022; golden convention 1)."""

import torch


def _sine_cosine(width: int, places: torch.Tensor) -> torch.Tensor:
    """Return (tokens, width) sines, then cosines of `places` (tokens,) at falling frequencies."""
    frequency = 1.0 / 10000 ** (torch.arange(width // 2, dtype=torch.float64) / (width / 2))
    angle = places.double()[:, None] * frequency
    return torch.cat([angle.sin(), angle.cos()], dim=1)


def position_table(width: int, grid: tuple[int, int]) -> torch.Tensor:
    """Build the position table of a row-major grid of patches.

    Args:
        width: channels, a multiple of 4.
        grid: (rows of frequency or height, columns of time or width).

    Returns:
        (1, rows * columns, width) float32: the first half of the channels encodes the column,
        the second half the row.
    """
    rows, columns = grid
    row, column = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
    halves = [_sine_cosine(width // 2, places.flatten()) for places in (column, row)]
    return torch.cat(halves, dim=1).float()[None]
