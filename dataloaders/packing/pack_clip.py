"""Packs one listed clip into the members of its samples; runs in the worker processes.

Separate from `pack.py` so that a worker process imports neither torch nor the command line.
"""

import os
import zlib
from bisect import bisect_right
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

from cavmae.dataloaders.constants import AUDIO_HZ, FRAMES_PER_CLIP
from cavmae.dataloaders.media.audio_codec import AudioCodec, encode_audio
from cavmae.dataloaders.media.decode_clip import DecodedClip, decode_clip, stream_seconds
from cavmae.dataloaders.media.encode_video import (
    VideoCodec,
    describe_fragments,
    encode_jpegs,
    encode_video,
)
from cavmae.dataloaders.media.errors import (
    MAXIMUM_CLIP_BYTES,
    ClipError,
    DecodeSettings,
    Streams,
)
from cavmae.dataloaders.media.video_size import crop_start, stored_size
from cavmae.dataloaders.packing.clip_list import ListedClip
from cavmae.dataloaders.packing.published_source import read_published
from cavmae.dataloaders.shards.format import SCHEMA, description_bytes

PUBLISHED_SECONDS = 10
"""The original code reads the first ten seconds."""

FrameChoice = Literal["by_time", "published"]


@dataclass(frozen=True)
class ClipTask:
    """Everything that a worker needs to pack one clip."""

    number: int
    clip: ListedClip
    clip_seconds: float
    tiers: tuple[str, ...]
    audio_codec: AudioCodec
    video_codec: VideoCodec
    frame_choice: FrameChoice
    decode: DecodeSettings


@dataclass(frozen=True)
class PackedClip:
    """The samples of one clip."""

    key: str
    members: dict[str, dict[str, bytes]]
    """Bytes by tier and extension."""
    seconds: float
    codec: str
    """Codec of the source's video; empty where only the sound is packed."""
    content: str
    """SHA-256 of what was decoded; see `DecodedClip.content`."""
    timing: dict[str, float]
    """See `DecodedClip.timing`."""
    cropped: float
    """Fraction of the picture that the `video` tier lacks."""


@dataclass(frozen=True)
class SkippedClip:
    """A clip that was not packed, and why."""

    reason: str
    detail: str


def pack_clip(task: ClipTask) -> PackedClip | SkippedClip:
    """Decode one clip and encode its samples for all tiers."""
    clip = task.clip
    end = clip.start_seconds + task.clip_seconds if clip.end_seconds is None else clip.end_seconds
    key = f"{task.number:09d}"
    jpegs, source = None, b""
    try:
        if clip.frames is not None:
            seconds = end - clip.start_seconds
            decoded, jpegs = read_published(
                clip.path, clip.frames, clip.source, seconds, task.decode
            )
        else:
            choose = (
                None if "video" in task.tiers else partial(ten_frames, choice=task.frame_choice)
            )
            decoded = decode_clip(
                clip.path, clip.start_seconds, end, task.decode, clip.part, choose
            )
        if "original" in task.tiers:
            source = _source_bytes(clip)
    except ClipError as error:
        return SkippedClip(error.reason, error.detail)
    times, rate = decoded.times_seconds, decoded.frames_per_second
    if jpegs is not None:
        chosen = list(range(FRAMES_PER_CLIP))
    elif times:
        chosen = ten_frames(times, decoded.video_seconds, rate, task.frame_choice)
    else:
        chosen = []
    audio = {}
    if len(decoded.audio):
        audio[task.audio_codec] = encode_audio(decoded.audio, task.audio_codec)
    description = describe(task, key, decoded, chosen)
    members, cropped = {}, 0.0
    for tier in task.tiers:
        described = description
        if tier == "video":
            whole = decoded.width, decoded.height
            size = stored_size(*whole, task.decode.short_side, task.video_codec)
            media = {"mp4": encode_video(decoded.frames, size, task.video_codec, rate)}
            picture = cropped_picture(whole, size)
            cropped = picture.get("cropped_from", {}).get("lost", 0.0)
            described = {
                **description,
                "video": description["video"] | picture,
                "fragments": describe_fragments(media["mp4"]),
            }
        elif tier == "original":
            media = {"source": source}
        elif tier == "audio":
            media = {}
        else:
            files = jpegs or _encoded_once(decoded, chosen)
            media = {f"{number}.jpg": data for number, data in enumerate(files)}
        members[tier] = _members(described, {**audio, **media})
    seconds = len(decoded.audio) / AUDIO_HZ or decoded.video_seconds
    return PackedClip(
        key, members, seconds, decoded.video_codec, decoded.content, decoded.timing, cropped
    )


