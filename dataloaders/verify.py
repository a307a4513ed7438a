"""`cavmae verify`: whether packed shards are what they were when they were written.

Disks and transfers damage files without a word. This reads everything once and compares it with
what the packer noted: sizes and SHA-256 of the shards, the index against the tar, the CRC-32 and
the description of every sample, and on request whether every member still decodes.
"""

import hashlib
import io
import json
import sys
import tarfile
import zlib
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any

import av
import tyro
from av.error import FFmpegError
from rich.console import Console
from rich.table import Table

from cavmae.dataloaders.shards import (
    AUDIO_HZ,
    EXTENSIONS,
    FRAMES_PER_CLIP,
    SCHEMA,
    TIERS,
    ShardEntry,
    read_index,
    read_member_index,
)
from cavmae.dataloaders.worker_pool import Failure, run_in_order

SHARD_LIMIT_SECONDS = 7200.0
LISTED_PROBLEMS = 50


@dataclass(frozen=True)
class VerifyConfig:
    """Check packed shards: sizes, checksums, index, descriptions."""

    shards: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="SHARDS")]
    """Folder that `cavmae pack` made, or one tier of it."""
    decode: bool = False
    """Decode every member as well."""
    workers: int = 1
    """Processes."""

    def __post_init__(self) -> None:
        if self.workers < 1:
            raise ValueError(f"workers is {self.workers}; use 1 or more")


@dataclass(frozen=True)
class _Check:
    folder: Path
    tier: str
    entry: ShardEntry
    decode: bool


@dataclass(frozen=True)
class ShardResult:
    """What was found in one shard."""

    tier: str
    name: str
    samples: int
    bytes: int
    problems: tuple[str, ...]


def verify(config: VerifyConfig) -> list[ShardResult]:
    """Check every shard of every tier in a folder.

    Raises:
        FileNotFoundError: no finished shards there.
        ValueError: `index.json` is damaged.
    """
    folder = Path(config.shards)
    tiers = [folder / tier for tier in TIERS if (folder / tier).is_dir()]
    checks, results = [], []
    for tier_folder in tiers or [folder]:
        index = read_index(tier_folder)
        stated, found = index["samples"], sum(entry.samples for entry in index["shards"])
        if stated != found:
            problem = f"states {stated} samples, its shards have {found}"
            results.append(ShardResult(index["tier"], "index.json", found, 0, (problem,)))
        for entry in index["shards"]:
            checks.append(_Check(tier_folder, index["tier"], entry, config.decode))
    checked = run_in_order(
        check_shard, checks, workers=config.workers, limit_seconds=SHARD_LIMIT_SECONDS
    )
    for check, result in zip(checks, checked, strict=True):
        if isinstance(result, Failure):  # A decoder crashed on damaged data.
            problems = (f"{result.reason}: {result.detail}",)
            result = ShardResult(check.tier, check.entry.name, 0, 0, problems)
        results.append(result)
    return results


