"""A run of one modality: the same batches as one of both, and nothing read or decoded beside."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from batches import take
from rich.console import Console

from cavmae.dataloaders.config import Augmentation, ClipShape, DataConfig
from cavmae.dataloaders.constants import Modalities
from cavmae.dataloaders.loading.dali import ClipDecoder
from cavmae.dataloaders.loading.loader import TrainLoader, ValidationLoader
from cavmae.dataloaders.loading.quarantine import intact_clip
from cavmae.dataloaders.loading.reader import ClipReader, EncodedClip, ReaderSettings, ReadTask
from cavmae.dataloaders.packing.pack import PackConfig, pack
from cavmae.dataloaders.shards.shard_set import ShardSet
from cavmae.dataloaders.shards.storage import LocalFolder, StoredFile

SHAPE = ClipShape(audio_frames=208, mel_bins=32, image_size=48)
AUGMENTATION = Augmentation(0.3, True, 8, 20, True, mixup_prob=0.5)
CONFIG = DataConfig(reader_workers=1, decode_threads=1, shuffle_window=4)


def settings(folder: Path, modality: Modalities) -> ReaderSettings:
    config = replace(CONFIG, modality=modality)
    return ReaderSettings(ShardSet(folder), config, SHAPE, 3, training=True, gpu=None)


@pytest.mark.parametrize("tier", ["video", "frames"])
def test_each_modality_alone_gives_what_it_is_in_a_batch_of_both(
    train_loader: Callable[..., TrainLoader], packed_synthetic: Path, tier: str
) -> None:
    """Augmented, and with clips mixed in."""
    config = replace(CONFIG, train=str(packed_synthetic / tier), augmentation=AUGMENTATION)
    found = {
        modality: take(train_loader(replace(config, modality=modality), SHAPE), 2)
        for modality in ("both", "audio", "video")
    }
    for both, audio, video in zip(found["both"], found["audio"], found["video"], strict=True):
        assert both.mixup_lambda.min() < 1
        for name, one, other in (("audio", audio, video), ("video", video, audio)):
            fields = ("log_mel", "audio_seconds") if name == "audio" else ("frames",)
            for field in fields:
                assert torch.equal(getattr(one, field), getattr(both, field)), field
                assert getattr(other, field) is None
            assert one.sample_ids == both.sample_ids and one.mixed_labels == both.mixed_labels
        assert video.frame_seconds is not None and both.frame_seconds is not None
        assert torch.equal(video.frame_seconds, both.frame_seconds)
        assert audio.frame_seconds is None and audio.frame is None
        assert audio.to(torch.device("cpu")).frames is None


@pytest.mark.parametrize("tier", ["video", "frames"])
def test_nothing_of_the_other_modality_is_read_of_a_set_of_both(
    packed_synthetic: Path, tier: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Counted: the bytes that a reader asks the storage for, beside those that members have."""
    asked: list[int] = []
    read = LocalFolder.read_range

    def counted(self: LocalFolder, file: StoredFile, offset: int, size: int) -> bytes:
        asked.append(size)
        return read(self, file, offset, size)

    monkeypatch.setattr(LocalFolder, "read_range", counted)
    total: dict[str, int] = {}
    clips: dict[str, EncodedClip] = {}
    for modality in ("both", "audio", "video"):
        asked.clear()
        clip = ClipReader(settings(packed_synthetic / tier, modality))(ReadTask(5, 0, 1, 2))
        assert isinstance(clip, EncodedClip)
        clips[modality], total[modality] = clip, sum(asked)
    shards = ShardSet(packed_synthetic / tier)
    text, sound = (shards.member_size(1, 2, name) for name in ("json", "flac"))
    assert total["audio"] == text + sound
    assert total["video"] == total["both"] - sound
    assert clips["audio"].audio == clips["both"].audio and clips["audio"].frames == ()
    assert clips["video"].frames == clips["both"].frames and clips["video"].audio == b""


