"""`cavmae pack`: from videos to the shards that training reads.

Decoding whole videos costs far more than training on a clip of them, so it is done once. The
packer takes whatever lies in a folder (or is listed in a CSV file), decodes it in worker processes
that may hang or crash without harm, and writes shards in the order of the list. A shard is written
whole or not at all; a run that was killed goes on at the first shard that is not finished, and
ends with the same bytes as one that was not.
"""

import json
import os
import sys
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, Protocol

import tyro
from rich.console import Console

from cavmae.dataloaders.media.audio_codec import AudioCodec
from cavmae.dataloaders.media.decode_clip import media_seconds
from cavmae.dataloaders.media.encode_video import VideoCodec
from cavmae.dataloaders.media.errors import ClipError, DecodeSettings
from cavmae.dataloaders.packing.clip_list import ListedClip, list_clips, list_digest
from cavmae.dataloaders.packing.duplicates import KnownContent, OtherSets
from cavmae.dataloaders.packing.output_folder import (
    claimed,
    finished_report,
    remove_unfinished,
    write_report,
)
from cavmae.dataloaders.packing.pack_clip import ClipTask, PackedClip, SkippedClip, pack_clip
from cavmae.dataloaders.packing.progress import PackProgress, PackSummary, summary_table
from cavmae.dataloaders.packing.statistics import write_statistics
from cavmae.dataloaders.packing.worker_pool import Failure, TaskLimits, run_in_order
from cavmae.dataloaders.shards.shard_set import TIERS, ShardEntry
from cavmae.dataloaders.shards.writer import ShardWriter, write_atomically, write_index
from cavmae.field_checks import CheckedFields, Limit, NonNegativeInt, PositiveInt, Seconds


