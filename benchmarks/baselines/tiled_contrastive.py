"""The public tiled method for a contrastive loss whose similarity matrix doesn't fit: a baseline.

Our own rendering of the method of Inf-CL (Cheng et al., "Breaking the Memory Barrier", 2024); its
code was consulted, none of it copied. As there: embeddings are copied to float32 and normalised, a
tile is 64 x 64, each direction has a forward pass of its own with an online log-sum-exp, and two
backward passes, one for either side, that add into float32 gradients in memory. There, as Triton
does unless told otherwise, products of float32 are computed in TF32: `precision="tf32"`.
"""

from typing import Any, Literal

import torch
import torch.nn.functional as F
import triton
import triton.language as tl

from cavmae.kernels.backend import Backend, choose_backend, jit

BLOCK = tl.constexpr(64)
STEP = tl.constexpr(64)
"""Columns of the width at a time."""

Precision = Literal["ieee", "tf32"]


def tiled_contrastive_loss(
    audio: torch.Tensor,
    video: torch.Tensor,
    temperature: float,
    *,
    precision: Precision | None = None,
    backend: Backend | None = None,
) -> torch.Tensor:
    """Bidirectional contrastive loss: two passes forward, four backward, of two products each.

    Args:
        audio: (batch, width) float.
        video: (batch, width), same dtype; its row i is the positive of row i of `audio`.
        temperature: divides the cosine similarities.
        precision: of the products in Triton; None: TF32 where
            `torch.backends.cuda.matmul.allow_tf32`, which also rules the torch rendering.
        backend: Triton for CUDA tensors, a plain torch rendering of the same tiles for CPU ones.

    Returns:
        Scalar float32 (float64 for float64 input, torch only).

    Raises:
        ValueError: a backend that can't be met.
    """
    chosen = choose_backend(backend, audio=audio, video=video)
    if precision is None:
        precision = "tf32" if torch.backends.cuda.matmul.allow_tf32 else "ieee"
    exact = torch.promote_types(audio.dtype, torch.float32)
    audio, video = (F.normalize(x.to(exact), dim=1).contiguous() for x in (audio, video))
    method = chosen, precision
    by_video = _TiledDirection.apply(video, audio, 1 / temperature, method)
    by_audio = _TiledDirection.apply(audio, video, 1 / temperature, method)
    return (by_video + by_audio) / 2


class _TiledDirection(torch.autograd.Function):
    """Mean over rows of `logsumexp over columns - positive`, for unit vectors."""

    @staticmethod
    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any,
        rows: torch.Tensor,
        columns: torch.Tensor,
        scale: float,
        method: tuple[Backend, Precision],
    ) -> torch.Tensor:
        backend, precision = method
        if backend == "triton":
            log_sums = _launch_log_sums(rows, columns, scale, precision)
        else:
            log_sums = _torch_log_sums(rows, columns, scale)
        ctx.save_for_backward(rows, columns, log_sums)
        ctx.scale, ctx.method = scale, method
        return (log_sums - (rows * columns).sum(1) * scale).mean()

    @staticmethod
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, grad_loss: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, None, None]:
        rows, columns, log_sums = ctx.saved_tensors
        backend, precision = ctx.method
        gradients = []
        for by_row, (first, second) in ((True, (rows, columns)), (False, (columns, rows))):
            if backend == "triton":
                grad = _launch_gradient(first, second, log_sums, ctx.scale, by_row, precision)
            else:
                grad = _torch_gradient(first, second, log_sums, ctx.scale, by_row)
            # The positive's part is a vector's business and no tile's.
            gradients.append((grad - second) * (grad_loss * ctx.scale / len(rows)))
        return gradients[0], gradients[1], None, None


@jit
def _scores(rows, columns, row, column, count, width, scale, PRECISION: tl.constexpr):
    """(BLOCK, BLOCK) similarities of unit vectors, -inf beyond the last column."""
    total = tl.zeros((BLOCK, BLOCK), tl.float32)
    for first in range(0, width, STEP):
        place = first + tl.arange(0, STEP)
        inside = (place < width)[None, :]
        source = rows + row.to(tl.int64)[:, None] * width + place[None, :]
        a = tl.load(source, mask=(row < count)[:, None] & inside, other=0.0)
        source = columns + column.to(tl.int64)[:, None] * width + place[None, :]
        b = tl.load(source, mask=(column < count)[:, None] & inside, other=0.0)
        total = tl.dot(a, tl.trans(b), total, input_precision=PRECISION)
    return tl.where((column < count)[None, :], total * scale, float("-inf"))


