"""Position tables of a checkpoint, for a model of another audio length, image size or number of mel
bins: fixed ones are computed for its grid of patches, trained ones interpolated."""

import logging
import math
from collections.abc import Mapping

import torch
import torch.nn.functional as F

from cavmae.trainer.model.encoder import PATCH, AudioVideoEncoder
from cavmae.trainer.model.pos_embed import position_table

log = logging.getLogger(__name__)

Grid = tuple[int, int]
"""(rows of frequency or height, columns of time or width)."""


def adapt_positions(
    state: Mapping[str, torch.Tensor], model: AudioVideoEncoder, source: str
) -> dict[str, torch.Tensor]:
    """Replace the position tables of a state whose grid of patches is not the model's.

    A fixed table is computed anew, so that a patch keeps its place from the start of the sound and
    its row; a trained one is interpolated. Each is said in a log line.

    Args:
        state: CAV-MAE weights, without prefixes. Tables of another width are left to the check of
            shapes.
        model: whose sizes are to be met; it is not changed.
        source: of the state, for messages.

    Raises:
        ValueError: a trained table lies near no fixed one, and its positions fit neither the
            model's mel bins nor 128, or no square image.
    """
    adapted = dict(state)
    for name, own in model.named_parameters():
        table = state.get(name)
        if "pos_embed" not in name or table is None or table.shape[::2] != own.shape[::2]:
            continue
        audio = name.endswith("_a")
        grid = model.config.audio_grid if audio else model.config.video_grid
        known = grid_of(table)
        before = known or _assumed_grid(f"{source}: {name}", table.shape[1], grid[0], audio)
        if before == grid:
            continue
        # Rounding to bf16 moves no value of a fixed table, which lies in -1 to 1, by more.
        fixed = bool((position_table(own.shape[2], before) - table).abs().max() <= 2**-9)
        adapted[name] = (
            position_table(own.shape[2], grid) if fixed else _interpolate(table, before, grid)
        )
        log.info(
            "%s: %s of %d x %d patches%s is %s for %d x %d",
            *(source, name, *before, "" if known else " (assumed)"),
            "fixed, and computed" if fixed else "trained, and interpolated",
            *grid,
        )
    return adapted


def grid_of(table: torch.Tensor) -> Grid | None:
    """Find the grid of a table (1, tokens, width): the one whose fixed table lies nearest.

    Training starts from the fixed table and moves it little, so that a trained one tells its grid
    too. None: the table lies near no fixed one.
    """
    if table.ndim != 3 or not table.numel() or table.shape[2] % 4:
        return None
    tokens, width = table.shape[1:]
    grids = [(rows, tokens // rows) for rows in range(1, tokens + 1) if tokens % rows == 0]
    distance, nearest = min(
        ((position_table(width, grid) - table).square().mean().item(), grid) for grid in grids
    )
    # A table unlike all fixed ones is 0.5 away from each, which is their mean square, or farther.
    return nearest if distance < 0.25 else None


def _assumed_grid(table: str, positions: int, own_rows: int, audio: bool) -> Grid:
    likely = (own_rows, 128 // PATCH) if audio else (math.isqrt(positions),)
    for rows in likely:
        columns = positions // rows if audio else rows
        if rows * columns == positions > 0:
            return rows, columns
    wrong = (
        f"no grid of {' or '.join(map(str, dict.fromkeys(likely)))} rows" if audio else "no square"
    )
    fix = "set model.mel_bins to the checkpoint's" if audio else "take one of square images"
    raise ValueError(f"{table} has {positions} trained positions, which make {wrong}; {fix}")


def _interpolate(table: torch.Tensor, before: Grid, grid: Grid) -> torch.Tensor:
    """Interpolate (1, tokens, width) in float32, bicubic as MAE does (`util/pos_embed.py`)."""
    channels = table.float().unflatten(1, before).permute(0, 3, 1, 2)  # (1, width, rows, columns)
    channels = F.interpolate(channels, size=grid, mode="bicubic")
    return channels.permute(0, 2, 3, 1).flatten(1, 2)  # (1, tokens, width)
