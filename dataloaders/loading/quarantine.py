"""Finds clips that cannot be decoded, by name and reason, and excludes them from the run.

A decode error of DALI names no sample, and a crash leaves no error at all. So the clips of the
batch are decoded again in a separate process, in halves of halves: immediately after an error, and
when the run resumes after a crash, from the journal that the rank wrote before it decoded. Before
one is blamed, that process decodes a clip that was made for this: a decoder, a driver or a GPU that
fails fails on that one too, and no clip is to blame.
"""

import hashlib
import logging
import os
import secrets
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import cast

import numpy as np

from cavmae.atomic_write import atomic_write
from cavmae.dataloaders.constants import WINDOW_SAMPLES
from cavmae.dataloaders.loading.augment import center_crop
from cavmae.dataloaders.loading.dali import ClipDecoder, DecodeError, error_line
from cavmae.dataloaders.loading.reader import (
    DECODE_SECONDS,
    MIXED_IN_DRAWS,
    BadSample,
    ClipReader,
    EncodedClip,
    ReaderSettings,
    ReadTask,
    StorageError,
)
from cavmae.dataloaders.media.audio_codec import AudioCodec, encode_audio
from cavmae.dataloaders.media.encode_video import VideoCodec, encode_jpegs, encode_video
from cavmae.dataloaders.media.headers import payload_of
from cavmae.dataloaders.process_pool import Failure, ProcessPool, time_limit
from cavmae.dataloaders.shards.shard_set import ShardSet

ALWAYS_ALLOWED = 10
"""Bad clips that never stop a run, however few clips were seen."""
TRIAL_SECONDS = 120.0
"""A batch that takes longer than this to decode is considered to hang its decoder."""
HANG, CRASH = "decoder_hang", "decoder_crash"
"""Reasons, whether the decoder is DALI's or a reader's."""

INTACT_SIZE = (448, 256)
"""Width and height of the frame that tries a decoder."""

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class QuarantinedSample:
    """A clip that is excluded from some position on."""

    sample_id: str
    """Such as `000003/000003017`."""
    reason: str
    """A word to count by, such as `crc_mismatch` or `video_undecodable`."""
    detail: str = ""
    position: int = -1
    """Position in the plan at which it was found; -1: known when the loader was created."""


class DataFaultError(RuntimeError):
    """More clips cannot be used than `data.max_bad_fraction` allows; lists them by reason."""


class DecoderFaultError(RuntimeError):
    """The decoder fails on a clip that is intact."""


@dataclass(frozen=True)
class DecoderFault:
    """What a decoder says of a clip that is intact."""

    detail: str


class Quarantine:
    """Tracks the excluded clips of one set, and the fraction of bad ones among the clips seen.

    A clip is excluded from the position at which it was found: a damaged frame of it may have been
    drawn only there, and earlier positions must not depend on when it was found.

    Args:
        shards: the set.
        known: ids, or ids with reasons, of clips found bad before; excluded from the start.
        max_bad_fraction: limit for the clips seen from now on.

    Attributes:
        seen: number of clips read from now on, for the reader to count.

    Raises:
        ValueError: a known id is not in the set.
    """

    def __init__(
        self,
        shards: ShardSet,
        known: Iterable[str | tuple[str, str]],
        max_bad_fraction: float,
    ):
        self._folder = shards.folder
        self._max_bad_fraction = max_bad_fraction
        self.seen = 0
        reasons: dict[str, str] = {}
        for item in known:
            sample_id, reason = (item, "known_before") if isinstance(item, str) else item
            reasons.setdefault(sample_id, reason)
        samples = [QuarantinedSample(*pair) for pair in reasons.items()]
        self._excluded = dict(zip(_places(shards, reasons), samples, strict=True))

    @property
    def samples(self) -> list[QuarantinedSample]:
        """The excluded clips, those known before first, in the order in which they were found."""
        return list(self._excluded.values())

    def excludes(self, task: ReadTask) -> bool:
        """Whether the task's sample must not be used at the task's position."""
        found = self._excluded.get((task.shard, task.sample))
        return found is not None and task.position >= found.position

    def add(self, bad: BadSample) -> None:
        """Exclude a clip from its task's position on; it is listed once, with the first position
        at which it was found.

        Raises:
            DataFaultError: the limit is exceeded.
        """
        task = bad.task
        if self.excludes(task):
            return
        place = (task.shard, task.sample)
        # It may have been found as a substitute, before its own position was read.
        self._excluded.pop(place, None)
        found = QuarantinedSample(bad.sample_id, bad.reason, bad.detail, task.position)
        self._excluded[place] = found
        log.warning("quarantined %s: %s (%s)", bad.sample_id, bad.reason, bad.detail)
        self._check()

    def _check(self) -> None:
        bad = [sample for sample in self.samples if sample.position >= 0]
        if len(bad) <= max(ALWAYS_ALLOWED, self._max_bad_fraction * self.seen):
            return
        reasons = Counter(sample.reason for sample in bad)
        examples = {sample.reason: sample.sample_id for sample in reversed(bad)}
        width = max(len(reason) for reason in reasons)
        table = "\n".join(
            f"  {reason:<{width}}  {count:>6}  such as {examples[reason]}"
            for reason, count in reasons.most_common()
        )
        raise DataFaultError(
            f"{len(bad)} clips of {self._folder} cannot be used and {self.seen} could so far, "
            f"over data.max_bad_fraction = {self._max_bad_fraction}:\n{table}\n"
            f"See `cavmae verify {self._folder}`; pack the clips again, or raise the fraction."
        )