@jit
def _log_sum_kernel(rows, columns, log_sums, count, width, scale, PRECISION: tl.constexpr):
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    top = tl.full((BLOCK,), -1e30, tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    for first in range(0, count, BLOCK):
        column = first + tl.arange(0, BLOCK)
        s = _scores(rows, columns, row, column, count, width, scale, PRECISION)
        new_top = tl.maximum(top, tl.max(s, 1))
        total = total * tl.exp(top - new_top) + tl.sum(tl.exp(s - new_top[:, None]), 1)
        top = new_top
    tl.store(log_sums + row, top + tl.log(total), mask=row < count)


@jit
def _gradient_kernel(
    rows,
    columns,
    log_sums,
    grad,
    count,
    width,
    scale,
    BY_ROW: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Adds softmax weights times columns; the softmax is over columns (BY_ROW) or over rows."""
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    log_sum = tl.load(log_sums + row, mask=row < count, other=0.0)
    for first in range(0, count, BLOCK):
        column = first + tl.arange(0, BLOCK)
        s = _scores(rows, columns, row, column, count, width, scale, PRECISION)
        if BY_ROW:
            weight = tl.exp(s - log_sum[:, None])
        else:
            of_column = tl.load(log_sums + column, mask=column < count, other=0.0)
            weight = tl.exp(s - of_column[None, :])
        for start in range(0, width, STEP):
            place = start + tl.arange(0, STEP)
            inside = (place < width)[None, :]
            source = columns + column.to(tl.int64)[:, None] * width + place[None, :]
            b = tl.load(source, mask=(column < count)[:, None] & inside, other=0.0)
            target = grad + row.to(tl.int64)[:, None] * width + place[None, :]
            wanted = (row < count)[:, None] & inside
            before = tl.load(target, mask=wanted, other=0.0)
            part = tl.dot(weight, b, input_precision=PRECISION)
            tl.store(target, before + part, mask=wanted)
        tl.debug_barrier()  # the next tile adds to what this one stored


def _launch_log_sums(
    rows: torch.Tensor, columns: torch.Tensor, scale: float, precision: Precision
) -> torch.Tensor:
    count, width = rows.shape
    log_sums = rows.new_empty(count)
    _log_sum_kernel[(triton.cdiv(count, BLOCK.value),)](
        rows, columns, log_sums, count, width, scale, PRECISION=precision, num_warps=8
    )
    return log_sums


def _launch_gradient(
    rows: torch.Tensor,
    columns: torch.Tensor,
    log_sums: torch.Tensor,
    scale: float,
    by_row: bool,
    precision: Precision,
) -> torch.Tensor:
    count, width = rows.shape
    grad = torch.zeros_like(rows)
    _gradient_kernel[(triton.cdiv(count, BLOCK.value),)](
        rows,
        columns,
        log_sums,
        grad,
        count,
        width,
        scale,
        BY_ROW=by_row,
        PRECISION=precision,
        num_warps=8,
    )
    return grad


def _torch_log_sums(rows: torch.Tensor, columns: torch.Tensor, scale: float) -> torch.Tensor:
    found = []
    for block in rows.split(BLOCK.value):
        top = torch.full_like(block[:, 0], -torch.inf)
        total = torch.zeros_like(top)
        for others in columns.split(BLOCK.value):
            s = block @ others.T * scale
            new_top = torch.maximum(top, s.amax(1))
            total = total * (top - new_top).exp() + (s - new_top[:, None]).exp().sum(1)
            top = new_top
        found.append(top + total.log())
    return torch.cat(found)


def _torch_gradient(
    rows: torch.Tensor, columns: torch.Tensor, log_sums: torch.Tensor, scale: float, by_row: bool
) -> torch.Tensor:
    grad = torch.zeros_like(rows)
    for block, own, target in zip(
        rows.split(BLOCK.value), log_sums.split(BLOCK.value), grad.split(BLOCK.value), strict=True
    ):
        for others, theirs in zip(
            columns.split(BLOCK.value), log_sums.split(BLOCK.value), strict=True
        ):
            shift = own[:, None] if by_row else theirs[None, :]
            target += (block @ others.T * scale - shift).exp() @ others
    return grad
