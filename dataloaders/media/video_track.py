"""Decodes the video frames of a clip: finds their times, and scales them for storage."""

import hashlib
from collections.abc import Container
from fractions import Fraction

import av
import numpy as np
from av.error import FFmpegError
from av.video.reformatter import ColorRange, Colorspace, Interpolation, VideoReformatter

from cavmae.dataloaders.media.deinterlace import Deinterlacer
from cavmae.dataloaders.media.errors import (
    MAXIMUM_CLIP_BYTES,
    ClipError,
    DecodeSettings,
    error_text,
    within,
)
from cavmae.dataloaders.media.tone_map import is_hdr, tone_map

EXACT = Interpolation.ACCURATE_RND | Interpolation.FULL_CHR_H_INT | Interpolation.FULL_CHR_H_INP
"""Without these flags, libswscale's colours are up to 1.4 of 255 too dark."""

MINIMUM_RATE, MAXIMUM_RATE = 1e-4, 1000.0
"""Frames per second that a header can state; 25 is taken for others."""
MAXIMUM_ASPECT = 16
"""Pixels that are stated to be wider or higher by more are taken for square."""

HD_WIDTH, HD_HEIGHT = 1280, 576
"""From this width, or above this height, video that states no matrix has that of BT.709."""
UNSPECIFIED = 2
"""`AVColorSpace` of frames that state no matrix."""
DROPPABLE_BYTES = 1 << 28
"""Memory for the frames of a clip of which only some are needed."""
THUMBNAIL, THUMBNAIL_SECONDS = 32, 2.0
"""Pixels of a side, and distance in time, of the frames that tell a clip's content."""


