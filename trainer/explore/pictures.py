"""Pictures of frames, of spectrograms and of values of patches.

They have no axes and no margins: a place in the picture is a place in what it shows, so that a
click means the patch that is under it.
"""

import numpy as np
import torch
from matplotlib import colormaps
from PIL import Image, ImageDraw

from cavmae.trainer.tracking.figures import REMOVED_GRAY, frame_colours

SMALLEST_SIDE = 256
"""Pixels; smaller pictures are enlarged by a whole number, so that patches keep sharp edges."""
HEAT_SHARE = 0.55
"""Of a value's colour in the mixture with the picture below."""
UNSEEN_SHARE = 0.3
"""Of a picture's brightness where the model did not see it."""


def frame_picture(frame: torch.Tensor) -> Image.Image:
    """Draw a normalised frame, (3, height, width) float32; NaN is grey."""
    return enlarged(Image.fromarray(np.rint(frame_colours(frame) * 255).astype(np.uint8)))


def spectrogram_picture(log_mel: torch.Tensor, low: float, high: float) -> Image.Image:
    """Draw a spectrogram, (mel_bins, frames) float32, low frequencies at the bottom.

    Args:
        log_mel: the values; NaN is grey.
        low, high: values of the darkest and of the brightest colour.
    """
    return enlarged(Image.fromarray(_colours("magma", log_mel.numpy()[::-1], low, high)))


def painted(picture: Image.Image, boxes: torch.Tensor, values: torch.Tensor) -> Image.Image:
    """Lay values over a picture, in colours from the lowest to the highest of them.

    Each value fills its own box and no more: what lies between two values was not computed.

    Args:
        picture: RGB.
        boxes: (values, 4) left, top, right and bottom, as fractions of the picture's width and
            height. What is in no box becomes darker.
        values: (values,) float32; NaN is grey.
    """
    pixels = np.asarray(picture) * UNSEEN_SHARE  # (height, width, 3)
    known = values[~values.isnan()]
    colours = _colours("viridis", values.numpy(), known.min().item(), known.max().item())
    # Grey, so that every colour is a value's.
    below = np.asarray(picture.convert("L").convert("RGB")) * (1 - HEAT_SHARE)
    for (left, top, right, bottom), colour in zip(_edges(picture, boxes), colours, strict=True):
        box = slice(top, bottom), slice(left, right)
        pixels[box] = below[box] + HEAT_SHARE * colour
    return Image.fromarray(np.rint(pixels).astype(np.uint8))


def outlined(picture: Image.Image, boxes: torch.Tensor) -> Image.Image:
    """Draw a frame around all `boxes`, as of `painted`."""
    left, top, right, bottom = zip(*_edges(picture, boxes), strict=True)
    framed = picture.copy()
    frame = (min(left), min(top), max(right) - 1, max(bottom) - 1)
    width = max(2, min(picture.size) // 100)
    ImageDraw.Draw(framed).rectangle(frame, outline="white", width=width)
    return framed


def _edges(picture: Image.Image, boxes: torch.Tensor) -> list[list[int]]:
    """Pixels of the edges of boxes; those that touch have an edge in common."""
    size = torch.tensor([*picture.size, *picture.size])
    return (boxes * size).round().long().tolist()


def _colours(name: str, values: np.ndarray, low: float, high: float) -> np.ndarray:
    """(...) to (..., 3) uint8."""
    colours = colormaps[name].with_extremes(bad=REMOVED_GRAY)
    return colours((values - low) / max(high - low, 1e-12), bytes=True)[..., :3]


def enlarged(picture: Image.Image) -> Image.Image:
    """Enlarge a picture whose smaller side is below `SMALLEST_SIDE`."""
    times = -(-SMALLEST_SIDE // min(picture.size))
    return picture.resize((picture.width * times, picture.height * times), Image.Resampling.NEAREST)
