"""Pictures show the patches that the mask ids name, in the places where they belong."""

import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as some
from PIL import Image

from cavmae.kernels import MaskIds, gather_patches, mask_ids_from_shuffle
from cavmae.trainer.tracking.figures import (
    masked_and_reconstructed,
    patchify,
    plot_reconstructions,
    plot_similarity,
    similarity_title,
    unpatchify,
)


def png_size(path: Path) -> tuple[int, int]:
    """(width, height) of a PNG whose every chunk has the right check sum."""
    data = path.read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    place, kinds = 8, []
    while place < len(data):
        (length,) = struct.unpack(">I", data[place : place + 4])
        kind_and_body = data[place + 4 : place + 8 + length]
        (checksum,) = struct.unpack(">I", data[place + 8 + length : place + 12 + length])
        assert zlib.crc32(kind_and_body) == checksum
        kinds.append(kind_and_body[:4])
        place += 12 + length
    assert kinds[0] == b"IHDR" and kinds[-1] == b"IEND"
    return struct.unpack(">II", data[16:24])


def shuffled_mask(batch: int, tokens: int, ratio: float) -> MaskIds:
    generator = torch.Generator().manual_seed(0)
    shuffle = torch.stack([torch.randperm(tokens, generator=generator) for _ in range(batch)])
    return mask_ids_from_shuffle(shuffle, ratio)


@given(
    batch=some.integers(1, 2),
    channels=some.sampled_from([1, 3]),
    rows=some.integers(1, 4),
    columns=some.integers(1, 4),
    patch=some.sampled_from([2, 16]),
)
def test_unpatchify_is_the_exact_inverse_of_patchify(
    batch: int, channels: int, rows: int, columns: int, patch: int
) -> None:
    pixels = torch.rand(batch, channels, rows * patch, columns * patch)
    patches = patchify(pixels, patch)
    assert patches.shape == (batch, rows * columns, patch * patch * channels)
    assert torch.equal(unpatchify(patches, (rows, columns), patch), pixels)


def test_patch_vectors_are_ordered_as_the_loss_orders_them() -> None:
    pixels = torch.arange(2 * 3 * 32 * 48, dtype=torch.float32).reshape(2, 3, 32, 48)
    ids = torch.arange(6).expand(2, -1)
    cut = gather_patches(pixels, ids).unflatten(2, (3, 16, 16))  # channels, row, column
    assert torch.equal(patchify(pixels), cut.permute(0, 1, 3, 4, 2).flatten(2))


def test_exactly_the_removed_patches_are_blanked() -> None:
    pixels = torch.rand(2, 1, 32, 64)
    mask = shuffled_mask(batch=2, tokens=8, ratio=0.75)
    masked, _ = masked_and_reconstructed(pixels, mask, torch.zeros(2, 8, 256), norm_pix=False)
    for clip in range(2):
        for patch_id in range(8):
            row, column = divmod(patch_id, 4)
            area = (clip, 0, slice(16 * row, 16 * row + 16), slice(16 * column, 16 * column + 16))
            if patch_id in mask.removed[clip]:
                assert masked[area].isnan().all()
            else:
                assert torch.equal(masked[area], pixels[area])


def test_the_reconstruction_is_the_original_where_visible_and_the_prediction_elsewhere() -> None:
    pixels, predicted = torch.rand(2, 3, 32, 32), torch.rand(2, 4, 768)
    mask = shuffled_mask(batch=2, tokens=4, ratio=0.5)
    _, reconstructed = masked_and_reconstructed(pixels, mask, predicted, norm_pix=False)
    result, original = patchify(reconstructed), patchify(pixels)
    for clip in range(2):
        assert torch.equal(result[clip, mask.removed[clip]], predicted[clip, mask.removed[clip]])
        assert torch.equal(result[clip, mask.keep[clip]], original[clip, mask.keep[clip]])


def test_a_perfect_prediction_of_normalised_patches_restores_the_original() -> None:
    pixels = torch.rand(2, 3, 32, 32)
    patches = patchify(pixels)
    variance, mean = torch.var_mean(patches, dim=-1, keepdim=True)
    mask = shuffled_mask(batch=2, tokens=4, ratio=0.75)
    perfect = (patches - mean) / (variance + 1e-6).sqrt()
    _, reconstructed = masked_and_reconstructed(pixels, mask, perfect, norm_pix=True)
    torch.testing.assert_close(reconstructed, pixels, rtol=0, atol=1e-6)


@pytest.mark.parametrize(("norm_pix", "dtype"), [(False, torch.float32), (True, torch.bfloat16)])
def test_the_reconstruction_picture_is_a_png_with_a_row_for_each_clip(
    tmp_path: Path, norm_pix: bool, dtype: torch.dtype
) -> None:
    sizes = []
    for clips in (1, 3):
        path = tmp_path / "pictures" / f"{clips}.png"
        plot_reconstructions(
            path,
            torch.randn(clips, 192, 64),
            torch.randn(clips, 3, 64, 64),
            shuffled_mask(clips, tokens=48, ratio=0.75),
            shuffled_mask(clips, tokens=16, ratio=0.5),
            torch.randn(clips, 48, 256, dtype=dtype),
            torch.randn(clips, 16, 768, dtype=dtype),
            norm_pix=norm_pix,
            names=[f"clip {clip}" for clip in range(clips)],
        )
        sizes.append(png_size(path))
    (width, height), (width_of_three, height_of_three) = sizes
    assert width == width_of_three == 1800
    assert 200 < height < height_of_three < 1000


def test_frames_are_shown_in_their_own_colours(tmp_path: Path) -> None:
    colour = torch.tensor([200, 30, 60])
    mean, deviation = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    frame = ((colour / 255 - mean) / deviation)[None, :, None, None].expand(1, 3, 32, 32)
    plot_reconstructions(
        tmp_path / "red.png",
        torch.randn(1, 32, 32),
        frame,
        shuffled_mask(1, tokens=4, ratio=0.5),
        shuffled_mask(1, tokens=4, ratio=0.5),
        torch.randn(1, 4, 256),
        torch.randn(1, 4, 768),
        norm_pix=False,
    )
    with Image.open(tmp_path / "red.png") as picture:
        pixels = torch.from_numpy(np.array(picture.convert("RGB"))).int()
    near = (pixels - colour).abs().amax(-1) <= 1
    assert near.sum() > 10_000


def test_the_similarity_picture_is_a_png(tmp_path: Path) -> None:
    plot_similarity(tmp_path / "similarity.png", torch.eye(12))
    assert png_size(tmp_path / "similarity.png") == (700, 600)


def test_the_similarity_title_takes_rows_as_sounds_and_columns_as_videos() -> None:
    # Sound 1 finds video 0; both videos find their sounds.
    similarity = torch.tensor([[0.9, 0.1], [0.8, 0.5]])
    assert similarity_title(similarity) == (
        "R@1 audio to video 50.0%, video to audio 100.0%, chance 50.0%"
    )
