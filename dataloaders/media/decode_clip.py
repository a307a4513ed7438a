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
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import av
import av.container
import av.stream
import numpy as np
from av.error import FFmpegError
from PIL import Image, UnidentifiedImageError

from cavmae.dataloaders.media.audio_track import AudioTrack
from cavmae.dataloaders.media.errors import (
    ClipError,
    DecodeSettings,
    Reason,
    Streams,
    error_text,
)
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
PICTURES = "jpeg_pipe,png_pipe,webp_pipe,bmp_pipe,tiff_pipe"
"""Pictures, as videos of one frame, where sound is not asked for."""
PICTURE_NAMES = (".jpeg", ".jpg", ".png", ".webp")


@dataclass(frozen=True)
class DecodedClip:
    """Audio and frames of one clip; all times in seconds from the start of the clip."""

    audio: np.ndarray
    """(samples,) int16, 16 kHz mono; no samples where there is no sound."""
    frames: list[np.ndarray]
    """Each `(height * 3 / 2, width)` uint8: planes of 4:2:0, BT.601, limited range; empty, and all
    else about the video 0 or empty, where there is none."""
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

    frames: VideoTrack | None
    audio: AudioTrack | None
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
    again = _read_window(*span, wanted=set(chosen)).frames
    assert again is not None
    return replace(clip, frames=list(again.frames.values()), frame_indexes=list(again.frames))


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
            stream, audio = _choose_streams(container, "both")
            assert stream is not None
            assert audio is not None
            zero = _origin_seconds([stream, audio]) + seconds
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


def stream_seconds(
    path: str, part: tuple[int, int] | None = None, streams: Streams = "both"
) -> dict[Literal["video", "audio"], float]:
    """Measure the seconds from time zero to the last packet's end of each stream that would be
    decoded, ignoring the header.

    Raises:
        ClipError: the file lacks what `streams` asks for, or cannot be opened.
    """
    with _open(_url(path, part), _formats(streams)) as container:
        chosen = [one for one in _choose_streams(container, streams) if one is not None]
        origin = _origin_seconds(chosen)
        ends = {one.index: 0.0 for one in chosen}
        for packet in Timeline(container, chosen).packets():
            if packet.pts is not None and packet.time_base is not None:
                last = float((packet.pts + (packet.duration or 0)) * packet.time_base)
                index = packet.stream.index
                ends[index] = max(ends[index], last - origin)
        return {one.type: ends[one.index] for one in chosen}


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
    if PICTURES in formats and isinstance(url, str) and url.lower().endswith(PICTURE_NAMES):
        url = _intact_picture(url.removeprefix("file:"))
    # Files alone: neither the content nor the name can make libavformat fetch a URL.
    options = {"format_whitelist": formats, "protocol_whitelist": "file,subfile"}
    try:
        return av.open(url, "r", options=options, metadata_errors="replace")
    except (FFmpegError, UnicodeError) as error:
        raise ClipError("open_failed", error_text(error)) from error


def _intact_picture(path: str) -> io.BytesIO:
    """Read a picture, which by its name would be one of a numbered series (image2), and of whose
    missing end libavcodec makes a green area without an error."""
    with open(path, "rb") as file:
        data = io.BytesIO(file.read())
    try:
        with Image.open(data) as picture:
            picture.load()
    except UnidentifiedImageError:  # a video, whatever its name
        pass
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ClipError("decode_error", str(error)) from error
    data.seek(0)
    return data


def _formats(streams: Streams) -> str:
    beside = {"any": AUDIO_CONTAINERS, "audio": AUDIO_CONTAINERS, "video": PICTURES, "both": ""}
    return f"{beside[streams]},{CONTAINERS}".strip(",")


def _choose_streams(
    container: av.container.InputContainer, streams: Streams
) -> tuple[av.VideoStream | None, av.AudioStream | None]:
    """Choose the video and the audio that are decoded; None: none is."""
    cover = av.stream.Disposition.attached_pic
    default = av.stream.Disposition.default
    videos = [stream for stream in container.streams.video if not stream.disposition & cover]
    audios = list(container.streams.audio)
    if not videos and not audios:
        raise ClipError("open_failed", f"a {container.format.name} file without audio or video")
    if not videos and streams in ("both", "video"):
        raise ClipError("no_video", "no video stream (cover art is not one)")
    if not audios and streams in ("both", "audio"):
        raise ClipError("no_audio", "no audio stream")
    video = next((one for one in videos if one.disposition & default), next(iter(videos), None))
    audio = next((one for one in audios if one.disposition & default), next(iter(audios), None))
    chosen = (None if streams == "audio" else video, None if streams == "video" else audio)
    for stream in chosen:
        if stream is None:
            continue
        if stream.codec_context is None:
            raise ClipError("decode_error", f"no decoder for {stream.type} stream {stream.index}")
        stream.codec_context.thread_count = 1  # Clips are decoded in parallel already.
        stream.codec_context.options = {"max_pixels": str(MAXIMUM_SOURCE_PIXELS)}
    return chosen


def _origin_seconds(streams: Sequence[av.VideoStream | av.AudioStream]) -> float:
    starts = [
        float(stream.start_time * stream.time_base)
        for stream in streams
        if stream.start_time is not None and stream.time_base is not None
    ]
    return min(starts, default=0.0)


