"""Patches cut out of pixels: times the weight they are the convolution."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from three_way import DEVICE, DTYPES, ROUNDING, dtype_name, error, normal, shuffles

from cavmae.kernels import gather_patches, gather_tokens


def cut(pixels: torch.Tensor, ids: torch.Tensor, backend, patch: int = 16, **options):
    return gather_patches(pixels, ids, patch, backend=backend, **options)


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("patch", [4, 6, 16])
def test_patches_times_the_weight_are_the_convolution(backend, patch: int) -> None:
    pixels, weight = normal(2, 3, 2 * patch, 3 * patch), normal(5, 3, patch, patch, seed=1)
    ids = shuffles(2, 6)[:, :4]
    whole = F.conv2d(pixels, weight, stride=patch).flatten(2).transpose(1, 2)
    patches = cut(pixels.float(), ids, backend, patch).double()
    torch.testing.assert_close(
        patches @ weight.flatten(1).T, gather_tokens(whole, ids, backend="torch"), atol=1e-4, rtol=0
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
@pytest.mark.parametrize(
    "view",
    [
        lambda: normal(2, 1, 32, 48),
        lambda: normal(2, 48, 32).transpose(1, 2)[:, None],
        lambda: normal(2, 32, 48, 3).permute(0, 3, 1, 2),
        lambda: normal(2, 5, 40, 48)[:, 1:3, 4:36],
        lambda: normal(1, 2, 32, 48).expand(2, -1, -1, -1),
    ],
    ids=["plain", "spectrogram", "channels-last", "cropped", "expanded"],
)
def test_pixels_are_read_through_their_strides(view, dtype) -> None:
    pixels, ids = view().to(dtype), shuffles(2, 6)[:, 1:5]
    assert torch.equal(cut(pixels, ids, "triton"), cut(pixels, ids, "torch"))


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
def test_uint8_pixels_are_normalised_on_the_way(dtype) -> None:
    pixels = (normal(2, 3, 32, 48).abs() * 80).clamp(max=255).to(torch.uint8)
    mean, deviation = (torch.tensor(x, device=DEVICE) for x in ([124.0, 116, 104], [58.0, 57, 56]))
    ids = shuffles(2, 6)[:, :3]
    truth = (pixels.double() - mean[:, None, None]) / deviation[:, None, None]
    found = cut(pixels, ids, "triton", mean=mean, deviation=deviation, dtype=dtype)
    assert found.dtype == dtype
    assert error(found, cut(truth, ids, "torch")) < ROUNDING[dtype]


@settings(max_examples=15, deadline=None)
@given(
    patch=st.integers(1, 7),
    rows=st.integers(1, 4),
    columns=st.integers(1, 4),
    channels=st.integers(1, 4),
    data=st.data(),
)
def test_all_patches_put_back_are_the_picture(patch, rows, columns, channels, data) -> None:
    pixels = normal(2, channels, rows * patch, columns * patch).float()
    ids = torch.arange(rows * columns, device=DEVICE).expand(2, -1)
    backend = data.draw(st.sampled_from(["torch", "triton"]))
    patches = cut(pixels, ids, backend, patch)
    back = patches.reshape(2, rows, columns, channels, patch, patch).permute(0, 3, 1, 4, 2, 5)
    assert torch.equal(back.reshape(pixels.shape), pixels)


def test_the_reference_passes_gradcheck_for_pixels() -> None:
    ids = shuffles(2, 6)[:, :4]
    pixels = normal(2, 2, 4, 6).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: cut(x, ids, "torch", 2), [pixels])


def test_two_runs_give_the_same_bits() -> None:
    pixels, ids = normal(2, 3, 32, 32).float(), shuffles(2, 4)
    assert torch.equal(cut(pixels, ids, "triton"), cut(pixels, ids, "triton"))


@pytest.mark.parametrize(
    ("pixels", "ids", "options", "message"),
    [
        (torch.zeros(1, 3, 30, 32), [[0]], {}, r"pixels have shape .* and patch is 16"),
        (torch.zeros(3, 32, 32), [[0]], {}, r"pixels have shape \(3, 32, 32\)"),
        (torch.zeros(1, 3, 32, 32), [[4]], {}, r"ids holds 4; ids go from 0 to 3"),
        (torch.zeros(1, 3, 32, 32), [[0]], {"mean": torch.zeros(3)}, r"mean and deviation go"),
        (
            torch.zeros(1, 3, 32, 32),
            [[0]],
            {"mean": torch.zeros(1), "deviation": torch.ones(3)},
            r"mean has shape \(1,\)",
        ),
    ],
)  # fmt: skip
def test_bad_input_is_named(pixels, ids, options, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        gather_patches(pixels, torch.tensor(ids), **options)


def test_the_kernel_refuses_what_it_has_not() -> None:
    pixels, ids = normal(1, 3, 32, 32), shuffles(1, 4)
    with pytest.raises(ValueError, match=r"pixels are torch.float64"):
        cut(pixels, ids, "triton")
    with pytest.raises(ValueError, match=r"pixels want a gradient"):
        cut(pixels.float().requires_grad_(), ids, "triton")
