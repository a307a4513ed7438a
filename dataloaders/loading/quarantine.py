"""Clips that cannot be decoded: found by name and reason, kept out, and never able to kill twice.

A decode error of DALI names no sample and a crash of it leaves no error at all. So the clips that
were under way are decoded again one by one in a process of their own: at once after an error, and
when the run starts again after a crash, from the journal that the rank wrote before it decoded.
"""

import logging
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from cavmae.atomic_write import atomic_write
from cavmae.dataloaders.loading.dali import ClipDecoder, DecodeError
from cavmae.dataloaders.loading.reader import (
    PARTNER_DRAWS,
    BadSample,
    ClipReader,
    EncodedClip,
    ReaderSettings,
    ReadTask,
    StorageError,
)
from cavmae.dataloaders.loading.reader_pool import WorkerDied, WorkerPool
from cavmae.dataloaders.shards.shard_set import ShardSet

ALWAYS_ALLOWED = 10
"""Bad clips that never stop a run, however few clips were seen."""
TRIAL_SECONDS = 120.0
"""A clip that takes longer than this to try out (process start included) hangs its decoder."""

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class QuarantinedSample:
    """A clip that is left out from some position on."""

    sample_id: str
    """Such as `000003/000003017`."""
    reason: str
    """A word to count by, such as `crc_mismatch` or `video_undecodable`."""
    detail: str = ""
    position: int = -1
    """Place in the plan at which it was found; -1: it was known when the loader started."""


class DataFaultError(RuntimeError):
    """More clips cannot be used than `data.max_bad_fraction` allows; lists them by reason."""


