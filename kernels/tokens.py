"""Moving patches and tokens between the full grid and the part of it that is computed.

Masked means not computed: only kept patches are cut out of the input, only removed patches are
predicted.
"""

import torch


def gather_tokens(x: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """The tokens named by `ids`.

    Args:
        x: (batch, tokens, width).
        ids: (batch, kept) int64, unique in each row.

    Returns:
        (batch, kept, width), dtype of `x`.
    """
    return torch.gather(x, 1, ids[:, :, None].expand(-1, -1, x.shape[2]))


def gather_patches(pixels: torch.Tensor, ids: torch.Tensor, patch: int = 16) -> torch.Tensor:
    """The patches named by `ids`, laid out for one matrix product with a convolution's weight.

    Args:
        pixels: (batch, channels, height, width), any strides.
        ids: (batch, kept) int64 patch ids, row-major over the grid of patches.
        patch: side of a patch in pixels; divides height and width.

    Returns:
        (batch, kept, channels, patch, patch), dtype of `pixels`.
    """
    batch, channels, height, width = pixels.shape
    columns = width // patch
    grid = pixels.reshape(batch, channels, height // patch, patch, columns, patch)
    sample = torch.arange(batch, device=pixels.device)[:, None]
    # Advanced indices around slices come first: (batch, kept, channels, patch, patch).
    return grid[sample, :, ids // columns, :, ids % columns, :]


def restore_tokens(
    x: torch.Tensor,
    restore_ids: torch.Tensor,
    mask_token: torch.Tensor,
    position: torch.Tensor,
    modality: torch.Tensor,
) -> torch.Tensor:
    """All tokens in their original order, mask tokens where patches were removed.

    Args:
        x: (batch, kept, width) kept tokens in mask order.
        restore_ids: (batch, tokens) int64, place of each patch among kept then removed ones.
        mask_token: (1, 1, width).
        position: (1, tokens, width) position table.
        modality: (1, 1, width) vector of the modality.

    Returns:
        (batch, tokens, width), dtype of `x`.
    """
    batch, kept, width = x.shape
    removed = restore_ids.shape[1] - kept
    full = torch.cat([x, mask_token.to(x.dtype).expand(batch, removed, width)], 1)
    return gather_tokens(full, restore_ids) + position + modality


def masked_reconstruction_loss(
    predicted: torch.Tensor,
    pixels: torch.Tensor,
    ids: torch.Tensor,
    norm_pix: bool,
    patch: int = 16,
) -> torch.Tensor:
    """Mean squared error over the removed patches (paper equation 2), computed in float32.

    Args:
        predicted: (batch, removed, patch * patch * channels), each patch ordered row, column,
            channel.
        pixels: (batch, channels, height, width).
        ids: (batch, removed) int64 patch ids of the predictions.
        norm_pix: compare with patches of mean 0 and unbiased variance 1.

    Returns:
        Scalar float32.
    """
    target = gather_patches(pixels, ids, patch).float()  # (batch, removed, channels, row, column)
    target = target.permute(0, 1, 3, 4, 2).flatten(2)  # (batch, removed, row * column * channel)
    if norm_pix:
        variance, mean = torch.var_mean(target, dim=-1, keepdim=True)
        target = (target - mean) / (variance + 1e-6).sqrt()
    return (predicted.float() - target).square().mean()
