"""Encoding of the frames of a clip into the members of a shard: JPEG and key-frame-only video.

Every video frame is a key frame in a fragment of its own, so that any one of them is read and
decoded alone: the file's header and one fragment are a whole file. VP9 is the default
because DALI decodes it on the CPU and on the GPU; H.264 decodes on the GPU only, MJPEG on the CPU
only. Encoded video runs at a constant rate (frame i is at i / rate) whatever the source did:
decoders that pick frames by number do not all agree on variable rates. The presentation times are
in the sample's JSON.
"""

import io
from fractions import Fraction
from itertools import pairwise
from typing import Literal

import av
import numpy as np
from av.video.reformatter import VideoReformatter
from PIL import Image

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
    """(height * 3 / 2, width) uint8 planes of 4:2:0 (BT.601, limited range) to a JPEG file each."""
    reformatter = VideoReformatter()
    return [_encode_jpeg(planes, reformatter) for planes in frames]


def _encode_jpeg(planes: np.ndarray, reformatter: VideoReformatter) -> bytes:
    frame = av.VideoFrame.from_ndarray(planes, format="yuv420p")
    picture = rgb_pixels(frame, reformatter)
    stream_of_bytes = io.BytesIO()
    Image.fromarray(picture).save(stream_of_bytes, "JPEG", quality=JPEG_QUALITY)
    return stream_of_bytes.getvalue()


def encode_video(frames: list[np.ndarray], codec: VideoCodec, frames_per_second: float) -> bytes:
    """Frames as `encode_jpegs` takes them to an MP4 file in which each is a key frame."""
    name, pixel_format, options = ENCODERS[codec]
    rate = Fraction(frames_per_second).limit_denominator(1001)
    stream_of_bytes = io.BytesIO()
    with av.open(stream_of_bytes, "w", format="mp4", options=FRAGMENTED) as container:
        stream = container.add_stream(name, rate=rate, options=options)
        assert isinstance(stream, av.VideoStream)
        stream.height = frames[0].shape[0] * 2 // 3
        stream.width = frames[0].shape[1]
        stream.pix_fmt = pixel_format
        stream.codec_context.time_base = 1 / rate
        stream.codec_context.thread_count = 1  # Clips are encoded in parallel already.
        stream.codec_context.gop_size = 1
        for number, planes in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(planes, format="yuv420p")
            frame.pts = number
            frame.time_base = 1 / rate
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return stream_of_bytes.getvalue()


def fragment_sizes(video: bytes) -> list[int]:
    """Bytes of the header and of each frame's fragment of what `encode_video` returns.

    Source: ISO/IEC 14496-12, boxes `moof` and `mdat`.

    Raises:
        ValueError: the file is not made up so.
    """
    starts = []
    place = 0
    while place + 8 <= len(video):
        size, kind = int.from_bytes(video[place : place + 4], "big"), video[place + 4 : place + 8]
        if kind == b"moof":
            starts.append(place)
        if size < 8:
            raise ValueError(f"a box of {size} bytes at {place}")
        place += size
    if place != len(video) or not starts:
        raise ValueError(f"{len(video)} bytes of boxes with {len(starts)} fragments")
    return [starts[0], *(end - start for start, end in pairwise([*starts, len(video)]))]
