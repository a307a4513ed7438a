"""Decodes one stored frame that DALI has no decoder for, or unwraps it for one; for the readers.

A frame of the `video` tier is a complete file (see `ShardSet.frame`). The `original` tier keeps the
source's video, where a frame costs a seek and decoding all frames since the last key frame.
"""

import io

import av
import numpy as np
from av.error import FFmpegError
from av.video.reformatter import VideoReformatter

from cavmae.dataloaders.media.decode_clip import decode_shown_frame
from cavmae.dataloaders.media.encode_video import boxes
from cavmae.dataloaders.media.errors import ClipError
from cavmae.dataloaders.media.video_track import rgb_pixels


class FrameError(ValueError):
    """The video does not give the requested frame: it is damaged, or was not packed by cavmae."""


def decode_frame(video: bytes) -> np.ndarray:
    """Decode the first frame of a packed video.

    Returns:
        `(height, width, 3)` uint8 RGB.

    Raises:
        FrameError: the frame cannot be decoded.
    """
    try:
        with av.open(io.BytesIO(video), "r") as source:
            context = source.streams.video[0].codec_context
            if context is None:
                raise FrameError("the frame cannot be decoded: there is no decoder for its codec")
            context.thread_count = 1
            frame = next(source.decode(video=0))
            return rgb_pixels(frame, VideoReformatter())
    except (FFmpegError, IndexError, StopIteration) as error:
        raise FrameError(f"the frame cannot be decoded: {error}") from error


def jpeg_of(video: bytes) -> bytes:
    """The JPEG that a one-frame file of MJPEG holds, for image decoders.

    Raises:
        FrameError: the file holds no frame.
    """
    try:
        return next(video[start + 8 : end] for name, start, end in boxes(video) if name == b"mdat")
    except (ValueError, StopIteration) as error:
        raise FrameError(f"the file holds no frame: {error}") from error


def decode_original(video: bytes, seconds: float, width: int, height: int) -> np.ndarray:
    """Decode the frame that a source's video shows at a time.

    Args:
        video: the source file.
        seconds: time on the clip's timeline.
        width: of the result; like `height`, from the sample's JSON.
        height: of the result.

    Returns:
        `(height, width, 3)` uint8 RGB, rotated and scaled like in packing.

    Raises:
        FrameError: the frame cannot be decoded.
    """
    try:
        planes = decode_shown_frame(video, seconds, (width, height))
    except ClipError as error:
        raise FrameError(f"the frame at {seconds:g} s cannot be decoded: {error}") from error
    return rgb_pixels(av.VideoFrame.from_ndarray(planes, format="yuv420p"), VideoReformatter())
