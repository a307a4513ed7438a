"""A clip as the published preparation leaves it: a sound file and ten JPEGs.

The pictures are packed as they are, without being encoded once more.
"""

import io
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError

from cavmae.dataloaders.media.decode_clip import decode_sound_file
from cavmae.dataloaders.media.errors import ClipError, DecodeSettings
from cavmae.dataloaders.shards.shard_set import FRAMES_PER_CLIP


def read_published(
    wav: str, frames: str, video_id: str, seconds: float, settings: DecodeSettings
) -> tuple[np.ndarray, list[bytes], tuple[int, int]]:
    """Sound and pictures of one clip.

    Args:
        wav: file with sound.
        frames: folder with `frame_{0-9}/VIDEO_ID.jpg`.
        video_id: name of the pictures.
        seconds: longer sound is cut.
        settings: as for videos; the pictures keep their size.

    Returns:
        `(samples,)` int16 at 16 kHz; ten JPEGs; their width and height.

    Raises:
        ClipError: the clip cannot be used.
    """
    audio = decode_sound_file(wav, seconds, settings)
    pictures, sizes = [], set()
    for number in range(FRAMES_PER_CLIP):
        path = Path(frames) / f"frame_{number}" / f"{video_id}.jpg"
        try:
            data = path.read_bytes()
            with Image.open(io.BytesIO(data)) as picture:
                picture.load()
                kind, size = picture.format, picture.size
        except FileNotFoundError as error:
            raise ClipError("no_video", f"there is no {path}") from error
        except (UnidentifiedImageError, OSError, ValueError) as error:
            raise ClipError("decode_error", f"{path}: {error}") from error
        if kind != "JPEG" or size[0] % 2 or size[1] % 2:
            raise ClipError("decode_error", f"{path}: a {kind} of {size[0]} x {size[1]} pixels")
        pictures.append(data)
        sizes.add(size)
    if len(sizes) > 1:
        raise ClipError("decode_error", f"pictures of different sizes: {sorted(sizes)}")
    return audio, pictures, sizes.pop()
