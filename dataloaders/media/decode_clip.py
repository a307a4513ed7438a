"""Decodes one clip from an untrusted file, with PyAV.

Everything that training relies on is decided here, once, when clips are packed: what a file is (by
its content, never its name), which of its streams are used, the times of audio and frames on the
presentation timeline, and whether enough of it can be decoded. Unusable clips are refused with a
machine-readable reason.

Conventions:
- Time zero of a file is the earlier start of the two streams used, as `ffmpeg -ss` counts; time
  zero of a clip is its `start_seconds` on that timeline. Audio that starts late follows zeros,
  audio that ends early is shorter. A frame already shown at the start has time 0.
- The stream marked as default counts, else the first; cover art is not a video.
- Frames are turned as the display matrix says (mirroring is ignored), stretched to square pixels,
  scaled down (never up) to the short side, cut to even sizes, and kept as 8-bit 4:2:0 with BT.601
  coefficients and limited range, which is what video decoders assume by default.
- Corrupt frames are skipped and counted. A damaged clip is kept if more frames and packets of it
  decode than fail, and `min_seconds` of both audio and video do.
"""

import hashlib
import io
import os
import stat
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import av
import av.container
import av.stream
import numpy as np
from av.error import FFmpegError

from cavmae.dataloaders.media.audio_track import AudioTrack
from cavmae.dataloaders.media.errors import ClipError, DecodeSettings, Reason, error_text
from cavmae.dataloaders.media.timeline import (
    Timeline,
    flush_packet,
    packet_seconds,
    time_starts_anew,
)
from cavmae.dataloaders.media.video_track import VideoTrack

SILENT_PEAK = 3
"""Samples of int16 up to this (-80 dBFS) are silence: lossy codecs return zeros as such values."""
PREROLL_SECONDS = 2.0
"""A seek aims this much early: codecs need some frames before the first that they decode well."""
ONE_FRAME_SECONDS = 1e-3
"""A window with one frame."""
INTERLEAVING_SECONDS = 60.0
"""Maximum distance in a file between audio and video of the same time."""
MAXIMUM_SOURCE_PIXELS = 1 << 27
"""Largest frame that is decoded (16k x 8k); a header can claim any size."""

CONTAINERS = "mov,matroska,webm,avi,mpegts,mpeg,mpegvideo,flv,ogg,asf,mxf,nut,wtv,gxf,rm"
AUDIO_CONTAINERS = (
    "aac,ac3,adx,aea,aiff,amr,ape,au,avr,bonk,caf,dsf,dss,dts,dtshd,eac3,epaf,flac,gsm,hcom,"
    "ircam,lc3,loas,mlp,mp3,mpc,mpc8,nistsphere,oma,osq,pvf,qcp,qoa,rka,sbc,shn,sox,tak,"
    "truehd,tta,voc,w64,wav,wv,xwma"
)
"""Formats that are opened. Playlists (HLS, concat) are not: they name other files and hosts."""


@dataclass(frozen=True)
class DecodedClip:
    """Audio and frames of one clip; all times in seconds from the start of the clip."""

    audio: np.ndarray
    """(samples,) int16, 16 kHz mono."""
    frames: list[np.ndarray]
    """Each `(height * 3 / 2, width)` uint8: planes of 4:2:0, BT.601, limited range."""
    frame_indexes: list[int]
    """Which frames of the clip those are; all, unless only some were needed."""
    times_seconds: list[float]
    """Presentation time of each frame, ascending."""
    video_seconds: float
    """End of the last frame."""
    frames_per_second: float
    width: int
    height: int
    video_codec: str
    """ffmpeg's name of the file's codec."""
    decode_errors: int
    """Packets or frames that failed, plus one if the file is shorter than its header says."""
    timing: dict[str, float]
    """What was done where time stamps and samples don't agree, by cause (docs/training/data.md)."""
    content: str
    """SHA-256 of the decoded audio and frames, independent of all settings but the window."""


@dataclass(frozen=True)
class _Window:
    """What reading a part of a file gave."""

    frames: VideoTrack
    audio: AudioTrack
    errors: list[str]
    """Errors of the container."""
    cut_off: bool
    """Whether the file ends before the window's end that its header states."""
    counts: dict[str, int]
    """What was found of the stamps' faults in the window, by cause."""


