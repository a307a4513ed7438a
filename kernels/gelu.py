"""The gradient of the GELU between two linear layers, in one pass over its input.

The pass gives everything that the products around it want: the activation again, for the gradient
of the second layer's weight, and the gradient of the first layer's output with its sum over the
rows, which is that of the first layer's bias.
"""

import torch
import torch.nn.functional as F
import triton
import triton.language as tl

from cavmae.kernels.backend import Backend, check_floats, choose_backend, jit

ROW_PARTS = 128
"""Parts of the rows whose sums are added up apart, each a vector of the width in float32."""
TILE_ROWS, TILE_COLUMNS = 8, 256
"""A row of a tile is 512 bytes of 16-bit values: one load of 16 bytes for each thread of a warp."""


def gelu_backward(
    x: torch.Tensor,
    grad: torch.Tensor,
    *,
    give_activation: bool,
    backend: Backend | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Gradients of `gelu(x)`, where the last step before was to add a bias.

    Bytes moved: `x` and `grad` read; the gradient of `x` written, and the activation if it is asked
    for.

    Args:
        x: (rows, width) float.
        grad: (rows, width) gradient of `gelu(x)`.
        give_activation: whether `gelu(x)` is wanted.
        backend: see `cavmae.kernels.backend`.

    Returns:
        (rows, width) gradient of `x`; (width,) its sum over the rows; (rows, width) `gelu(x)` or
        None.

    Raises:
        ValueError: tensors on different devices, or dtypes that the kernel has not.
    """
    if choose_backend(backend, x=x, grad=grad) == "torch":
        of_x = torch.ops.aten.gelu_backward(grad, x)
        return of_x, of_x.sum(0), F.gelu(x) if give_activation else None
    check_floats(x=x, grad=grad)
    x, grad = x.contiguous(), grad.contiguous()
    rows, width = x.shape
    of_x = torch.empty_like(x)
    activation = torch.empty_like(x) if give_activation else None
    sums = x.new_empty(ROW_PARTS, width, dtype=torch.float32)
    _gelu_backward_kernel[(triton.cdiv(width, TILE_COLUMNS), ROW_PARTS)](
        x,
        grad,
        of_x,
        sums if activation is None else activation,
        sums,
        rows,
        width,
        triton.cdiv(rows, ROW_PARTS),
        ROWS=TILE_ROWS,
        COLUMNS=TILE_COLUMNS,
        GIVE_ACTIVATION=give_activation,
        num_warps=4,
    )
    return of_x, sums.sum(0).to(x.dtype), activation


@jit
def _gelu_backward_kernel(
    x,
    grad,
    of_x,
    activation,
    sums,
    rows,
    width,
    rows_each,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    GIVE_ACTIVATION: tl.constexpr,
):
    """One block of columns over one part of the rows."""
    part = tl.program_id(1).to(tl.int64)
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    there = column < width
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    end = tl.minimum(rows, (part + 1) * rows_each)
    for begin in range(part * rows_each, end, ROWS):
        row = begin + tl.arange(0, ROWS)
        wanted = (row < end)[:, None] & there[None, :]
        place = row[:, None] * width + column[None, :]
        value = tl.load(x + place, mask=wanted, other=0.0).to(tl.float32)
        slope = tl.load(grad + place, mask=wanted, other=0.0).to(tl.float32)
        below = 0.5 + 0.5 * tl.erf(value * 0.7071067811865476)  # the normal distribution's share
        if GIVE_ACTIVATION:
            tl.store(activation + place, value * below, mask=wanted)
        density = tl.exp(-0.5 * value * value) * 0.3989422804014327
        slope *= below + value * density
        tl.store(of_x + place, slope, mask=wanted)
        total += slope
    tl.store(sums + part * width + column, tl.sum(total, 0), mask=there)
