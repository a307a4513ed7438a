"""`cavmae verify`: checks packed shards for damage.

Disks and transfers damage files silently. This reads everything once and compares it with what the
packer recorded: sizes and SHA-256 of the shards, the index against the tar, the CRC-32 and the
description of every sample, and on request whether every member still decodes. Works on a folder
and on a URL.
"""

import hashlib
import io
import os
import sys
import tarfile
import zlib
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any

import av
import tyro
from av.error import FFmpegError
from PIL import Image

from cavmae.console import JsonOption, counted, print_json, print_rows
from cavmae.dataloaders.constants import AUDIO_CODECS, AUDIO_HZ, FRAMES_PER_CLIP, TIERS
from cavmae.dataloaders.media.audio_codec import decode_audio
from cavmae.dataloaders.media.decode_frame import FrameError, decode_original, limit_pixels
from cavmae.dataloaders.media.encode_video import describe_fragments
from cavmae.dataloaders.media.headers import HeaderError, check_audio, check_jpeg
from cavmae.dataloaders.process_pool import Failure, TaskLimits, run_in_order
from cavmae.dataloaders.shards.format import (
    CONTENT_FILE,
    SCHEMA,
    MemberIndex,
    ShardEntry,
    ShardError,
    member_names,
    parse_description,
    parse_member_index,
)
from cavmae.dataloaders.shards.shard_set import ShardSet, read_index
from cavmae.dataloaders.shards.storage import Storage, StoredFile, open_storage
from cavmae.field_checks import CheckedFields, PositiveInt

SHARD_LIMITS = TaskLimits(seconds=7200.0, memory_bytes=6 << 30)
READ_BYTES = 1 << 23
LISTED_PROBLEMS = 50


@dataclass(frozen=True)
class VerifyConfig(CheckedFields, JsonOption):
    """Check packed shards: sizes, checksums, index, descriptions."""

    shards: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="SHARDS")]
    """Output of `cavmae pack`, or one tier of it; a folder or a URL."""
    decode: bool = False
    """Also decode every member."""
    workers: PositiveInt = 1
    """Processes."""


@dataclass(frozen=True)
class _Check:
    folder: str
    tier: str
    members: tuple[str, ...]
    entry: ShardEntry
    decode: bool


@dataclass(frozen=True)
class ShardResult:
    """The result for one shard."""

    tier: str
    name: str
    samples: int
    bytes: int
    problems: tuple[str, ...]


def verify(config: VerifyConfig) -> list[ShardResult]:
    """Check every shard of every tier in a folder or at a URL.

    Raises:
        FileNotFoundError: there are no finished shards.
        OSError: `index.json` cannot be read.
        ValueError: `index.json` is damaged.
    """
    checks, results = [], []
    for folder in _tiers(config.shards):
        index = read_index(open_storage(folder, None))
        tier, stated = index["tier"], index["samples"]
        found = sum(entry.samples for entry in index["shards"])
        if stated != found:
            problem = f"states {stated} samples, its shards have {found}"
            results.append(ShardResult(tier, "index.json", found, 0, (problem,)))
        if problem := _content_problem(folder):
            results.append(ShardResult(tier, CONTENT_FILE, found, 0, (problem,)))
        members = member_names(tier, index["audio_codec"], index["modality"])
        checks += [_Check(folder, tier, members, one, config.decode) for one in index["shards"]]
    checked = run_in_order(check_shard, checks, workers=config.workers, limits=SHARD_LIMITS)
    clips = sum(check.entry.samples for check in checks)
    pairs = zip(checks, checked, strict=True)
    for check, result in counted(
        pairs, "checking", clips, "clips", lambda pair: pair[0].entry.samples
    ):
        if isinstance(result, Failure):  # A decoder crashed on damaged data.
            problems = (f"{result.reason}: {result.detail}",)
            result = ShardResult(check.tier, check.entry.name, 0, 0, problems)
        results.append(result)
    return results


def _content_problem(folder: str) -> str:
    """What is wrong with a tier's content hashes; empty if nothing is."""
    try:
        return "" if ShardSet(folder).content() is not None else "it is missing"
    except ValueError as error:
        return str(error)


def _tiers(shards: str) -> list[str]:
    """The tiers in a folder or at a URL, or `shards` itself if it is one."""
    tiers = [f"{shards.rstrip('/')}/{tier}" for tier in TIERS]
    exists = _has_index if "://" in shards else os.path.isdir
    return [tier for tier in tiers if exists(tier)] or [shards]


def _has_index(folder: str) -> bool:
    try:
        return bool(open_storage(folder, None).read("index.json"))
    except FileNotFoundError:
        return False


