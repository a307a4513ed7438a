"""Encodes the frames of a clip for a shard, as JPEGs or as key-frame-only video.

Every video frame is a key frame in its own fragment, so that it can be read and decoded alone: the
file's header and one fragment are a complete file. VP9 and MJPEG decode on the CPU and on the GPU,
MJPEG as the JPEG that its fragment holds; H.264 on the GPU only. Encoded video has a constant rate
(frame i is at i / rate) whatever the source's, since decoders disagree on frame numbers at variable
rates. The presentation times are in the sample's JSON.
"""

import io
import zlib
from collections.abc import Iterator
from fractions import Fraction
from itertools import pairwise
from typing import Literal

import av
import numpy as np
from av.video.reformatter import VideoReformatter
from PIL import Image

from cavmae.dataloaders.media.video_size import crop_middle
from cavmae.dataloaders.media.video_track import rgb_pixels

VideoCodec = Literal["vp9", "h264", "mjpeg"]

JPEG_QUALITY = 95
FRAGMENTED = {"movflags": "+frag_every_frame+empty_moov+default_base_moof+skip_trailer"}
"""Options of the MP4 muxer."""

ENCODERS: dict[VideoCodec, tuple[str, str, dict[str, str]]] = {
    # 340 to 450 x 256 pixels: VP9 3 to 5 ms and 11 to 28 kB a frame at 41 to 44 dB; `good` instead
    # of `realtime` saves up to a quarter of the bytes and takes 15 times as long. H.264 2 to 3 ms,
    # 9 to 19 kB, 37 to 42 dB. MJPEG 1 ms, 16 to 33 kB, 41 to 45 dB.
    "vp9": (
        "libvpx-vp9",
        "yuv420p",
        {"crf": "40", "b": "0", "deadline": "realtime", "cpu-used": "8", "g": "1"},
    ),
    "h264": ("libx264", "yuv420p", {"crf": "18", "preset": "veryfast", "g": "1", "bf": "0"}),
    "mjpeg": ("mjpeg", "yuvj420p", {"qmin": "3", "qmax": "3"}),
}
"""Encoder, pixel format and options."""


def encode_jpegs(frames: list[np.ndarray]) -> list[bytes]:
    """Encode each frame as a JPEG file.

    Args:
        frames: `(height * 3 / 2, width)` uint8 planes of 4:2:0, BT.601, limited range.
    """
    reformatter, jpegs = VideoReformatter(), []
    for planes in frames:
        frame = av.VideoFrame.from_ndarray(planes, format="yuv420p")
        buffer = io.BytesIO()
        pixels = rgb_pixels(frame, reformatter)
        Image.fromarray(pixels).save(buffer, "JPEG", quality=JPEG_QUALITY)
        jpegs.append(buffer.getvalue())
    return jpegs


def encode_video(
    frames: list[np.ndarray], size: tuple[int, int], codec: VideoCodec, frames_per_second: float
) -> bytes:
    """Encode the middle of each frame as an MP4 file of key frames.

    The rate is kept within 1 to 1000, which all readers know; the sample's JSON has the times.

    Args:
        frames: in the format of `encode_jpegs`.
        size: width and height of that middle (`stored_size`).
    """
    name, pixel_format, options = ENCODERS[codec]
    rate = Fraction(min(max(frames_per_second, 1.0), 1000.0)).limit_denominator(1001)
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4", options=FRAGMENTED) as container:
        stream = container.add_stream(name, rate=rate, options=options)
        assert isinstance(stream, av.VideoStream)
        stream.width, stream.height = size
        stream.pix_fmt = pixel_format
        stream.codec_context.time_base = 1 / rate
        stream.codec_context.thread_count = 1  # Clips are encoded in parallel already.
        stream.codec_context.gop_size = 1
        for number, planes in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(crop_middle(planes, *size), format="yuv420p")
            frame.pts = number
            frame.time_base = 1 / rate
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return buffer.getvalue()


def boxes(video: bytes) -> Iterator[tuple[bytes, int, int]]:
    """Yield name, start and end of each top-level box of an MP4 file.

    Raises:
        ValueError: the file is not made of boxes.
    """
    start = 0
    while start < len(video):
        end = start + int.from_bytes(video[start : start + 4], "big")
        if not start + 8 <= end <= len(video):
            raise ValueError(f"a box of {end - start} bytes at {start} of {len(video)}")
        yield video[start + 4 : start + 8], start, end
        start = end


def describe_fragments(video: bytes) -> dict[str, list[int]]:
    """Bytes and CRC-32 of the header and of each frame's fragment in a file of `encode_video`.

    Source: ISO/IEC 14496-12, boxes `moof` and `mdat`.

    Raises:
        ValueError: the file has another structure.
    """
    starts = [start for name, start, _ in boxes(video) if name == b"moof"]
    if not starts:
        raise ValueError(f"{len(video)} bytes of boxes without a fragment")
    parts = [video[start:end] for start, end in pairwise([0, *starts, len(video)])]
    return {
        "bytes": [len(part) for part in parts],
        "crc32": [zlib.crc32(part) for part in parts],
    }
