"""Augmentation, several frames and windows: right, repeatable, and drawn for the position alone."""

import io
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from batches import assert_equal, given, take
from PIL import Image
from pytest import approx

from cavmae.dataloaders.config import Augmentation, ClipShape, DataConfig
from cavmae.dataloaders.constants import IMAGE_MEAN, IMAGE_STD
from cavmae.dataloaders.loading.augment import (
    center_crop,
    is_flipped,
    random_crop,
    resize_and_crop,
    spec_augment,
    stored_center_crop,
)
from cavmae.dataloaders.loading.dali import ClipDecoder
from cavmae.dataloaders.loading.loader import TrainLoader, ValidationLoader
from cavmae.dataloaders.loading.reader import EncodedClip, ReadTask
from cavmae.dataloaders.media.audio_codec import encode_audio
from cavmae.dataloaders.shards.shard_set import ShardSet

EVERYTHING = Augmentation(
    min_crop_area=0.2, flip=True, frequency_mask=12, time_mask=60, noise=True, mixup_prob=0.5
)
SHAPE = ClipShape(audio_frames=208, mel_bins=32, image_size=48)


@pytest.fixture
def start(train_loader: Callable[..., TrainLoader], packed_synthetic: Path) -> Callable[..., Any]:
    def loader(tier: str = "video", position: int = 0, **fields: Any) -> TrainLoader:
        config = DataConfig(train=str(packed_synthetic / tier), reader_workers=1, decode_threads=1)
        return train_loader(replace(config, **fields), SHAPE, start_position=position)

    return loader


# ------------------------------------------------------------------------------------ frames

CENTER = (0.0, 0.1, 1.0, 0.9)


def test_random_crops_have_torchvision_s_areas_and_ratios() -> None:
    augmentation = Augmentation(min_crop_area=0.2)
    boxes = np.array([random_crop(240, 320, CENTER, augmentation, 3, p) for p in range(2000)])
    height, width = 240 * (boxes[:, 2] - boxes[:, 0]), 320 * (boxes[:, 3] - boxes[:, 1])
    assert (boxes >= 0).all() and (boxes <= 1 + 1e-12).all()
    areas, ratios = height * width / (240 * 320), width / height
    assert 0.19 < areas.min() < 0.22 and 0.9 < areas.max() <= 1
    assert 0.7 < ratios.min() < 0.77 and 1.3 < ratios.max() < 1.4
    assert abs(boxes[:, 0].mean() - (1 - boxes[:, 2]).mean()) < 0.02, "as often up as down"
    assert len({tuple(box) for box in boxes}) > 1900
    assert random_crop(240, 320, CENTER, augmentation, 3, 7) == tuple(boxes[7])


def test_a_picture_that_no_crop_fits_shows_its_middle() -> None:
    augmentation = Augmentation(min_crop_area=0.99)
    for position in range(20):
        assert random_crop(16, 1600, CENTER, augmentation, 0, position) == CENTER


def test_half_of_the_clips_are_flipped() -> None:
    flips = [is_flipped(Augmentation(flip=True), 0, position) for position in range(4000)]
    assert abs(np.mean(flips) - 0.5) < 0.03
    assert not any(is_flipped(Augmentation(), 0, position) for position in range(100))


@pytest.mark.parametrize("mirrored", [False, True])
def test_a_box_comes_out_as_pil_crops_and_resizes_it(mirrored: bool) -> None:
    row, column = np.mgrid[:256, :341]
    waves = [127 + 90 * np.sin(column / 9 + row / 13), 255 * row / 256, 255 * column / 341]
    picture = Image.fromarray(np.stack(waves, -1).astype(np.uint8))
    jpeg = io.BytesIO()
    picture.save(jpeg, "JPEG", quality=95)
    top, left, bottom, right = 40, 30, 200, 240
    box = (top / 256, left / 341, bottom / 256, right / 341)
    sound = encode_audio(np.zeros(1600, dtype=np.int16), "flac")
    task = ReadTask(0, 0, 0, 0)
    clip = EncodedClip(
        task, "", (), sound, (jpeg.getvalue(),), None, box, mirrored, (0.0,), (0.0, 0.1)
    )
    decoder = ClipDecoder(True, 96, maximum_batch=1, threads=1, gpu=None)
    decoder.schedule([clip])
    frame = decoder.collect().frames[0, 0].transpose(1, 2, 0)
    ours = 255 * (frame * np.array(IMAGE_STD) + np.array(IMAGE_MEAN))
    decoded = Image.open(jpeg).convert("RGB")
    theirs = decoded.resize((96, 96), Image.Resampling.BILINEAR, (left, top, right, bottom))
    expected = np.asarray(theirs, dtype=np.float64)
    expected = expected[:, ::-1] if mirrored else expected
    assert np.abs(ours - expected).max() < 3 and np.abs(ours - expected).mean() < 0.4