def _places(shards: ShardSet, sample_ids: Iterable[str]) -> list[tuple[int, int]]:
    """Shard and sample of each id."""
    shard_of = {shards.shard_id(shard): shard for shard in range(len(shards.sizes))}
    samples_of: dict[int, dict[str, int]] = {}
    places = []
    for sample_id in sample_ids:
        shard = shard_of.get(sample_id.rpartition("/")[0], -1)
        if shard >= 0 and shard not in samples_of:
            numbers = range(shards.sizes[shard])
            samples_of[shard] = {shards.sample_id(shard, number): number for number in numbers}
        if sample_id not in samples_of.get(shard, {}):
            raise ValueError(
                f"quarantine names {sample_id}, which is not in {shards.folder}; a run resumes "
                f"only with the set that it was started with"
            )
        places.append((shard, samples_of[shard][sample_id]))
    return places


class Journal:
    """Records on a disk of the node which clips a rank is decoding, in case it crashes.

    A line per clip: counter of its draws (`ReadTask.draw`), epoch, shard, sample, id. Each attempt
    of a rank has a file of its own; what crashed attempts left, the ranks of the next attempt on
    the node read. A node that is gone takes its journals along: a clip that also ended the node
    crashes another rank before it is found.

    What the readers decode is not recorded. They are processes of their own, whose crashes and
    hangs end no rank, and packing has decoded each clip under a limit on memory.

    Args:
        folder: of the run on this node, see `journal_folder`.
    """

    def __init__(self, folder: Path):
        self._folder = folder
        self._path = folder / f"{secrets.token_hex(8)}.txt"
        self._left: list[Path] = []
        self._kept: list[str] = []
        self._decoding: list[str] = []
        self._failing = False

    def write(self, clips: Iterable[EncodedClip]) -> None:
        """Replace what is being decoded.

        It survives a crash; a power cut, which no clip causes, need not. Without it a clip that
        crashes its rank is not found, so one that cannot be written, as on a full disk, is a
        warning.
        """
        self._decoding = [_line(clip.task, clip.sample_id) for clip in clips]
        self._write()

    def keep(self, bad: BadSample) -> None:
        """Keep a clip that was found until the rank ends properly: if it crashes before the next
        checkpoint, the clip is found at the start, not by another crash or hang."""
        self._kept.append(_line(bad.task, bad.sample_id))
        self._write()

    def unfinished(self, shards: ShardSet, rank: int, ranks: int) -> list[ReadTask]:
        """What crashed ranks were decoding on this node, divided among its ranks: each reads its
        share of the journals, before any of them writes its own.

        Lines that a power cut tore or filled with zeros are left out, with a warning, as are files
        that cannot be read.

        Args:
            shards: the set of the run.
            rank: of this process among those of the node.
            ranks: of the node.
        """
        self._left = sorted(self._folder.glob("*.txt"))[rank::ranks]
        tasks = []
        for path in self._left:
            try:
                lines = path.read_text(errors="replace").splitlines()
            except OSError as error:
                log.warning("the journal of a crashed rank could not be read: %s", error)
                continue
            for line in lines:
                try:
                    draw, epoch, shard, sample, sample_id = line.split(" ", 4)
                    mixed_in, position = divmod(int(draw), MIXED_IN_DRAWS)
                    task = ReadTask(position, int(epoch), int(shard), int(sample), bool(mixed_in))
                except ValueError:
                    log.warning("%s has a torn line, which is left out: %.80r", path, line)
                    continue
                in_set = task.shard in range(len(shards.sizes)) and task.sample in range(
                    shards.sizes[task.shard]
                )
                if in_set and shards.sample_id(task.shard, task.sample) == sample_id:
                    tasks.append(task)
                else:
                    log.warning("%s names %s, which is not in this set", path, sample_id)
        return tasks

    def remove_left(self) -> None:
        """Remove the journals that `unfinished` has read, after their clips were tried."""
        for path in self._left:
            with suppress(OSError):
                path.unlink()

    def clear(self) -> None:
        """Remove the journal: nothing is being decoded."""
        with suppress(OSError):  # other ranks have theirs in the folder
            self._path.unlink(missing_ok=True)
            self._folder.rmdir()

    def _write(self) -> None:
        try:
            self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            with atomic_write(self._path, durable=False) as temporary:
                temporary.write_text("".join(self._kept + self._decoding))
        except OSError as error:
            if not self._failing:
                log.warning("the journal could not be written; training continues: %s", error)
            self._failing = True
        else:
            self._failing = False