class _HashedReader(io.RawIOBase):
    """Reads a shard from start to end, and computes its size and digest."""

    def __init__(self, storage: Storage, file: StoredFile):
        self._storage = storage
        self._file = file
        self.bytes = 0
        self.sha256 = hashlib.sha256()

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = self._storage.read_range(self._file, self.bytes, len(buffer))
        self.bytes += len(data)
        self.sha256.update(data)
        buffer[: len(data)] = data
        return len(data)


def check_shard(check: _Check) -> ShardResult:
    """Check one shard; its problems name the sample."""
    entry, storage = check.entry, open_storage(check.folder, None)
    hashed = _HashedReader(storage, StoredFile(entry.name, entry.sha256, entry.bytes))
    problems: list[str] = []
    of_file: list[str] = []
    samples = 0
    with io.BufferedReader(hashed, READ_BYTES) as stream:
        try:
            name = f"{Path(entry.name).stem}.idx"
            index = parse_member_index(storage.read(name), storage.location(name))
            samples = _check_samples(check, index, stream, problems)
        except (OSError, ValueError, tarfile.TarError) as error:
            problems.append(str(error))
        try:
            while stream.read(READ_BYTES):
                pass
        except OSError as error:
            of_file.append(str(error))
        else:
            if hashed.bytes != entry.bytes:
                of_file.append(f"{hashed.bytes} bytes, index.json says {entry.bytes}")
            if hashed.sha256.hexdigest() != entry.sha256:
                of_file.append("its SHA-256 is not that of index.json")
    if samples != entry.samples:
        problems.append(f"{samples} samples, index.json says {entry.samples}")
    found = tuple(dict.fromkeys([*of_file, *problems]))
    return ShardResult(check.tier, entry.name, samples, hashed.bytes, found)


def _check_samples(
    check: _Check, index: MemberIndex, stream: "io.BufferedReader[Any]", problems: list[str]
) -> int:
    """Compare a tar with its index; returns the number of samples."""
    if index.extensions != check.members:
        listed, expected = " ".join(index.extensions), " ".join(check.members)
        problems.append(f"its .idx lists {listed} instead of {expected}")
        return len(index.keys)
    samples = 0
    with tarfile.open(fileobj=stream, mode="r|", bufsize=READ_BYTES) as tar:
        members = iter(tar)
        for sample, key in enumerate(index.keys):
            data = {}
            for column, extension in enumerate(check.members):
                member = next(members, None)
                name = f"{key}.{extension}"
                if member is None:
                    problems.append(f"the tar ends before {name}")
                    return samples
                listed = (name, int(index.offset[sample, column]), int(index.size[sample, column]))
                if (member.name, member.offset_data, member.size) != listed or not member.isfile():
                    problems.append(f"the tar has {member.name} where the .idx has {name}")
                    return samples
                content = tar.extractfile(member)
                assert content is not None
                data[extension] = content.read()
            samples += 1
            problems += [f"{key}: {problem}" for problem in _check_sample(check, str(key), data)]
        if next(members, None) is not None:
            problems.append("the tar has members that the .idx does not list")
    return samples


def _check_sample(check: _Check, key: str, data: dict[str, bytes]) -> list[str]:
    try:
        description = parse_description(data["json"])
    except ShardError as error:
        return [f"its JSON is damaged: {error}"]
    wrong = description_problem(description, key, check.members)
    if wrong:
        return [f"its JSON is invalid: {wrong}"]
    damaged = [
        extension
        for extension in check.members[1:]
        if zlib.crc32(data[extension]) != description["crc32"][extension]
    ]
    if damaged:
        return [f"{extension} is damaged (CRC-32)" for extension in damaged]
    problems = _fragment_problems(description, data["mp4"]) if "mp4" in data else []
    return problems + (_decode_problems(description, data) if check.decode else [])


def description_problem(description: Any, key: str, members: Iterable[str]) -> str | None:
    """The first rule that a sample's JSON violates, or None."""
    try:
        source = description["source"]
        rules = {
            f"schema is {SCHEMA}": description["schema"] == SCHEMA,
            f"key is {key}": description["key"] == key,
            "source.path is a string": isinstance(source["path"], str),
            "source.start_seconds is 0 or more": source["start_seconds"] >= 0,
            "source.end_seconds is after the start or null": source["end_seconds"] is None
            or source["end_seconds"] > source["start_seconds"],
            "labels are strings": isinstance(description["labels"], list)
            and all(isinstance(label, str) for label in description["labels"]),
            "every member has a crc32": set(description["crc32"]) == set(members),
        }
        if set(members) & set(AUDIO_CODECS):
            audio = description["audio"]
            rules |= {
                f"audio.hz is {AUDIO_HZ}": audio["hz"] == AUDIO_HZ,
                "audio.samples is above 0": audio["samples"] > 0,
            }
        if set(members) & {"0.jpg", "mp4", "source"}:
            rules |= _picture_rules(description, members)
    except (KeyError, TypeError, IndexError) as error:
        return f"{type(error).__name__}: {error}"
    return next((f"not true that {rule}" for rule, holds in rules.items() if not holds), None)