def decode_clip(
    path: str,
    start_seconds: float,
    end_seconds: float,
    settings: DecodeSettings,
    part: tuple[int, int] | None = None,
    choose: Callable[[list[float], float, float], list[int]] | None = None,
) -> DecodedClip:
    """Decode the part of a file from `start_seconds` up to `end_seconds` (may be infinite).

    Args:
        part: offset and size in bytes of the video in the file; None: the whole file.
        choose: returns the indexes of the frames that are needed, from the times of all, the
            seconds of video and the frames per second; None: all are.

    Raises:
        ClipError: the clip is unusable; see `Reason`.
        OSError: the file exists but cannot be accessed.
    """
    url = _url(path, part)
    span = (url, start_seconds, end_seconds, settings)
    window = _read_window(*span, droppable=choose is not None)
    clip = _checked_clip(window, start_seconds, end_seconds, settings)
    if choose is None or len(clip.frames) == len(clip.times_seconds):
        return clip
    # A long clip: its times are known now, and only the pixels that are needed are kept.
    chosen = choose(clip.times_seconds, clip.video_seconds, clip.frames_per_second)
    frames = _read_window(*span, wanted=set(chosen)).frames.frames
    return replace(clip, frames=list(frames.values()), frame_indexes=list(frames))


def _read_window(
    url: str, start: float, end: float, settings: DecodeSettings, **frames: Any
) -> _Window:
    """Decode a part of a file; seeks to it where that finds all of it."""
    window = None
    if start > PREROLL_SECONDS:
        window = _read(url, start, end, settings, seek=True, **frames)
    if window is None:  # Nothing to skip, or the file cannot be sought in: read it through.
        window = _read(url, start, end, settings, seek=False, **frames)
    assert window is not None
    return window


def decode_audio_file(
    path: str, seconds: float, settings: DecodeSettings
) -> tuple[np.ndarray, dict[str, float], str]:
    """Decode the first `seconds` of a file's audio.

    Returns:
        `(samples,)` int16 at 16 kHz; `timing` and `content` as in `DecodedClip`.

    Raises:
        ClipError: the file is unusable.
        OSError: the file exists but cannot be accessed.
    """
    with _open(_url(path, None), f"{AUDIO_CONTAINERS},{CONTAINERS}") as container:
        audio = next(iter(container.streams.audio), None)
        if audio is None or audio.codec_context is None:
            raise ClipError("no_audio", "no audio stream that can be decoded")
        zero = float((audio.start_time or 0) * (audio.time_base or 0))
        audio_track = AudioTrack(audio, zero, seconds, settings)
        timeline = Timeline(container, [audio])
        for packet in timeline.packets():
            audio_track.decode(packet)
            if audio_track.done:
                break
        audio_track.decode(flush_packet(audio))
    audio_track.finish()
    errors = [*audio_track.errors, *timeline.errors]
    if audio_track.samples == 0 or len(audio_track.errors) > audio_track.frames:
        raise ClipError("decode_error", f"no audio decodes; {errors[0] if errors else ''}")
    audio = _checked_audio(audio_track, settings)
    content = hashlib.sha256(audio_track.first_channel()).hexdigest()
    return audio, dict(audio_track.faults), content


def decode_shown_frame(video: bytes, seconds: float, size: tuple[int, int]) -> np.ndarray:
    """Decode the frame that a file shows at a time on the timeline of `decode_clip`.

    Args:
        video: the file.
        seconds: time as in `DecodedClip.times_seconds` of a clip that starts at 0.
        size: width and height to scale to.

    Returns:
        `(height * 3 / 2, width)` uint8 planes in the format of `DecodedClip.frames`.

    Raises:
        ClipError: the frame cannot be decoded.
    """
    errors: list[str] = []
    for seek in (True, False) if seconds > PREROLL_SECONDS else (False,):
        with _open(io.BytesIO(video)) as container:
            stream, audio = _choose_streams(container)
            zero = _origin_seconds(stream, audio) + seconds
            track = VideoTrack(stream, zero, ONE_FRAME_SECONDS, DecodeSettings())
            track.size = size
            if seek and not _sought(container, stream, zero):
                continue
            timeline = Timeline(container, [stream, audio])
            for packet in timeline.packets():
                if packet.stream is stream:
                    track.decode(packet)
                if track.done or (seek and track.begins_late):
                    break
            track.decode(flush_packet(stream))
            track.finish()
            if track.times and not (seek and track.begins_late):
                return track.frames[0]
            errors += [*track.errors, *timeline.errors]
    raise ClipError("decode_error", f"no frame at {seconds:g} s; {errors[0] if errors else ''}")


def media_seconds(path: str, part: tuple[int, int] | None = None) -> float:
    """Measure the seconds from time zero to the last packet's end, ignoring the header.

    Raises:
        ClipError: the file has no audio or video, or cannot be opened.
    """
    with _open(_url(path, part)) as container:
        video, audio = _choose_streams(container)
        origin = _origin_seconds(video, audio)
        end = 0.0
        for packet in Timeline(container, [video, audio]).packets():
            if packet.pts is not None and packet.time_base is not None:
                last = float((packet.pts + (packet.duration or 0)) * packet.time_base)
                end = max(end, last - origin)
    return end


