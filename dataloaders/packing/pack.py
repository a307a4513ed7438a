"""`cavmae pack`: from videos, or sounds, to the shards that training reads.

Decoding whole videos costs far more than training on clips of them, so it is done once. The packer
decodes the files of a folder (or of a list) in worker processes that may hang or crash without
harm, and writes shards in the order of the list. A shard is written whole or not at all; a run that
was killed resumes at the first unfinished shard, and produces the same bytes as one that was not.
"""

import json
import os
from collections import Counter
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import closing
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import tyro
from rich.console import Console

from cavmae.atomic_write import write_text
from cavmae.console import Bar, JsonOption, plain_console, print_json, print_rows
from cavmae.dataloaders.constants import TIERS, Modalities
from cavmae.dataloaders.media.audio_codec import AudioCodec
from cavmae.dataloaders.media.encode_video import VideoCodec
from cavmae.dataloaders.media.errors import DecodeSettings, Reason
from cavmae.dataloaders.packing.clip_list import ListedClip, list_clips, list_digest
from cavmae.dataloaders.packing.duplicates import KnownContent, OtherSets
from cavmae.dataloaders.packing.output_folder import (
    claimed,
    finished_report,
    remove_unfinished,
    write_report,
)
from cavmae.dataloaders.packing.pack_clip import (
    ClipTask,
    PackedClip,
    SkippedClip,
    clip_length,
    pack_clip,
)
from cavmae.dataloaders.packing.statistics import crop_statistics, write_statistics
from cavmae.dataloaders.packing.summary import PackSummary, summary_rows
from cavmae.dataloaders.process_pool import Failure, FailureReason, TaskLimits, run_in_order
from cavmae.dataloaders.shards.format import ShardEntry
from cavmae.dataloaders.shards.writer import ShardWriter, write_index
from cavmae.field_checks import CheckedFields, Limit, NonNegativeInt, PositiveInt, Seconds

MAY_PASS = frozenset({"missing_file", *get_args(FailureReason)})
"""Reasons for which a rerun tries skipped clips again: they may be gone without a change of file or
option, or by another limit."""


