"""Decoding: all tiers and codecs give the same clip, alone or in a batch, with any threads."""

import io
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from cavmae.dataloaders.config import ClipShape, DataConfig
from cavmae.dataloaders.constants import MIDDLE_FRAME
from cavmae.dataloaders.loading.dali import (
    ClipDecoder,
    DecodedClips,
    DecodeError,
    _image_graph,
    _video_graph,
)
from cavmae.dataloaders.loading.reader import (
    BadSample,
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


def decode(source: str, clips: list[EncodedClip], threads: int = 1) -> DecodedClips:
    jpegs = source in ("jpeg", "jpeg_wav", "mjpeg")
    decoder = ClipDecoder(jpegs, IMAGE_SIZE, maximum_batch=8, threads=threads, gpu=None)
    decoder.schedule(clips)
    return decoder.collect()


def levels(decoded: DecodedClips) -> np.ndarray:
    """Frames in levels of about 0 to 255, without the mean of each channel."""
    return decoded.frames * 255 * 0.225


@pytest.mark.parametrize("source", ["h264", "mjpeg", "jpeg", "original"])
def test_every_tier_and_codec_shows_nearly_the_same_frame(
    packed_by_codec: dict[str, Path], source: str
) -> None:
    """The middle frame, which does not depend on the tier."""
    positions = list(range(CLIPS))
    vp9 = decode("vp9", read(packed_by_codec["vp9"], positions, training=False))
    other = decode(source, read(packed_by_codec[source], positions, training=False))
    assert np.abs(levels(vp9) - levels(other)).mean() < 4
    another_clip = np.roll(levels(other), 1, axis=0)
    assert np.abs(levels(vp9) - another_clip).mean() > 12


@pytest.mark.parametrize("source", ["vp9", "h264", "mjpeg", "jpeg", "jpeg_wav", "original"])
def test_sound_is_the_packed_sound_sample_for_sample(
    packed_by_codec: dict[str, Path], source: str
) -> None:
    clips = read(packed_by_codec[source], [0, 1])
    shards = ShardSet(packed_by_codec[source])
    for number, waveform in enumerate(decode(source, clips).waveforms):
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
            levels(decode("original", ours[:8])) - levels(decode("vp9", theirs[:8])),
            levels(decode("original", ours[8:])) - levels(decode("vp9", theirs[8:])),
        ]
    )
    assert np.abs(difference).mean(axis=(1, 2, 3, 4)).max() < 4


@pytest.mark.parametrize("source", ["vp9", "h264", "mjpeg", "jpeg"])
@pytest.mark.parametrize("threads", [1, 2])
def test_a_clip_decodes_to_the_same_bits_in_any_company(
    packed_by_codec: dict[str, Path], source: str, threads: int
) -> None:
    clips = read(packed_by_codec[source], list(range(8)))
    together = decode(source, clips, threads)
    for number in (0, 5):
        alone = decode(source, clips[number : number + 1])
        assert np.array_equal(alone.frames[0], together.frames[number])
        assert np.array_equal(alone.waveforms[0], together.waveforms[number])


def test_frames_of_two_batches_do_not_mix(packed_by_codec: dict[str, Path]) -> None:
    clips = read(packed_by_codec["vp9"], list(range(6)))
    decoder = ClipDecoder(False, IMAGE_SIZE, maximum_batch=8, threads=1, gpu=None)
    decoder.schedule(clips[:4])
    first = decoder.collect()
    decoder.schedule(clips[4:])
    kept = first.frames.copy()
    second = decoder.collect()
    assert np.array_equal(first.frames, kept)
    assert np.array_equal(second.frames, decode("vp9", clips[4:]).frames)


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
    difference = levels(decode("vp9", clips)) - levels(decode("jpeg", as_jpeg))
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


def read_for_a_gpu(folder: Path) -> EncodedClip:
    """The first clip, as for decoding on a GPU."""
    settings = ReaderSettings(ShardSet(folder), DataConfig(), ClipShape(198, 32, 48), 0, True, 0)
    clip = ClipReader(settings)(ReadTask(0, 0, 0, 0))
    assert isinstance(clip, EncodedClip)
    return clip


def test_frames_too_small_for_a_gpu_decoder_come_as_pixels(
    packed_by_codec: dict[str, Path],
) -> None:
    """NVDEC takes VP9 from 128 x 128 pixels and H.264 from 48 x 16; the clips here have 64."""
    pixels = read_for_a_gpu(packed_by_codec["vp9"]).pixels
    assert pixels is not None and pixels[0].shape == (64, 64, 3)
    assert read_for_a_gpu(packed_by_codec["h264"]).pixels is None


