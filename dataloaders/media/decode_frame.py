"""Decodes one stored frame that DALI has no decoder for, for the readers.

A frame of the `video` tier is a complete file (see `ShardSet.frame`). The `original` tier keeps the
source's video, where a frame costs a seek and decoding all frames since the last key frame.
"""

import io

import av
import numpy as np
from av.error import FFmpegError
from av.video.reformatter import VideoReformatter

from cavmae.dataloaders.media.decode_clip import decode_shown_frame
from cavmae.dataloaders.media.errors import ClipError
from cavmae.dataloaders.media.video_track import rgb_pixels

BLOCK_PIXELS = 128
"""Decoders make a side longer by less: by the blocks of a codec and the alignment of rows."""


class FrameError(ValueError):
    """The video does not give the requested frame: it is damaged, or was not packed by cavmae."""


def decode_frame(video: bytes, width: int, height: int) -> np.ndarray:
    """Decode the first frame of a packed video.

    Args:
        video: a one-frame file.
        width: that the frame has; like `height`, from the sample's JSON.
        height: that the frame has.

    Returns:
        `(height, width, 3)` uint8 RGB.

    Raises:
        FrameError: the frame cannot be decoded, or has another size.
    """
    try:
        with av.open(io.BytesIO(video), "r") as source:
            limit_pixels(source.streams.video[0], width, height)
            frame = next(source.decode(video=0))
            if (frame.width, frame.height) != (width, height):
                raise FrameError(
                    f"the frame has {frame.width} x {frame.height} pixels, and its JSON {width} x "
                    f"{height}"
                )
            return rgb_pixels(frame, VideoReformatter())
    except (FFmpegError, IndexError, StopIteration) as error:
        raise FrameError(f"the frame cannot be decoded: {error}") from error


def limit_pixels(stream: av.VideoStream, width: int, height: int) -> None:
    """Have a packed video decoded by one thread, and larger frames refused before they are
    allocated.

    Raises:
        FrameError: there is no decoder for its codec.
    """
    context = stream.codec_context
    if context is None:
        raise FrameError("the frame cannot be decoded: there is no decoder for its codec")
    context.thread_count = 1
    context.options = {"max_pixels": str((width + BLOCK_PIXELS) * (height + BLOCK_PIXELS))}


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
