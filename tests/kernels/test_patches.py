"""Patches cut out of pixels: times the weight they are the convolution."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from three_way import DEVICE, DTYPES, ROUNDING, dtype_name, error, normal, shuffles

from cavmae.kernels import gather_patches, gather_tokens
from cavmae.kernels.backend import INTERPRETED


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
    mean, std = (torch.tensor(x, device=DEVICE) for x in ([124.0, 116, 104], [58.0, 57, 56]))
    ids = shuffles(2, 6)[:, :3]
    truth = (pixels.double() - mean[:, None, None]) / std[:, None, None]
    found = cut(pixels, ids, "triton", mean=mean, std=std, dtype=dtype)
    assert found.dtype == dtype
    assert error(found, cut(truth, ids, "torch")) < ROUNDING[dtype]


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
@pytest.mark.parametrize("patch", [1, 4, 6, 16])
def test_normalised_pixels_are_as_near_to_the_truth_as_torch(patch: int, dtype) -> None:
    pixels = (normal(2, 3, 2 * patch, 3 * patch) * 50 + 100).to(dtype)
    mean, std = (normal(3, seed=s).float().abs() * 40 + 20 for s in (1, 2))
    ids = shuffles(2, 6)[:, :5]
    statistics = {"mean": mean.double(), "std": std.double()}
    truth = cut(pixels.double(), ids, "torch", patch, **statistics)
    by_torch, by_kernel = (
        cut(pixels, ids, backend, patch, mean=mean, std=std) for backend in ("torch", "triton")
    )
    assert by_kernel.dtype == dtype
    # The interpreter cuts float32 off at bf16; what is compiled rounds (cvt.rn.bf16).
    cut_off = ROUNDING[dtype] if INTERPRETED and dtype == torch.bfloat16 else 1e-6
    assert error(by_kernel, truth) <= error(by_torch, truth) + cut_off


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
def test_uint8_pixels_without_statistics_keep_their_values(dtype) -> None:
    pixels = torch.arange(256, device=DEVICE).to(torch.uint8).reshape(1, 1, 16, 16)
    found = cut(pixels, torch.zeros(1, 1, dtype=torch.int64, device=DEVICE), "triton", dtype=dtype)
    assert found.dtype == dtype and torch.equal(found.long().flatten(), pixels.long().flatten())


@pytest.mark.parametrize(
    "view",
    [
        lambda: normal(1).float().abs().add(1).expand(3),
        lambda: normal(3, 2).float().abs().add(1)[:, 0],
        lambda: normal(3).abs().add(1),
    ],
    ids=["expanded", "every-second", "float64"],
)
def test_statistics_are_read_through_their_strides(view) -> None:
    pixels, ids = normal(2, 3, 8, 12).float(), shuffles(2, 6)[:, :4]
    by_kernel, by_torch = (
        cut(pixels, ids, backend, 4, mean=view(), std=view()) for backend in ("triton", "torch")
    )
    torch.testing.assert_close(by_kernel, by_torch)


@pytest.mark.parametrize(
    "ids",
    [
        lambda: shuffles(3, 6).T.contiguous().T,
        lambda: shuffles(3, 6)[:, ::2],
        lambda: shuffles(1, 6)[:, 1:4].expand(3, -1),
        lambda: shuffles(3, 6)[:, :1],
    ],
    ids=["transposed", "every-second", "expanded", "one"],
)
def test_ids_are_read_through_their_strides(ids) -> None:
    pixels = normal(3, 2, 8, 12).float()
    assert torch.equal(cut(pixels, ids(), "triton", 4), cut(pixels, ids(), "torch", 4))


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
    mean, std = normal(2, seed=1), normal(2, seed=2).abs() + 1
    assert torch.autograd.gradcheck(lambda x: cut(x, ids, "torch", 2, mean=mean, std=std), [pixels])


def test_two_runs_give_the_same_bits() -> None:
    pixels, ids = normal(2, 3, 32, 32).float(), shuffles(2, 4)
    assert torch.equal(cut(pixels, ids, "triton"), cut(pixels, ids, "triton"))


@pytest.mark.parametrize(
    ("pixels", "ids", "options", "message"),
    [
        (torch.zeros(1, 3, 30, 32), [[0]], {}, r"pixels have shape .* and patch is 16"),
        (torch.zeros(3, 32, 32), [[0]], {}, r"pixels have shape \(3, 32, 32\)"),
        (torch.zeros(1, 3, 32, 32), [[4]], {}, r"ids holds 4; ids go from 0 to 3"),
        (torch.zeros(1, 3, 32, 32), [[-1]], {}, r"ids holds -1; ids go from 0 to 3"),
        (torch.zeros(1, 3, 32, 32), [[0.0]], {}, r"ids is torch.float32"),
        (torch.zeros(1, 3, 32, 32), [[0], [0]], {}, r"ids has shape \(2, 1\)"),
        (torch.zeros(1, 3, 32, 32), [[0]], {"patch": 0}, r"patch is 0"),
        (torch.zeros(1, 3, 32, 32, device="meta"), [[0]], {}, r"ids is on cpu and pixels on meta"),
        (torch.zeros(1, 3, 32, 32), [[0]], {"mean": torch.zeros(3)}, r"mean and std go"),
        (torch.zeros(1, 3, 32, 32), [[0]], {"std": torch.ones(3)}, r"mean and std go"),
        (
            torch.zeros(1, 3, 32, 32),
            [[0]],
            {"mean": torch.zeros(3), "std": torch.ones(3, 1)},
            r"std has shape \(3, 1\)",
        ),
        (
            torch.zeros(1, 3, 32, 32),
            [[0]],
            {"mean": torch.zeros(3, device="meta"), "std": torch.ones(3)},
            r"mean is on meta and pixels on cpu",
        ),
        (
            torch.zeros(1, 3, 32, 32),
            [[0]],
            {"mean": torch.zeros(1), "std": torch.ones(3)},
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
    with pytest.raises(ValueError, match=r"pixels are torch.int32"):
        cut(pixels.int(), ids, "triton")
    with pytest.raises(ValueError, match=r"dtype is torch.float64"):
        cut(pixels.float(), ids, "triton", dtype=torch.float64)
    with pytest.raises(ValueError, match=r"pixels want a gradient"):
        cut(pixels.float().requires_grad_(), ids, "triton")


@pytest.mark.gpu
def test_published_shapes_of_images() -> None:
    pixels = (normal(256, 3, 224, 224).abs() * 80).clamp(max=255).to(torch.uint8)
    mean, std = (torch.tensor(x, device=DEVICE) for x in ([124.0, 116, 104], [58.0, 57, 56]))
    options = {"mean": mean, "std": std, "dtype": torch.bfloat16}
    ids = shuffles(256, 196)[:, :49]
    by_torch = cut(pixels, ids, "torch", **options)
    assert error(cut(pixels, ids, "triton", **options), by_torch.double()) < 2**-8  # one rounding


@pytest.mark.gpu
def test_published_shapes_of_spectrograms() -> None:
    pixels = normal(256, 1024, 128).transpose(1, 2)[:, None].bfloat16()
    ids = shuffles(256, 512)[:, :128]
    assert torch.equal(cut(pixels, ids, "triton"), cut(pixels, ids, "torch"))