def test_the_middle_box_is_the_resize_and_crop() -> None:
    resized, crop = resize_and_crop(256, 455, 224)
    top, left, bottom, right = center_crop(256, 455, 224)
    assert (top * resized[0], bottom * resized[0]) == (0, 224)
    assert round(left * resized[1], 9) == crop[1] * (resized[1] - 224) == 87
    assert round((right - left) * resized[1], 9) == 224


def test_a_cropped_picture_shows_the_center_crop_of_the_whole_one() -> None:
    """Also where the pixel at which it was cut is not the middle one."""
    whole = {"width": 454, "height": 256, "left": 2, "top": 0}
    expected = center_crop(256, 454, 224)
    top, left, bottom, right = stored_center_crop(256, 448, 224, whole)
    assert (top, bottom) == (expected[0], expected[2])
    assert 2 + 448 * np.array([left, right]) == approx(454 * np.array([expected[1], expected[3]]))
    assert (left, right) != center_crop(256, 448, 224)[1::2]


def test_a_picture_that_lacks_a_part_of_the_center_crop_shows_its_own() -> None:
    whole = {"width": 180, "height": 320, "left": 2, "top": 0}
    assert stored_center_crop(320, 176, 224, whole) == center_crop(320, 176, 224)


# ------------------------------------------------------------------------------------- sound


def test_masks_noise_and_shift_are_drawn_as_published() -> None:
    augmentation = Augmentation(frequency_mask=48, time_mask=192, noise=True)
    changes = [spec_augment(augmentation, 1024, 128, 5, position) for position in range(400)]
    for name, longest, count in (("frames", 192, 1024), ("bins", 48, 128)):
        spans = np.array([getattr(change, name) for change in changes])
        lengths = spans[:, 1] - spans[:, 0]
        assert lengths.min() >= 0 and 0.9 * longest < lengths.max() < longest
        assert abs(lengths.mean() - longest / 2) < 0.1 * longest
        assert spans.min() >= 0 and spans.max() <= count
    shifts = np.array([change.shift for change in changes])
    assert shifts.min() < -900 and shifts.max() > 900 and shifts.min() >= -1024
    noises = [change.noise for change in changes if change.noise is not None]
    strengths = np.array([noise.max() for noise in noises])
    assert len(noises) == 400 and 0.09 < strengths.max() <= 0.1 and strengths.min() < 0.01
    assert abs(noises[0].mean() / noises[0].max() - 0.5) < 0.01
    assert len(np.unique(noises[0])) == 256


def test_masks_come_before_the_normalisation_and_noise_after_it(
    start: Callable[..., TrainLoader],
) -> None:
    (plain,) = take(start(), 1)
    masks = Augmentation(frequency_mask=12, time_mask=60)
    config = DataConfig()
    (masked,) = take(start(augmentation=masks), 1)
    (noisy,) = take(start(augmentation=replace(masks, noise=True)), 1)
    for row, position in enumerate(plain.positions.tolist()):
        change = spec_augment(replace(masks, noise=True), 208, 32, 11, position)
        expected = given(plain.log_mel)[row].clone()
        value = (0 - config.log_mel_mean) / config.log_mel_std
        expected[slice(*change.frames)] = value
        expected[:, slice(*change.bins)] = value
        torch.testing.assert_close(given(masked.log_mel)[row], expected)
        assert change.noise is not None
        expected = (expected + torch.from_numpy(change.noise)).roll(change.shift, 0)
        torch.testing.assert_close(given(noisy.log_mel)[row], expected)
    assert torch.equal(given(plain.frames), given(noisy.frames))


