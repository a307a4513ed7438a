"""One gradient of query, key and value together, as the product that made all three wants it.

Attention gives three tensors; they are written side by side in one pass, which also adds up the
gradient of the product's bias.
"""

import torch
import triton
import triton.language as tl

from cavmae.kernels.backend import Backend, check_floats, choose_backend, jit
from cavmae.kernels.gelu import ROW_PARTS, TILE_COLUMNS, TILE_ROWS


def pack_rows(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    backend: Backend | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`cat([query, key, value], 2)` and its sum over batch and tokens.

    Bytes moved: everything read and written once.

    Args:
        query, key, value: (batch, tokens, width) float.
        backend: see `cavmae.kernels.backend`.

    Returns:
        (batch, tokens, 3 * width) and (3 * width,).

    Raises:
        ValueError: tensors on different devices, or dtypes that the kernel has not.
    """
    if choose_backend(backend, query=query, key=key, value=value) == "torch":
        packed = torch.cat([query, key, value], dim=2)
        return packed, packed.sum((0, 1))
    check_floats(query=query, key=key, value=value)
    batch, tokens, width = query.shape
    parts = [part.contiguous() for part in (query, key, value)]
    packed = query.new_empty(batch, tokens, 3 * width)
    sums = query.new_empty(ROW_PARTS, 3 * width, dtype=torch.float32)
    rows = batch * tokens
    _pack_kernel[(triton.cdiv(width, TILE_COLUMNS), ROW_PARTS, 3)](
        *parts,
        packed,
        sums,
        rows,
        width,
        triton.cdiv(rows, ROW_PARTS),
        ROWS=TILE_ROWS,
        COLUMNS=TILE_COLUMNS,
        num_warps=4,
    )
    return packed, sums.sum(0).to(query.dtype)


@jit
def _pack_kernel(
    query,
    key,
    value,
    packed,
    sums,
    rows,
    width,
    rows_each,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """One block of columns of one of the three over one part of the rows."""
    part = tl.program_id(1).to(tl.int64)
    third = tl.program_id(2)
    source = query
    if third == 1:
        source = key
    elif third == 2:
        source = value
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    there = column < width
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    end = tl.minimum(rows, (part + 1) * rows_each)
    for begin in range(part * rows_each, end, ROWS):
        row = begin + tl.arange(0, ROWS)
        wanted = (row < end)[:, None] & there[None, :]
        number = tl.load(source + row[:, None] * width + column[None, :], mask=wanted, other=0.0)
        target = row[:, None] * (3 * width) + third * width + column[None, :]
        tl.store(packed + target, number, mask=wanted)
        total += number.to(tl.float32)
    target = sums + part * (3 * width) + third * width + column
    tl.store(target, tl.sum(total, 0), mask=there)