class VideoTrack:
    """Collects the video frames of a window.

    Args:
        stream: the stream whose packets `decode` is given.
        zero: start of the window on the stream's timeline, seconds.
        length: seconds; may be infinite.
        wanted: indexes of the frames whose pixels are kept; None: all.
        droppable: whether all pixels are dropped when they take much memory, instead of an error.
    """

    def __init__(
        self,
        stream: av.VideoStream,
        zero: float,
        length: float,
        settings: DecodeSettings,
        wanted: Container[int] | None = None,
        droppable: bool = False,
    ):
        self.stream = stream
        self.zero = zero
        self.length = length
        self.settings = settings
        self.codec = stream.codec_context.name
        self.rate = _frames_per_second(stream)
        self.wanted = wanted
        self.droppable = droppable
        self.frames: dict[int, np.ndarray] = {}
        """`(height * 3 / 2, width)` uint8 by index, from `scale_frame`."""
        self.times: list[float] = []
        """Seconds from the start of the window, ascending."""
        self.decoded = 0
        """Number of decoded frames, kept or not."""
        self.errors: list[str] = []
        """Packets and frames of the window that failed."""
        self.done = False
        """Whether no further frame can belong to the window."""
        self.begins_late = False
        """Whether the first decoded frame comes after the start of the window."""
        self.size: tuple[int, int] | None = None
        self.reached = 0.0
        """End of the last decoded frame, seconds from the start of the window."""
        self.moved = 0
        """Number of frames of the window whose stamps cannot be right: they are shown between
        their neighbours."""
        self.content = hashlib.sha256()
        """Of small gray pictures of frames about two seconds apart, whatever the settings."""
        self._reformatter = VideoReformatter()
        self._thumbnails = VideoReformatter()
        self._next_thumbnail = 0.0
        self._deinterlacer = Deinterlacer()
        self._last_time: float | None = None
        self._waiting: tuple[av.VideoFrame, float | None, float] | None = None
        self._shown_at_start: av.VideoFrame | None = None
        self._next_slot = 0.0
        self._last_pts: int | None = None
        self._last_dts: int | None = None
        self._faulty_pts = self._faulty_dts = 0

    def decode(self, packet: av.Packet) -> None:
        """Decode a packet of the stream; failures are added to `errors`.

        Raises:
            ClipError: the frames take too much memory.
        """
        try:
            decoded = packet.decode()
        except (FFmpegError, MemoryError) as error:
            if within(packet, self.zero, self.length):
                self.errors.append(error_text(error))
            return
        for frame in decoded:
            assert isinstance(frame, av.VideoFrame)
            if frame.is_corrupt:
                if within(packet, self.zero, self.length):
                    self.errors.append("corrupt frame")
                continue
            self.decoded += 1
            if not self.done:
                self._take(frame)

    def finish(self) -> None:
        """At the end of reading, take the last frame, and keep one from before the window that is
        still shown in it."""
        for ready in self._deinterlacer.rest():
            self._hold(*ready)
        if self._waiting is not None and not self.done:
            self._show(None)
        if self._shown_at_start is not None and self.reached > 1e-3:
            self._keep(self._shown_at_start, 0.0)
        self._shown_at_start = None

    def _take(self, frame: av.VideoFrame) -> None:
        shown_seconds = 1 / self.rate
        if frame.duration and frame.time_base:
            shown_seconds = float(frame.duration * frame.time_base)
        stamp, time = self._timestamp(frame), None
        if stamp is not None and frame.time_base is not None:
            time = float(stamp * frame.time_base) - self.zero
        for ready in self._deinterlacer.frames(frame, time, shown_seconds):
            self._hold(*ready)

    def _hold(self, frame: av.VideoFrame, time: float | None, shown_seconds: float) -> None:
        """Hold a frame until the next one tells whether its stamp can be right."""
        if self._waiting is not None and not self.done:
            self._show(time)
        self._waiting = (frame, time, shown_seconds)

    def _show(self, next_time: float | None) -> None:
        """Take the frame that waits, whose successor has a stamp or none."""
        assert self._waiting is not None
        frame, time, shown_seconds = self._waiting
        self._waiting = None
        last = self._last_time
        if time is None:  # Raw streams carry no times.
            time = -self.zero if last is None else last + shown_seconds
        elif last is None:
            if next_time is not None and next_time < time:
                time = next_time - shown_seconds
                self.moved += time >= 0
        elif time <= last or (next_time is not None and last < next_time < time):
            time = last + shown_seconds
            if next_time is not None and last < next_time:
                time = (last + next_time) / 2
            self.moved += 0 <= time < self.length
        if last is None:
            self.begins_late = time > 0
        self._last_time = time
        self.reached = time + shown_seconds
        if time < -1e-4:
            self._shown_at_start = frame
            return
        if self._shown_at_start is not None and time > 1e-3:
            self._keep(self._shown_at_start, 0.0)
        self._shown_at_start = None
        if time >= self.length - 1e-6:
            self.done = True
        else:
            self._keep(frame, max(0.0, time))

    def _timestamp(self, frame: av.VideoFrame) -> int | None:
        """Choose between PTS and DTS, like ffmpeg's `guess_correct_pts`.

        AVI stores one time per packet in decoding order, so that frames which are reordered carry
        the times of others; their decoding times ascend.
        """
        pts, dts = frame.pts, frame.dts
        if dts is not None:
            self._faulty_dts += self._last_dts is not None and dts <= self._last_dts
            self._last_dts = dts
        if pts is not None:
            self._faulty_pts += self._last_pts is not None and pts <= self._last_pts
            self._last_pts = pts
        if pts is not None and (self._faulty_pts <= self._faulty_dts or dts is None):
            return pts
        return dts

    def _keep(self, frame: av.VideoFrame, time: float) -> None:
        self._note_content(frame, time)
        fps = self.settings.video_fps
        if fps > 0:  # The first frame in each slot of 1 / fps seconds.
            if time < self._next_slot - 1e-6:
                return
            self._next_slot = (int(time * fps + 1e-6) + 1) / fps
        if self.size is None:
            aspect = self.stream.sample_aspect_ratio or Fraction(1)
            self.size = scaled_size(frame, aspect, self.settings.short_side)
        index = len(self.times)
        self.times.append(time)
        if self.wanted is not None and index not in self.wanted:
            return
        width, height = self.size
        held = (len(self.frames) + 1) * width * height * 3 // 2
        if self.droppable and held > DROPPABLE_BYTES:
            self.frames, self.wanted = {}, ()
            return
        if held > MAXIMUM_CLIP_BYTES:
            raise ClipError(
                "too_large",
                f"more than {MAXIMUM_CLIP_BYTES} bytes of {width}x{height} frames; "
                f"set video_fps or a shorter clip",
            )
        self.frames[index] = scale_frame(frame, width, height, self._reformatter)

    def _note_content(self, frame: av.VideoFrame, time: float) -> None:
        if time < self._next_thumbnail - 1e-6:
            return
        self._next_thumbnail = time + THUMBNAIL_SECONDS
        small = self._thumbnails.reformat(
            frame, THUMBNAIL, THUMBNAIL, format="gray", interpolation=EXACT | Interpolation.AREA
        )
        self.content.update(small.to_ndarray().tobytes())