class Quarantine:
    """The clips of one set that are left out, and the share of bad ones among those seen.

    A clip is left out from the position on at which it was found: a damaged frame of it may have
    been drawn only there, and what comes before must be the same whenever it is found.

    Args:
        shards: the set.
        known: ids, or ids with reasons, of clips found bad before; left out from the start.
        max_bad_fraction: of the clips seen from now on.

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
        self._maximum_bad_share = max_bad_fraction
        self._seen = 0
        reasons: dict[str, str] = {}
        for item in known:
            sample_id, reason = (item, "known_before") if isinstance(item, str) else item
            reasons.setdefault(sample_id, reason)
        self.samples = [QuarantinedSample(*pair) for pair in reasons.items()]
        self._known = len(self.samples)
        self._left_out_from = dict.fromkeys(
            _places(shards, [sample.sample_id for sample in self.samples]), -1
        )

    def leaves_out(self, task: ReadTask) -> bool:
        """Whether the task's sample must not be used at the task's position."""
        first = self._left_out_from.get((task.shard, task.sample))
        return first is not None and task.position >= first

    def add(self, damage: BadSample) -> None:
        """Leave a clip out from the position of its damage on; it is listed once, with the first
        position at which it was found.

        Raises:
            DataFaultError: that is one too many.
        """
        task = damage.task
        if self.leaves_out(task):
            return
        place = (task.shard, task.sample)
        found = QuarantinedSample(damage.sample_id, damage.reason, damage.detail, task.position)
        if place in self._left_out_from:  # As a substitute, before its own place was read.
            self.samples = [one for one in self.samples if one.sample_id != found.sample_id]
        self._left_out_from[place] = task.position
        self.samples.append(found)
        log.warning("left out %s: %s (%s)", damage.sample_id, damage.reason, damage.detail)
        self._check()

    def count_seen(self, clips: int) -> None:
        """Note that this many more clips were read."""
        self._seen += clips

    def _check(self) -> None:
        bad = self.samples[self._known :]
        if len(bad) <= max(ALWAYS_ALLOWED, self._maximum_bad_share * self._seen):
            return
        reasons = Counter(sample.reason for sample in bad)
        examples = {sample.reason: sample.sample_id for sample in reversed(bad)}
        width = max(len(reason) for reason in reasons)
        table = "\n".join(
            f"  {reason:<{width}}  {count:>6}  such as {examples[reason]}"
            for reason, count in reasons.most_common()
        )
        raise DataFaultError(
            f"{len(bad)} clips of {self._folder} cannot be used and {self._seen} could so far, "
            f"over data.max_bad_fraction = {self._maximum_bad_share}:\n{table}\n"
            f"See `cavmae verify {self._folder}`; pack the clips again, or raise the share."
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
                f"quarantine names {sample_id}, which is not in {shards.folder}; a run goes on "
                f"only with the set that it began with"
            )
        places.append((shard, samples_of[shard][sample_id]))
    return places


class Journal:
    """The clips that a rank is decoding, on disk, for whoever finds the rank dead.

    A line per clip: counter of its draws (`ReadTask.draw`), epoch, shard, sample, id.

    Args:
        path: file of this rank; all files beside it with its suffix are journals of the same run.
    """

    def __init__(self, path: Path):
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)

    def write(self, clips: Iterable[EncodedClip]) -> None:
        """Replace the journal. It outlives the process; a power cut needs no culprit."""
        lines = (
            f"{clip.task.draw} {clip.task.epoch} {clip.task.shard} {clip.task.sample} "
            f"{clip.sample_id}\n"
            for clip in clips
        )
        with atomic_write(self.path, durable=False) as temporary:
            temporary.write_text("".join(lines))

    def left_behind(self, shards: ShardSet) -> list[ReadTask]:
        """What ranks that did not end properly were decoding, this one or any other: a run may go
        on with fewer ranks than it had."""
        tasks = []
        for path in sorted(self.path.parent.glob(f"*{self.path.suffix}")):
            for line in path.read_text().splitlines():
                draw, epoch, shard, sample, sample_id = line.split(" ", 4)
                partner, position = divmod(int(draw), PARTNER_DRAWS)
                task = ReadTask(position, int(epoch), int(shard), int(sample), bool(partner))
                in_set = task.shard < len(shards.sizes) and task.sample < shards.sizes[task.shard]
                if in_set and shards.sample_id(task.shard, task.sample) == sample_id:
                    tasks.append(task)
                else:
                    log.warning("%s names %s, which is not in this set", path, sample_id)
        return tasks

    def clear(self) -> None:
        """Nothing is being decoded any more."""
        self.path.unlink(missing_ok=True)


class ClipTrial:
    """Callable that reads and decodes one clip as the rank would; None, or what is wrong with it.

    Runs in a process of its own.
    """

    def __init__(self, settings: ReaderSettings):
        self._reader = ClipReader(settings)

    def __call__(self, task: ReadTask) -> BadSample | StorageError | None:
        clip = self._reader(task)
        if not isinstance(clip, EncodedClip):
            return clip
        decoder = ClipDecoder(
            self._reader.shards.tier,
            self._reader.settings.image_size,
            maximum_batch=1,
            threads=1,
            gpu=self._reader.settings.gpu,
            frames_per_clip=self._reader.settings.frames_per_clip,
        )
        try:
            decoder.schedule([clip])
            decoder.collect()
        except DecodeError as error:
            return BadSample(task, clip.sample_id, error.reason, _last_line(str(error)))
        return None


def find_culprits(
    trial: ClipTrial, shards: ShardSet, tasks: Iterable[ReadTask], seconds: float = TRIAL_SECONDS
) -> list[BadSample]:
    """Try clips one by one, apart from this process; returns those that cannot be decoded.

    A crash or a hang of the decoder is a finding as well.

    Raises:
        OSError: a shard cannot be read.
    """
    tasks = list(tasks)
    culprits: list[BadSample] = []
    if not tasks:
        return culprits
    pool = WorkerPool(trial, 1)
    try:
        for task in tasks:
            finding = None
            try:
                finding = pool.result(pool.submit(task), seconds)
            except WorkerDied as death:
                sample_id = shards.sample_id(task.shard, task.sample)
                finding = BadSample(task, sample_id, "decoder_crash", str(death))
            except TimeoutError:
                pool.close()
                pool = WorkerPool(trial, 1)
                sample_id = shards.sample_id(task.shard, task.sample)
                finding = BadSample(task, sample_id, "decoder_hang", f"over {seconds:g} s")
            if isinstance(finding, StorageError):
                raise OSError(finding.detail)
            if finding is not None:
                culprits.append(finding)
    finally:
        pool.close()
    return culprits


def _last_line(text: str) -> str:
    """The sentence of a DALI error that says what happened, without the traceback around it."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    for place, line in enumerate(lines):
        if line == "encountered:" and place + 1 < len(lines):
            return lines[place + 1]
    return lines[-1] if lines else ""
