"""What is drawn for a clip's place in the plan: crop, flip, mixing, masks, noise, shift.

Every draw is a function of seed, stream and position (`random_streams`), so a sample that comes
again is changed differently, and a run that goes on, or has other ranks, changes it the same.
"""

import math
import statistics
from dataclasses import dataclass

import numpy as np

from cavmae.dataloaders.config import Augmentation
from cavmae.dataloaders.sampling.philox import random_words

CROP_TRIES = 10
NARROWEST, WIDEST = 3 / 4, 4 / 3
"""Ratios of width to height that a random crop may have; torchvision's."""

Box = tuple[float, float, float, float]
"""Top, left, bottom and right of a crop, as shares of the picture's height and width."""


def resize_and_crop(
    height: int, width: int, size: int
) -> tuple[tuple[int, int], tuple[float, float]]:
    """Short side to `size`, then the middle `size` x `size` pixels, rounded as torchvision does.

    Returns:
        Height and width after the resize; top and left of the crop, each as a share (0 to 1) of
        the pixels that the crop leaves over.
    """
    short = min(height, width)
    resized = (size * height // short, size * width // short)
    left_over = [side - size for side in resized]
    start = [round(pixels / 2) for pixels in left_over]
    top, left = (
        pixels / over if over else 0.0 for pixels, over in zip(start, left_over, strict=True)
    )
    return resized, (top, left)


def middle_box(height: int, width: int, size: int) -> Box:
    """What `resize_and_crop` leaves, in the picture as it was."""
    resized, crop = resize_and_crop(height, width, size)
    top, left = (share * (side - size) for share, side in zip(crop, resized, strict=True))
    return (
        top / resized[0],
        left / resized[1],
        (top + size) / resized[0],
        (left + size) / resized[1],
    )


def random_box(
    height: int, width: int, size: int, augmentation: Augmentation, seed: int, position: int
) -> Box:
    """A crop of a random area and ratio, as torchvision's RandomResizedCrop draws it.

    Where no crop fits in ten tries, and where the least area is 1, the middle.
    """
    smallest = augmentation.min_crop_area
    if smallest == 1:
        return middle_box(height, width, size)
    shares = _uniform(seed, "crop", position, 4 * CROP_TRIES).reshape(CROP_TRIES, 4)
    for area_share, ratio_share, top_share, left_share in shares.tolist():
        area = height * width * (smallest + (1 - smallest) * area_share)
        low, high = math.log(NARROWEST), math.log(WIDEST)
        ratio = math.exp(low + (high - low) * ratio_share)
        crop_width, crop_height = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < crop_width <= width and 0 < crop_height <= height:
            top = int(top_share * (height - crop_height + 1))
            left = int(left_share * (width - crop_width + 1))
            return (
                top / height,
                left / width,
                (top + crop_height) / height,
                (left + crop_width) / width,
            )
    return middle_box(height, width, size)


def is_mirrored(augmentation: Augmentation, seed: int, position: int) -> bool:
    """Whether the frames are flipped left to right: half of the time where that is on."""
    return augmentation.flip and bool(_uniform(seed, "flip", position, 1)[0] < 0.5)


def mix_share(augmentation: Augmentation, seed: int, position: int) -> float:
    """Share of the clip itself where another one is mixed in, from Beta(10, 10); 1: none is.

    The median of 19 uniform numbers has that very distribution.
    """
    if not augmentation.mixup_prob:
        return 1.0
    decision, *uniform = _uniform(seed, "mix", position, 20).tolist()
    return statistics.median(uniform) if decision < augmentation.mixup_prob else 1.0


def mixed_waveform(first: np.ndarray, second: np.ndarray, share: float) -> np.ndarray:
    """Two sounds as one, as published: each without its mean, the second cut or padded with zeros.

    Args:
        first: `(samples,)` float32.
        second: `(its samples,)` float32.
        share: of the first, 0 to 1.

    Returns:
        `(samples,)` float32; the log-mel takes its mean away again.
    """
    mixed = share * (first - first.mean())
    second = (1 - share) * (second - second.mean())
    heard = min(len(first), len(second))
    mixed[:heard] += second[:heard]
    return mixed


@dataclass(frozen=True)
class SpectrogramChange:
    """What happens to one log-mel.

    Attributes:
        frames, bins: first and end of the masked ones; they get 0 before normalisation.
        noise: `(frames, bins)` float32 to be added after it; None: no noise, no shift.
        shift: frames by which it is rolled then.
    """

    frames: tuple[int, int]
    bins: tuple[int, int]
    noise: np.ndarray | None
    shift: int


def spectrogram_change(
    augmentation: Augmentation, frames: int, bins: int, seed: int, position: int
) -> SpectrogramChange:
    """As the published fine-tuning draws it: one mask of frames and one of bins, both of random
    length; noise of random strength up to 0.1; a shift by up to the whole length, around the end.

    The noise has 256 levels.
    """
    draws = _uniform(seed, "spec_augment", position, 4).tolist()
    spans = [
        _mask(count, longest, length, start)
        for count, longest, length, start in (
            (frames, augmentation.time_mask, draws[0], draws[1]),
            (bins, augmentation.frequency_mask, draws[2], draws[3]),
        )
    ]
    if not augmentation.noise:
        return SpectrogramChange(spans[0], spans[1], None, 0)
    words = random_words(seed, "noise", position, -(-frames * bins // 4)).astype("<u4")
    levels = words.view(np.uint8)[: frames * bins].reshape(frames, bins)
    strength, turn = _uniform(seed, "shift", position, 2).tolist()
    noise = levels * np.float32(strength / 10 / 255)
    return SpectrogramChange(spans[0], spans[1], noise, int(turn * 2 * frames) - frames)


def _mask(count: int, longest: int, length_share: float, start_share: float) -> tuple[int, int]:
    """torchaudio's mask along an axis: a length below `longest`, then a start that lets it fit."""
    length = min(length_share * longest, count)
    start = start_share * (count - length)
    return int(start), int(start) + int(length)


def _uniform(seed: int, stream: str, position: int, count: int) -> np.ndarray:
    """`(count,)` float64 from 0 up to below 1."""
    return random_words(seed, stream, position, count) / 2.0**32