def _encoded_once(decoded: DecodedClip, chosen: list[int]) -> list[bytes]:
    """Encode the chosen frames as JPEGs, those that occur more than once only once."""
    frames = dict(zip(decoded.frame_indexes, decoded.frames, strict=True))
    distinct = sorted(set(chosen))
    encoded = encode_jpegs([frames[index] for index in distinct])
    jpegs = dict(zip(distinct, encoded, strict=True))
    return [jpegs[index] for index in chosen]


def clip_length(clip: ListedClip, streams: Streams) -> float | None:
    """Length in seconds of the file of a clip without an end; None if it is unknown."""
    if clip.end_seconds is not None or clip.frames is not None:
        return None
    try:
        return max(stream_seconds(clip.path, clip.part, streams).values())
    except ClipError:
        return None


def _source_bytes(clip: ListedClip) -> bytes:
    """The unchanged file, or its part of a tar."""
    with open(clip.path, "rb") as file:
        offset, size = clip.part or (0, os.fstat(file.fileno()).st_size)
        if size > MAXIMUM_CLIP_BYTES:
            raise ClipError(
                "too_large",
                f"{size} bytes, and the original tier keeps files up to {MAXIMUM_CLIP_BYTES}; "
                f"cut it into clips first",
            )
        file.seek(offset)
        return file.read(size)


def _members(description: dict[str, Any], media: dict[str, bytes]) -> dict[str, bytes]:
    crc32 = {extension: zlib.crc32(data) for extension, data in media.items()}
    return {"json": description_bytes(description, crc32), **media}


def describe(task: ClipTask, key: str, decoded: DecodedClip, chosen: list[int]) -> dict[str, Any]:
    """Build the sample's JSON without the checksums, which differ between tiers."""
    clip = task.clip
    times = [round(time, 6) for time in decoded.times_seconds]
    description: dict[str, Any] = {
        "schema": SCHEMA,
        "key": key,
        "source": {
            "path": clip.source,
            "start_seconds": clip.start_seconds,
            "end_seconds": clip.end_seconds,
        },
        "labels": list(clip.labels),
    }
    if len(decoded.audio):
        description["audio"] = {"hz": AUDIO_HZ, "samples": len(decoded.audio)}
    if times:
        description["video"] = {
            "frames": len(times),
            "width": decoded.width,
            "height": decoded.height,
            "codec": task.video_codec if "video" in task.tiers else None,
            "seconds": round(decoded.video_seconds, 6),
            "times_seconds": times,
        }
        description["ten_frames"] = [{"index": index, "seconds": times[index]} for index in chosen]
    if decoded.decode_errors:
        description["decode_errors"] = decoded.decode_errors
    if decoded.timing:
        description["timing"] = {cause: round(n, 6) for cause, n in decoded.timing.items()}
    return description


def cropped_picture(whole: tuple[int, int], size: tuple[int, int]) -> dict[str, Any]:
    """What a sample's JSON says of its stored picture: its size, and where in which picture it was
    if that was larger, in pixels, with the fraction of it that is lost.

    Args:
        whole, size: width and height.
    """
    width, height = size
    picture: dict[str, Any] = {"width": width, "height": height}
    if size != whole:
        picture["cropped_from"] = {
            "width": whole[0],
            "height": whole[1],
            "left": crop_start(whole[0], width),
            "top": crop_start(whole[1], height),
            "lost": round(1 - width * height / (whole[0] * whole[1]), 4),
        }
    return picture


def ten_frames(
    times_seconds: list[float],
    video_seconds: float,
    frames_per_second: float,
    choice: FrameChoice,
) -> list[int]:
    """Choose the indexes of the ten frames of a clip; a frame may occur more than once.

    `by_time`: the frame shown at (i + 0.5) / 10 of the video. `published`: the index of the
    original code, `int(i * (min(frames, int(10 * fps)) / 10))`, minus one because it reads the
    frame before (the first stays 0).
    """
    frames = len(times_seconds)
    if choice == "published":
        span = min(frames, int(PUBLISHED_SECONDS * frames_per_second))
        return [max(0, int(i * (span / FRAMES_PER_CLIP)) - 1) for i in range(FRAMES_PER_CLIP)]
    moments = [(i + 0.5) / FRAMES_PER_CLIP * video_seconds for i in range(FRAMES_PER_CLIP)]
    return [max(0, bisect_right(times_seconds, moment) - 1) for moment in moments]