def _url(path: str, part: tuple[int, int] | None) -> str:
    """The URL for libavformat of an existing file, or of a part of it."""
    try:
        status = os.stat(path)
    except FileNotFoundError as error:
        raise ClipError("missing_file", "no such file") from error
    if not stat.S_ISREG(status.st_mode):
        raise ClipError("not_a_file", "not a regular file")
    if (part[1] if part else status.st_size) == 0:
        raise ClipError("empty_file", "0 bytes")
    if part is None:
        return f"file:{path}"
    return f"subfile,,start,{part[0]},end,{sum(part)},,:file:{path}"


def _open(url: str | io.BytesIO, formats: str = CONTAINERS) -> av.container.InputContainer:
    # Files alone: neither the content nor the name can make libavformat fetch a URL.
    options = {"format_whitelist": formats, "protocol_whitelist": "file,subfile"}
    try:
        return av.open(url, "r", options=options, metadata_errors="replace")
    except (FFmpegError, UnicodeError) as error:
        raise ClipError("open_failed", error_text(error)) from error


def _choose_streams(
    container: av.container.InputContainer,
) -> tuple[av.VideoStream, av.AudioStream]:
    cover = av.stream.Disposition.attached_pic
    default = av.stream.Disposition.default
    videos = [stream for stream in container.streams.video if not stream.disposition & cover]
    audios = list(container.streams.audio)
    if not videos and not audios:
        raise ClipError("open_failed", f"a {container.format.name} file without audio or video")
    if not videos:
        raise ClipError("no_video", "no video stream (cover art is not one)")
    if not audios:
        raise ClipError("no_audio", "no audio stream")
    video = next((stream for stream in videos if stream.disposition & default), videos[0])
    audio = next((stream for stream in audios if stream.disposition & default), audios[0])
    for stream in (video, audio):
        if stream.codec_context is None:
            raise ClipError("decode_error", f"no decoder for {stream.type} stream {stream.index}")
        stream.codec_context.thread_count = 1  # Clips are decoded in parallel already.
        stream.codec_context.options = {"max_pixels": str(MAXIMUM_SOURCE_PIXELS)}
    return video, audio


def _origin_seconds(video: av.VideoStream, audio: av.AudioStream) -> float:
    starts = [
        float(stream.start_time * stream.time_base)
        for stream in (video, audio)
        if stream.start_time is not None and stream.time_base is not None
    ]
    return min(starts, default=0.0)


def _sought(container: av.container.InputContainer, video: av.VideoStream, zero: float) -> bool:
    """Seek to some time before `zero`; returns False where that cannot be relied on."""
    if time_starts_anew(container, video):
        return False
    try:
        container.seek(int((zero - PREROLL_SECONDS) * 1_000_000))
    except FFmpegError:
        return False
    return True


def _read(
    url: str, start: float, end: float, settings: DecodeSettings, *, seek: bool, **frames_kept: Any
) -> _Window | None:
    """Decode the window; returns None if seeking fails or skips a part of it."""
    with _open(url) as container:
        video, audio = _choose_streams(container)
        zero = _origin_seconds(video, audio) + start
        length = end - start
        frames = VideoTrack(video, zero, length, settings, **frames_kept)
        audio_track = AudioTrack(audio, zero, length, settings)
        if seek and not _sought(container, video, zero):
            return None
        timeline = Timeline(container, [video, audio])
        passed = {video.index: 0.0, audio.index: 0.0}
        for packet in timeline.packets():
            track = frames if packet.stream is video else audio_track
            if not track.done:
                track.decode(packet)
            else:  # By durations: a stream whose stamps are wrong is done by its samples.
                passed[packet.stream.index] += packet_seconds(packet, packet.duration)
                if passed[packet.stream.index] > INTERLEAVING_SECONDS:
                    break  # The other stream has passed the window, too.
            if seek and frames.begins_late:
                return None
            if frames.done and audio_track.done:
                break
        for track, stream in ((frames, video), (audio_track, audio)):
            if not track.done:
                track.decode(flush_packet(stream))
            track.finish()
        if seek and (
            frames.begins_late
            or audio_track.begins_late
            or "stamps_disagree" in audio_track.faults
            or not (frames.times and audio_track.samples)
        ):
            return None
        counts = {
            "time_started_anew": _within(timeline.joins, zero, length),
            "odd_stamps": _within(timeline.odd_stamps, zero, length),
            "frames_moved": frames.moved,
        }
        cut_off = _is_cut_off(container, frames, start, length)
        return _Window(frames, audio_track, timeline.errors, cut_off, counts)


