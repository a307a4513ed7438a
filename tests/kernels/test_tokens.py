"""Gathering, restoring and the reconstruction loss, against the whole-grid way of saying it."""

import pytest
import torch
import torch.nn.functional as F

from cavmae.kernels import (
    gather_patches,
    gather_tokens,
    mask_ids_from_shuffle,
    masked_reconstruction_loss,
    restore_tokens,
)


def shuffles(batch: int, tokens: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.stack([torch.randperm(tokens, generator=generator) for _ in range(batch)])


def test_gathered_patches_times_the_kernel_are_the_convolution() -> None:
    pixels = torch.randn(2, 3, 32, 48, dtype=torch.float64)
    weight = torch.randn(5, 3, 16, 16, dtype=torch.float64)
    ids = shuffles(2, 6)[:, :4]
    whole = F.conv2d(pixels, weight, stride=16).flatten(2).transpose(1, 2)
    gathered = gather_patches(pixels, ids).flatten(2) @ weight.flatten(1).T
    torch.testing.assert_close(gathered, gather_tokens(whole, ids))


def test_patches_of_a_transposed_image_are_read_through_its_strides() -> None:
    pixels = torch.randn(2, 1, 64, 32)
    ids = shuffles(2, 8)
    turned = pixels.transpose(2, 3)
    assert torch.equal(gather_patches(turned, ids), gather_patches(turned.contiguous(), ids))


def test_the_gradient_of_a_gather_is_written_once_and_zero_elsewhere() -> None:
    x = torch.randn(2, 6, 3, requires_grad=True)
    ids = shuffles(2, 6)[:, :2]
    gather_tokens(x, ids).sum().backward()
    expected = torch.zeros(2, 6).scatter(1, ids, 1.0)[:, :, None].expand(-1, -1, 3)
    assert x.grad is not None and torch.equal(x.grad, expected)


def test_restored_tokens_stand_where_they_were_and_mask_tokens_elsewhere() -> None:
    mask = mask_ids_from_shuffle(shuffles(2, 6), 0.5)
    tokens = torch.randn(2, 6, 4)
    mask_token, modality = torch.randn(1, 1, 4), torch.randn(1, 1, 4)
    position = torch.randn(1, 6, 4)
    kept = gather_tokens(tokens, mask.keep)
    restored = restore_tokens(kept, mask.restore, mask_token, position, modality)
    plain = restored - position - modality
    torch.testing.assert_close(gather_tokens(plain, mask.keep), kept)
    torch.testing.assert_close(
        gather_tokens(plain, mask.removed), mask_token.expand(2, 3, 4), atol=1e-5, rtol=1e-5
    )


@pytest.mark.parametrize("norm_pix", [True, False])
def test_reconstruction_loss_is_the_masked_mean_over_the_whole_grid(norm_pix: bool) -> None:
    pixels = torch.randn(2, 3, 32, 48) * 2 + 1
    mask = mask_ids_from_shuffle(shuffles(2, 6), 0.5)
    predicted = torch.randn(2, 6, 768)
    # The published way: patchify everything, average over the patch, then over removed patches.
    target = pixels.reshape(2, 3, 2, 16, 3, 16).permute(0, 2, 4, 3, 5, 1).reshape(2, 6, 768)
    if norm_pix:
        mean, variance = target.mean(-1, keepdim=True), target.var(-1, keepdim=True)
        target = (target - mean) / (variance + 1e-6) ** 0.5
    removed = torch.zeros(2, 6).scatter(1, mask.removed, 1.0)
    per_patch = (predicted - target).square().mean(-1)
    expected = (per_patch * removed).sum() / removed.sum()
    loss = masked_reconstruction_loss(
        gather_tokens(predicted, mask.removed), pixels, mask.removed, norm_pix
    )
    torch.testing.assert_close(loss, expected)


def test_constant_patches_give_a_finite_loss_and_gradient() -> None:
    predicted = torch.zeros(1, 6, 768, requires_grad=True)
    ids = torch.arange(6)[None]
    loss = masked_reconstruction_loss(predicted, torch.zeros(1, 3, 32, 48), ids, norm_pix=True)
    loss.backward()
    assert loss.item() == 0 and predicted.grad is not None and predicted.grad.isfinite().all()
