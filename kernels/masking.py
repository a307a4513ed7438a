"""Which patches a sample's encoders see: random masks from counters (paper section 3.3).

A patch's key is its random word, after whether it is marked and before its number, so keys are
unique and an order of them is the mask. The kernel finds each patch's rank by counting the smaller
keys, which it draws again from their counters: nothing is stored or sorted, and one launch does the
batch.
"""

from typing import Literal, NamedTuple

import torch
import triton
import triton.language as tl

from cavmae.kernels.backend import Backend, choose_backend, jit
from cavmae.kernels.philox import STREAMS, random_words

MaskMode = Literal["unstructured", "time", "freq", "tf"]


class MaskIds(NamedTuple):
    """Patch ids of a masked batch.

    Attributes:
        keep: (batch, kept) int64, in the order in which the encoder sees the patches.
        removed: (batch, removed) int64.
        restore: (batch, tokens) int64; place of each patch in `keep` followed by `removed`.
    """

    keep: torch.Tensor
    removed: torch.Tensor
    restore: torch.Tensor


def kept_count(tokens: int, ratio: float) -> int:
    """Patches kept of `tokens`, evaluated in floats as the published code does."""
    return int(tokens * (1 - ratio))


def mask_ids_from_shuffle(ids_shuffle: torch.Tensor, ratio: float) -> MaskIds:
    """Mask ids of a given shuffle.

    Args:
        ids_shuffle: (batch, tokens) a permutation of the patch ids per row; the first ones stay.
        ratio: share of patches removed.
    """
    ids_shuffle = ids_shuffle.long()
    kept = kept_count(ids_shuffle.shape[1], ratio)
    return MaskIds(
        keep=ids_shuffle[:, :kept], removed=ids_shuffle[:, kept:], restore=_inverse(ids_shuffle)
    )


def _inverse(permutation: torch.Tensor) -> torch.Tensor:
    """(batch, n) the inverse of each row's permutation."""
    place = torch.arange(permutation.shape[1], device=permutation.device)
    return torch.empty_like(permutation).scatter_(1, permutation, place.expand_as(permutation))


def random_mask(
    positions: torch.Tensor,
    *,
    seed: int,
    stream: str,
    grid: tuple[int, int],
    ratio: float,
    mode: MaskMode = "unstructured",
    backend: Backend | None = None,
) -> MaskIds:
    """Random mask ids, a function of seed, stream and position alone.

    Structured modes mark `int(columns * ratio)` time columns or `int(rows * ratio)` frequency rows
    (`tf`: both, at 0.7 of the ratio) and remove marked patches first; the kept count is that of
    the unstructured mode, as in the published code.

    Args:
        positions: (batch,) int64 positions in the sample plan.
        seed: the run's seed.
        stream: a name in `STREAMS`.
        grid: patches as (rows of frequency or height, columns of time or width).
        ratio: share of patches removed, in [0, 1).
        mode: how patches are removed.
        backend: see `cavmae.kernels.backend`; both give the same bits.

    Returns:
        `MaskIds` on the device of `positions`.

    Raises:
        ValueError: an argument that can't be met; names it.
    """
    chosen = choose_backend(backend, positions=positions)
    if positions.ndim != 1 or positions.dtype != torch.int64:
        raise ValueError(
            f"positions are {positions.dtype} of shape {tuple(positions.shape)}; they have to be "
            "int64 of shape (batch,)"
        )
    if stream not in STREAMS:
        raise ValueError(f"stream is {stream!r}; use one of {', '.join(STREAMS)}")
    if mode not in ("unstructured", "time", "freq", "tf"):
        raise ValueError(f"mode is {mode!r}; use unstructured, time, freq or tf")
    if not 0 <= ratio < 1:
        raise ValueError(f"ratio is {ratio}; use 0 up to below 1")
    rows, columns = grid
    if rows < 1 or columns < 1:
        raise ValueError(f"grid is {grid}; use 1 or more rows and columns")
    share = ratio * 0.7 if mode == "tf" else ratio
    marked_columns = int(columns * share) if mode in ("time", "tf") else 0
    marked_rows = int(rows * share) if mode in ("freq", "tf") else 0
    draw = _reference if chosen == "torch" else _launch
    return draw(positions, seed, stream, grid, ratio, marked_columns, marked_rows)


