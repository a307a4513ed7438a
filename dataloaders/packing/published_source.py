"""Reads a clip that was prepared like the published data: an audio file and ten JPEGs.

JPEGs are packed as they are, without re-encoding.
"""

import dataclasses
import hashlib
import io
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError

from cavmae.dataloaders.constants import AUDIO_HZ, FRAMES_PER_CLIP
from cavmae.dataloaders.media.decode_clip import DecodedClip, decode_clip
from cavmae.dataloaders.media.encode_video import JPEG_QUALITY
from cavmae.dataloaders.media.errors import ClipError, DecodeSettings

JPEG_FORMATS = ("JPEG", "MPO")
"""A phone's Ultra HDR picture is an MPO: a JPEG, then others that readers of JPEG don't look at."""


def read_published(
    wav: str, frames: str, video_id: str, seconds: float, settings: DecodeSettings
) -> tuple[DecodedClip, list[bytes]]:
    """Read the audio and the JPEGs of one clip, or of pictures alone the JPEGs.

    The times of its frames are unknown: each gets the middle of its tenth of the clip. For a JPEG
    that is missing the one before stands in, as in the original loader; `timing` counts them. A
    picture that is no RGB or gray JPEG is stored as one.

    Args:
        wav: audio file.
        frames: folder with `frame_{0-9}/VIDEO_ID.jpg`.
        video_id: name of the JPEGs.
        seconds: longer audio is cut; the length of a clip of pictures alone.
        settings: as for videos; the frames keep their size.

    Returns:
        The clip, without decoded frames; its ten JPEGs.

    Raises:
        ClipError: the clip cannot be used.
    """
    sound = None
    if settings.streams != "video":
        sound = decode_clip(wav, 0.0, seconds, dataclasses.replace(settings, streams="audio"))
    timing = dict(sound.timing) if sound else {}
    jpegs: list[bytes] = []
    sizes = set()
    for number in range(FRAMES_PER_CLIP):
        path = Path(frames) / f"frame_{number}" / f"{video_id}.jpg"
        try:
            data, size = _read_jpeg(path)
        except FileNotFoundError as error:
            if not jpegs:
                raise ClipError("missing_file", f"there is no {path}") from error
            timing["frames_repeated"] = timing.get("frames_repeated", 0) + 1
            data, size = jpegs[-1], next(iter(sizes))
        jpegs.append(data)
        sizes.add(size)
    if len(sizes) > 1:
        raise ClipError(
            "frame_sizes", f"its ten JPEGs have the sizes {sorted(sizes)}; scale them to one"
        )
    width, height = sizes.pop()
    length = len(sound.audio) / AUDIO_HZ if sound else seconds
    heard = sound.content.encode() if sound else b""
    clip = DecodedClip(
        audio=sound.audio if sound else np.zeros(0, np.int16),
        frames=[],
        frame_indexes=[],
        times_seconds=[(i + 0.5) / FRAMES_PER_CLIP * length for i in range(FRAMES_PER_CLIP)],
        video_seconds=length,
        frames_per_second=FRAMES_PER_CLIP / length,
        width=width,
        height=height,
        video_codec="jpeg",
        decode_errors=0,
        timing=timing,
        content=hashlib.sha256(b"".join([heard, *jpegs])).hexdigest(),
    )
    return clip, jpegs


def _read_jpeg(path: Path) -> tuple[bytes, tuple[int, int]]:
    """The file as it is, or as an RGB JPEG if it is another kind of picture; width and height."""
    data = path.read_bytes()
    try:
        with Image.open(io.BytesIO(data)) as image:
            image.load()
            if image.format not in JPEG_FORMATS or image.mode not in ("RGB", "L"):
                buffer = io.BytesIO()
                image.convert("RGB").save(buffer, "JPEG", quality=JPEG_QUALITY)
                data = buffer.getvalue()
            return data, image.size
    except (UnidentifiedImageError, OSError, ValueError, Image.DecompressionBombError) as error:
        raise ClipError("decode_error", f"{path}: {error}") from error
