"""Sizes of the video tier: few, multiples of 16, and as much of the picture as they can hold."""

import itertools

import numpy as np
import pytest

from cavmae.dataloaders.media.video_size import (
    LONG_SIDES,
    SMALLEST,
    crop_middle,
    crop_start,
    nvdec_decodes,
    stored_size,
)

SIDES = [2, 14, 16, 46, 48, 64, 126, 128, 130, 142, 144, 180, 240, 254, 256]
"""Short sides of pictures that packing gives."""


@pytest.mark.parametrize("codec", ["vp9", "h264", "mjpeg"])
def test_what_nvdec_takes_has_sides_that_are_multiples_of_16(codec: str) -> None:
    """So that coded and shown size are equal. What it does not take keeps its whole picture."""
    for short, more in itertools.product(SIDES, range(0, 800, 2)):
        for whole in ((short, short + more), (short + more, short)):
            size = stored_size(*whole, 256, codec)
            small = whole[0] < SMALLEST[codec][0] or whole[1] < SMALLEST[codec][1]
            if small:
                assert size == whole
            else:
                assert size[0] % 16 == size[1] % 16 == 0
                assert all(
                    0 < side <= all_of_it for side, all_of_it in zip(size, whole, strict=True)
                )
                assert size[0] >= SMALLEST[codec][0] and size[1] >= SMALLEST[codec][1]
            assert nvdec_decodes(*size, codec) == (codec != "mjpeg" and not small)


def test_pictures_of_the_short_side_have_few_sizes() -> None:
    """DALI keeps 100 decoders, and each of 8 threads can need one of every size."""
    pictures = [(256, 256 + more) for more in range(0, 2000, 2)]
    pictures += [(long, short) for short, long in pictures]
    sizes = {stored_size(*picture, 256, "vp9") for picture in pictures}
    assert len(sizes) == 2 * len(LONG_SIDES) - 1
    assert 8 * len(sizes) <= 100


@pytest.mark.parametrize(
    ("whole", "expected"),
    [
        ((454, 256), (448, 256)),
        ((256, 454), (256, 448)),
        ((340, 256), (336, 256)),
        ((384, 256), (384, 256)),
        ((270, 256), (256, 256)),
        ((1200, 256), (592, 256)),
        ((426, 240), (416, 240)),
        ((144, 254), (144, 240)),
        ((320, 120), (320, 120)),
    ],
    ids=str,
)
def test_usual_pictures_of_vp9(whole: tuple[int, int], expected: tuple[int, int]) -> None:
    assert stored_size(*whole, 256, "vp9") == expected


def test_the_middle_of_luma_and_colour_is_kept() -> None:
    rows, columns = 20, 26
    luma = np.arange(rows * columns).reshape(rows, columns) % 256
    blue, red = (np.arange(rows * columns // 4).reshape(rows // 2, -1) % 100 + n for n in (1, 101))
    planes = np.concatenate([part.reshape(-1) for part in (luma, blue, red)])
    planes = planes.reshape(rows * 3 // 2, columns).astype(np.uint8)
    cropped = crop_middle(planes, 16, 16)
    assert (crop_start(rows, 16), crop_start(columns, 16)) == (2, 4)
    assert np.array_equal(cropped[:16], luma[2:18, 4:20])
    colours = cropped[16:].reshape(2, 8, 8)
    assert np.array_equal(colours, np.stack([blue, red])[:, 1:9, 2:10])
    assert np.array_equal(crop_middle(planes, columns, rows), planes)
