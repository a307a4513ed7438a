"""Mixing of clips: the published sums, and partners that depend on seed and position alone."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from batches import take

from cavmae.dataloaders.config import Augmentation, ClipShape, DataConfig
from cavmae.dataloaders.loading.augment import mixup_lambda
from cavmae.dataloaders.loading.dali import ClipDecoder
from cavmae.dataloaders.loading.loader import TrainLoader
from cavmae.dataloaders.loading.quarantine import Journal
from cavmae.dataloaders.loading.reader import ClipReader, EncodedClip, ReaderSettings, ReadTask
from cavmae.dataloaders.media.audio_codec import decode_audio
from cavmae.dataloaders.media.log_mel import log_mel
from cavmae.dataloaders.sampling.mixture import MixturePlan
from cavmae.dataloaders.sampling.sample_plan import SamplePlan, any_sample
from cavmae.dataloaders.shards.shard_set import ShardSet

CPU = torch.device("cpu")
SHAPE = ClipShape(audio_frames=208, mel_bins=32, image_size=48)
SEED, LANES, WINDOW = 11, 4, 8
CHANGES = {"min_crop_area": 0.2, "flip": True}


@pytest.fixture
def rows(
    train_loader: Callable[..., TrainLoader], packed_synthetic: Path
) -> Callable[..., dict[int, dict[str, Any]]]:
    """The first rows of a loader, by position: one entry for each field of the batch."""

    def rows(augmentation: Augmentation, batches: int, **fields: Any) -> dict[int, dict[str, Any]]:
        config = DataConfig(
            train=str(packed_synthetic / "video"),
            reader_workers=1,
            decode_threads=1,
            shuffle_window=WINDOW,
            augmentation=augmentation,
        )
        loader = train_loader(config, SHAPE, **fields)
        return {
            position: {name: value[row] for name, value in vars(batch).items()}
            for batch in take(loader, batches)
            for row, position in enumerate(batch.positions.tolist())
        }

    return rows


def assert_same(ours: dict[int, dict[str, Any]], theirs: dict[int, dict[str, Any]]) -> None:
    assert sorted(ours) == sorted(theirs)
    for position, fields in theirs.items():
        for name, value in fields.items():
            found = ours[position][name]
            same = torch.equal(found, value) if torch.is_tensor(value) else found == value
            assert same, f"{name} at {position}"


def reader(shards: ShardSet, **settings: Any) -> ClipReader:
    return ClipReader(ReaderSettings(shards, DataConfig(**settings), SHAPE, SEED, True, None))


# ------------------------------------------------------------------------------------- draws


def test_shares_have_the_published_distribution() -> None:
    """Beta(10, 10): mean 1/2, variance 1/84, symmetric, hardly ever far from the middle."""
    always = Augmentation(mixup_prob=1.0)
    shares = np.array([mixup_lambda(always, 3, position) for position in range(6000)])
    assert abs(shares.mean() - 1 / 2) < 0.005
    assert abs(shares.var() * 84 - 1) < 0.06
    assert 0.05 < shares.min() < 0.2 and 0.8 < shares.max() < 0.95
    sometimes = Augmentation(mixup_prob=0.3)
    mixed = np.array([mixup_lambda(sometimes, 3, position) for position in range(6000)])
    assert abs((mixed < 1).mean() - 0.3) < 0.02
    assert (mixed[mixed < 1] == shares[mixed < 1]).all(), "a share does not depend on the rate"
    assert mixup_lambda(Augmentation(), 3, 0) == 1


def test_partners_are_any_clips_of_all_sets() -> None:
    sets = [SamplePlan(sizes, SEED, 1, 4) for sizes in ((3, 2), (4,))]
    ends = MixturePlan(sets, (0.99, 0.01)).ends
    assert ends.tolist() == [3, 5, 9]
    drawn = [any_sample(ends, SEED, "mix_source", position, 0) for position in range(4500)]
    places, counts = np.unique(drawn, axis=0, return_counts=True)
    assert len(places) == 9 and abs(counts - 500).max() < 90
    again = [any_sample(ends, SEED, "mix_source", 7, attempt) for attempt in range(20)]
    assert len(set(again)) > 5, "another one is drawn where one can't be used"


def test_a_partner_has_its_own_frame_crop_flip_and_window(packed_synthetic: Path) -> None:
    shards = ShardSet(packed_synthetic / "video")
    read = reader(shards, augmentation=Augmentation(**CHANGES), window_seconds=1.0)
    pairs = [
        [read(ReadTask(position, 0, 1, 2, partner)) for partner in (False, True)]
        for position in range(40)
    ]
    for name in ("crop", "flipped", "frame_seconds", "audio_seconds"):
        values = [[getattr(clip, name) for clip in pair] for pair in pairs]
        differ = sum(own != partner for own, partner in values)
        assert differ > (10 if name == "flipped" else 30), name


def test_a_journal_keeps_which_clips_were_partners(packed_synthetic: Path, tmp_path: Path) -> None:
    shards = ShardSet(packed_synthetic / "video")
    tasks = [ReadTask(10**12, 3, 1, 2), ReadTask(10**12, 3, 0, 5, mixed_in=True)]
    clips = [reader(shards)(task) for task in tasks]
    Journal(tmp_path).write(clip for clip in clips if isinstance(clip, EncodedClip))
    assert Journal(tmp_path).unfinished(shards, 0, 1) == tasks


# ------------------------------------------------------------------------------------ values


def test_sound_and_frames_are_sums_of_those_of_two_clips(
    packed_synthetic: Path, rows: Callable[..., dict[int, dict[str, Any]]]
) -> None:
    augmentation = Augmentation(mixup_prob=1.0, **CHANGES)
    shards = ShardSet(packed_synthetic / "video")
    plan = SamplePlan(shards.sizes, SEED, LANES, WINDOW)
    read = reader(shards, augmentation=augmentation)
    decoder = ClipDecoder(False, 48, maximum_batch=2, threads=1, gpu=None)
    config = DataConfig()
    mixed = rows(augmentation, 1)
    for position, row in mixed.items():
        planned = plan.samples(position, 1)[0]
        places = [planned[:2], any_sample(plan.ends, SEED, "mix_source", position, 0)]
        share = row["mixup_lambda"]
        assert share == np.float32(mixup_lambda(augmentation, SEED, position)) and share < 1
        assert row["sample_ids"] == shards.sample_id(*places[0])
        labels = [tuple(shards.description(*place)["labels"]) for place in places]
        assert [row["labels"], row["mixed_labels"]] == labels

        sounds = [decode_audio(shards.member(*place, "flac")) / 32768 for place in places]
        first, second = (sound - sound.mean() for sound in sounds)
        second = np.pad(second, (0, max(0, len(first) - len(second))))[: len(first)]
        sound = share.item() * first + (1 - share.item()) * second
        expected = log_mel([torch.from_numpy(sound).float()], 32, 208, CPU)[0]
        expected = (expected - config.log_mel_mean) / config.log_mel_std
        torch.testing.assert_close(row["log_mel"], expected, atol=5e-4, rtol=0)

        tasks = [ReadTask(position, 0, *place, place is places[1]) for place in places]
        clips = [read(task) for task in tasks]
        decoder.schedule([clip for clip in clips if isinstance(clip, EncodedClip)])
        own, partner = torch.from_numpy(decoder.collect().frames)
        assert torch.equal(row["frames"], share * own + (1 - share) * partner)


def test_half_mixed_batches_hold_the_rows_of_unmixed_and_mixed_ones(
    rows: Callable[..., dict[int, dict[str, Any]]],
) -> None:
    none, half, every = (rows(Augmentation(mixup_prob=rate, **CHANGES), 3) for rate in (0, 0.5, 1))
    assert {row["mixup_lambda"].item() for row in none.values()} == {1.0}
    assert {row["mixed_labels"] for row in none.values()} == {()}
    assert all(row["mixup_lambda"] < 1 for row in every.values())
    mixed = {position for position, row in half.items() if row["mixup_lambda"] < 1}
    assert 4 < len(mixed) < 20
    assert_same(
        half, {position: (every if position in mixed else none)[position] for position in half}
    )


@pytest.mark.parametrize(("world_size", "micro_batch"), [(1, 2), (2, 2), (2, 4)])
def test_ranks_micro_batches_and_restarts_change_nothing(
    rows: Callable[..., dict[int, dict[str, Any]]], world_size: int, micro_batch: int
) -> None:
    augmentation = Augmentation(
        mixup_prob=0.5, frequency_mask=12, time_mask=60, noise=True, **CHANGES
    )
    whole = rows(augmentation, 4)
    parts: dict[int, dict[str, Any]] = {}
    for rank in range(world_size):
        parts |= rows(
            augmentation,
            16 // (world_size * micro_batch),
            rank=rank,
            world_size=world_size,
            micro_batch=micro_batch,
            start_position=16,
        )
    assert_same(parts, {position: row for position, row in whole.items() if position >= 16})
