"""Finds clips that cannot be decoded, by name and reason, and excludes them from the run.

A decode error of DALI names no sample, and a crash leaves no error at all. So the clips of the
batch are decoded again one by one in a separate process: immediately after an error, and when the
run resumes after a crash, from the journal that the rank wrote before it decoded. Before one is
blamed, that process decodes a clip that was made for this: a decoder, a driver or a GPU that fails
fails on that one too, and no clip is to blame.
"""

import logging
from collections import Counter
from collections.abc import Iterable
from contextlib import closing
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
    MIXED_IN_DRAWS,
    BadSample,
    ClipReader,
    EncodedClip,
    ReaderSettings,
    ReadTask,
    StorageError,
)
from cavmae.dataloaders.media.audio_codec import AudioCodec, encode_audio
from cavmae.dataloaders.media.decode_frame import jpeg_of
from cavmae.dataloaders.media.encode_video import VideoCodec, encode_jpegs, encode_video
from cavmae.dataloaders.process_pool import Failure, ProcessPool, TaskLimits
from cavmae.dataloaders.shards.shard_set import ShardSet

ALWAYS_ALLOWED = 10
"""Bad clips that never stop a run, however few clips were seen."""
TRIAL_SECONDS = 120.0
"""A clip that takes longer than this to decode alone is considered to hang its decoder."""

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
    """Records on disk which clips a rank is decoding, in case it crashes.

    A line per clip: counter of its draws (`ReadTask.draw`), epoch, shard, sample, id.

    Args:
        path: file of this rank; all files beside it with its suffix are journals of the same run.
    """

    def __init__(self, path: Path):
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)

    def write(self, clips: Iterable[EncodedClip]) -> None:
        """Replace the journal. It survives a crash; a power cut, which no clip causes, need not."""
        lines = (
            f"{clip.task.draw} {clip.task.epoch} {clip.task.shard} {clip.task.sample} "
            f"{clip.sample_id}\n"
            for clip in clips
        )
        with atomic_write(self.path, durable=False) as temporary:
            temporary.write_text("".join(lines))

    def unfinished(self, shards: ShardSet) -> list[ReadTask]:
        """Tasks that crashed ranks were decoding, whichever ranks: a run may resume with fewer."""
        tasks = []
        for path in sorted(self.path.parent.glob(f"*{self.path.suffix}")):
            for line in path.read_text().splitlines():
                draw, epoch, shard, sample, sample_id = line.split(" ", 4)
                mixed_in, position = divmod(int(draw), MIXED_IN_DRAWS)
                task = ReadTask(position, int(epoch), int(shard), int(sample), bool(mixed_in))
                in_set = task.shard < len(shards.sizes) and task.sample < shards.sizes[task.shard]
                if in_set and shards.sample_id(task.shard, task.sample) == sample_id:
                    tasks.append(task)
                else:
                    log.warning("%s names %s, which is not in this set", path, sample_id)
        return tasks

    def clear(self) -> None:
        """Remove the journal: nothing is being decoded."""
        self.path.unlink(missing_ok=True)


def intact_clip(settings: ReaderSettings) -> EncodedClip:
    """Make a clip in the codecs of a set: one gray frame, and a moment of sound."""
    shards, (width, height) = settings.shards, INTACT_SIZE
    planes = np.full((height * 3 // 2, width), 128, dtype=np.uint8)
    frame, pixels = b"\0", None
    if shards.tier == "frames":
        (frame,) = encode_jpegs([planes])
    elif shards.tier == "video" and settings.dali_decodes(height, width):
        codec = cast(VideoCodec, shards.video_codec)
        frame = encode_video([planes], INTACT_SIZE, codec, frames_per_second=25.0)
        frame = jpeg_of(frame) if settings.jpegs else frame
    else:
        pixels = (np.full((height, width, 3), 128, dtype=np.uint8),)
    count = settings.config.frames_per_clip
    return EncodedClip(
        task=ReadTask(0, 0, 0, 0),
        sample_id="intact",
        labels=(),
        audio=encode_audio(
            np.arange(WINDOW_SAMPLES, dtype=np.int16), cast(AudioCodec, shards.audio_codec)
        ),
        frames=(frame,) * count,
        pixels=pixels and pixels * count,
        crop=center_crop(height, width, settings.shape.image_size),
        flipped=False,
        frame_seconds=(0.0,) * count,
        audio_seconds=(0.0, 0.0),
    )


def try_clip(
    settings: ReaderSettings, task: ReadTask | None
) -> BadSample | StorageError | DecoderFault | None:
    """Read and decode one clip like the rank does; returns what is wrong with it, or None.

    Args:
        task: the clip; None: an intact one, which only a faulty decoder refuses.
    """
    clip = intact_clip(settings) if task is None else ClipReader(settings)(task)
    if not isinstance(clip, EncodedClip):
        return clip
    try:
        decoder = ClipDecoder.of(settings, maximum_batch=1, threads=1)
        decoder.schedule([clip])
        decoder.collect()
    except DecodeError as error:
        detail = error_line(str(error))
        if task is None:
            return DecoderFault(detail)
        return BadSample(task, clip.sample_id, error.reason, detail)
    except RuntimeError as error:  # Of a pipeline that cannot be built, as without memory.
        return DecoderFault(error_line(str(error)))
    return None


def find_culprits(settings: ReaderSettings, tasks: list[ReadTask]) -> list[BadSample]:
    """Try clips one by one in a separate process; returns those that cannot be decoded.

    A crash or a hang of the decoder counts as well.

    Raises:
        DecoderFaultError: the decoder fails on an intact clip as well.
        OSError: a shard cannot be read.
    """
    culprits: list[BadSample] = []
    if not tasks:
        return culprits
    trial = partial(try_clip, settings)
    with closing(ProcessPool(trial, 1, TaskLimits(TRIAL_SECONDS))) as pool:
        for task in tasks:
            finding = pool.submit(task).result()
            if finding is None:
                continue
            if isinstance(finding, StorageError):
                raise OSError(finding.detail)
            fault = finding if isinstance(finding, DecoderFault) else pool.submit(None).result()
            if fault is not None:
                where = "the CPU" if settings.gpu is None else f"GPU {settings.gpu}"
                raise DecoderFaultError(
                    f"DALI fails on {where} with a clip that is intact: {fault.detail}. No clip is "
                    f"to blame; try `cavmae bench video-check`, free memory, look for errors of "
                    f"the driver (dmesg), and rerun the same command to resume"
                )
            if isinstance(finding, Failure):
                sample_id = settings.shards.sample_id(task.shard, task.sample)
                reason = "decoder_hang" if finding.reason == "timeout" else "decoder_crash"
                finding = BadSample(task, sample_id, reason, finding.detail)
            assert isinstance(finding, BadSample)
            culprits.append(finding)
    return culprits