def _frames_per_second(stream: av.VideoStream) -> float:
    """The stated rate, the first that is one; a header can claim any."""
    for rate in (stream.average_rate, stream.guessed_rate):
        if rate and MINIMUM_RATE <= float(rate) <= MAXIMUM_RATE:
            return float(rate)
    return 25.0


def scaled_size(frame: av.VideoFrame, pixel_aspect: Fraction, short_side: int) -> tuple[int, int]:
    """Width and height to store: square pixels, upright, short side at most `short_side`, even."""
    width, height = float(frame.width), float(frame.height)
    if 1 < pixel_aspect <= MAXIMUM_ASPECT:
        width *= float(pixel_aspect)
    elif 1 > pixel_aspect >= Fraction(1, MAXIMUM_ASPECT):
        height /= float(pixel_aspect)
    if _quarter_turns(frame) % 2:
        width, height = height, width
    scale = min(1.0, short_side / min(width, height))
    return max(2, int(width * scale / 2 + 1e-6) * 2), max(2, int(height * scale / 2 + 1e-6) * 2)


def scale_frame(
    frame: av.VideoFrame, width: int, height: int, reformatter: VideoReformatter
) -> np.ndarray:
    """Rotate and scale to `(height * 3 / 2, width)` uint8: planes of 4:2:0, BT.601, limited range.

    Colours are converted from the matrix that the frame states; where it states none, from BT.709
    in HD and BT.601 below. HDR is tone-mapped (`tone_map.py`). The reformatter caches its tables,
    which cost more than scaling a small frame.
    """
    turns = _quarter_turns(frame)
    unturned = (height, width) if turns % 2 else (width, height)
    shrinks = unturned[0] * unturned[1] < frame.width * frame.height
    interpolation = EXACT | (Interpolation.AREA if shrinks else Interpolation.BILINEAR)
    matrix = None
    if frame.colorspace == UNSPECIFIED and (frame.width >= HD_WIDTH or frame.height > HD_HEIGHT):
        matrix = Colorspace.ITU709
    if any(component.is_alpha for component in frame.format.components):
        rgba = reformatter.reformat(frame, *unturned, format="rgba", interpolation=interpolation)
        frame = av.VideoFrame.from_ndarray(_onto_white(rgba.to_ndarray()), "rgb24")
    if is_hdr(frame):
        rgb = reformatter.reformat(
            frame, *unturned, format="rgb48le", interpolation=interpolation, dst_color_range="JPEG"
        )
        frame = av.VideoFrame.from_ndarray(tone_map(rgb.to_ndarray(), frame.color_trc), "rgb24")
    scaled = reformatter.reformat(
        frame,
        *unturned,
        format="yuv420p",
        interpolation=interpolation,
        src_colorspace=matrix,
        dst_colorspace=Colorspace.ITU601,
        dst_color_range="MPEG",
    )
    planes = scaled.to_ndarray()
    if turns == 0:
        return planes
    columns, rows = unturned
    chroma = planes[rows:].reshape(2, rows // 2, columns // 2)
    turned = [np.rot90(plane, turns).reshape(-1) for plane in (planes[:rows], *chroma)]
    return np.concatenate(turned).reshape(height * 3 // 2, width)


def _onto_white(rgba: np.ndarray) -> np.ndarray:
    """Lay `(height, width, 4)` uint8 onto white: hidden colours mean nothing."""
    alpha = rgba[..., 3:].astype(np.float32) / 255
    return np.rint(rgba[..., :3] * alpha + 255 * (1 - alpha)).astype(np.uint8)


def rgb_pixels(frame: av.VideoFrame, reformatter: VideoReformatter) -> np.ndarray:
    """Convert a frame of 4:2:0, BT.601, limited range (unless its metadata differ) to contiguous
    `(height, width, 3)` uint8 RGB."""
    image = reformatter.reformat(
        frame,
        format="rgb24",
        src_colorspace=Colorspace.ITU601,
        src_color_range="JPEG" if frame.color_range == ColorRange.JPEG else "MPEG",
        dst_color_range="JPEG",
        interpolation=EXACT | Interpolation.BILINEAR,
    )
    return np.ascontiguousarray(image.to_ndarray())


def _quarter_turns(frame: av.VideoFrame) -> int:
    """Number of counterclockwise quarter turns that make the frame upright."""
    return round(frame.rotation / 90) % 4
