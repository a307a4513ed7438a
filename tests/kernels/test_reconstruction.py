"""The masked reconstruction loss, against the published way of saying it and the truth."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from three_way import (
    DEVICE,
    DTYPES,
    check_repeats,
    check_three_way,
    dtype_name,
    normal,
    shuffles,
)

from cavmae.kernels import gather_tokens, mask_ids_from_shuffle, masked_reconstruction_loss


def loss_of(pixels: torch.Tensor, ids: torch.Tensor, norm_pix: bool, patch: int = 16):
    """The loss as a function of the prediction; pixels take its dtype where they are float64."""

    def operation(backend, predicted: torch.Tensor) -> torch.Tensor:
        return masked_reconstruction_loss(
            predicted, pixels.to(predicted.dtype), ids, norm_pix, patch, backend=backend
        )

    return operation


@pytest.mark.parametrize("norm_pix", [True, False], ids=["norm_pix", "pixels"])
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
@pytest.mark.parametrize(
    ("channels", "patch", "removed"), [(1, 16, 5), (3, 16, 2), (3, 6, 6), (2, 4, 1)]
)
def test_the_kernel_is_as_near_to_the_truth_as_torch(
    channels, patch, removed, dtype, norm_pix: bool
) -> None:
    pixels = (normal(2, channels, 2 * patch, 3 * patch) * 2 + 1).to(dtype)
    ids = shuffles(2, 6)[:, :removed]
    predicted = normal(2, removed, patch * patch * channels, seed=1)
    check_three_way(loss_of(pixels, ids, norm_pix, patch), [predicted], dtype)


@pytest.mark.parametrize("norm_pix", [True, False])
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_the_loss_is_the_masked_mean_over_the_whole_grid(norm_pix: bool, backend) -> None:
    pixels = (normal(2, 3, 32, 48) * 2 + 1).float()
    mask = mask_ids_from_shuffle(shuffles(2, 6), 0.5)
    predicted = normal(2, 6, 768, seed=1).float()
    # The published way: patchify everything, average over the patch, then over removed patches.
    target = pixels.reshape(2, 3, 2, 16, 3, 16).permute(0, 2, 4, 3, 5, 1).reshape(2, 6, 768)
    if norm_pix:
        mean, variance = target.mean(-1, keepdim=True), target.var(-1, keepdim=True)
        target = (target - mean) / (variance + 1e-6) ** 0.5
    removed = torch.zeros(2, 6, device=DEVICE).scatter(1, mask.removed, 1.0)
    per_patch = (predicted - target).square().mean(-1)
    expected = (per_patch * removed).sum() / removed.sum()
    loss = masked_reconstruction_loss(
        gather_tokens(predicted, mask.removed), pixels, mask.removed, norm_pix, backend=backend
    )
    torch.testing.assert_close(loss, expected)


@pytest.mark.parametrize(
    ("predicted", "pixels", "ids"),
    [
        ("plain", "spectrogram", "plain"),
        ("plain", "channels-last", "plain"),
        ("plain", "cropped", "plain"),
        ("plain", "expanded", "plain"),
        ("transposed", "plain", "plain"),
        ("rows", "plain", "plain"),
        ("columns", "plain", "plain"),
        ("expanded", "plain", "plain"),
        ("plain", "plain", "transposed"),
        ("plain", "plain", "expanded"),
    ],
)
def test_inputs_are_read_through_their_strides(predicted: str, pixels: str, ids: str) -> None:
    predictions = {
        "plain": lambda: normal(3, 4, 32, seed=1),
        "transposed": lambda: normal(3, 32, 4, seed=1).transpose(1, 2),
        "rows": lambda: normal(3, 9, 32, seed=1)[:, 3:7],
        "columns": lambda: normal(3, 4, 64, seed=1)[:, :, 16:48],
        "expanded": lambda: normal(4, 32, seed=1).expand(3, -1, -1),
    }
    pictures = {
        "plain": lambda: normal(3, 2, 8, 12),
        "spectrogram": lambda: normal(3, 2, 12, 8).transpose(2, 3),
        "channels-last": lambda: normal(3, 8, 12, 2).permute(0, 3, 1, 2),
        "cropped": lambda: normal(3, 4, 14, 15)[:, 1:3, 5:13, 2:14],
        "expanded": lambda: normal(1, 2, 8, 12).expand(3, -1, -1, -1),
    }
    numbers = {
        "plain": lambda: shuffles(3, 6)[:, 2:],
        "transposed": lambda: shuffles(3, 6)[:, 2:].T.contiguous().T,
        "expanded": lambda: shuffles(1, 6)[:, 2:].expand(3, -1),
    }
    operation = loss_of(pictures[pixels](), numbers[ids](), True, 4)
    check_three_way(operation, [predictions[predicted]()], torch.float32)


@pytest.mark.parametrize("norm_pix", [True, False], ids=["norm_pix", "pixels"])
def test_predictions_of_16_bits_meet_pixels_of_32(norm_pix: bool) -> None:
    pixels, ids = (normal(2, 3, 12, 18) * 2 + 1).float(), shuffles(2, 6)[:, :5]

    def operation(backend, predicted: torch.Tensor) -> torch.Tensor:
        picture = pixels.to(torch.promote_types(torch.float32, predicted.dtype))
        return masked_reconstruction_loss(predicted, picture, ids, norm_pix, 6, backend=backend)

    check_three_way(operation, [normal(2, 5, 108, seed=1)], torch.bfloat16)


@pytest.mark.parametrize("value", [0.1, 1000.0])
def test_the_target_of_a_constant_patch_is_zero(value: float) -> None:
    # What rounding leaves of a patch minus its mean is divided by the root of 1e-6.
    pixels = torch.full((1, 3, 12, 18), value, device=DEVICE)
    ids, predicted = shuffles(1, 6), normal(1, 6, 108, seed=1).float()
    loss = masked_reconstruction_loss(predicted, pixels, ids, True, 6, backend="triton")
    spacing = value * 2**-23
    torch.testing.assert_close(
        loss, predicted.square().mean(), rtol=1e-5 + 3 * spacing / 1e-3, atol=0
    )


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_constant_patches_give_a_finite_loss_and_gradient(backend) -> None:
    predicted = torch.zeros(1, 6, 768, device=DEVICE, requires_grad=True)
    ids = torch.arange(6, device=DEVICE)[None]
    pixels = torch.zeros(1, 3, 32, 48, device=DEVICE)
    loss = masked_reconstruction_loss(predicted, pixels, ids, True, backend=backend)
    loss.backward()
    assert loss.item() == 0 and predicted.grad is not None and predicted.grad.isfinite().all()


@settings(max_examples=15, deadline=None)
@given(
    scale=st.floats(0.1, 10),
    shift=st.floats(-5, 5),
    backend=st.sampled_from(["torch", "triton"]),
)
def test_norm_pix_does_not_see_brightness_and_contrast(scale, shift, backend) -> None:
    pixels, ids = normal(1, 1, 32, 32).float(), shuffles(1, 4)[:, :3]
    predicted = normal(1, 3, 256, seed=1).float()
    plain, changed = (
        masked_reconstruction_loss(predicted, p, ids, True, backend=backend)
        for p in (pixels, pixels * scale + shift)
    )
    torch.testing.assert_close(plain, changed, rtol=1e-3, atol=0)


@pytest.mark.parametrize("norm_pix", [True, False])
def test_the_reference_passes_gradcheck(norm_pix: bool) -> None:
    ids = shuffles(2, 6)[:, :3]

    def loss(predicted: torch.Tensor, pixels: torch.Tensor) -> torch.Tensor:
        return masked_reconstruction_loss(predicted, pixels, ids, norm_pix, 2, backend="torch")

    inputs = [normal(2, 3, 8, seed=1).requires_grad_(), normal(2, 2, 4, 6).requires_grad_()]
    assert torch.autograd.gradcheck(loss, inputs)


def test_two_runs_give_the_same_bits() -> None:
    pixels, ids = normal(3, 3, 32, 48).float(), shuffles(3, 6)[:, :5]
    check_repeats(loss_of(pixels, ids, True), [normal(3, 5, 768, seed=1).float()])


@pytest.mark.parametrize(
    ("predicted", "pixels", "ids", "message"),
    [
        (torch.zeros(1, 2, 256), torch.zeros(1, 1, 32, 30), [[0, 1]], r"pixels have shape"),
        (torch.zeros(1, 2, 768), torch.zeros(1, 1, 32, 32), [[0, 1]], r"predicted has shape"),
        (torch.zeros(1, 2, 256), torch.zeros(1, 1, 32, 32), [[0, 4]], r"ids holds 4"),
        (torch.zeros(1, 0, 256), torch.zeros(1, 1, 32, 32), [[]], r"ids names no patch"),
        (torch.zeros(1, 2, 256), torch.zeros(1, 1, 32, 32), [[0], [1]], r"ids has shape \(2, 1\)"),
        (
            torch.zeros(1, 2, 256),
            torch.zeros(1, 1, 32, 32, device="meta"),
            [[0, 1]],
            r"pixels is on meta and predicted on cpu",
        ),
    ],
)
def test_bad_input_is_named(predicted, pixels, ids, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        masked_reconstruction_loss(predicted, pixels, torch.tensor(ids, dtype=torch.int64), True)


def test_the_kernel_refuses_what_it_has_not() -> None:
    pixels, ids = normal(1, 1, 32, 32), shuffles(1, 4)
    predicted = normal(1, 4, 256)
    with pytest.raises(ValueError, match=r"predicted is torch.float64"):
        masked_reconstruction_loss(predicted, pixels, ids, True, backend="triton")
    with pytest.raises(ValueError, match=r"pixels is torch.uint8"):
        masked_reconstruction_loss(predicted.float(), pixels.byte(), ids, True, backend="triton")
    with pytest.raises(ValueError, match=r"pixels want a gradient"):
        masked_reconstruction_loss(
            predicted.float(), pixels.float().requires_grad_(), ids, True, backend="triton"
        )


@pytest.mark.gpu
@pytest.mark.parametrize(("channels", "removed"), [(1, 384), (3, 147)])
def test_published_shapes(channels: int, removed: int) -> None:
    pixels = normal(64, channels, 128, 1024) if channels == 1 else normal(64, 3, 224, 224)
    tokens = 512 if channels == 1 else 196
    ids = shuffles(64, tokens)[:, :removed]
    predicted = normal(64, removed, 256 * channels, seed=1)
    check_three_way(loss_of(pixels, ids, True), [predicted], torch.bfloat16)
