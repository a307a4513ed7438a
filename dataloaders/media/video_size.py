"""Sizes at which the `video` tier stores frames, for the decoders of a GPU.

NVDEC needs a decoder for each size, and making one takes 50 to 70 ms (H100, torchcodec issue 1176).
DALI keeps the last 100 under the size that is shown and looks for one by the size that is coded,
which is a multiple of 16 (`NVDECCache` in its `frames_decoder_gpu.cc`): at other sizes it makes one
for every frame, or takes one of another size. So frames are cropped to few sizes, all multiples of
16. The readers know what was cropped, and still see what the whole picture's center crop shows.
"""

import numpy as np

BLOCK = 16
"""Pixels."""
LONG_SIDES = (16, 21, 24, 28, 32, 37)
"""Sixteenths of the short side: 256, 336 (4:3), 384 (3:2), 448 (16:9), 512 (2:1) and 592 (21:9)
pixels at 256. Upright and lying these are 11 sizes, of which 8 threads need 88 decoders at most."""

SMALLEST = {"vp9": (128, 128), "h264": (48, 16), "mjpeg": (128, 128)}
"""Width and height from which frames are cropped: for VP9 and H.264 what NVDEC decodes at least
(`cuvidGetDecoderCaps`, as printed in philipl/nv-video-info pull request 7 and Xpra issue 3703); for
MJPEG, which NVDEC does not decode here, as for VP9, so that both show the same. Smaller frames keep
their size."""
NVDEC_LARGEST_SIDE = {"vp9": 8192, "h264": 4096}
"""Pixels, from the same table and the NVDEC Video Decoder API Programming Guide, table 1."""


def stored_size(width: int, height: int, short_side: int, codec: str) -> tuple[int, int]:
    """Width and height at which a picture is stored.

    Each side is cropped to the multiple of 16 below it; the long side of a picture of `short_side`
    pixels or more to the next of `LONG_SIDES`.

    Args:
        width, height: of the picture, which is not enlarged; its short side is at most
            `short_side`.
        short_side: `PackConfig.short_side`, a multiple of 16.
        codec: of the `video` tier.
    """
    if width < SMALLEST[codec][0] or height < SMALLEST[codec][1]:
        return width, height
    long = max(width, height)
    if min(width, height) == short_side:
        long = max(side for n in LONG_SIDES if (side := n * short_side // BLOCK) <= long)
    return min(width, long) // BLOCK * BLOCK, min(height, long) // BLOCK * BLOCK


def nvdec_decodes(width: int, height: int, codec: str) -> bool:
    """Whether NVDEC takes frames of a size, of any GPU that decodes the codec at all."""
    largest = NVDEC_LARGEST_SIDE.get(codec, 0)
    return SMALLEST[codec][0] <= width <= largest and SMALLEST[codec][1] <= height <= largest


def crop_start(whole: int, part: int) -> int:
    """First pixel of the middle part of a side; even, since two pixels share their colour."""
    return (whole - part) // 4 * 2


def crop_middle(planes: np.ndarray, width: int, height: int) -> np.ndarray:
    """Crop the middle of a picture.

    Args:
        planes: `(rows * 3 / 2, columns)` uint8, 4:2:0.
        width, height: even, at most `columns` and `rows`.

    Returns:
        `(height * 3 / 2, width)` uint8.
    """
    rows, columns = planes.shape[0] * 2 // 3, planes.shape[1]
    top, left = crop_start(rows, height), crop_start(columns, width)
    chroma = planes[rows:].reshape(2, rows // 2, columns // 2)
    parts = (
        planes[top : top + height, left : left + width],
        chroma[:, top // 2 : (top + height) // 2, left // 2 : (left + width) // 2],
    )
    return np.concatenate([part.reshape(-1) for part in parts]).reshape(height * 3 // 2, width)
