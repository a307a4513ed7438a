"""The public tiled method for a contrastive loss whose similarity matrix doesn't fit: the baseline.

Our own rendering in Triton of the method of Inf-CL (Cheng et al., "Breaking the Memory Barrier",
2024); its code was consulted, none of it copied. As there: tiles in float32, one pass over the
tiles for each direction, and for the gradients two further passes for each direction, one for
either side, that add into float32 gradients in memory.
"""

from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl

from cavmae.kernels.backend import jit

BLOCK = 64
STEP = 32


@jit
def _scores(
    rows, columns, row, column, count, width, scale, BLOCK: tl.constexpr, STEP: tl.constexpr
):
    """(BLOCK, BLOCK) similarities of unit vectors, -inf beyond the last column."""
    total = tl.zeros((BLOCK, BLOCK), tl.float32)
    for first in range(0, width, STEP):
        place = first + tl.arange(0, STEP)
        inside = place < width
        a = tl.load(
            rows + row[:, None] * width + place[None, :],
            mask=(row < count)[:, None] & inside[None, :],
            other=0.0,
        ).to(tl.float32)
        b = tl.load(
            columns + column[None, :] * width + place[:, None],
            mask=(column < count)[None, :] & inside[:, None],
            other=0.0,
        ).to(tl.float32)
        total = tl.dot(a, b, total, input_precision="ieee")
    return tl.where((column < count)[None, :], total * scale, float("-inf"))


@jit
def _forward_kernel(
    rows, columns, log_sums, count, width, scale, BLOCK: tl.constexpr, STEP: tl.constexpr
):
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    top = tl.full((BLOCK,), -1e30, tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    for first in range(0, count, BLOCK):
        column = first + tl.arange(0, BLOCK)
        s = _scores(rows, columns, row, column, count, width, scale, BLOCK, STEP)
        new_top = tl.maximum(top, tl.max(s, 1))
        total = total * tl.exp(top - new_top) + tl.sum(tl.exp(s - new_top[:, None]), 1)
        top = new_top
    tl.store(log_sums + row, top + tl.log(total), mask=row < count)


@jit
def _backward_kernel(
    rows,
    columns,
    row_log_sums,
    column_log_sums,
    grad,
    count,
    width,
    scale,
    BY_ROW: tl.constexpr,
    BLOCK: tl.constexpr,
    STEP: tl.constexpr,
):
    """Adds the gradient of the rows: of their own softmax, or of the columns'."""
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    log_sum = tl.load(row_log_sums + row, mask=row < count, other=0.0)
    for first in range(0, count, BLOCK):
        column = first + tl.arange(0, BLOCK)
        s = _scores(rows, columns, row, column, count, width, scale, BLOCK, STEP)
        if not BY_ROW:
            log_sum = tl.load(column_log_sums + column, mask=column < count, other=0.0)
        shift = log_sum[:, None] if BY_ROW else log_sum[None, :]
        weight = tl.exp(s - shift) - (row[:, None] == column[None, :]).to(tl.float32)
        weight = tl.where((column < count)[None, :], weight, 0.0)
        for start in range(0, width, STEP):
            place = start + tl.arange(0, STEP)
            inside = place < width
            b = tl.load(
                columns + column[:, None] * width + place[None, :],
                mask=(column < count)[:, None] & inside[None, :],
                other=0.0,
            ).to(tl.float32)
            target = grad + row[:, None] * width + place[None, :]
            wanted = (row < count)[:, None] & inside[None, :]
            sum_so_far = tl.load(target, mask=wanted, other=0.0)
            part = tl.dot(weight, b, input_precision="ieee")
            tl.store(target, sum_so_far + part, mask=wanted)
        tl.debug_barrier()


class _TiledDirection(torch.autograd.Function):
    """Mean over rows of `logsumexp over columns - partner`, for unit vectors."""

    @staticmethod
    def forward(ctx: Any, rows: torch.Tensor, columns: torch.Tensor, scale: float) -> torch.Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        count, width = rows.shape
        log_sums = rows.new_empty(count, dtype=torch.float32)
        grid = (triton.cdiv(count, BLOCK),)
        _forward_kernel[grid](rows, columns, log_sums, count, width, scale, BLOCK=BLOCK, STEP=STEP)
        ctx.save_for_backward(rows, columns, log_sums)
        ctx.scale = scale
        partner = (rows.float() * columns.float()).sum(1) * scale
        return (log_sums - partner).mean()

    @staticmethod
    def backward(ctx: Any, grad_loss: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        rows, columns, log_sums = ctx.saved_tensors
        count, width = rows.shape
        grid = (triton.cdiv(count, BLOCK),)
        gradients = []
        for by_row, (first, second) in ((True, (rows, columns)), (False, (columns, rows))):
            grad = torch.zeros_like(first, dtype=torch.float32)
            _backward_kernel[grid](
                first,
                second,
                log_sums,
                log_sums,
                grad,
                count,
                width,
                ctx.scale,
                BY_ROW=by_row,
                BLOCK=BLOCK,
                STEP=STEP,
            )
            gradients.append((grad * (grad_loss * ctx.scale / count)).to(first.dtype))
        return gradients[0], gradients[1], None


def tiled_contrastive_loss(
    audio: torch.Tensor, video: torch.Tensor, temperature: float
) -> torch.Tensor:
    """Bidirectional contrastive loss; two passes forward, four backward.

    Args:
        audio: (batch, width) float on a CUDA device (or a CPU under Triton's interpreter).
        video: (batch, width).
        temperature: divides the cosine similarities.
    """
    audio, video = (F.normalize(x, dim=1).contiguous() for x in (audio, video))
    by_video = _TiledDirection.apply(video, audio, 1 / temperature)
    by_audio = _TiledDirection.apply(audio, video, 1 / temperature)
    return (by_video + by_audio) / 2
