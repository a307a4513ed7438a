"""A few bytes that state gigabytes are refused by their headers, before anything decodes them."""

import io
import struct
from collections.abc import Callable
from typing import get_args

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from cavmae.dataloaders.media.audio_codec import AudioCodec, encode_audio
from cavmae.dataloaders.media.decode_frame import FrameError, decode_frame
from cavmae.dataloaders.media.encode_video import (
    VideoCodec,
    describe_fragments,
    encode_jpegs,
    encode_video,
)
from cavmae.dataloaders.media.headers import (
    HeaderError,
    check_audio,
    check_frame,
    check_jpeg,
    payload_of,
)

WIDTH, HEIGHT = 128, 144
SAMPLES = 16_000
SIX_HOURS = 6 * 3600 * 16_000
PLANES = np.random.default_rng(0).integers(0, 255, (HEIGHT * 3 // 2, WIDTH), dtype=np.uint8)
SOUND = np.random.default_rng(0).integers(-3000, 3000, SAMPLES, dtype=np.int16)
(JPEG,) = encode_jpegs([PLANES])
FLAC, WAV = encode_audio(SOUND, "flac"), encode_audio(SOUND, "wav")
CODECS: tuple[VideoCodec, ...] = ("vp9", "h264", "mjpeg")


def one_frame(codec: VideoCodec, planes: np.ndarray = PLANES) -> bytes:
    size = planes.shape[1], planes.shape[0] * 2 // 3
    video = encode_video([planes, planes], size, codec, 25.0)
    return video[: sum(describe_fragments(video)["bytes"][:2])]


FRAMES = {codec: one_frame(codec) for codec in CODECS}


def jpeg_stating(width: int, height: int, jpeg: bytes = JPEG) -> bytes:
    at = jpeg.index(b"\xff\xc0") + 5
    return jpeg[:at] + struct.pack(">HH", height, width) + jpeg[at + 4 :]


def flac_stating(samples: int, channels: int = 1) -> bytes:
    stated = 16_000 << 44 | (channels - 1) << 41 | 15 << 36 | samples
    return FLAC[:18] + stated.to_bytes(8, "big") + FLAC[26:]


def vp9_stating(width: int, height: int) -> bytes:
    video = FRAMES["vp9"]
    at = video.index(b"\x49\x83\x42") + 3
    bits = int.from_bytes(video[at : at + 5], "big") & ~(0xFFFFFFFF << 4)
    bits |= (width - 1) << 20 | (height - 1) << 4
    return video[:at] + bits.to_bytes(5, "big") + video[at + 5 :]


def edited(data: bytes, old: bytes, new: bytes) -> bytes:
    assert old in data
    return data.replace(old, new, 1)


def test_what_packing_writes_is_what_its_json_says() -> None:
    for codec in get_args(AudioCodec):
        for samples in (SAMPLES, 31):
            check_audio(encode_audio(SOUND[:samples], codec), codec, samples)
    check_jpeg(JPEG, WIDTH, HEIGHT)
    for codec, frame in FRAMES.items():
        check_frame(frame, codec, WIDTH, HEIGHT)
    check_jpeg(payload_of(FRAMES["mjpeg"]), WIDTH, HEIGHT)


@pytest.mark.parametrize(
    "options", [{"progressive": True}, {"exif": b"Exif\0\0" + b"\xff\xc0" * 9}]
)
def test_the_header_of_any_jpeg_is_found(options: dict[str, object]) -> None:
    """Published JPEGs are packed as they are; segments may hold what looks like a marker."""
    file = io.BytesIO()
    Image.new("RGB", (300, 200)).save(file, "JPEG", **options)
    check_jpeg(file.getvalue(), 300, 200)
    check_jpeg(b"\xff\xd8" + b"no marker\0\xff\xff" + file.getvalue()[3:], 300, 200)


COMMENT = b"\xff\xfe\0\x0b\xff\xc0\0\x11\x08" + struct.pack(">HH", HEIGHT, WIDTH)
BOMBS: dict[str, tuple[Callable[[], object], str]] = {
    "jpeg": (
        lambda: check_jpeg(jpeg_stating(16_000, 16_000)[:691], WIDTH, HEIGHT),
        "its picture states 16000 x 16000 pixels, and its JSON 128 x 144",
    ),
    "jpeg with another header in a comment": (
        lambda: check_jpeg(b"\xff\xd8" + COMMENT + jpeg_stating(16_000, 9)[2:], WIDTH, HEIGHT),
        "states 16000 x 9 pixels",
    ),
    "jpeg whose height comes later": (
        lambda: check_jpeg(jpeg_stating(WIDTH, 0), WIDTH, HEIGHT),
        "states 128 x 0 pixels",
    ),
    "png": (lambda: check_jpeg(b"\x89PNG\r\n\x1a\n" + JPEG, WIDTH, HEIGHT), "is no JPEG"),
    "flac": (
        lambda: check_audio(flac_stating(SIX_HOURS), "flac", SAMPLES),
        "its flac is not one of 16000 samples, 16 kHz mono, as its JSON",
    ),
    "flac of unknown length": (lambda: check_audio(flac_stating(0), "flac", SAMPLES), "not one of"),
    "flac of 8 channels": (
        lambda: check_audio(flac_stating(SAMPLES, 8), "flac", SAMPLES),
        "not one of",
    ),
    "ogg": (lambda: check_audio(b"OggS" + FLAC[4:], "flac", SAMPLES), "not one of"),
    "wav of another codec": (
        lambda: check_audio(edited(WAV, b"\x10\0\0\0\1\0", b"\x10\0\0\0\2\0"), "wav", SAMPLES),
        "its wav is not one of 16000 samples",
    ),
    "wav cut short": (lambda: check_audio(WAV[:-2], "wav", SAMPLES), "not one of"),
    "vp9": (
        lambda: check_frame(vp9_stating(16_000, 16_000), "vp9", WIDTH, HEIGHT),
        "its frame states 128 x 144 and 16000 x 16000 pixels, and its JSON 128 x 144",
    ),
    "vp9 with a second frame": (
        lambda: check_frame(FRAMES["vp9"][:-1] + b"\xc0", "vp9", WIDTH, HEIGHT),
        "is no vp9 of packing",
    ),
    "jpeg in the place of vp9": (
        lambda: check_frame(edited(FRAMES["vp9"], b"vp09", b"mjpg"), "vp9", WIDTH, HEIGHT),
        "is no vp9 of packing",
    ),
    "container": (
        lambda: check_frame(FRAMES["h264"], "h264", WIDTH, HEIGHT + 16),
        "states 128 x 144 pixels, and its JSON 128 x 160",
    ),
    "nothing": (lambda: check_frame(b"", "h264", WIDTH, HEIGHT), "is no h264 of packing"),
}


@pytest.mark.parametrize("bomb", BOMBS)
def test_a_header_that_states_something_else_is_refused(bomb: str) -> None:
    check, message = BOMBS[bomb]
    with pytest.raises(HeaderError, match=message):
        check()


@pytest.mark.parametrize("codec", CODECS)
def test_readers_decode_no_frame_that_is_larger_than_its_json(codec: VideoCodec) -> None:
    large = one_frame(codec, np.full((1024 * 3 // 2, 1024), 128, np.uint8))
    with pytest.raises(FrameError, match="frame cannot be decoded"):
        decode_frame(large, WIDTH, HEIGHT)
    with pytest.raises(FrameError, match="has 128 x 144 pixels, and its JSON 128 x 128"):
        decode_frame(FRAMES[codec], WIDTH, 128)


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_damage_is_either_found_or_harmless(data: st.DataObject) -> None:
    codec: AudioCodec = data.draw(st.sampled_from(["flac", "wav"]))
    kind = data.draw(st.sampled_from(CODECS))
    whole, check = data.draw(
        st.sampled_from(
            [
                (FLAC if codec == "flac" else WAV, lambda it: check_audio(it, codec, SAMPLES)),
                (JPEG, lambda it: check_jpeg(it, WIDTH, HEIGHT)),
                (FRAMES[kind], lambda it: check_frame(it, kind, WIDTH, HEIGHT)),
            ]
        )
    )
    damaged = bytearray(whole[: data.draw(st.integers(0, len(whole)))])
    for at in data.draw(st.lists(st.integers(0, 900), max_size=8)):
        if at < len(damaged):
            damaged[at] = data.draw(st.integers(0, 255))
    try:
        check(bytes(damaged))
    except HeaderError as error:
        assert str(error)
