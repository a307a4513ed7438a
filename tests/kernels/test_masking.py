"""Masks: which patches stay, how many, and that a sample's mask depends on its position alone."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from three_way import DEVICE

from cavmae.kernels import MaskIds, MaskMode, kept_count, mask_ids_from_shuffle, random_mask

GRID = (8, 64)


def draw(
    count: int = 16,
    grid: tuple[int, int] = GRID,
    ratio: float = 0.75,
    mode: MaskMode = "unstructured",
) -> MaskIds:
    return random_mask(
        torch.arange(count, device=DEVICE),
        seed=0,
        stream="mask_audio",
        grid=grid,
        ratio=ratio,
        mode=mode,
    )


@pytest.mark.parametrize(
    ("tokens", "ratio", "kept"),
    [(196, 0.85, 29), (512, 0.65, 179), (512, 0.75, 128), (196, 0, 196)],
)
def test_kept_count_is_the_published_one(tokens: int, ratio: float, kept: int) -> None:
    assert kept_count(tokens, ratio) == kept


@pytest.mark.parametrize("mode", ["unstructured", "time", "freq", "tf"])
@pytest.mark.parametrize("ratio", [0.0, 0.5, 0.65, 0.75, 0.85])
def test_kept_and_removed_patches_are_a_permutation_that_restore_inverts(mode, ratio) -> None:
    mask = draw(mode=mode, ratio=ratio)
    shuffled = torch.cat([mask.keep, mask.removed], 1)
    every = torch.arange(512, device=DEVICE).expand(16, -1)
    assert mask.keep.shape[1] == kept_count(512, ratio)
    assert torch.equal(shuffled.sort(1).values, every)
    assert torch.equal(shuffled.gather(1, mask.restore), every)


@pytest.mark.parametrize("mode", ["unstructured", "time", "freq", "tf"])
def test_a_sample_has_the_same_mask_in_any_batch(mode) -> None:
    alone = random_mask(
        torch.tensor([11], device=DEVICE),
        seed=0,
        stream="mask_audio",
        grid=GRID,
        ratio=0.75,
        mode=mode,
    )
    assert torch.equal(draw(mode=mode).keep[11:12], alone.keep)


def test_time_masks_keep_whole_columns() -> None:
    mask = draw(mode="time", ratio=0.75)
    for row in mask.keep:
        # 48 of 64 columns are marked, which is exactly what is removed.
        assert len(set((row % 64).tolist())) == 16


def test_frequency_masks_keep_whole_rows() -> None:
    mask = draw(mode="freq", ratio=0.75)
    for row in mask.keep:
        assert len(set((row // 64).tolist())) == 2


def test_time_frequency_masks_remove_marked_patches_first() -> None:
    # int(64 * 0.35) = 22 columns and int(8 * 0.35) = 2 rows are marked: 42 x 6 = 252 patches are
    # free of marks, and 256 are kept.
    mask = draw(mode="tf", ratio=0.5)
    for row in mask.keep:
        columns, rows = row % 64, row // 64
        full_columns = (columns.bincount(minlength=64) >= 6).sum()
        full_rows = (rows.bincount(minlength=8) >= 42).sum()
        assert full_columns >= 42 and full_rows >= 6


def test_every_patch_is_kept_equally_often() -> None:
    mask = draw(count=4000, grid=(4, 4), ratio=0.5)
    share = mask.keep.flatten().bincount(minlength=16) / 4000
    assert (share - 0.5).abs().max() < 0.04  # five standard errors


def test_given_ids_are_taken_as_they_are() -> None:
    shuffle = torch.tensor([[3, 1, 0, 2]], dtype=torch.int16)
    mask = mask_ids_from_shuffle(shuffle, 0.5)
    assert mask.keep.tolist() == [[3, 1]]
    assert mask.removed.tolist() == [[0, 2]]
    assert mask.restore.tolist() == [[2, 1, 3, 0]]


@settings(max_examples=25, deadline=None)
@given(
    rows=st.integers(1, 9),
    columns=st.integers(1, 11),
    ratio=st.floats(0, 1, exclude_max=True),
    mode=st.sampled_from(["unstructured", "time", "freq", "tf"]),
    seed=st.integers(0, 2**40),
    stream=st.sampled_from(["mask_audio", "mask_video"]),
    position=st.integers(0, 2**62),
)
def test_the_kernel_draws_the_reference_s_bits(
    rows, columns, ratio, mode, seed, stream, position
) -> None:
    positions = torch.tensor([position, 0, position // 3], device=DEVICE)
    by_kernel, by_torch = (
        random_mask(
            positions,
            seed=seed,
            stream=stream,
            grid=(rows, columns),
            ratio=ratio,
            mode=mode,
            backend=backend,
        )
        for backend in ("triton", "torch")
    )
    assert all(torch.equal(a, b) for a, b in zip(by_kernel, by_torch, strict=True))


def test_the_kernel_draws_the_reference_s_bits_over_several_blocks_of_patches() -> None:
    by_kernel, by_torch = (
        random_mask(
            torch.tensor([2**33 + 1], device=DEVICE),
            seed=3,
            stream="mask_video",
            grid=(7, 20),
            ratio=0.75,
            mode="tf",
            backend=backend,
        )
        for backend in ("triton", "torch")
    )
    assert all(torch.equal(a, b) for a, b in zip(by_kernel, by_torch, strict=True))


@pytest.mark.parametrize(
    "positions",
    [
        lambda: torch.arange(6, device=DEVICE)[1::2],
        lambda: torch.arange(5, 6, device=DEVICE).expand(3),
    ],
    ids=["every-second", "expanded"],
)
def test_positions_are_read_through_their_strides(positions) -> None:
    by_kernel, by_torch = (
        random_mask(
            positions(), seed=0, stream="mask_audio", grid=(2, 3), ratio=0.5, backend=backend
        )
        for backend in ("triton", "torch")
    )
    assert torch.equal(by_kernel.restore, by_torch.restore)


@pytest.mark.gpu
@pytest.mark.parametrize("mode", ["unstructured", "time", "freq", "tf"])
def test_published_grids(mode: MaskMode) -> None:
    for grid, stream in ((GRID, "mask_audio"), ((14, 14), "mask_video")):
        by_kernel, by_torch = (
            random_mask(
                torch.arange(512, device=DEVICE) + 2**33,
                seed=1,
                stream=stream,
                grid=grid,
                ratio=0.75,
                mode=mode,
                backend=backend,
            )
            for backend in ("triton", "torch")
        )
        assert all(torch.equal(a, b) for a, b in zip(by_kernel, by_torch, strict=True))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"positions": torch.zeros(2, 2, dtype=torch.int64)},
            r"positions are torch.int64 of shape",
        ),
        ({"positions": torch.zeros(2)}, r"positions are torch.float32"),
        ({"stream": "mask"}, r"stream is 'mask'; use one of mask_audio"),
        ({"mode": "columns"}, r"mode is 'columns'; use unstructured"),
        ({"ratio": 1.0}, r"ratio is 1.0"),
        ({"ratio": -0.1}, r"ratio is -0.1"),
        ({"ratio": float("nan")}, r"ratio is nan"),
        ({"grid": (0, 4)}, r"grid is \(0, 4\)"),
        ({"grid": (4, -1)}, r"grid is \(4, -1\)"),
        ({"backend": "cuda"}, r"backend is 'cuda'"),
    ],
)
def test_bad_input_is_named(changes: dict, message: str) -> None:
    arguments = {
        "positions": torch.arange(2),
        "seed": 0,
        "stream": "mask_audio",
        "grid": (2, 2),
        "ratio": 0.5,
    }
    with pytest.raises(ValueError, match=message):
        random_mask(**(arguments | changes))