# ------------------------------------------------------------------- the loader as a whole


@pytest.mark.parametrize("tier", ["video", "frames"])
def test_an_augmented_batch_depends_on_its_position_alone(
    tier: str, start: Callable[..., TrainLoader]
) -> None:
    fields = {"augmentation": EVERYTHING, "window_seconds": 1.2, "frames_per_clip": 3}
    whole = take(start(tier, **fields), 5)
    assert_equal(take(start(tier, position=16, reader_workers=2, **fields), 3), whole[2:])
    ids = [one for batch in whole for one in batch.sample_ids]
    again = [place for place, one in enumerate(ids) if ids.index(one) != place]
    assert again, "a clip came twice"
    spectrograms = torch.cat([given(batch.log_mel) for batch in whole])
    first = ids.index(ids[again[0]])
    assert not torch.equal(spectrograms[first], spectrograms[again[0]]), "and was changed anew"


@pytest.mark.parametrize("tier", ["video", "frames"])
def test_validation_is_not_augmented(
    tier: str, packed_synthetic: Path, validation_loader: Callable[..., ValidationLoader]
) -> None:
    found = []
    for augmentation in (Augmentation(), EVERYTHING):
        config = DataConfig(augmentation=augmentation, reader_workers=1)
        folder = str(packed_synthetic / tier)
        found.append(list(validation_loader(config, SHAPE, folder=folder, limit=6)))
    assert_equal(*found)


@pytest.mark.parametrize("tier", ["video", "frames"])
def test_frames_and_sound_come_from_the_same_window(
    tier: str, start: Callable[..., TrainLoader], packed_synthetic: Path
) -> None:
    shards = ShardSet(packed_synthetic / tier)
    described = {
        shards.sample_id(shard, sample): shards.description(shard, sample)
        for shard, size in enumerate(shards.sizes)
        for sample in range(size)
    }
    starts = set()
    for batch in take(start(tier, window_seconds=1.0, frames_per_clip=4), 3):
        assert given(batch.frames).shape == (8, 4, 3, 48, 48)
        for row, sample_id in enumerate(batch.sample_ids):
            begin, length = given(batch.audio_seconds)[row].tolist()
            times = given(batch.frame_seconds)[row].tolist()
            seconds = described[sample_id]["audio"]["samples"] / 16000
            assert length == pytest.approx(1.0) and 0 <= begin <= seconds - 1 + 1e-6
            starts.add(round(begin, 4))
            step = 0.13 if tier == "video" else 0.21  # between frames
            assert times == sorted(times)
            assert begin - step <= times[0] and times[-1] <= begin + length + step
            quiet = given(batch.log_mel)[row, 98:]
            assert (quiet == quiet[0, 0]).all(), "padding after the second that is heard"
    assert len(starts) > 15, "windows are drawn"


def test_each_frame_comes_from_its_own_part_of_the_clip(start: Callable[..., TrainLoader]) -> None:
    for batch in take(start("video", frames_per_clip=4), 2):
        assert given(batch.frame_seconds).shape == (8, 4)
        parts = (given(batch.frame_seconds) / 2.0 * 4 + 1e-6).floor()  # of clips of two seconds
        # What is shown at a moment began up to 1/8 s before it.
        assert ((parts - torch.arange(4)).abs() <= 1).all()
        assert (given(batch.frame_seconds).diff(dim=1) >= 0).all()


@pytest.mark.parametrize("tier", ["video", "frames"])
def test_several_pipelines_give_the_same_batches(
    tier: str, start: Callable[..., TrainLoader]
) -> None:
    alone = take(start(tier), 5)
    for count in (2, 4):
        assert_equal(take(start(tier, video_pipelines=count), 5), alone)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"min_crop_area": 0.0}, r"min_crop_area is 0\.0; use a fraction above 0"),
        ({"min_crop_area": 1.5}, r"min_crop_area is 1\.5"),
        ({"time_mask": -1}, "time_mask is -1; use 0 or more"),
        ({"mixup_prob": 1.5}, r"mixup_prob is 1\.5; use a fraction from 0 to 1"),
        ({"mixup_prob": float("nan")}, "mixup_prob is nan"),
    ],
)
def test_values_out_of_range_are_named(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Augmentation(**fields)