def _within(times: list[float], zero: float, length: float) -> int:
    return sum(0 <= time - zero < length for time in times)


def _is_cut_off(
    container: av.container.InputContainer, frames: VideoTrack, start: float, length: float
) -> bool:
    """Whether the file ends over half a second before the window's end that its header states."""
    stream = frames.stream
    if frames.done or stream.time_base is None:
        return False
    if container.format.name.startswith("mov"):  # Lists where each sample lies in the file.
        entries = stream.index_entries
        if len(entries) == 0 or entries[-1].pos + entries[-1].size <= container.size:
            return False
        seconds = float(stream.time_base)
        return any(
            entry.pos + entry.size > container.size
            and entry.timestamp * seconds < frames.zero + length - 0.5
            for entry in entries
        )
    if stream.duration is None:
        return False
    stated = float(stream.duration * stream.time_base)
    return start + frames.reached + 0.5 < min(stated, start + length)


def _checked_clip(
    window: _Window, start: float, end: float, settings: DecodeSettings
) -> DecodedClip:
    frames, audio_track = window.frames, window.audio
    errors = [*frames.errors, *window.errors, *audio_track.errors]
    reason: Reason = "decode_error"
    detail = f"{len(errors)} errors, the first: {errors[0]}" if errors else ""
    if not errors and window.cut_off:
        reason, detail = "short_read", "the file ends before its header says"
        errors = [detail]
    if not frames.times or audio_track.samples == 0:
        missing = "video frame" if not frames.times else "audio"
        if errors:
            raise ClipError(reason, f"no {missing} decodes; {detail}")
        if start > 0:
            raise ClipError("window_outside", f"the file has no {missing} from {start:g} s on")
        raise ClipError(
            "no_video" if not frames.times else "no_audio", f"the stream has no {missing}"
        )
    video_seconds = _video_seconds(frames, end - start)
    audio_seconds = audio_track.samples / audio_track.hz
    if not (audio_track.errors or window.errors or window.cut_off):
        _check_length(audio_seconds, settings)  # Not for what failed: the sound itself is short.
    if errors:
        if len(frames.errors) > frames.decoded or len(audio_track.errors) > audio_track.frames:
            raise ClipError(reason, f"most of it does not decode; {detail}")
        if min(video_seconds, audio_seconds) < settings.min_seconds:
            raise ClipError(
                reason,
                f"only {video_seconds:.2f} s of video and {audio_seconds:.2f} s of audio decode; "
                f"{detail}",
            )
    audio = _checked_audio(audio_track, settings)
    assert frames.size is not None
    rate = min(frames.rate, settings.video_fps) if settings.video_fps > 0 else frames.rate
    return DecodedClip(
        audio=audio,
        frames=list(frames.frames.values()),
        frame_indexes=list(frames.frames),
        times_seconds=frames.times,
        video_seconds=video_seconds,
        frames_per_second=rate,
        width=frames.size[0],
        height=frames.size[1],
        video_codec=frames.codec,
        decode_errors=len(errors),
        timing=audio_track.faults | {cause: n for cause, n in window.counts.items() if n},
        content=_content(frames, audio_track),
    )


def _checked_audio(audio_track: AudioTrack, settings: DecodeSettings) -> np.ndarray:
    _check_length(audio_track.samples / audio_track.hz, settings)
    audio = audio_track.waveform()
    peak = int(np.abs(audio.astype(np.int32)).max())
    if peak <= SILENT_PEAK and not settings.keep_silent:
        raise ClipError("silent_audio", f"the largest sample is {peak} of 32768")
    return audio


def _content(frames: VideoTrack, audio_track: AudioTrack) -> str:
    """SHA-256 of audio and frames before anything that settings determine."""
    content = frames.content.copy()
    content.update(audio_track.first_channel())
    return content.hexdigest()


def _check_length(seconds: float, settings: DecodeSettings) -> None:
    if seconds < settings.min_seconds:
        raise ClipError("too_short", f"{seconds:.3f} s of audio, {settings.min_seconds:g} s needed")


def _video_seconds(frames: VideoTrack, length: float) -> float:
    """End of the last frame of the window; it is shown as long as the others usually are."""
    if len(frames.times) < 2:
        shown = max(1 / frames.rate, frames.reached - frames.times[-1])
    else:
        shown = float(np.median(np.diff(frames.times)))
    return min(frames.times[-1] + shown, length)