def _reference(
    positions: torch.Tensor,
    seed: int,
    stream: str,
    grid: tuple[int, int],
    ratio: float,
    marked_columns: int,
    marked_rows: int,
) -> MaskIds:
    rows, columns = grid
    tokens = rows * columns
    patch = torch.arange(tokens, device=positions.device)
    marked = patch[None] < 0
    if marked_columns:
        words = random_words(positions, columns, seed=seed, stream=stream, part=1)
        marked = marked | (_ranks(words) < marked_columns)[:, patch % columns]
    if marked_rows:
        words = random_words(positions, rows, seed=seed, stream=stream, part=2)
        marked = marked | (_ranks(words) < marked_rows)[:, patch // columns]
    words = random_words(positions, tokens, seed=seed, stream=stream)
    # Unique keys of 63 bits: marked patches last, then by random word, then by patch.
    keys = (marked.long() << 62) | (words << 30) | patch
    return mask_ids_from_shuffle(torch.argsort(keys, dim=1), ratio)


def _ranks(words: torch.Tensor) -> torch.Tensor:
    """(batch, n) the rank of each word in its row; equal words are ranked by their place."""
    place = torch.arange(words.shape[1], device=words.device)
    return _inverse(torch.argsort((words << 30) | place, dim=1))


@jit
def _words(number, position, key, part):
    """The words of one position that have these numbers, as int64."""
    low = (position & 0xFFFFFFFF).to(tl.uint32)
    high = ((position >> 32) & 0xFFFFFFFF).to(tl.uint32)
    block = (number // 4).to(tl.uint32)
    zero = block * 0
    first, second, third, fourth = tl.philox(key, zero + low, zero + high, block, zero + part)
    lane = number % 4
    word = tl.where(lane == 0, first, tl.where(lane == 1, second, third))
    return tl.where(lane == 3, fourth, word).to(tl.int64)


@jit
def _line_is_marked(line, position, key, part, lines, marked, LINES: tl.constexpr):
    """Return whether fewer than `marked` columns (or rows) have a smaller key than this one."""
    own = (_words(line, position, key, part) << 30) | line
    other = tl.arange(0, LINES)
    others = (_words(other, position, key, part) << 30) | other
    smaller = (others[None, :] < own[:, None]) & (other < lines)[None, :]
    return tl.sum(smaller.to(tl.int32), 1) < marked


@jit
def _keys(
    patch,
    position,
    key,
    rows,
    columns,
    marked_columns,
    marked_rows,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Unique keys of 63 bits; ROWS and COLUMNS are 0 where none is marked."""
    keys = (_words(patch, position, key, 0) << 30) | patch
    marked = patch < 0
    if COLUMNS > 0:
        column = patch % columns
        marked |= _line_is_marked(column, position, key, 1, columns, marked_columns, COLUMNS)
    if ROWS > 0:
        row = patch // columns
        marked |= _line_is_marked(row, position, key, 2, rows, marked_rows, ROWS)
    return keys | (marked.to(tl.int64) << 62)


@jit
def _mask_kernel(
    positions,
    keep,
    removed,
    restore,
    key,
    tokens,
    kept,
    rows,
    columns,
    marked_columns,
    marked_rows,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    PATCHES: tl.constexpr,
):
    """PATCHES patches of one sample: their ranks among all of the sample's patches."""
    sample = tl.program_id(0).to(tl.int64)
    position = tl.load(positions + sample)
    patch = tl.program_id(1) * PATCHES + tl.arange(0, PATCHES)
    own = _keys(patch, position, key, rows, columns, marked_columns, marked_rows, ROWS, COLUMNS)
    rank = tl.zeros((PATCHES,), tl.int32)
    for first in range(0, tokens, PATCHES):
        other = first + tl.arange(0, PATCHES)
        others = _keys(
            other, position, key, rows, columns, marked_columns, marked_rows, ROWS, COLUMNS
        )
        smaller = (others[None, :] < own[:, None]) & (other < tokens)[None, :]
        rank += tl.sum(smaller.to(tl.int32), 1)
    inside = patch < tokens
    tl.store(restore + sample * tokens + patch, rank.to(tl.int64), mask=inside)
    stays = rank < kept
    number = patch.to(tl.int64)
    tl.store(keep + sample * kept + rank, number, mask=inside & stays)
    tl.store(removed + sample * (tokens - kept) + rank - kept, number, mask=inside & (rank >= kept))


def _launch(
    positions: torch.Tensor,
    seed: int,
    stream: str,
    grid: tuple[int, int],
    ratio: float,
    marked_columns: int,
    marked_rows: int,
) -> MaskIds:
    rows, columns = grid
    tokens = rows * columns
    kept = kept_count(tokens, ratio)
    batch = len(positions)
    ids = [positions.new_empty(batch, count) for count in (kept, tokens - kept, tokens)]
    patches = min(32, triton.next_power_of_2(tokens))  # more would spill with triton 3.6
    if batch:
        _mask_kernel[(batch, triton.cdiv(tokens, patches))](
            positions.contiguous(),
            *ids,
            (seed & 0xFFFFFFFF) | (STREAMS[stream] << 32),
            tokens,
            kept,
            rows,
            columns,
            marked_columns,
            marked_rows,
            ROWS=triton.next_power_of_2(rows) if marked_rows else 0,
            COLUMNS=triton.next_power_of_2(columns) if marked_columns else 0,
            PATCHES=patches,
            num_warps=4,
        )
    return MaskIds(*ids)