@pytest.mark.parametrize(
    "whole",
    [
        {"width": 80, "height": 64, "left": 18, "top": 0},
        {"width": 80, "height": 64, "left": -2, "top": 0},
        {"width": 1 << 22, "height": 64, "left": 8, "top": 0},
        {"width": 0, "height": 0, "left": 0, "top": 0},
        {"width": "80", "height": 64, "left": 8, "top": 0},
        {"width": 80},
        7,
    ],
    ids=str,
)
def test_a_wrong_place_in_the_whole_picture_is_a_fault_of_the_clip(
    packed_by_codec: dict[str, Path], monkeypatch: pytest.MonkeyPatch, whole: Any
) -> None:
    """Of 80 x 64 pixels the middle 64 x 64 are stored."""
    shards = ShardSet(packed_by_codec["vp9"])
    described = shards.description(0, 0)
    settings = ReaderSettings(shards, DataConfig(), ClipShape(198, 32, 48), 0, True, None)

    def read_from(whole: Any) -> Any:
        changed = {**described, "video": {**described["video"], "cropped_from": whole}}
        monkeypatch.setattr(shards, "description", lambda *place: changed)
        return ClipReader(settings)(ReadTask(0, 0, 0, 0))

    assert read_from({"width": 80, "height": 64, "left": 8, "top": 0}).crop == (0, 0, 1, 1)
    found = read_from(whole)
    assert isinstance(found, BadSample) and found.reason == "bad_schema"


def test_a_frame_of_mjpeg_is_the_jpeg_that_it_holds(packed_by_codec: dict[str, Path]) -> None:
    """NVDEC does not decode MJPEG; nvJPEG does, in any size."""
    clip = read_for_a_gpu(packed_by_codec["mjpeg"])
    assert clip.pixels is None
    with Image.open(io.BytesIO(clip.frames[0])) as image:
        assert (image.format, image.size) == ("JPEG", (64, 64))


def test_mjpeg_looks_the_same_as_jpegs_and_as_video(packed_by_codec: dict[str, Path]) -> None:
    shards = ShardSet(packed_by_codec["mjpeg"])
    as_jpegs = read(packed_by_codec["mjpeg"], list(range(CLIPS)), training=False)
    middle = [shards.description(0, n)["ten_frames"][MIDDLE_FRAME]["index"] for n in range(CLIPS)]
    as_video = [
        replace(clip, frames=(shards.frame(0, sample, index),))
        for sample, (clip, index) in enumerate(zip(as_jpegs, middle, strict=True))
    ]
    difference = levels(decode("mjpeg", as_jpegs)) - levels(decode("video", as_video))
    assert np.abs(difference).mean() < 0.5


@pytest.mark.parametrize(
    "graph", [_video_graph, partial(_image_graph, config=DataConfig())], ids=["video", "image"]
)
def test_the_graph_for_a_gpu_can_be_defined(graph: Callable[..., object]) -> None:
    """It cannot be built or run here."""
    graph(on_gpu=True, image_size=224, batch_size=2, num_threads=1, device_id=0)


@pytest.mark.gpu
def test_on_a_gpu_a_jpeg_has_the_same_bits_at_any_place_of_a_batch(
    packed_by_codec: dict[str, Path],
) -> None:
    """nvJPEG has two decoders, and below a load of 1 the place decides which one it is."""
    random = np.random.default_rng(0)
    (base,) = read(packed_by_codec["jpeg"], [0])
    clips = []
    for width in (448, 454, 340, 256) * 8:
        pixels = random.integers(0, 255, (16, width // 16 + 1, 3), dtype=np.uint8)
        picture = np.kron(pixels, np.ones((16, 16, 1), np.uint8))[:, :width]
        jpeg = io.BytesIO()
        Image.fromarray(picture).save(jpeg, "JPEG", quality=95)
        clips.append(replace(base, frames=(jpeg.getvalue(),)))
    decoder = ClipDecoder(True, 224, maximum_batch=32, threads=8, gpu=0)
    decoder.schedule(clips)
    forwards = decoder.collect().frames
    decoder.schedule(clips[::-1])
    assert torch.equal(forwards, decoder.collect().frames.flip(0))


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
        decode("vp9", [clips[0], EncodedClip(**fields), clips[2]])
    assert refused.value.reason == reason