def _line(task: ReadTask, sample_id: str) -> str:
    return f"{task.draw} {task.epoch} {task.shard} {task.sample} {sample_id}\n"


def journal_folder(run_dir: Path) -> Path:
    """Return the folder of a run's journals on this node: in its temporary folder, since a rename a
    micro-batch of each rank is no work for storage that a thousand ranks share.

    `tempfile` would choose another one on a full disk, where the next attempt would not look.
    """
    name = f"{os.getuid()} {run_dir.resolve()}"
    digest = hashlib.sha256(name.encode()).hexdigest()[:16]
    return Path(os.environ.get("TMPDIR") or "/tmp") / f"cavmae-journal-{digest}"


def intact_clip(settings: ReaderSettings) -> EncodedClip:
    """Make a clip in the codecs of a set: one gray frame, and a moment of sound."""
    shards, (width, height) = settings.shards, INTACT_SIZE
    planes = np.full((height * 3 // 2, width), 128, dtype=np.uint8)
    frame, pixels, sound = b"\0", None, b""
    if "audio" in settings.config.modalities:
        sound = encode_audio(
            np.arange(WINDOW_SAMPLES, dtype=np.int16), cast(AudioCodec, shards.audio_codec)
        )
    count = settings.config.frames_per_clip if "video" in settings.config.modalities else 0
    if not count:
        frame = b""
    elif shards.tier == "frames":
        (frame,) = encode_jpegs([planes])
    elif shards.tier == "video" and settings.dali_decodes(height, width):
        codec = cast(VideoCodec, shards.video_codec)
        frame = encode_video([planes], INTACT_SIZE, codec, frames_per_second=25.0)
        frame = payload_of(frame) if settings.jpegs else frame
    else:
        pixels = (np.full((height, width, 3), 128, dtype=np.uint8),)
    return EncodedClip(
        task=ReadTask(0, 0, 0, 0),
        sample_id="intact",
        labels=(),
        audio=sound,
        frames=(frame,) * count,
        pixels=pixels and pixels * count,
        crop=center_crop(height, width, settings.shape.image_size),
        flipped=False,
        frame_seconds=(0.0,) * count,
        audio_seconds=(0.0, 0.0),
    )


class Trial:
    """Callable that reads and decodes clips as one batch, like the rank does; returns what is wrong
    with them, or None. It keeps what it has read, and its decoder, for the next batch.

    Args:
        settings: of the loader.
        maximum_batch: of clips.
        decode_seconds: the process is ended if decoding a batch takes longer.
        read_seconds: the same for the decoding that a reader does for one clip.
    """

    def __init__(
        self,
        settings: ReaderSettings,
        maximum_batch: int,
        decode_seconds: float,
        read_seconds: float,
    ):
        self._settings = settings
        self._maximum_batch = maximum_batch
        self._decode_seconds = decode_seconds
        self._reader = ClipReader(settings, read_seconds)
        self._read: dict[ReadTask, EncodedClip] = {}
        self._decoder: ClipDecoder | None = None

    def __call__(self, tasks: Sequence[ReadTask]) -> BadSample | StorageError | DecoderFault | None:
        """Try some clips; none: an intact one, which only a faulty decoder refuses."""
        for task in tasks:
            if task not in self._read:
                clip = self._reader(task)
                if not isinstance(clip, EncodedClip):
                    return clip
                self._read[task] = clip
        clips = [self._read[task] for task in tasks] or [intact_clip(self._settings)]
        try:
            with time_limit(self._decode_seconds):
                if self._decoder is None:
                    self._decoder = ClipDecoder.of(self._settings, self._maximum_batch, threads=1)
                self._decoder.schedule(clips)
                self._decoder.collect()
        except DecodeError as error:
            self._decoder = None
            detail = error_line(str(error))
            if not tasks:
                return DecoderFault(detail)
            # Which one of several is bad is not known.
            return BadSample(tasks[0], clips[0].sample_id, error.reason, detail)
        except RuntimeError as error:  # Of a pipeline that cannot be built, as without memory.
            return DecoderFault(error_line(str(error)))
        return None


def find_culprits(settings: ReaderSettings, tasks: Sequence[ReadTask]) -> list[BadSample]:
    """Try clips in a separate process; returns those that cannot be decoded alone, as a crash or a
    hang of the decoder shows as well.

    The first batch is all of them, and one that fails is tried in halves: at most
    2 log2(clips) + 1 batches for one culprit, and one batch if there is none. Clips that fail only
    together are no culprits.

    Raises:
        DecoderFaultError: the decoder fails on an intact clip as well.
        OSError: a shard cannot be read.
    """
    if not tasks:
        return []
    trial = Trial(settings, len(tasks), TRIAL_SECONDS, 2 * DECODE_SECONDS)
    with closing(ProcessPool(trial, 1)) as pool:
        return list(_culprits(partial(_finding, pool, settings), tasks))


def _culprits(
    finding: Callable[[Sequence[ReadTask]], BadSample | None],
    tasks: Sequence[ReadTask],
    *,
    must_fail: bool = False,
) -> Iterator[BadSample]:
    """Yield the culprits among some clips.

    Args:
        finding: says what is wrong with clips that are tried together.
        tasks: the clips.
        must_fail: whether they fail together if any is a culprit, so that only parts are tried.
    """
    bad = None
    if not must_fail or len(tasks) == 1:
        bad = finding(tasks)
        if bad is None:
            return
        if len(tasks) == 1:
            yield bad
            return
    # Each batch with a clip that hangs takes the whole limit, and all other clips next to nothing.
    size = 1 if bad is not None and bad.reason == HANG else (len(tasks) + 1) // 2
    found = False
    for start in range(0, len(tasks), size):
        last = start + size >= len(tasks)
        for culprit in _culprits(
            finding, tasks[start : start + size], must_fail=last and not found
        ):
            found = True
            yield culprit


def _finding(
    pool: ProcessPool, settings: ReaderSettings, tasks: Sequence[ReadTask]
) -> BadSample | None:
    """Try clips as one batch; returns what is wrong with it, where an intact clip decodes."""
    found = pool.submit(tasks).result()
    if found is None:
        return None
    if isinstance(found, StorageError):
        raise OSError(found.detail)
    fault = found if isinstance(found, DecoderFault) else pool.submit(()).result()
    if fault is not None:
        where = "the CPU" if settings.gpu is None else f"GPU {settings.gpu}"
        # The other one is of a pipeline that was not built, with whatever clips.
        tried = "" if fault is found else " with a clip that is intact"
        raise DecoderFaultError(
            f"DALI fails on {where}{tried}: {fault.detail}. No clip is to blame; try `cavmae bench "
            f"video-check`, free memory, look for errors of the driver "
            f"(dmesg), and rerun the same command to resume"
        )
    if isinstance(found, Failure):
        sample_id = settings.shards.sample_id(tasks[0].shard, tasks[0].sample)
        reason = HANG if found.reason == "timeout" else CRASH
        found = BadSample(tasks[0], sample_id, reason, found.detail)
    assert isinstance(found, BadSample)
    return found