@dataclass(frozen=True)
class PackConfig(CheckedFields, JsonOption):
    """Pack videos, or sounds, into shards for training.

    A clip is the first `clip_seconds` of a file, or the window that a CSV file gives. Clips that
    cannot be used are skipped and listed in OUT/report.jsonl with the reason. Rerun the same
    command to resume after an interruption, and to try again the clips that were missing, or
    exceeded a limit.

    Raises:
        ValueError: a field is out of range.
    """

    videos: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="VIDEOS")]
    """Folder, searched recursively: every file is tried, whatever its name, except hidden files,
    text, subtitles and images. Or a table (CSV, also with `;` or tabs) with the columns
    path,start,end,labels (only path is required; start and end in seconds; labels separated by
    `;`). Or a tar of
    KEY.mp4 with KEY.json (labels, start, end), or a folder of such tars. Or a JSON file in the
    published format (wav, video_id, video_path, labels). Or published sounds: `meta/esc50.csv` of
    ESC-50, or the folder of Speech Commands."""
    out: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="OUT")]
    """Folder for the shards: new, empty, or from an earlier run of the same command."""
    modality: Modalities = "both"
    """What is packed: sound and pictures, of clips that have both; or one of them alone, of clips
    that may have nothing else: sounds, silent films, or a folder of JPEG, PNG and WebP pictures."""
    split: str = ""
    """Parts to pack of published sounds, separated by commas: of ESC-50 folds, such as 1,2,3,4; of
    Speech Commands training, validation, testing; empty: all."""
    tiers: str = ""
    """Tiers to pack, separated by commas: `frames` (ten JPEGs a clip), `video` (every frame as a
    key frame), `original` (the unchanged file); empty: frames,video, or `audio`, the one tier of
    sound alone."""
    audio_codec: AudioCodec = "flac"
    """Codec of the audio: flac takes two thirds of the bytes, wav next to no time to decode."""
    video_codec: VideoCodec = "mjpeg"
    """Codec of the video tier: mjpeg costs the least CPU, and decodes as JPEGs on CPU and GPU; vp9
    takes three quarters of its bytes, and NVDEC on a GPU; h264 decodes on a GPU only."""
    video_fps: Annotated[float, Limit(lambda x: 0 <= x <= 1000, "0 (all) up to 1000")] = 0.0
    """Maximum frames per second; 0: keep all."""
    short_side: Annotated[
        int, Limit(lambda x: x >= 16 and x % 16 == 0, "a multiple of 16 from 16")
    ] = 256
    """Pixels of the shorter side; smaller videos are not enlarged. The video tier is cropped to
    multiples of 16 and a few lengths of the longer side, which a GPU decodes with few decoders."""
    frame_choice: Literal["by_time", "published"] = "by_time"
    """The ten frames: at the middle of each tenth of the clip, or as the original code chose."""
    audio_channel: Literal["mix", "first"] = "mix"
    """Make the audio mono from all channels, or from the first alone as published."""
    clip_seconds: Seconds = 10.0
    """Length of a clip without an end in the list; a longer file gives one clip, from its start."""
    segment: bool = False
    """Cut longer files into consecutive clips of `clip_seconds` instead."""
    min_seconds: Seconds = 0.5
    """Shorter clips are skipped."""
    keep_silent: bool = False
    """Keep clips whose audio is silent."""
    deduplicate: bool = False
    """Skip clips with the audio and frames of an earlier clip of the list; OUT/duplicates.jsonl
    lists them in any case."""
    not_in: tuple[str, ...] = ()
    """Packed folders that must not share clips with this one, such as the test set: by sound and
    frames, whatever the name, or by a YouTube id with its start. Other equal names only warn."""
    allow_leakage: bool = False
    """Count the clips whose sound and frames are also in `not_in` instead of refusing them."""
    allow_same_ids: bool = False
    """Count the clips whose YouTube id and start are also in `not_in` instead of refusing them."""
    retry: Annotated[
        tuple[Reason | FailureReason, ...], tyro.conf.arg(metavar="[REASON [REASON ...]]")
    ] = ()
    """Reasons of skipped clips for which a rerun tries them again too, such as `decode_error` where
    files were repaired."""
    clips_per_shard: PositiveInt = 1000
    """Clips of the list in each shard, skipped ones included."""
    max_seconds_per_clip: Seconds = 300.0
    """A clip that takes longer to decode and encode is skipped as `timeout`."""
    max_cpu_seconds_per_clip: Seconds = 120.0
    """A clip that takes more CPU time, which does not depend on the machine's load, is skipped as
    `cpu_limit`."""
    max_memory_gb: Annotated[float, Limit(lambda x: 1 <= x < 1 << 20, "1 or more")] = 6.0
    """Address space of a worker; a clip that needs more is skipped as `memory_limit`."""
    workers: NonNegativeInt = 0
    """Processes; 0: one per core."""
    ray: bool = False
    """Decode on a Ray cluster, whose nodes see VIDEOS at the same path; this process writes."""
    ray_address: str = ""
    """Address of the cluster, such as `auto`; empty: RAY_ADDRESS, else a new local cluster."""

    def __post_init__(self) -> None:
        super().__post_init__()
        allowed = {"both": TIERS[:3], "audio": ("audio",), "video": ("frames", "video")}
        for tier in self.tier_names:
            if tier not in allowed[self.modality]:
                raise ValueError(
                    f"tiers is {self.tiers!r} and modality {self.modality}; use some of "
                    f"{', '.join(allowed[self.modality])}"
                )
        if len(set(self.tier_names)) != len(self.tier_names):
            raise ValueError(f"tiers is {self.tiers!r}, which names one twice")
        if self.segment and "original" in self.tier_names:
            raise ValueError(
                "segment is set and tiers has original, which would keep the whole file for each "
                "of its clips; cut the files first, or remove original"
            )
        if self.clip_seconds < self.min_seconds:
            raise ValueError(
                f"clip_seconds is {self.clip_seconds}, less than min_seconds {self.min_seconds}"
            )

    @property
    def tier_names(self) -> tuple[str, ...]:
        tiers = self.tiers or ("audio" if self.modality == "audio" else "frames,video")
        return tuple(tier.strip() for tier in tiers.split(","))

    def decode_settings(self) -> DecodeSettings:
        names = [field.name for field in fields(DecodeSettings) if field.name != "streams"]
        return DecodeSettings(
            **{name: getattr(self, name) for name in names}, streams=self.modality
        )

    def limits(self) -> TaskLimits:
        return TaskLimits(
            self.max_seconds_per_clip,
            self.max_cpu_seconds_per_clip,
            int(self.max_memory_gb * 1e9),
        )

    def content_options(self) -> dict[str, Any]:
        """The options that determine the shards' content; the others may change on a resume."""
        others = (
            "videos",
            "split",
            "out",
            "json",
            "workers",
            "ray",
            "ray_address",
            "max_seconds_per_clip",
            "max_cpu_seconds_per_clip",
            "max_memory_gb",
            "not_in",
            "allow_leakage",
            "allow_same_ids",
            "retry",
        )
        options = asdict(self) | {"tiers": ",".join(self.tier_names)}
        return {name: value for name, value in options.items() if name not in others}