def _picture_rules(description: Any, members: Iterable[str]) -> dict[str, bool]:
    """Whether what a sample's JSON says of its pictures keeps the rules, by rule."""
    video, ten = description["video"], description["ten_frames"]
    times = video["times_seconds"]
    return {
        "video.width and height are even, where they are no JPEGs'": "0.jpg" in members
        or video["width"] % 2 == video["height"] % 2 == 0,
        "video.cropped_from holds the picture": _holds(video.get("cropped_from"), video),
        "video.frames is the number of times": video["frames"] == len(times) > 0,
        "times_seconds ascend from 0": times[0] >= 0
        and all(before < after for before, after in pairwise(times)),
        f"there are {FRAMES_PER_CLIP} ten_frames": len(ten) == FRAMES_PER_CLIP,
        "ten_frames have the times of their indexes": all(
            0 <= one["index"] < len(times) and one["seconds"] == times[one["index"]] for one in ten
        ),
    }


def _holds(whole: dict[str, int] | None, part: dict[str, int]) -> bool:
    """Whether a picture is a part of the one that it was cut from, if there is one."""
    return whole is None or all(
        0 <= whole[start] <= whole[side] - part[side]
        for start, side in (("left", "width"), ("top", "height"))
    )


def _fragment_problems(description: dict[str, Any], video: bytes) -> list[str]:
    """Compare the fragments in the JSON with those of the video."""
    try:
        found = describe_fragments(video)
    except ValueError as error:
        return [f"mp4 has no fragments: {error}"]
    if description.get("fragments") != found:
        return ["its JSON is invalid: fragments differ from those of the mp4"]
    if len(found["bytes"]) != description["video"]["frames"] + 1:
        return [f"mp4 has {len(found['bytes']) - 1} frames, its JSON another number"]
    return []


def _decode_problems(description: dict[str, Any], data: dict[str, bytes]) -> list[str]:
    problems = []
    video = description.get("video", {})
    size = (video.get("width"), video.get("height"))
    for extension, content in data.items():
        if extension == "json":
            continue
        try:
            if extension in AUDIO_CODECS:
                expected: Any = description["audio"]["samples"]
                check_audio(content, extension, expected)
                found: Any = len(decode_audio(content))
            elif extension == "source":  # The last frame needs most of the file.
                last = max(frame["seconds"] for frame in description["ten_frames"])
                found, expected = decode_original(content, last, *size).shape[1::-1], size
            elif extension == "mp4":
                expected = [size] * video["frames"]
                with av.open(io.BytesIO(content), "r") as container:
                    limit_pixels(container.streams.video[0], *size)
                    found = [(frame.width, frame.height) for frame in container.decode(video=0)]
            else:  # By libjpeg, as in the loader; libavformat finds two pictures in one of a phone.
                check_jpeg(content, *size)
                with Image.open(io.BytesIO(content)) as image:
                    image.load()
                    found, expected = image.size, size
        except (FFmpegError, FrameError, HeaderError, OSError) as error:
            problems.append(f"{extension} does not decode: {error}")
            continue
        if found != expected:
            problems.append(f"{extension} does not decode to what its JSON describes")
    return problems


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit code: 1 if there are problems."""
    config = tyro.cli(VerifyConfig, prog="cavmae verify", args=argv)
    results = verify(config)
    if config.json:
        print_json([asdict(result) for result in results])
    else:
        print_rows(
            ("tier", "shard", "samples", "MB", "problems"),
            [
                (
                    one.tier,
                    one.name,
                    one.samples,
                    f"{one.bytes / 1e6:.1f}",
                    len(one.problems) or "none",
                )
                for one in results
            ],
        )
    problems = [
        f"{result.tier}/{result.name}: {problem}"
        for result in results
        for problem in result.problems
    ]
    for problem in problems[:LISTED_PROBLEMS]:
        print(f"error: {problem}", file=sys.stderr)
    if len(problems) > LISTED_PROBLEMS:
        print(f"and {len(problems) - LISTED_PROBLEMS} more problems", file=sys.stderr)
    return 1 if problems else 0