@pytest.mark.parametrize("modality", ["audio", "video"])
def test_only_one_modality_reaches_the_decoders(
    packed_synthetic: Path, modality: Modalities
) -> None:
    """Bytes that no decoder takes stand for the other one: they would end the batch."""
    of_run = settings(packed_synthetic / "frames", modality)
    clip = ClipReader(of_run)(ReadTask(5, 0, 1, 2))
    assert isinstance(clip, EncodedClip)
    spoiled = {"frames": (b"no JPEG",)} if modality == "audio" else {"audio": b"no FLAC"}
    decoder = ClipDecoder.of(of_run, 1, threads=1)
    decoder.schedule([replace(clip, **spoiled)])
    decoded = decoder.collect()
    assert (decoded.frames is None) == (modality == "audio")
    assert (len(decoded.waveforms[0]) > 1) == (modality == "audio")


@pytest.fixture(scope="module")
def alone(packed_synthetic: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The videos of `packed_synthetic` as `audio/audio` and `video/frames`, `video/video`."""
    folder = tmp_path_factory.mktemp("alone")
    for modality in ("audio", "video"):
        pack(
            PackConfig(
                str(packed_synthetic.parent / "videos" / "clips.csv"),
                str(folder / modality),
                modality,  # pyright: ignore[reportArgumentType]
                video_codec="vp9",
                clips_per_shard=8,
                workers=1,
            ),
            Console(quiet=True),
        )
    return folder


@pytest.mark.parametrize("tier", ["audio/audio", "video/frames", "video/video"])
def test_a_set_of_one_modality_gives_the_batches_of_a_set_of_both(
    train_loader: Callable[..., TrainLoader], packed_synthetic: Path, alone: Path, tier: str
) -> None:
    modality, name = tier.split("/")
    folders = (alone / tier, packed_synthetic / name.replace("audio", "frames"))
    one, both = (
        take(train_loader(replace(CONFIG, train=str(folder), modality=modality), SHAPE), 1)[0]
        for folder in folders
    )
    field = "log_mel" if modality == "audio" else "frames"
    assert torch.equal(getattr(one, field), getattr(both, field))
    assert one.labels == both.labels


@pytest.mark.parametrize("modality", ["audio", "video"])
def test_an_intact_clip_of_one_modality_decodes(alone: Path, modality: Modalities) -> None:
    tiers = ["audio"] if modality == "audio" else ["frames", "video"]
    for tier in tiers:
        of_run = settings(alone / modality / tier, modality)
        decoder = ClipDecoder.of(of_run, 1, threads=1)
        decoder.schedule([intact_clip(of_run)])
        assert len(decoder.collect().waveforms) == 1


def test_a_damaged_sound_is_quarantined_in_a_set_of_sound_alone(
    validation_loader: Callable[..., ValidationLoader], alone: Path, tmp_path: Path
) -> None:
    tier = tmp_path / "audio"
    tier.mkdir()
    for file in (alone / "audio" / "audio").iterdir():
        (tier / file.name).write_bytes(file.read_bytes())
    shards = ShardSet(tier)
    offset, size = shards._range(0, 3, "flac")
    data = bytearray((tier / "000000.tar").read_bytes())
    data[offset + size // 2] ^= 0xFF
    (tier / "000000.tar").write_bytes(data)
    config = replace(CONFIG, modality="audio")
    loader = validation_loader(config, SHAPE, folder=str(tier))
    assert sum(len(batch.sample_ids) for batch in loader) == 23
    assert [one.reason for one in loader.quarantine] == ["crc_mismatch"]


def test_a_set_that_lacks_what_is_read_is_refused_with_the_fix(
    train_loader: Callable[..., TrainLoader], alone: Path
) -> None:
    lacking = [("audio/audio", "both", "pictures"), ("video/frames", "both", "sound")]
    for tier, modality, what in [*lacking, ("audio/audio", "video", "pictures")]:
        config = replace(CONFIG, train=str(alone / tier), modality=modality)
        has = tier.split("/")[0]
        with pytest.raises(ValueError, match=f"has no {what}: .* set data.modality to {has}"):
            train_loader(config, SHAPE)