Executor = Callable[..., Generator[Any]]
"""Has the signature of `run_in_order`: yields results or `Failure`s in the order of the tasks."""


def pack(
    config: PackConfig, console: Console | None = None, executor: Executor = run_in_order
) -> PackSummary:
    """Pack all clips of `config.videos` into `config.out`.

    Args:
        config: input, output and options.
        console: for progress; None: standard error.
        executor: decodes the clips; does not affect the result.

    Raises:
        ValueError: the list, the options, or all clips are unusable.
        OSError: a file cannot be read or written.
    """
    return _Packer(config, console or plain_console(stderr=True), executor).run()


class _Packer:
    def __init__(self, config: PackConfig, console: Console, executor: Executor):
        self.config = config
        self.console = console
        self.out = Path(config.out)
        self.workers = config.workers or len(os.sched_getaffinity(0))
        self.execute = partial(executor, workers=self.workers, limits=config.limits())
        listed = list_clips(Path(config.videos), self.out, config.modality, config.split)
        for line in listed.remarks():
            console.print(line)
        self.clips = listed.clips
        self._check_tiers()
        if config.segment:
            self.clips = self._segments()
        self.others = OtherSets(config.not_in, config.modality) if config.not_in else None
        if self.others:
            sources = [clip.source for clip in self.clips]
            if not config.allow_same_ids:
                self.others.check_ids(sources)
            if same := self.others.same_names(sources):
                self.console.print(f"warning: {same}", markup=False)
        self.known = KnownContent()
        self.skipped_now = 0

    def run(self) -> PackSummary:
        config, out, tiers, clips = self.config, self.out, self.config.tier_names, self.clips
        with claimed(out, config.content_options(), tiers, len(clips), list_digest(clips)):
            shards = range(-(-len(clips) // config.clips_per_shard))
            reports = {shard: finished_report(out, shard) for shard in shards}
            self._try_again(reports)
            pending = [shard for shard in shards if reports[shard] is None]
            if pending and config.deduplicate:  # which of equal clips is kept may change after it
                pending = list(shards[pending[0] :])
            remove_unfinished(out, tiers, pending)
            kept = [report for shard, report in reports.items() if shard not in pending]
            for report in filter(None, kept) if config.deduplicate else ():
                for clip in report["packed"]:
                    self.known.add(clip["content"], int(clip["key"]))
            if pending:
                numbers = [number for shard in pending for number in self._numbers(shard)]
                total = len(numbers)
                self.console.print(
                    f"Packing {total} clips in {len(pending)} shards, {self.workers} processes"
                )
                with (
                    Bar("packing", total, "clips", console=self.console) as bar,
                    closing(self.execute(pack_clip, map(self._task, numbers))) as results,
                ):
                    for shard in pending:
                        reports[shard] = self._pack_shard(shard, results, bar)
            return self._complete([reports[shard] or {} for shard in shards], len(pending))

    def _try_again(self, reports: dict[int, dict[str, Any] | None]) -> None:
        """Decode skipped clips of finished shards again, and drop the reports of shards where that
        ends in anything else than what is reported."""
        reasons = MAY_PASS | set(self.config.retry)
        skipped = [
            (shard, line)
            for shard, report in reports.items()
            for line in (report or {"skipped": []})["skipped"]
            if line["reason"] in reasons
        ]
        if not skipped:
            return
        counts = Counter(line["reason"] for _, line in skipped)
        self.console.print(f"Trying {len(skipped)} skipped clips again: {_counted(counts)}")
        tasks = [self._task(int(line["key"])) for _, line in skipped]
        changed = 0
        with closing(self.execute(pack_clip, tasks)) as results:
            for (shard, line), result in zip(skipped, results, strict=True):
                if isinstance(result, PackedClip) or result.reason != line["reason"]:
                    reports[shard] = None
                    changed += 1
        self.console.print(
            f"{changed} of them end otherwise now; their shards are packed anew"
            if changed
            else "They end as before; nothing is packed anew"
        )

    def _check_tiers(self) -> None:
        tiers = ",".join(self.config.tier_names)
        if self.config.tier_names != ("frames",) and any(clip.frames for clip in self.clips):
            raise ValueError(
                f"tiers is {tiers!r}, but {self.config.videos} lists audio files with ten frames "
                f"each, which give only the frames tier; use --tiers frames"
            )
        late = next((clip for clip in self.clips if clip.start_seconds > 0), None)
        if "original" in self.config.tier_names and late is not None:
            raise ValueError(
                f"tiers has original, which keeps whole files, but {late.source} is listed from "
                f"{late.start_seconds:g} s on; cut the files first, or remove original"
            )

    def _segments(self) -> list[ListedClip]:
        """Cut clips without a given end into consecutive ones, by the lengths of their files."""
        self.console.print(f"Reading the lengths of {len(self.clips)} files")
        lengths = self.execute(partial(clip_length, streams=self.config.modality), self.clips)
        cut = []
        for clip, length in zip(self.clips, lengths, strict=True):
            if not isinstance(length, float):  # It stays listed, and is skipped with a reason.
                cut.append(clip)
                continue
            start = clip.start_seconds
            while True:
                end = start + self.config.clip_seconds
                cut.append(replace(clip, start_seconds=start, end_seconds=end))
                start = end
                if length - start < self.config.min_seconds:
                    break
        return cut

    def _numbers(self, shard: int) -> range:
        """Positions of a shard's clips in the list."""
        first = shard * self.config.clips_per_shard
        return range(first, min(first + self.config.clips_per_shard, len(self.clips)))

    def _task(self, number: int) -> ClipTask:
        config = self.config
        return ClipTask(
            number=number,
            clip=self.clips[number],
            clip_seconds=config.clip_seconds,
            tiers=config.tier_names,
            audio_codec=config.audio_codec,
            video_codec=config.video_codec,
            frame_choice=config.frame_choice,
            decode=config.decode_settings(),
        )

    def _pack_shard(
        self,
        shard: int,
        results: Iterator[PackedClip | SkippedClip | Failure],
        bar: Bar,
    ) -> dict[str, Any]:
        """Write one shard of every tier from the next results; returns its report."""
        tiers = self.config.tier_names
        writers = {tier: ShardWriter(self.out / tier, f"{shard:06d}") for tier in tiers}
        skipped, packed, seconds = [], [], 0.0
        try:
            for number in self._numbers(shard):
                clip, result = self.clips[number], self._checked(number, next(results))
                line: dict[str, Any] = {"key": f"{number:09d}", "source": clip.source}
                if isinstance(result, PackedClip):
                    seconds += result.seconds
                    line["labels"] = list(clip.labels)
                    line |= {"codec": result.codec, "content": result.content}
                    packed.append(line | {"timing": result.timing, "cropped": result.cropped})
                    for tier, writer in writers.items():
                        writer.add(result.key, result.members[tier])
                else:
                    line |= {"start_seconds": clip.start_seconds, "end_seconds": clip.end_seconds}
                    skipped.append(line | {"reason": result.reason, "detail": result.detail})
                self.skipped_now += not isinstance(result, PackedClip)
                bar.count(note=f"{self.skipped_now} skipped")
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
        write_report(self.out, shard, report)
        return report

    def _checked(
        self, number: int, result: PackedClip | SkippedClip | Failure
    ) -> PackedClip | SkippedClip | Failure:
        """Skip duplicates, and refuse clips of other sets."""
        if not isinstance(result, PackedClip):
            # A lost mount must not look like missing clips.
            if result.reason == "missing_file" and not Path(self.config.videos).exists():
                raise FileNotFoundError(
                    f"{self.config.videos} has disappeared; restore it and rerun the same command "
                    f"to resume"
                )
            return result
        if self.others and not self.config.allow_leakage:
            self.others.check_content(self.clips[number].source, result.content)
        first = self.known.add(result.content, number) if self.config.deduplicate else None
        if first is None:
            return result
        return SkippedClip("duplicate", f"same audio and frames as {first:09d}")

    def _complete(self, reports: list[dict[str, Any]], packed_now: int) -> PackSummary:
        """Write the report of skipped clips and, last, the index of each tier."""
        config, out = self.config, self.out
        skipped = [line for report in reports for line in report["skipped"]]
        text = "".join(json.dumps(line) + "\n" for line in skipped)
        write_text(out / "report.jsonl", text)
        reasons = dict(Counter(line["reason"] for line in skipped).most_common())
        totals: dict[str, int] = {}
        samples = 0
        for tier in config.tier_names:
            shards = [report["tiers"][tier] for report in reports]
            entries = [ShardEntry(**entry) for entry in shards if entry]
            if not entries:
                raise ValueError(
                    f"none of the {len(skipped)} clips can be packed: {_counted(reasons)}; "
                    f"see {out / 'report.jsonl'}"
                )
            write_index(
                out / tier,
                tier=tier,
                modality=config.modality,
                audio_codec=config.audio_codec,
                video_codec=config.video_codec if tier == "video" else None,
                short_side=config.short_side,
                frame_choice=config.frame_choice,
                skipped=len(skipped),
                content=[clip["content"] for report in reports for clip in report["packed"]],
                shards=entries,
            )
            totals[tier] = sum(entry.bytes for entry in entries)
            samples = sum(entry.samples for entry in entries)
        if packed_now or not (out / "statistics.json").exists():
            write_statistics(out, config.tier_names, self.others)
        seconds = sum(report["seconds"] for report in reports)
        timing = Counter(
            c for report in reports for clip in report["packed"] for c in clip["timing"]
        )
        contents = {clip["content"] for report in reports for clip in report["packed"]}
        cropped = [clip["cropped"] for report in reports for clip in report["packed"]]
        return PackSummary(
            clips=samples,
            skipped=reasons,
            timing=dict(timing.most_common()),
            cropped=crop_statistics(cropped),
            duplicates=samples - len(contents),
            seconds=seconds,
            bytes=totals,
            resumed_shards=len(reports) - packed_now,
        )


def _counted(reasons: Mapping[str, int]) -> str:
    return ", ".join(f"{reason} {count}" for reason, count in reasons.items())


def main(argv: list[str] | None = None, on_ray: Callable[[str], Executor] | None = None) -> int:
    """Run the command line; returns the exit code.

    Args:
        argv: arguments after `cavmae pack`.
        on_ray: returns the executor for `--ray` at an address; None: `--ray` is not supported.
    """
    errors = plain_console(stderr=True, soft_wrap=True, highlight=False)
    try:
        config = tyro.cli(PackConfig, prog="cavmae pack", args=argv)
        if config.ray and on_ray is None:
            raise ValueError("ray is set, which only `cavmae pack` supports")
        executor = on_ray(config.ray_address) if config.ray and on_ray else run_in_order
        summary = pack(config, errors, executor)
    except KeyboardInterrupt:
        errors.print("stopped; rerun the same command to resume")
        return 130
    if config.json:
        print_json(asdict(summary))
    else:
        print_rows(("", ""), summary_rows(summary), title=f"Packed into {config.out}")
    if summary.skipped:
        errors.print(f"Skipped clips are listed in {Path(config.out) / 'report.jsonl'}")
    return 0
