"""Videos made on the spot and packed clips that tests of this folder share."""

from collections.abc import Callable, Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest

SHARED = Path(__file__).resolve().parents[3] / "shared"


@pytest.fixture(scope="session")
def shared_clips() -> Path:
    """Folder with `clips` and `clips_bad`: real and damaged videos, not part of the repository."""
    if not (SHARED / "clips").is_dir():
        pytest.skip(f"{SHARED} is not here")
    return SHARED


@pytest.fixture(scope="session")
def write_video() -> Callable[..., Path]:
    """A function that writes a video; see `_write_video`."""
    return _write_video


def _write_video(
    path: Path,
    *,
    frames: Sequence[np.ndarray] | None = None,
    times: Sequence[float] | None = None,
    sound: np.ndarray | None = None,
    sound_hz: int = 16000,
    sound_start: float = 0.0,
    layout: str = "mono",
    codec: str = "ffv1",
    pixel_format: str = "yuv444p",
    sound_codec: str = "pcm_s16le",
    pixel_aspect: Fraction | None = None,
    second_sound: np.ndarray | None = None,
    options: dict[str, str] | None = None,
    container: str | None = None,
    packet_samples: int = 1024,
    pause_seconds: float = 0.0,
    codec_options: dict[str, str] | None = None,
) -> Path:
    """Write a video; without arguments 1 s at 10 fps whose greys are 20, 40, 60, ... and a tone.

    Args:
        frames: RGB pictures; an empty list: no video stream.
        times: when each is shown; default: i / 10.
        sound: int16 (samples,) or (samples, channels); an empty array: no audio stream.
        container: format name where the path does not tell.
        pause_seconds: the second half of the sound is that much later than where the first ends.
    """
    if frames is None:
        frames = [np.full((48, 64, 3), 20 * (number + 1), np.uint8) for number in range(10)]
    times = [number / 10 for number in range(len(frames))] if times is None else times
    if sound is None:
        angle = 2 * np.pi * 440 * np.arange(sound_hz) / sound_hz
        sound = (np.sin(angle) * 16000).astype(np.int16)
    with av.open(path, "w", format=container, options=options or {}) as output:
        video = None
        if frames:
            video = output.add_stream(codec, rate=10)
            assert isinstance(video, av.VideoStream)
            video.height, video.width = frames[0].shape[:2]
            video.pix_fmt = pixel_format
            video.codec_context.time_base = Fraction(1, 1000)
            if codec == "libx264":
                video.options = {"preset": "ultrafast", "g": "10", **(codec_options or {})}
            if pixel_aspect is not None:
                video.codec_context.sample_aspect_ratio = pixel_aspect
        sounds = [each for each in (sound, second_sound) if each is not None and len(each)]
        tracks = [output.add_stream(sound_codec, rate=sound_hz, layout=layout) for _ in sounds]
        if video is not None:
            for picture, time in zip(frames, times, strict=True):
                frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
                frame = frame.reformat(format=pixel_format, dst_colorspace="ITU601")
                frame.pts, frame.time_base = round(time * 1000), Fraction(1, 1000)
                output.mux(video.encode(frame))
            output.mux(video.encode(None))
        for samples, track in zip(sounds, tracks, strict=True):
            assert isinstance(track, av.AudioStream)
            channels = samples.reshape(len(samples), -1)
            for first in range(0, len(samples), packet_samples):
                part = channels[first : first + packet_samples].reshape(1, -1)
                piece = av.AudioFrame.from_ndarray(part, format="s16", layout=layout)
                piece.sample_rate = sound_hz
                later = pause_seconds if first * 2 >= len(samples) else 0.0
                piece.pts = round((sound_start + later) * sound_hz) + first
                output.mux(track.encode(piece))
            output.mux(track.encode(None))
    return path
