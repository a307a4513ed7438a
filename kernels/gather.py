"""The tokens that a mask names: (batch, tokens, width) to (batch, kept, width).

Ids are unique in a row, so the gradient is a gather as well: by the inverse ids, with zeros where a
token was not taken. One kernel does both, and every row is written once.
"""

import torch
import triton
import triton.language as tl
from torch.autograd.function import once_differentiable

from cavmae.kernels.backend import Backend, check_floats, check_ids, choose_backend, jit


def gather_tokens(
    x: torch.Tensor, ids: torch.Tensor, *, backend: Backend | None = None
) -> torch.Tensor:
    """`out[b, i] = x[b, ids[b, i]]`.

    Bytes moved: the rows taken, read and written; backward, those rows read and all rows written.

    Args:
        x: (batch, tokens, width) float, any strides.
        ids: (batch, kept) int64, unique in each row.
        backend: see `cavmae.kernels.backend`.

    Returns:
        (batch, kept, width), dtype of `x`.

    Raises:
        ValueError: shapes, dtypes or devices that don't fit; an id out of range (on a GPU: NaN).
    """
    chosen = choose_backend(backend, x=x, ids=ids)
    if x.ndim != 3:
        raise ValueError(f"x has shape {tuple(x.shape)}; it has to be (batch, tokens, width)")
    check_ids("ids", ids, x.shape[0], x.shape[1])
    if chosen == "torch":
        return _reference(x, ids)
    check_floats(x=x)
    return _GatherTokens.apply(x, ids)


def _reference(x: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    return torch.gather(x, 1, ids[:, :, None].expand(-1, -1, x.shape[2]))


@jit
def _gather_kernel(
    x,
    ids,
    out,
    rows,
    taken,
    tokens,
    width,
    x_batch_stride,
    x_token_stride,
    ids_batch_stride,
    missing,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """`out[row] = x[batch, ids[row]]`, `missing` where the id is out of range."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS).to(tl.int64)
    inside = row < rows
    batch, place = row // taken, row % taken
    token = tl.load(ids + batch * ids_batch_stride + place, mask=inside, other=-1)
    there = (token >= 0) & (token < tokens)
    source = x + batch * x_batch_stride + token * x_token_stride
    for first in range(0, width, COLUMNS):
        column = first + tl.arange(0, COLUMNS)
        wanted = inside[:, None] & (column < width)[None, :]
        value = tl.load(source[:, None] + column[None, :], mask=wanted & there[:, None], other=0.0)
        # In float32, because the interpreter of Triton 3.6 has no constants of bf16.
        value = tl.where(there[:, None], value.to(tl.float32), missing)
        tl.store(out + row[:, None] * width + column[None, :], value, mask=wanted)


def _launch(x: torch.Tensor, ids: torch.Tensor, missing: float) -> torch.Tensor:
    x = x if x.stride(2) == 1 else x.contiguous()
    ids = ids if ids.stride(1) == 1 else ids.contiguous()
    batch, tokens, width = x.shape
    out = x.new_empty(batch, ids.shape[1], width)
    rows = batch * ids.shape[1]
    if rows == 0 or width == 0:
        return out
    columns, rows_each = row_tile(x)
    _gather_kernel[(triton.cdiv(rows, rows_each),)](
        x,
        ids,
        out,
        rows,
        ids.shape[1],
        tokens,
        width,
        x.stride(0),
        x.stride(1),
        ids.stride(0),
        missing,
        ROWS=rows_each,
        COLUMNS=columns,
        num_warps=4,
    )
    return out


def row_tile(x: torch.Tensor) -> tuple[int, int]:
    """Columns and rows of a tile for kernels that move rows of `x`: about 8 KiB, so that each of
    128 threads has four loads of 16 bytes under way."""
    columns = min(triton.next_power_of_2(x.shape[-1]), 1024)
    return columns, max(1, 8192 // (columns * x.element_size()))


def inverse_ids(ids: torch.Tensor, tokens: int) -> torch.Tensor:
    """(batch, tokens) int64: the place of each token in `ids`, -1 where it isn't there."""
    place = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
    return torch.full((len(ids), tokens), -1, device=ids.device).scatter_(1, ids, place)


class _GatherTokens(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx.save_for_backward(ids)
        ctx.tokens = x.shape[1]
        return _launch(x, ids, float("nan"))

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: torch.Tensor) -> tuple[torch.Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        (ids,) = ctx.saved_tensors
        return _launch(grad, inverse_ids(ids, ctx.tokens), 0.0), None
