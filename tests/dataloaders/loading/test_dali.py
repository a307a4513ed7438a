"""Decoding: all tiers and codecs give the same clip, alone or in a batch, with any threads."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from cavmae.dataloaders.config import ClipShape, DataConfig
from cavmae.dataloaders.loading.dali import (
    ClipDecoder,
    DecodedClips,
    DecodeError,
    _image_graph,
    _video_graph,
)
from cavmae.dataloaders.loading.reader import (
    ClipReader,
    EncodedClip,
    ReaderSettings,
    ReadTask,
    check_frame_choice,
)
from cavmae.dataloaders.media.audio_codec import decode_audio
from cavmae.dataloaders.packing.pack import PackConfig, pack
from cavmae.dataloaders.shards.shard_set import ShardSet
from cavmae.dataloaders.tools.synthetic import generate

IMAGE_SIZE = 48
CLIPS = 4


@pytest.fixture(scope="module")
def packed_by_codec(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The same few clips as JPEGs, as video of each codec and as they were, with WAV: tiers."""
    folder = tmp_path_factory.mktemp("packed_by_codec")
    listing = str(generate(folder / "videos", CLIPS, seed=2, workers=1))
    tiers = {}
    for codec in ("vp9", "h264", "mjpeg"):
        names = "frames,video" if codec == "vp9" else "video"
        pack(PackConfig(listing, str(folder / codec), tiers=names, video_codec=codec, workers=1))
        tiers[codec] = folder / codec / "video"
    wav = PackConfig(
        listing, str(folder / "wav"), tiers="frames,original", audio_codec="wav", workers=1
    )
    pack(wav)
    return tiers | {
        "jpeg": folder / "vp9" / "frames",
        "jpeg_wav": folder / "wav" / "frames",
        "original": folder / "wav" / "original",
    }


def read(folder: Path, positions: list[int], training: bool = True) -> list[EncodedClip]:
    """Clips read as for training: sample `position % CLIPS` of the first shard."""
    settings = ReaderSettings(
        shards=ShardSet(folder),
        config=DataConfig(),
        shape=ClipShape(audio_frames=198, mel_bins=32, image_size=IMAGE_SIZE),
        seed=3,
        training=training,
        gpu=None,
    )
    reader = ClipReader(settings)
    clips = []
    for position in positions:
        clip = reader(ReadTask(position, 0, 0, position % CLIPS))
        assert isinstance(clip, EncodedClip), clip
        clips.append(clip)
    return clips


def decode(tier: str, clips: list[EncodedClip], threads: int = 1) -> DecodedClips:
    decoder = ClipDecoder(tier, IMAGE_SIZE, maximum_batch=8, threads=threads, gpu=None)
    decoder.schedule(clips)
    return decoder.collect()


def tier_of(source: str) -> str:
    return {"jpeg": "frames", "jpeg_wav": "frames", "original": "original"}.get(source, "video")


def levels(decoded: DecodedClips) -> np.ndarray:
    """Frames in levels of about 0 to 255, without the mean of each channel."""
    return decoded.frames * 255 * 0.225


@pytest.mark.parametrize("source", ["h264", "mjpeg", "jpeg", "original"])
def test_every_tier_and_codec_shows_nearly_the_same_frame(
    packed_by_codec: dict[str, Path], source: str
) -> None:
    """The middle frame, which does not depend on the tier."""
    positions = list(range(CLIPS))
    vp9 = decode("video", read(packed_by_codec["vp9"], positions, training=False))
    other = decode(tier_of(source), read(packed_by_codec[source], positions, training=False))
    assert np.abs(levels(vp9) - levels(other)).mean() < 4
    another_clip = np.roll(levels(other), 1, axis=0)
    assert np.abs(levels(vp9) - another_clip).mean() > 12


@pytest.mark.parametrize("source", ["vp9", "h264", "mjpeg", "jpeg", "jpeg_wav", "original"])
def test_sound_is_the_packed_sound_sample_for_sample(
    packed_by_codec: dict[str, Path], source: str
) -> None:
    clips = read(packed_by_codec[source], [0, 1])
    shards = ShardSet(packed_by_codec[source])
    for number, waveform in enumerate(decode(tier_of(source), clips).waveforms):
        assert waveform.dtype == np.int16
        assert len(waveform) == shards.description(0, number)["audio"]["samples"]
        assert np.abs(waveform.astype(np.int32)).max() > 1000
        stored = ShardSet(packed_by_codec["jpeg"]).member(0, number, "flac")
        assert np.array_equal(waveform, decode_audio(stored))


def test_the_original_is_the_file_as_it_was(packed_by_codec: dict[str, Path]) -> None:
    shards = ShardSet(packed_by_codec["original"])
    for sample in range(CLIPS):
        source = packed_by_codec["original"].parents[1] / "videos"
        path = source / shards.description(0, sample)["source"]["path"]
        assert shards.member(0, sample, "source") == path.read_bytes()


def test_any_moment_of_the_original_is_what_the_video_tier_shows(
    packed_by_codec: dict[str, Path],
) -> None:
    positions = [CLIPS * number + number % CLIPS for number in range(12)]
    ours, theirs = (
        read(packed_by_codec["original"], positions),
        read(packed_by_codec["vp9"], positions),
    )
    assert [one.frame_seconds for one in ours] == [one.frame_seconds for one in theirs]
    difference = np.concatenate(
        [
            levels(decode("original", ours[:8])) - levels(decode("video", theirs[:8])),
            levels(decode("original", ours[8:])) - levels(decode("video", theirs[8:])),
        ]
    )
    assert np.abs(difference).mean(axis=(1, 2, 3, 4)).max() < 4