@dataclass(frozen=True)
class PackConfig(CheckedFields):
    """Pack videos into shards for training.

    A clip is the first `clip_seconds` of a file, or the window that a CSV file gives. What cannot
    be used is skipped and named in OUT/report.jsonl with its reason. Run the same command again to
    go on after an interruption.

    Raises:
        ValueError: a field out of its range.
    """

    videos: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="VIDEOS")]
    """Folder, searched with its subfolders: every file is tried, whatever its name, but hidden
    files, text, subtitles and pictures. Or a CSV file with the columns path,start,end,labels
    (only path is required; start and end in seconds; labels separated by `;`). Or a tar of
    KEY.mp4 with KEY.json (labels, start, end), or a folder of such tars. Or a JSON file as the
    published code reads it (wav, video_id, video_path, labels)."""
    out: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="OUT")]
    """Folder for the shards; new, empty, or of an earlier run of the same command."""
    tiers: str = "frames,video"
    """What to pack: `frames` (ten JPEGs a clip), `video` (every frame as a key frame), `original`
    (the file as it is), separated by commas."""
    audio_codec: AudioCodec = "flac"
    """Of the sound: flac takes two thirds of the bytes, wav next to no time to decode."""
    video_codec: VideoCodec = "vp9"
    """Codec of the video tier: vp9 decodes on CPU and GPU, h264 on GPU only, mjpeg on CPU only."""
    video_fps: Annotated[float, Limit(lambda x: 0 <= x <= 1000, "0 (all) up to 1000")] = 0.0
    """Frames per second kept at most; 0: all."""
    short_side: Annotated[
        int, Limit(lambda x: x >= 16 and x % 2 == 0, "an even number from 16")
    ] = 256
    """Pixels of the shorter side; smaller videos keep their size."""
    frame_choice: Literal["by_time", "published"] = "by_time"
    """The ten frames: at the middle of each tenth of the clip, or as the original code chose."""
    audio_channel: Literal["mix", "first"] = "mix"
    """Mono sound from all channels, or from the first alone as published."""
    clip_seconds: Seconds = 10.0
    """Length of a clip where the list gives no end; longer files give one clip, from the start."""
    segment: bool = False
    """Cut longer files into consecutive clips of `clip_seconds` instead."""
    minimum_seconds: Seconds = 0.5
    """Shorter clips are skipped."""
    keep_silent: bool = False
    """Keep clips whose sound is silence."""
    deduplicate: bool = False
    """Skip clips whose sound and pictures an earlier clip of the list has; they are named in
    OUT/duplicates.jsonl in any case."""
    not_in: tuple[str, ...] = ()
    """Packed folders that must not share clips with this one, such as the test set's: by file name
    or by content."""
    allow_leakage: bool = False
    """Only count the clips that are in `not_in` as well."""
    clips_per_shard: PositiveInt = 1000
    """Clips of the list in each shard, skipped ones included."""
    maximum_seconds_per_clip: Seconds = 300.0
    """A clip that takes longer than this to decode and encode is skipped as `timeout`."""
    maximum_cpu_seconds_per_clip: Seconds = 120.0
    """The same for CPU time, which a busy machine does not stretch, as `cpu_limit`."""
    maximum_memory_gb: Annotated[float, Limit(lambda x: 1 <= x < 1 << 20, "1 or more")] = 6.0
    """Address space of a worker; a clip that wants more is skipped as `memory_limit`."""
    workers: NonNegativeInt = 0
    """Processes; 0: one per core."""
    ray: bool = False
    """Decode on a Ray cluster, whose nodes reach VIDEOS by the same path; this process writes."""
    ray_address: str = ""
    """Of the cluster, such as `auto`; empty: what RAY_ADDRESS names, else one started here."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for tier in self.tier_names:
            if tier not in TIERS:
                raise ValueError(f"tiers is {self.tiers!r}; use some of {', '.join(TIERS)}")
        if len(set(self.tier_names)) != len(self.tier_names):
            raise ValueError(f"tiers is {self.tiers!r}, which names one twice")
        if self.segment and "original" in self.tier_names:
            raise ValueError(
                "segment is set and tiers has original, which would keep the whole file for each "
                "of its clips; cut the files first, or leave original out"
            )
        if self.clip_seconds < self.minimum_seconds:
            raise ValueError(
                f"clip_seconds is {self.clip_seconds}, less than minimum_seconds "
                f"{self.minimum_seconds}"
            )

    @property
    def tier_names(self) -> tuple[str, ...]:
        return tuple(tier.strip() for tier in self.tiers.split(","))

    def decode_settings(self) -> DecodeSettings:
        return DecodeSettings(
            short_side=self.short_side,
            video_fps=self.video_fps,
            minimum_seconds=self.minimum_seconds,
            keep_silent=self.keep_silent,
            audio_channel=self.audio_channel,
        )

    def limits(self) -> TaskLimits:
        return TaskLimits(
            self.maximum_seconds_per_clip,
            self.maximum_cpu_seconds_per_clip,
            int(self.maximum_memory_gb * 1e9),
        )

    def lasting(self) -> dict[str, Any]:
        """The options that decide what the shards hold; the others may change on a restart."""
        free = (
            "videos",
            "out",
            "workers",
            "ray",
            "ray_address",
            "maximum_seconds_per_clip",
            "maximum_cpu_seconds_per_clip",
            "maximum_memory_gb",
            "not_in",
            "allow_leakage",
        )
        return {name: value for name, value in asdict(self).items() if name not in free}


class Executor(Protocol):
    """Something like `run_in_order`: results in the order of the arguments, lost ones as such."""

    def __call__(
        self,
        function: Callable[[Any], Any],
        arguments: Iterable[Any],
        *,
        workers: int,
        limits: TaskLimits,
    ) -> Generator[Any]: ...


def pack(
    config: PackConfig, console: Console | None = None, executor: Executor = run_in_order
) -> PackSummary:
    """Pack all clips of `config.videos` into `config.out`.

    Args:
        config: what to pack, and how.
        console: for progress; None: standard error.
        executor: where clips are decoded; which one does not change what is packed.

    Raises:
        ValueError: the list or the options cannot be used, or no clip can.
        OSError: something cannot be read or written.
    """
    console = console or Console(stderr=True)
    videos, out = Path(config.videos), Path(config.out)
    workers = config.workers or len(os.sched_getaffinity(0))
    clips = list_clips(videos, out)
    if config.tier_names != ("frames",) and any(clip.frames is not None for clip in clips):
        raise ValueError(
            f"tiers is {config.tiers!r}, and {videos} lists sounds with ten pictures each, of "
            f"which only the frames tier can be made; use --tiers frames"
        )
    _check_whole_files(config, clips)
    if config.segment:
        clips = _segments(clips, config, workers, console, executor)
    others = OtherSets(config.not_in) if config.not_in else None
    if others and not config.allow_leakage:
        others.check_names(clip.source for clip in clips)
    options, tiers = config.lasting(), config.tier_names
    with claimed(out, options, tiers, len(clips), list_digest(clips)):
        shards = range(-(-len(clips) // config.clips_per_shard))
        reports = {shard: finished_report(out, shard) for shard in shards}
        pending = [shard for shard in shards if reports[shard] is None]
        remove_unfinished(out, tiers, pending)
        resumed = len(shards) - len(pending)
        known = KnownContent()
        for report in reports.values():
            if report is not None and config.deduplicate:
                known.add(report)
        if pending:
            total = sum(len(_numbers(shard, clips, config)) for shard in pending)
            console.print(f"Packing {total} clips in {len(pending)} shards, {workers} processes")
            with (
                PackProgress(console, total) as progress,
                closing(_results(pending, clips, config, workers, executor)) as results,
            ):
                for shard in pending:
                    checks = _Checks(known, None if config.allow_leakage else others)
                    reports[shard] = _pack_shard(
                        shard, clips, results, config, out, progress, checks
                    )
        return _complete(out, config, [reports[shard] or {} for shard in shards], resumed, others)


def _check_whole_files(config: PackConfig, clips: list[ListedClip]) -> None:
    late = next((clip for clip in clips if clip.start_seconds > 0), None)
    if "original" in config.tier_names and late is not None:
        raise ValueError(
            f"tiers has original, which keeps whole files, and {late.source} is listed from "
            f"{late.start_seconds:g} s on; cut the files first, or leave original out"
        )


def _segments(
    clips: list[ListedClip],
    config: PackConfig,
    workers: int,
    console: Console,
    executor: Executor,
) -> list[ListedClip]:
    """Cut clips without a stated end into consecutive ones; their files are read for it."""
    console.print(f"Reading the lengths of {len(clips)} files")
    lengths = executor(
        _length,
        [clip if clip.end_seconds is None and clip.frames is None else None for clip in clips],
        workers=workers,
        limits=config.limits(),
    )
    cut = []
    for clip, length in zip(clips, lengths, strict=True):
        if not isinstance(length, float):  # Listed as it is, it will be skipped with the reason.
            cut.append(clip)
            continue
        start = clip.start_seconds
        cut.append(replace(clip, end_seconds=start + config.clip_seconds))
        start += config.clip_seconds
        while length - start >= config.minimum_seconds:
            end = start + config.clip_seconds
            cut.append(replace(clip, start_seconds=start, end_seconds=end))
            start = end
    return cut


def _length(clip: ListedClip | None) -> float | None:
    if clip is None:
        return None
    try:
        return media_seconds(clip.path, clip.part)
    except ClipError:
        return None


def _numbers(shard: int, clips: list[ListedClip], config: PackConfig) -> range:
    """Places in the list of the clips of a shard."""
    first = shard * config.clips_per_shard
    return range(first, min(first + config.clips_per_shard, len(clips)))


def _results(
    pending: list[int],
    clips: list[ListedClip],
    config: PackConfig,
    workers: int,
    executor: Executor,
) -> Generator[PackedClip | SkippedClip | Failure]:
    """Every clip of the shards that are not finished, packed or not, in order."""
    tasks = (
        ClipTask(
            number=number,
            clip=clips[number],
            clip_seconds=config.clip_seconds,
            tiers=config.tier_names,
            audio_codec=config.audio_codec,
            video_codec=config.video_codec,
            frame_choice=config.frame_choice,
            decode=config.decode_settings(),
        )
        for shard in pending
        for number in _numbers(shard, clips, config)
    )
    yield from executor(pack_clip, tasks, workers=workers, limits=config.limits())


class _Checks(NamedTuple):
    """What the content of a clip is compared with."""

    known: KnownContent
    others: OtherSets | None


def _pack_shard(
    shard: int,
    clips: list[ListedClip],
    results: Iterator[PackedClip | SkippedClip | Failure],
    config: PackConfig,
    out: Path,
    progress: PackProgress,
    checks: _Checks,
) -> dict[str, Any]:
    """Write one shard of every tier from the next results; returns its report."""
    writers = {tier: ShardWriter(out / tier, f"{shard:06d}") for tier in config.tier_names}
    skipped, packed, seconds = [], [], 0.0
    try:
        for number in _numbers(shard, clips, config):
            result = next(results)
            if isinstance(result, PackedClip):
                result = _checked(result, number, clips[number], config, checks)
            if isinstance(result, PackedClip):
                seconds += result.seconds
                packed.append(_packed_line(result, clips[number]))
                for tier, writer in writers.items():
                    writer.add(result.key, result.members[tier])
            else:
                if result.reason == "missing_file":
                    _check_still_there(config.videos)
                skipped.append(_report_line(number, clips[number], result))
            progress.count(packed=isinstance(result, PackedClip))
        entries = {tier: writer.finish() for tier, writer in writers.items()}
    except BaseException:
        for writer in writers.values():
            writer.abandon()
        raise
    report = {
        "tiers": {tier: entry and asdict(entry) for tier, entry in entries.items()},
        "seconds": seconds,
        "skipped": skipped,
        "packed": packed,
    }
    write_report(out, shard, report)
    return report


def _checked(
    clip: PackedClip, number: int, listed: ListedClip, config: PackConfig, checks: _Checks
) -> PackedClip | SkippedClip:
    """The clip, or that it comes twice."""
    if checks.others:
        checks.others.check_content(listed.source, clip.content)
    if not config.deduplicate:
        return clip
    first = checks.known.earlier(clip.content, number)
    if first is not None:
        return SkippedClip("duplicate", f"the sound and pictures of {first:09d}")
    checks.known.note(clip.content, number)
    return clip


def _packed_line(clip: PackedClip, listed: ListedClip) -> dict[str, Any]:
    return {
        "key": clip.key,
        "source": listed.source,
        "labels": list(listed.labels),
        "codec": clip.codec,
        "content": clip.content,
    }


def _check_still_there(videos: str) -> None:
    """A lost mount must not look like a set of missing clips."""
    if not Path(videos).exists():
        raise FileNotFoundError(f"{videos} has gone; bring it back and run the same command again")


def _report_line(number: int, clip: ListedClip, result: SkippedClip | Failure) -> dict[str, Any]:
    return {
        "key": f"{number:09d}",
        "source": clip.source,
        "start_seconds": clip.start_seconds,
        "end_seconds": clip.end_seconds,
        "reason": result.reason,
        "detail": result.detail,
    }


def _complete(
    out: Path,
    config: PackConfig,
    reports: list[dict[str, Any]],
    resumed: int,
    others: OtherSets | None,
) -> PackSummary:
    """Write the report of skipped clips and, last, the index of each tier."""
    skipped = [line for report in reports for line in report["skipped"]]
    text = "".join(json.dumps(line) + "\n" for line in skipped)
    write_atomically(out / "report.jsonl", text.encode())
    reasons = dict(Counter(line["reason"] for line in skipped).most_common())
    totals: dict[str, int] = {}
    samples = 0
    for tier in config.tier_names:
        entries = [
            ShardEntry(**report["tiers"][tier]) for report in reports if report["tiers"][tier]
        ]
        if not entries:
            counts = ", ".join(f"{reason} {count}" for reason, count in reasons.items())
            raise ValueError(
                f"none of the {len(skipped)} clips can be packed: {counts}; "
                f"see {out / 'report.jsonl'}"
            )
        write_index(
            out / tier,
            tier=tier,
            audio_codec=config.audio_codec,
            video_codec=config.video_codec if tier == "video" else None,
            short_side=config.short_side,
            frame_choice=config.frame_choice,
            skipped=len(skipped),
            shards=entries,
        )
        totals[tier] = sum(entry.bytes for entry in entries)
        samples = sum(entry.samples for entry in entries)
    if resumed < len(reports) or not (out / "statistics.json").exists():
        write_statistics(out, config.tier_names, others)
    seconds = sum(report["seconds"] for report in reports)
    return PackSummary(samples, reasons, seconds, totals, resumed)


def main(argv: list[str] | None = None, on_ray: Callable[[str], Executor] | None = None) -> int:
    """Run the command line; returns the exit code.

    Args:
        argv: words after `cavmae pack`.
        on_ray: makes the executor for `--ray` from an address; None: there is none.
    """
    errors = Console(stderr=True, soft_wrap=True, highlight=False, markup=False)
    try:
        config = tyro.cli(PackConfig, prog="cavmae pack", args=argv)
        if config.ray and on_ray is None:
            raise ValueError("ray is set, and this module knows no cluster; use `cavmae pack`")
        executor = on_ray(config.ray_address) if config.ray and on_ray else run_in_order
        summary = pack(config, errors, executor)
    except KeyboardInterrupt:
        errors.print("stopped; run the same command again to go on")
        return 130
    except (ValueError, OSError, RuntimeError) as error:
        errors.print(f"error: {error}")
        return 1
    Console().print(summary_table(summary, config.out))
    if summary.skipped:
        Console().print(f"Skipped clips are named in {Path(config.out) / 'report.jsonl'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
