"""Masked reconstruction (paper equation 2): targets are read from the pixels when they are wanted.

No tensor of patch targets exists. The forward pass reads predictions and pixels and leaves one sum
per program, the backward pass reads them again and writes the gradient.
"""

import torch
import triton
import triton.language as tl
from torch.autograd.function import once_differentiable

from cavmae.kernels.backend import Backend, check_floats, check_ids, choose_backend, jit
from cavmae.kernels.patches import check_pixels, patches_of

EPSILON = 1e-6
"""Added to a patch's variance, as published."""


def masked_reconstruction_loss(
    predicted: torch.Tensor,
    pixels: torch.Tensor,
    ids: torch.Tensor,
    norm_pix: bool,
    patch: int = 16,
    *,
    backend: Backend | None = None,
) -> torch.Tensor:
    """Mean squared error over the removed patches, computed in float32.

    Bytes moved: predictions and the pixels of removed patches read; backward, the same and the
    gradient written.

    Args:
        predicted: (batch, removed, patch * patch * channels) float, each patch ordered row, column,
            channel.
        pixels: (batch, channels, height, width) float, any strides; has no gradient in the kernel.
        ids: (batch, removed) int64 patch ids of the predictions.
        norm_pix: compare with patches of mean 0 and unbiased variance 1.
        patch: side of a patch in pixels; divides height and width.
        backend: see `cavmae.kernels.backend`.

    Returns:
        Scalar float32 (float64 for float64 input).

    Raises:
        ValueError: shapes, dtypes or devices that don't fit; an id out of range (on a GPU: NaN);
            pixels that want a gradient from the Triton kernel.
    """
    chosen = choose_backend(backend, predicted=predicted, pixels=pixels, ids=ids)
    check_pixels(pixels, patch)
    batch, channels, height, width = pixels.shape
    check_ids("ids", ids, batch, (height // patch) * (width // patch))
    expected = (batch, ids.shape[1], patch * patch * channels)
    if tuple(predicted.shape) != expected:
        raise ValueError(
            f"predicted has shape {tuple(predicted.shape)}; for these pixels, ids and patch it has "
            f"to be {expected}"
        )
    if ids.numel() == 0:
        raise ValueError("ids names no patch; a mask that removes nothing leaves nothing to learn")
    if chosen == "torch":
        return _reference(predicted, pixels, ids, norm_pix, patch)
    check_floats(predicted=predicted, pixels=pixels)
    if pixels.requires_grad:
        raise ValueError("pixels want a gradient, which the kernel has not; use backend='torch'")
    return _MaskedReconstruction.apply(predicted, pixels, ids, norm_pix, patch)


def _reference(
    predicted: torch.Tensor, pixels: torch.Tensor, ids: torch.Tensor, norm_pix: bool, patch: int
) -> torch.Tensor:
    exact = torch.promote_types(torch.float32, predicted.dtype)
    target = patches_of(pixels, ids, patch).to(exact)  # (batch, removed, channels, row, column)
    target = target.permute(0, 1, 3, 4, 2).flatten(2)  # (batch, removed, row * column * channel)
    if norm_pix:
        variance, mean = torch.var_mean(target, dim=-1, keepdim=True)
        target = (target - mean) / (variance + EPSILON).sqrt()
    return (predicted.to(exact) - target).square().mean()


@jit
def _reconstruction_kernel(
    predicted,
    pixels,
    ids,
    out,
    scale,
    rows,
    removed,
    patches,
    columns,
    predicted_batch_stride,
    predicted_row_stride,
    batch_stride,
    channel_stride,
    height_stride,
    width_stride,
    CHANNELS: tl.constexpr,
    PATCH: tl.constexpr,
    VALUES: tl.constexpr,
    ROWS: tl.constexpr,
    NORM_PIX: tl.constexpr,
    EPSILON_: tl.constexpr,
    GRADIENT: tl.constexpr,
    ROWS_LIE_TOGETHER: tl.constexpr,
):
    """Prediction minus target of ROWS patches: the sum of its squares, or `scale` times itself.

    VALUES is a power of two from the values of a patch on. Pixels are loaded in the order in which
    they lie in memory: channel by channel, and in each along columns, or along rows where those lie
    side by side. They are put into the order of the prediction afterwards.
    """
    count: tl.constexpr = PATCH * PATCH * CHANNELS
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS).to(tl.int64)
    inside = row < rows
    batch = row // removed
    token = tl.load(ids + row, mask=inside, other=-1)
    there = (token >= 0) & (token < patches)
    value = tl.arange(0, VALUES)
    wanted = inside[:, None] & (value < count)[None, :]
    channel, slow, fast = value // (PATCH * PATCH), value // PATCH % PATCH, value % PATCH
    down, across = (fast, slow) if ROWS_LIE_TOGETHER else (slow, fast)
    offset = channel * channel_stride + down * height_stride + across * width_stride
    corner = pixels + batch * batch_stride
    corner += (token // columns) * PATCH * height_stride + (token % columns) * PATCH * width_stride
    target = tl.load(corner[:, None] + offset[None, :], mask=wanted & there[:, None], other=0.0)
    target = target.to(tl.float32)
    if NORM_PIX:
        mean = tl.sum(target, 1) / count
        centred = tl.where(wanted, target - mean[:, None], 0.0)
        variance = tl.sum(centred * centred, 1) / (count - 1)
        target = centred / tl.sqrt(variance + EPSILON_)[:, None]
    pixel = value // CHANNELS  # the prediction's order is row, column, channel
    if ROWS_LIE_TOGETHER:
        pixel = pixel % PATCH * PATCH + pixel // PATCH
    place = tl.minimum(value % CHANNELS * (PATCH * PATCH) + pixel, VALUES - 1)
    target = tl.gather(target, tl.broadcast_to(place[None, :], (ROWS, VALUES)), 1)
    target = tl.where(there[:, None], target, float("nan"))
    source = predicted + batch * predicted_batch_stride + row % removed * predicted_row_stride
    guess = tl.load(source[:, None] + value[None, :], mask=wanted, other=0.0).to(tl.float32)
    difference = tl.where(wanted, guess - target, 0.0)
    if GRADIENT:
        place = row[:, None] * count + value[None, :]
        tl.store(out + place, difference * tl.load(scale), mask=wanted)
    else:
        tl.store(out + tl.program_id(0), tl.sum(tl.sum(difference * difference, 1), 0))


def _launch(
    predicted: torch.Tensor,
    pixels: torch.Tensor,
    ids: torch.Tensor,
    norm_pix: bool,
    patch: int,
    scale: torch.Tensor | None,
) -> torch.Tensor:
    """The gradient for a `scale`; without one, a sum of squares of each program."""
    channels, height, width = pixels.shape[1:]
    values = triton.next_power_of_2(patch * patch * channels)
    rows, rows_each = ids.numel(), max(1, 2048 // values)
    programs = triton.cdiv(rows, rows_each)
    if scale is None:
        out = predicted.new_empty(programs, dtype=torch.float32)
    else:
        out = predicted.new_empty(predicted.shape)
    _reconstruction_kernel[(programs,)](
        predicted,
        pixels,
        ids,
        out,
        out if scale is None else scale,
        rows,
        ids.shape[1],
        (height // patch) * (width // patch),
        width // patch,
        predicted.stride(0),
        predicted.stride(1),
        *pixels.stride(),
        CHANNELS=channels,
        PATCH=patch,
        VALUES=values,
        ROWS=rows_each,
        NORM_PIX=norm_pix,
        EPSILON_=EPSILON,
        GRADIENT=scale is not None,
        ROWS_LIE_TOGETHER=pixels.stride(2) == 1,
        num_warps=4,
    )
    return out


class _MaskedReconstruction(torch.autograd.Function):
    @staticmethod
    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx,
        predicted: torch.Tensor,
        pixels: torch.Tensor,
        ids: torch.Tensor,
        norm_pix: bool,
        patch: int,
    ) -> torch.Tensor:
        predicted = predicted if predicted.stride(2) == 1 else predicted.contiguous()
        ids = ids.contiguous()
        ctx.save_for_backward(predicted, pixels, ids)
        ctx.norm_pix, ctx.patch = norm_pix, patch
        sums = _launch(predicted, pixels, ids, norm_pix, patch, None)
        return sums.sum() / predicted.numel()

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx, grad_loss: torch.Tensor
    ) -> tuple[torch.Tensor, None, None, None, None]:
        predicted, pixels, ids = ctx.saved_tensors
        scale = grad_loss.float() * (2 / predicted.numel())
        grad = _launch(predicted, pixels, ids, ctx.norm_pix, ctx.patch, scale)
        return grad, None, None, None, None