@pytest.mark.parametrize("source", ["vp9", "h264", "jpeg"])
@pytest.mark.parametrize("threads", [1, 2])
def test_a_clip_decodes_to_the_same_bits_in_any_company(
    packed_by_codec: dict[str, Path], source: str, threads: int
) -> None:
    clips = read(packed_by_codec[source], list(range(8)))
    together = decode(tier_of(source), clips, threads)
    for number in (0, 5):
        alone = decode(tier_of(source), clips[number : number + 1])
        assert np.array_equal(alone.frames[0], together.frames[number])
        assert np.array_equal(alone.waveforms[0], together.waveforms[number])


def test_frames_of_two_batches_do_not_mix(packed_by_codec: dict[str, Path]) -> None:
    clips = read(packed_by_codec["vp9"], list(range(6)))
    decoder = ClipDecoder("video", IMAGE_SIZE, maximum_batch=8, threads=1, gpu=None)
    decoder.schedule(clips[:4])
    first = decoder.collect()
    decoder.schedule(clips[4:])
    kept = first.frames.copy()
    second = decoder.collect()
    assert np.array_equal(first.frames, kept)
    assert np.array_equal(second.frames, decode("video", clips[4:]).frames)


@pytest.mark.parametrize("source", ["vp9", "jpeg", "original"])
def test_the_frame_is_drawn_for_the_position(packed_by_codec: dict[str, Path], source: str) -> None:
    """All frames come about, each position has its own, and always the same."""
    positions = [CLIPS * number for number in range(200)]
    times = [clip.frame_seconds[0] for clip in read(packed_by_codec[source], positions)]
    assert times == [clip.frame_seconds[0] for clip in read(packed_by_codec[source], positions)]
    described = ShardSet(packed_by_codec[source]).description(0, 0)
    shown = described["video"]["times_seconds"]
    if source == "jpeg":
        shown = [frame["seconds"] for frame in described["ten_frames"]]
    assert set(times) == set(shown)


def test_a_drawn_frame_shows_what_the_video_shows_at_that_time(
    packed_by_codec: dict[str, Path],
) -> None:
    """VP9, cut out by its time, against the JPEG that was packed with the same time."""
    ten = {
        frame["seconds"]: f"{number}.jpg"
        for number, frame in enumerate(
            ShardSet(packed_by_codec["jpeg"]).description(0, 0)["ten_frames"]
        )
    }
    clips = [
        clip
        for clip in read(packed_by_codec["vp9"], [CLIPS * number for number in range(24)])
        if clip.frame_seconds[0] in ten
    ][:6]
    assert len(clips) >= 3
    jpegs = ShardSet(packed_by_codec["jpeg"])
    as_jpeg = [
        EncodedClip(
            **{
                **vars(clip),
                "frames": (jpegs.member(0, 0, ten[clip.frame_seconds[0]]),),
            }
        )
        for clip in clips
    ]
    difference = levels(decode("video", clips)) - levels(decode("frames", as_jpeg))
    assert np.abs(difference).mean(axis=(1, 2, 3, 4)).max() < 4


@pytest.mark.parametrize(
    ("frame_choice", "refused"), [("by_time", False), ("published", True)], ids=str
)
@pytest.mark.parametrize("source", ["vp9", "jpeg"])
def test_a_set_packed_for_another_choice_of_frames_is_refused(
    packed_by_codec: dict[str, Path], source: str, frame_choice: str, refused: bool
) -> None:
    shards = ShardSet(packed_by_codec[source])
    if not refused:
        check_frame_choice(shards, frame_choice)
        return
    with pytest.raises(ValueError, match=r"data.frame_choice is published.*--frame-choice"):
        check_frame_choice(shards, frame_choice)


def test_frames_too_small_for_a_gpu_decoder_come_as_pixels(
    packed_by_codec: dict[str, Path],
) -> None:
    """NVDEC takes VP9 from 128 pixels; the clips here have 64."""
    shards = ShardSet(packed_by_codec["vp9"])
    settings = ReaderSettings(shards, DataConfig(), ClipShape(198, 32, 48), 0, True, gpu=0)
    clip = ClipReader(settings)(ReadTask(0, 0, 0, 0))
    assert isinstance(clip, EncodedClip)
    assert clip.pixels is not None
    assert clip.pixels[0].shape == (64, 64, 3)


@pytest.mark.parametrize("graph", [_video_graph, _image_graph])
def test_the_graph_for_a_gpu_can_be_defined(graph: Callable[..., object]) -> None:
    """It cannot be built or run here."""
    graph(on_gpu=True, image_size=224, batch_size=2, num_threads=1, device_id=0)


Spoil = Callable[[EncodedClip], dict[str, object]]


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        pytest.param(lambda clip: {"audio": b"RIFF"}, "audio_undecodable", id="sound"),
        pytest.param(
            lambda clip: {"audio": clip.audio[: len(clip.audio) // 2]},
            "audio_undecodable",
            id="half_a_flac",
        ),
        pytest.param(lambda clip: {"frames": (b"no video",)}, "video_undecodable", id="video"),
    ],
)
def test_one_bad_clip_is_an_error_of_the_batch_with_a_reason(
    packed_by_codec: dict[str, Path], spoil: Spoil, reason: str
) -> None:
    clips = read(packed_by_codec["vp9"], [0, 1, 2])
    fields: dict = {**vars(clips[1]), **spoil(clips[1])}
    with pytest.raises(DecodeError) as refused:
        decode("video", [clips[0], EncodedClip(**fields), clips[2]])
    assert refused.value.reason == reason
