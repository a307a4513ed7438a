"""Decoding settings, and the reasons to refuse a clip."""

from dataclasses import dataclass
from typing import Literal

import av

MAXIMUM_CLIP_BYTES = 1 << 30
"""Memory limit for the scaled frames, or the audio, of one clip; a larger one is `too_large`."""

Reason = Literal[
    "missing_file",
    "not_a_file",
    "empty_file",
    "open_failed",
    "no_video",
    "no_audio",
    "window_outside",
    "too_short",
    "too_large",
    "silent_audio",
    "decode_error",
    "short_read",
    "frame_sizes",
]


class ClipError(ValueError):
    """A clip cannot be packed; `reason` is for counting, `detail` for reading."""

    def __init__(self, reason: Reason, detail: str):
        super().__init__(reason, detail)
        self.reason: Reason = reason
        self.detail = detail

    def __str__(self) -> str:
        return f"{self.reason}: {self.detail}"


Streams = Literal["both", "any", "audio", "video"]
"""What of a file is decoded: sound and picture, and nothing without either; what there is of them;
or one of them alone, and nothing of the other."""


@dataclass(frozen=True)
class DecodeSettings:
    """Decoding settings; all fields but `streams` are those of `PackConfig`."""

    short_side: int = 256
    video_fps: float = 0.0
    min_seconds: float = 0.5
    keep_silent: bool = False
    audio_channel: Literal["mix", "first"] = "mix"
    streams: Streams = "both"


def within(packet: av.Packet, zero: float, length: float) -> bool:
    """Whether a packet belongs to the window of `length` seconds from `zero`; True if unknown."""
    stamp = packet.dts if packet.pts is None else packet.pts
    if stamp is None or packet.time_base is None:
        return True
    return 0 <= float(stamp * packet.time_base) - zero < length


def error_text(error: Exception) -> str:
    """Format an FFmpeg error without its number and file name."""
    return getattr(error, "strerror", None) or str(error)
