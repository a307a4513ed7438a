"""Pixels of one stored frame, for what DALI has no decoder for; runs in the readers.

A frame of the `video` tier is a file of its own (see `ShardSet.frame`). The `original` tier keeps
the source's video as it was, from which any frame costs a seek and the decoding of all frames since
the last key frame.
"""

import io

import av
import numpy as np
from av.error import FFmpegError
from av.video.reformatter import VideoReformatter

from cavmae.dataloaders.media.decode_clip import decode_shown_frame
from cavmae.dataloaders.media.errors import ClipError
from cavmae.dataloaders.media.video_track import rgb_pixels


class FrameError(ValueError):
    """The video cannot give the wanted frame: damaged, or not packed by us."""


def decode_frame(video: bytes) -> np.ndarray:
    """Pixels of the first frame of a packed video.

    Returns:
        `(height, width, 3)` uint8 RGB.

    Raises:
        FrameError: it cannot be decoded.
    """
    try:
        with av.open(io.BytesIO(video), "r") as source:
            context = source.streams.video[0].codec_context
            if context is None:
                raise FrameError("the frame cannot be decoded: no decoder is known for it")
            context.thread_count = 1
            frame = next(source.decode(video=0))
            return rgb_pixels(frame, VideoReformatter())
    except (FFmpegError, IndexError, StopIteration) as error:
        raise FrameError(f"the frame cannot be decoded: {error}") from error


def decode_original(video: bytes, seconds: float, width: int, height: int) -> np.ndarray:
    """Pixels of the frame that a source's video shows at a moment.

    Args:
        video: the file as it was packed.
        seconds: on the clip's timeline.
        width: of the result; as for `height`, what packing noted.
        height: of the result.

    Returns:
        `(height, width, 3)` uint8 RGB, turned and scaled as packing does.

    Raises:
        FrameError: it cannot be decoded.
    """
    try:
        planes = decode_shown_frame(video, seconds, (width, height))
    except ClipError as error:
        raise FrameError(f"the frame at {seconds:g} s cannot be decoded: {error}") from error
    return rgb_pixels(av.VideoFrame.from_ndarray(planes, format="yuv420p"), VideoReformatter())
