"""Augmentation of a clip: crop, flip, mixup, masks, noise, shift.

Every draw is a function of seed, stream and position in the plan (`sampling.philox`), so a sample
is augmented differently in each epoch, and the same after a resume or on another number of ranks.
"""

import math
import statistics
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from cavmae.dataloaders.config import Augmentation
from cavmae.dataloaders.sampling.philox import random_words

CROP_TRIES = 10
NARROWEST, WIDEST = 3 / 4, 4 / 3
"""Limits of a random crop's ratio of width to height, as in torchvision."""

Box = tuple[float, float, float, float]
"""Top, left, bottom and right of a crop, as fractions of the image's height and width."""


def resize_and_crop(
    height: int, width: int, size: int
) -> tuple[tuple[int, int], tuple[float, float]]:
    """Resize the short side to `size`, then crop the central `size` x `size` pixels, rounding like
    torchvision.

    Returns:
        Height and width after the resize; top and left of the crop, each as a fraction (0 to 1) of
        the pixels outside the crop.
    """
    short = min(height, width)
    resized = (size * height // short, size * width // short)
    top, left = (
        round(over / 2) / over if over else 0.0 for over in (side - size for side in resized)
    )
    return resized, (top, left)


def center_crop(height: int, width: int, size: int) -> Box:
    """The crop of `resize_and_crop`, relative to the original image."""
    (rows, columns), (top, left) = resize_and_crop(height, width, size)
    top, left = top * (rows - size), left * (columns - size)
    return top / rows, left / columns, (top + size) / rows, (left + size) / columns


def stored_center_crop(height: int, width: int, size: int, whole: Mapping[str, int] | None) -> Box:
    """The center crop of the picture that a stored one was cut from, relative to the stored one;
    the stored one's own where it lacks a part of that.

    Args:
        height, width: of the stored picture.
        size: pixels of a side after the crop is resized.
        whole: `cropped_from` of the sample's JSON; None: the stored picture is whole.
    """
    if whole is not None:
        top, left, bottom, right = center_crop(whole["height"], whole["width"], size)
        vertical = [(y * whole["height"] - whole["top"]) / height for y in (top, bottom)]
        horizontal = [(x * whole["width"] - whole["left"]) / width for x in (left, right)]
        if min(*vertical, *horizontal) >= 0 and max(*vertical, *horizontal) <= 1:
            return vertical[0], horizontal[0], vertical[1], horizontal[1]
    return center_crop(height, width, size)


def random_crop(
    height: int, width: int, center: Box, augmentation: Augmentation, seed: int, position: int
) -> Box:
    """Draw a crop of random area and aspect ratio, like torchvision's RandomResizedCrop.

    Falls back to the center crop after ten tries, and if the minimum area is 1.
    """
    smallest = augmentation.min_crop_area
    if smallest == 1:
        return center
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
    return center


def is_flipped(augmentation: Augmentation, seed: int, position: int) -> bool:
    """Whether the frames are flipped horizontally: half of the time, if enabled."""
    return augmentation.flip and bool(_uniform(seed, "flip", position, 1)[0] < 0.5)


def mixup_lambda(augmentation: Augmentation, seed: int, position: int) -> float:
    """Weight of the clip itself when another one is mixed in, from Beta(10, 10); 1: no mixup.

    The median of 19 uniform numbers has that distribution.
    """
    if not augmentation.mixup_prob:
        return 1.0
    decision, *uniform = _uniform(seed, "mix", position, 20).tolist()
    return statistics.median(uniform) if decision < augmentation.mixup_prob else 1.0


def mixed_waveform(first: np.ndarray, second: np.ndarray, weight: float) -> np.ndarray:
    """Mix two waveforms as published: each without its mean, the second cut or zero-padded.

    Args:
        first: `(samples,)` float32.
        second: `(its samples,)` float32.
        weight: of the first, 0 to 1.

    Returns:
        `(samples,)` float32; the log-mel subtracts its mean again.
    """
    mixed = weight * (first - first.mean())
    second = (1 - weight) * (second - second.mean())
    length = min(len(first), len(second))
    mixed[:length] += second[:length]
    return mixed


@dataclass(frozen=True)
class SpecAugment:
    """Augmentation of one log-mel.

    Attributes:
        frames, bins: start and end of the masks, which set 0 before normalisation.
        noise: `(frames, bins)` float32 to add after normalisation; None: no noise, no shift.
        shift: frames by which to roll the result.
    """

    frames: tuple[int, int]
    bins: tuple[int, int]
    noise: np.ndarray | None
    shift: int


def spec_augment(
    augmentation: Augmentation, frames: int, bins: int, seed: int, position: int
) -> SpecAugment:
    """Draw the augmentation of the published fine-tuning: one mask of frames and one of bins, both
    of random length; noise of random strength up to 0.1; a roll by up to the whole length.

    The noise has 256 levels.
    """
    draws = _uniform(seed, "spec_augment", position, 4).tolist()
    masked_frames = _mask(frames, augmentation.time_mask, *draws[:2])
    masked_bins = _mask(bins, augmentation.frequency_mask, *draws[2:])
    if not augmentation.noise:
        return SpecAugment(masked_frames, masked_bins, None, 0)
    words = random_words(seed, "noise", position, -(-frames * bins // 4)).astype("<u4")
    levels = words.view(np.uint8)[: frames * bins].reshape(frames, bins)
    strength, turn = _uniform(seed, "shift", position, 2).tolist()
    noise = levels * np.float32(strength / 10 / 255)
    return SpecAugment(masked_frames, masked_bins, noise, int(turn * 2 * frames) - frames)


def _mask(count: int, longest: int, length_share: float, start_share: float) -> tuple[int, int]:
    """Draw torchaudio's mask along an axis: a length below `longest`, then a start that fits."""
    length = min(length_share * longest, count)
    start = start_share * (count - length)
    return int(start), int(start) + int(length)


def _uniform(seed: int, stream: str, position: int, count: int) -> np.ndarray:
    """`(count,)` float64 in [0, 1)."""
    return random_words(seed, stream, position, count) / 2.0**32
