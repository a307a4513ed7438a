"""Reads a clip that was prepared like the published data: an audio file and ten JPEGs.

The JPEGs are packed as they are, without re-encoding.
"""

import io
from pathlib import Path

from PIL import Image, UnidentifiedImageError

from cavmae.dataloaders.constants import AUDIO_HZ, FRAMES_PER_CLIP
from cavmae.dataloaders.media.decode_clip import DecodedClip, decode_audio_file
from cavmae.dataloaders.media.errors import ClipError, DecodeSettings


def read_published(
    wav: str, frames: str, video_id: str, seconds: float, settings: DecodeSettings
) -> tuple[DecodedClip, list[bytes]]:
    """Read the audio and the JPEGs of one clip.

    The times of its frames are unknown: each gets the middle of its tenth of the clip.

    Args:
        wav: audio file.
        frames: folder with `frame_{0-9}/VIDEO_ID.jpg`.
        video_id: name of the JPEGs.
        seconds: longer audio is cut.
        settings: as for videos; the frames keep their size.

    Returns:
        The clip, without decoded frames; its ten JPEGs.

    Raises:
        ClipError: the clip cannot be used.
    """
    audio = decode_audio_file(wav, seconds, settings)
    jpegs, sizes = [], set()
    for number in range(FRAMES_PER_CLIP):
        path = Path(frames) / f"frame_{number}" / f"{video_id}.jpg"
        try:
            data = path.read_bytes()
            with Image.open(io.BytesIO(data)) as image:
                image.load()
                kind, size = image.format, image.size
        except FileNotFoundError as error:
            raise ClipError("no_video", f"there is no {path}") from error
        except (UnidentifiedImageError, OSError, ValueError) as error:
            raise ClipError("decode_error", f"{path}: {error}") from error
        if kind != "JPEG" or size[0] % 2 or size[1] % 2:
            raise ClipError("decode_error", f"{path}: a {kind} of {size[0]} x {size[1]} pixels")
        jpegs.append(data)
        sizes.add(size)
    if len(sizes) > 1:
        raise ClipError("decode_error", f"frames of different sizes: {sorted(sizes)}")
    width, height = sizes.pop()
    length = len(audio) / AUDIO_HZ
    times = [(i + 0.5) / FRAMES_PER_CLIP * length for i in range(FRAMES_PER_CLIP)]
    clip = DecodedClip(audio, [], times, length, FRAMES_PER_CLIP / length, width, height, "jpeg", 0)
    return clip, jpegs