def _sought(
    container: av.container.InputContainer, stream: av.VideoStream | av.AudioStream, zero: float
) -> bool:
    """Seek to some time before `zero`; returns False where that cannot be relied on."""
    if time_starts_anew(container, stream):
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
    with _open(url, _formats(settings.streams)) as container:
        video, audio = _choose_streams(container, settings.streams)
        chosen = [stream for stream in (video, audio) if stream is not None]
        zero = _origin_seconds(chosen) + start
        length = end - start
        frames = video and VideoTrack(video, zero, length, settings, **frames_kept)
        audio_track = audio and AudioTrack(audio, zero, length, settings)
        tracks = {
            track_of.index: track
            for track_of, track in ((video, frames), (audio, audio_track))
            if track_of is not None and track is not None
        }
        if seek and not _sought(container, chosen[0], zero):
            return None
        timeline = Timeline(container, chosen)
        passed = dict.fromkeys(tracks, 0.0)
        for packet in timeline.packets():
            track = tracks[packet.stream.index]
            if not track.done:
                track.decode(packet)
            else:  # By durations: a stream whose stamps are wrong is done by its samples.
                passed[packet.stream.index] += packet_seconds(packet, packet.duration)
                if passed[packet.stream.index] > INTERLEAVING_SECONDS:
                    break  # The other stream has passed the window, too.
            if seek and frames and frames.begins_late:
                return None
            if all(one.done for one in tracks.values()):
                break
        for stream in chosen:
            track = tracks[stream.index]
            if not track.done:
                track.decode(flush_packet(stream))
            track.finish()
        if seek and not _found_all(frames, audio_track):
            return None
        counts = {
            "time_started_anew": _within(timeline.joins, zero, length),
            "odd_stamps": _within(timeline.odd_stamps, zero, length),
            "frames_moved": frames.moved if frames else 0,
        }
        cut_off = frames is not None and _is_cut_off(container, frames, start, length)
        return _Window(frames, audio_track, timeline.errors, cut_off, counts)


def _found_all(frames: VideoTrack | None, audio_track: AudioTrack | None) -> bool:
    """Whether a window that was sought has all that reading the file through would give."""
    if frames is not None and (frames.begins_late or not frames.times):
        return False
    return audio_track is None or not (
        audio_track.begins_late
        or "stamps_disagree" in audio_track.faults
        or audio_track.samples == 0
    )


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
    frame_errors = frames.errors if frames else []
    audio_errors = audio_track.errors if audio_track else []
    errors = [*frame_errors, *window.errors, *audio_errors]
    reason: Reason = "decode_error"
    detail = f"{len(errors)} errors, the first: {errors[0]}" if errors else ""
    if not errors and window.cut_off:
        reason, detail = "short_read", "the file ends before its header says"
        errors = [detail]
    if settings.streams == "any" and frames and audio_track and not errors:
        if not frames.times:  # ended before the window, or begins after it
            frames = None
        elif audio_track.samples < settings.min_seconds * audio_track.hz:
            audio_track = None
    missing = [
        name
        for name, absent in (
            ("video frame", frames is not None and not frames.times),
            ("audio", audio_track is not None and audio_track.samples == 0),
        )
        if absent
    ]
    if missing:
        if errors:
            raise ClipError(reason, f"no {missing[0]} decodes; {detail}")
        if start > 0:
            raise ClipError("window_outside", f"the file has no {missing[0]} from {start:g} s on")
        raise ClipError(
            "no_audio" if missing == ["audio"] else "no_video", f"the stream has no {missing[0]}"
        )
    decoded = {}
    if frames:
        decoded["video"] = _video_seconds(frames, end - start)
    if audio_track:
        decoded["audio"] = audio_track.samples / audio_track.hz
        if not (audio_errors or window.errors or window.cut_off):
            _check_length(decoded["audio"], settings)  # Not for what failed: the sound is short.
    if errors:
        if (frames and len(frame_errors) > frames.decoded) or (
            audio_track and len(audio_errors) > audio_track.frames
        ):
            raise ClipError(reason, f"most of it does not decode; {detail}")
        if min(decoded.values()) < settings.min_seconds:
            lengths = " and ".join(f"{length:.2f} s of {what}" for what, length in decoded.items())
            raise ClipError(reason, f"only {lengths} decode; {detail}")
    audio = _checked_audio(audio_track, settings) if audio_track else np.zeros(0, np.int16)
    rate = frames.rate if frames else 0.0
    width, height = (frames.size if frames else None) or (0, 0)
    return DecodedClip(
        audio=audio,
        frames=list(frames.frames.values()) if frames else [],
        frame_indexes=list(frames.frames) if frames else [],
        times_seconds=frames.times if frames else [],
        video_seconds=decoded.get("video", 0.0),
        frames_per_second=min(rate, settings.video_fps) if settings.video_fps > 0 else rate,
        width=width,
        height=height,
        video_codec=frames.codec if frames else "",
        decode_errors=len(errors),
        timing=(audio_track.faults if audio_track else {})
        | {cause: n for cause, n in window.counts.items() if n},
        content=_content(frames, audio_track),
    )


def _checked_audio(audio_track: AudioTrack, settings: DecodeSettings) -> np.ndarray:
    _check_length(audio_track.samples / audio_track.hz, settings)
    audio = audio_track.waveform()
    peak = int(np.abs(audio.astype(np.int32)).max())
    if peak <= SILENT_PEAK and not settings.keep_silent:
        raise ClipError("silent_audio", f"the largest sample is {peak} of 32768")
    return audio


def _content(frames: VideoTrack | None, audio_track: AudioTrack | None) -> str:
    """SHA-256 of audio and frames before anything that settings determine."""
    content = frames.content.copy() if frames else hashlib.sha256()
    content.update(audio_track.first_channel() if audio_track else b"")
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