def check_shard(check: _Check) -> ShardResult:
    """Check one shard; the problems name the sample."""
    path = check.folder / check.entry.name
    problems: list[str] = []
    samples = size = 0
    try:
        size = path.stat().st_size
        if size != check.entry.bytes:
            problems.append(f"{size} bytes, index.json says {check.entry.bytes}")
        with open(path, "rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest() != check.entry.sha256:
                problems.append("its SHA-256 is not that of index.json")
        samples = _check_samples(check, path, problems)
    except (OSError, ValueError, tarfile.TarError) as error:
        problems.append(str(error))
    if samples != check.entry.samples:
        problems.append(f"{samples} samples, index.json says {check.entry.samples}")
    return ShardResult(check.tier, check.entry.name, samples, size, tuple(problems))


def _check_samples(check: _Check, path: Path, problems: list[str]) -> int:
    """Read the tar through and compare it with its index; returns the number of samples."""
    extensions = EXTENSIONS[check.tier]
    index = read_member_index(path.with_suffix(".idx"))
    if index.extensions != extensions:
        problems.append(f"its .idx lists {' '.join(index.extensions)}, not {' '.join(extensions)}")
        return len(index.keys)
    samples = 0
    with tarfile.open(path) as tar:
        members = iter(tar)
        for sample, key in enumerate(index.keys):
            data = {}
            for column, extension in enumerate(extensions):
                member = next(members, None)
                name = f"{key}.{extension}"
                if member is None:
                    problems.append(f"the tar ends before {name}")
                    return samples
                place = (name, int(index.offset[sample, column]), int(index.size[sample, column]))
                if (member.name, member.offset_data, member.size) != place or not member.isfile():
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
        description = json.loads(data["json"])
    except ValueError as error:
        return [f"its JSON is damaged: {error}"]
    wrong = description_problem(description, key, check.tier)
    if wrong:
        return [f"its JSON is not as it should be: {wrong}"]
    damaged = [
        extension
        for extension in EXTENSIONS[check.tier][1:]
        if zlib.crc32(data[extension]) != description["crc32"][extension]
    ]
    if damaged:
        return [f"{extension} is damaged (CRC-32)" for extension in damaged]
    return _decode_problems(description, data) if check.decode else []


def description_problem(description: Any, key: str, tier: str) -> str | None:
    """What is wrong with a sample's JSON (schema 1), or None."""
    try:
        audio, video = description["audio"], description["video"]
        times, ten = video["times_seconds"], description["ten_frames"]
        source = description["source"]
        rules = {
            f"schema is {SCHEMA}": description["schema"] == SCHEMA,
            f"key is {key}": description["key"] == key,
            "source.path is text": isinstance(source["path"], str),
            "source.start_seconds is 0 or more": source["start_seconds"] >= 0,
            "source.end_seconds is after the start or null": source["end_seconds"] is None
            or source["end_seconds"] > source["start_seconds"],
            "labels are texts": isinstance(description["labels"], list)
            and all(isinstance(label, str) for label in description["labels"]),
            f"audio.hz is {AUDIO_HZ}": audio["hz"] == AUDIO_HZ,
            "audio.samples is above 0": audio["samples"] > 0,
            "video.width and height are even": video["width"] % 2 == video["height"] % 2 == 0,
            "video.frames is the number of times": video["frames"] == len(times) > 0,
            "times_seconds ascend from 0": times[0] >= 0
            and all(before < after for before, after in pairwise(times)),
            f"there are {FRAMES_PER_CLIP} ten_frames": len(ten) == FRAMES_PER_CLIP,
            "ten_frames have the times of their indexes": all(
                0 <= one["index"] < len(times) and one["seconds"] == times[one["index"]]
                for one in ten
            ),
            "every member has a crc32": set(description["crc32"]) == set(EXTENSIONS[tier]),
        }
    except (KeyError, TypeError, IndexError) as error:
        return f"{type(error).__name__}: {error}"
    return next((f"not true that {rule}" for rule, holds in rules.items() if not holds), None)


def _decode_problems(description: dict[str, Any], data: dict[str, bytes]) -> list[str]:
    problems = []
    video = description["video"]
    for extension, content in data.items():
        if extension == "json":
            continue
        try:
            if extension == "flac":
                with av.open(io.BytesIO(content), "r") as container:
                    found: Any = sum(frame.samples for frame in container.decode(audio=0))
                expected: Any = description["audio"]["samples"]
            else:
                count = video["frames"] if extension == "mp4" else 1
                expected = [(video["width"], video["height"])] * count
                with av.open(io.BytesIO(content), "r") as container:
                    found = [(frame.width, frame.height) for frame in container.decode(video=0)]
        except FFmpegError as error:
            problems.append(f"{extension} does not decode: {error}")
            continue
        if found != expected:
            problems.append(f"{extension} decodes to something else than its JSON says")
    return problems


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit code: 1 if anything is wrong."""
    errors = Console(stderr=True, soft_wrap=True, highlight=False, markup=False)
    try:
        results = verify(tyro.cli(VerifyConfig, prog="cavmae verify", args=argv))
    except (ValueError, OSError, RuntimeError) as error:
        errors.print(f"error: {error}")
        return 1
    table = Table("tier", "shard", "samples", "MB", "problems")
    for result in results:
        row = (result.tier, result.name, str(result.samples), f"{result.bytes / 1e6:.1f}")
        table.add_row(*row, str(len(result.problems)) if result.problems else "none")
    Console().print(table)
    problems = [
        f"{result.tier}/{result.name}: {problem}"
        for result in results
        for problem in result.problems
    ]
    for problem in problems[:LISTED_PROBLEMS]:
        errors.print(f"error: {problem}")
    if len(problems) > LISTED_PROBLEMS:
        errors.print(f"and {len(problems) - LISTED_PROBLEMS} more problems")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
