"""Patches cut straight out of an image or a spectrogram, for one matrix product.

A convolution with stride 16 over everything, and a gather after it, reads and multiplies the
patches that the mask throws away: three of four. Here they are never read.
"""

import torch
import triton
import triton.language as tl

from cavmae.kernels.backend import FLOATS, Backend, check_ids, choose_backend, jit


def gather_patches(
    pixels: torch.Tensor,
    ids: torch.Tensor,
    patch: int = 16,
    *,
    mean: torch.Tensor | None = None,
    std: torch.Tensor | None = None,
    dtype: torch.dtype | None = None,
    backend: Backend | None = None,
) -> torch.Tensor:
    """The patches named by `ids`, each flattened as a convolution's weight is.

    Times `weight.flatten(1).T` they are what the convolution with `stride=patch` gives there.
    Bytes moved: the pixels of the patches taken, read and written.

    Args:
        pixels: (batch, channels, height, width) float or uint8, any strides.
        ids: (batch, kept) int64 patch ids, row-major over the grid of patches.
        patch: side of a patch in pixels; divides height and width.
        mean, std: (channels,) float32 in units of the pixels; the result is
            `(pixel - mean) / std`, computed in float32. Both or neither.
        dtype: of the result; None: that of float pixels, float32 for uint8.
        backend: see `cavmae.kernels.backend`.

    Returns:
        (batch, kept, channels * patch * patch). The Triton kernel has no gradient for pixels.

    Raises:
        ValueError: shapes, dtypes or devices that don't fit; an id out of range (on a GPU: NaN);
            pixels that want a gradient from the Triton kernel.
    """
    statistics = {"mean": mean, "std": std}
    given = {name: tensor for name, tensor in statistics.items() if tensor is not None}
    chosen = choose_backend(backend, pixels=pixels, ids=ids, **given)
    check_pixels(pixels, patch)
    channels, height, width = pixels.shape[1:]
    check_ids("ids", ids, pixels.shape[0], (height // patch) * (width // patch))
    if (mean is None) != (std is None):
        raise ValueError("mean and std go together; give both or neither")
    for name, statistic in given.items():
        if statistic.shape != (channels,):
            raise ValueError(
                f"{name} has shape {tuple(statistic.shape)}; it has to be ({channels},), one for "
                "each channel of pixels"
            )
    dtype = dtype or (pixels.dtype if pixels.is_floating_point() else torch.float32)
    if chosen == "torch":
        return _reference(pixels, ids, patch, mean, std, dtype)
    if pixels.requires_grad:
        raise ValueError("pixels want a gradient, which the kernel has not; use backend='torch'")
    if dtype not in FLOATS or pixels.dtype not in (*FLOATS, torch.uint8):
        raise ValueError(
            f"pixels are {pixels.dtype} and dtype is {dtype}; the Triton kernel takes float32, "
            "bfloat16, float16 and uint8 pixels and gives the first three"
        )
    return _launch(pixels, ids, patch, mean, std, dtype)


def check_pixels(pixels: torch.Tensor, patch: int) -> None:
    """Refuse pixels that `patch` does not divide.

    Raises:
        ValueError: names the argument and its shape.
    """
    if pixels.ndim != 4 or patch < 1 or pixels.shape[2] % patch or pixels.shape[3] % patch:
        raise ValueError(
            f"pixels have shape {tuple(pixels.shape)} and patch is {patch}; pixels have to be "
            "(batch, channels, height, width), with height and width multiples of patch"
        )


def patches_of(pixels: torch.Tensor, ids: torch.Tensor, patch: int) -> torch.Tensor:
    """(batch, kept, channels, patch, patch): the torch reference, before it is laid out."""
    batch, channels, height, width = pixels.shape
    columns = width // patch
    grid = pixels.reshape(batch, channels, height // patch, patch, columns, patch)
    sample = torch.arange(batch, device=pixels.device)[:, None]
    # Advanced indices around slices come first.
    return grid[sample, :, ids // columns, :, ids % columns, :]


def _reference(
    pixels: torch.Tensor,
    ids: torch.Tensor,
    patch: int,
    mean: torch.Tensor | None,
    std: torch.Tensor | None,
    dtype: torch.dtype,
) -> torch.Tensor:
    patches = patches_of(pixels, ids, patch)
    if mean is not None and std is not None:
        exact = torch.promote_types(torch.float32, dtype)
        shift, scale = (x.to(exact)[:, None, None] for x in (mean, std))
        patches = (patches.to(exact) - shift) / scale
    return patches.to(dtype).flatten(2)


@jit
def _patch_kernel(
    pixels,
    ids,
    mean,
    std,
    out,
    rows,
    kept,
    patches,
    columns,
    batch_stride,
    channel_stride,
    height_stride,
    width_stride,
    ids_batch_stride,
    CHANNELS: tl.constexpr,
    PATCH: tl.constexpr,
    SIDE: tl.constexpr,
    ROWS: tl.constexpr,
    NORMALISE: tl.constexpr,
):
    """ROWS patches of one channel after the other; SIDE is a power of two from PATCH on.

    Rows and columns of a patch are dimensions of their own, so that pixels are loaded along the one
    whose pixels lie side by side in memory (an image's columns, a spectrogram's rows) and stored
    along columns.
    """
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS).to(tl.int64)[:, None, None]
    inside = row < rows
    batch = row // kept
    token = tl.load(ids + batch * ids_batch_stride + row % kept, mask=inside, other=-1)
    there = (token >= 0) & (token < patches)
    corner = pixels + batch * batch_stride
    corner += (token // columns) * PATCH * height_stride + (token % columns) * PATCH * width_stride
    down, across = tl.arange(0, SIDE)[None, :, None], tl.arange(0, SIDE)[None, None, :]
    offset = down * height_stride + across * width_stride
    wanted = inside & (down < PATCH) & (across < PATCH)
    for channel in tl.static_range(CHANNELS):  # pyright: ignore[reportGeneralTypeIssues]
        source = corner + channel * channel_stride
        value = tl.load(source + offset, mask=wanted & there, other=0).to(tl.float32)
        if NORMALISE:
            value = (value - tl.load(mean + channel)) / tl.load(std + channel)
        value = tl.where(there, value, float("nan"))
        target = row * (CHANNELS * PATCH * PATCH) + channel * (PATCH * PATCH)
        tl.store(out + target + down * PATCH + across, value, mask=wanted)


def _launch(
    pixels: torch.Tensor,
    ids: torch.Tensor,
    patch: int,
    mean: torch.Tensor | None,
    std: torch.Tensor | None,
    dtype: torch.dtype,
) -> torch.Tensor:
    ids = ids if ids.stride(1) == 1 else ids.contiguous()
    batch, channels, height, width = pixels.shape
    kept = ids.shape[1]
    out = pixels.new_empty(batch, kept, channels * patch * patch, dtype=dtype)
    rows, side = batch * kept, triton.next_power_of_2(patch)
    if rows == 0:
        return out
    rows_each = max(1, 2048 // side**2)
    _patch_kernel[(triton.cdiv(rows, rows_each),)](
        pixels,
        ids,
        out if mean is None else mean.to(torch.float32).contiguous(),
        out if std is None else std.to(torch.float32).contiguous(),
        out,
        rows,
        kept,
        (height // patch) * (width // patch),
        width // patch,
        *pixels.stride(),
        ids.stride(0),
        CHANNELS=channels,
        PATCH=patch,
        SIDE=side,
        ROWS=rows_each,
        NORMALISE=mean is not None,
        num_warps=4,
    )
    return out
