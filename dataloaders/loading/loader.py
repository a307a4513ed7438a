"""Packed clips as batches on the training device, the same ones every time.

What a loader hands out depends on configuration, seed and position alone: one that is started at
position k goes on exactly as one that came there by itself, whatever the number of readers. Clips
that cannot be decoded are put in quarantine by name and reason; in training the plan names a
substitute for their place, and nothing else changes.

Work happens in a background thread, in reader processes and in DALI's threads. None of it outlives
the loader, the interpreter or the process, however they end.
"""

import itertools
import logging
import os
import weakref
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch

from cavmae.dataloaders.batch import AudioVideoBatch, ClipShape
from cavmae.dataloaders.config import Augmentation, DataConfig
from cavmae.dataloaders.loading.augment import mix_share
from cavmae.dataloaders.loading.pipeline import ClipStream
from cavmae.dataloaders.loading.prefetch import Prefetcher
from cavmae.dataloaders.loading.quarantine import (
    ClipTrial,
    DataFaultError,
    Journal,
    Quarantine,
    QuarantinedSample,
    find_culprits,
)
from cavmae.dataloaders.loading.reader import ReaderSettings, ReadTask, check_frame_choice
from cavmae.dataloaders.media.log_mel import HOP_SAMPLES, WINDOW_SAMPLES
from cavmae.dataloaders.sampling.mixture import MixturePlan, training_plan
from cavmae.dataloaders.sampling.sample_plan import (
    PlannedSample,
    SamplePlan,
    any_sample,
    check_ranks,
    default_lanes,
    rank_positions,
)
from cavmae.dataloaders.shards.shard_set import ShardSet

MAXIMUM_SUBSTITUTES = 100

log = logging.getLogger(__name__)


class TrainLoader:
    """Endless micro-batches of one rank, in the order of the sample plan.

    Args:
        config: the set and how it is read.
        shape: of the clips that come out.
        seed: of the run: order of samples and choice of frames.
        global_batch: clips of one optimizer step over all ranks and micro-batches.
        micro_batch: clips of one batch that comes out.
        lanes: of the plan; fixed for the run (`plan.default_lanes`).
        rank: this process among `world_size`.
        world_size: ranks that share the global batch.
        device: where the tensors come out; a GPU also decodes the frames.
        start_position: first position of the step to begin with, a multiple of `lanes`.
        quarantine: ids, or ids with reasons, of clips that the run found damaged before.
        journal: file of this rank that names what is being decoded, beside those of the other
            ranks; where ranks died and left theirs, those clips are tried out before the start.

    Attributes:
        wait_seconds: time for which batches were waited for, in all.

    Raises:
        FileNotFoundError: no packed shards in `config.train`.
        ValueError: numbers that do not divide each other, a set that is too small, or one that
            was packed for another choice of frames.
    """

    def __init__(
        self,
        config: DataConfig,
        shape: ClipShape,
        *,
        seed: int,
        global_batch: int,
        micro_batch: int,
        lanes: int,
        rank: int,
        world_size: int,
        device: torch.device,
        start_position: int = 0,
        quarantine: Iterable[str | tuple[str, str]] = (),
        journal: Path | None = None,
    ):
        _check_batches(global_batch, micro_batch, lanes, world_size)
        if start_position % lanes:
            raise ValueError(
                f"start_position is {start_position}, which is not the start of a step: it has to "
                f"be a multiple of lanes = {lanes}"
            )
        shards = ShardSet(config.train_folders, config.cache)
        check_frame_choice(shards, config.frame_choice)
        device = _with_index(device)
        settings = _settings(config, shards, shape, seed, device, draw_frame=True)
        plan = training_plan(config, shards, seed, lanes)
        _check_cache(config, shards, lanes // world_size)
        self._quarantine = Quarantine(shards, quarantine, config.max_bad_fraction)
        self._last_position = -1
        self.wait_seconds = 0.0
        notes = None if journal is None else Journal(journal)
        if notes is not None:
            suspects = [
                task
                for task in notes.left_behind(shards)
                if task.position >= start_position
                and task.position % lanes * world_size // lanes == rank
            ]
            for damage in find_culprits(ClipTrial(settings), shards, suspects):
                self._quarantine.add(damage)
        stream = ClipStream(
            settings,
            shards,
            config,
            shape,
            device,
            2 * micro_batch if config.augmentation.mixup_prob else micro_batch,
            self._quarantine,
            partial(_planned, plan, config.augmentation, self._quarantine),
            notes,
        )
        offsets = rank_positions(0, rank, world_size, global_batch, lanes)
        positions = (
            start_position + step * global_batch + some
            for step in itertools.count()
            for some in np.split(offsets, len(offsets) // micro_batch)
        )
        self._ahead = Prefetcher(stream.batches(positions), config.prefetch_batches)
        self._end = weakref.finalize(self, _end, self._ahead, stream)

    def __iter__(self) -> Iterator[AudioVideoBatch]:
        """Goes on where the last iterator stopped.

        Raises:
            OSError: a shard cannot be read.
            DataFaultError: more clips are damaged than `config.max_bad_fraction` allows.
        """
        while True:
            batch = _taken(self._ahead.next())
            self.wait_seconds = self._ahead.wait_seconds
            self._last_position = int(batch.positions[-1])
            yield batch

    @property
    def quarantine(self) -> list[QuarantinedSample]:
        """Clips left out, those found up to the last batch handed out included.

        What the readers found ahead of it is not: a run that goes on from here finds it again.
        """
        return [
            sample
            for sample in list(self._quarantine.samples)
            if sample.position <= self._last_position
        ]

    def close(self) -> None:
        """End readers and decoders; does nothing the second time."""
        self._end()


class ValidationLoader:
    """The first clips of a set in packing order, once per iteration, with their middle frame.

    Each rank has a contiguous part, so the ranks' parts end to end are the whole in order. A clip
    that cannot be decoded is left out and named in `quarantine`.

    Args:
        config: how the set is read.
        shape: of the clips that come out.
        folder: one tier of packed shards.
        batch: clips per batch; the last one of a rank may be smaller.
        rank: this process among `world_size`.
        world_size: ranks that share the clips.
        device: where the tensors come out.
        limit: clips over all ranks at most; 0: all.
        parts: places in packing order to read, None: the rank's; each part has batches of its
            own, so what a clip is decoded and computed with does not depend on the other parts.

    Raises:
        FileNotFoundError: no packed shards in `folder`.
        ValueError: a number out of range, or a set packed for another choice of frames.
    """

    def __init__(
        self,
        config: DataConfig,
        shape: ClipShape,
        *,
        folder: str,
        batch: int,
        rank: int,
        world_size: int,
        device: torch.device,
        limit: int,
        parts: Sequence[range] | None = None,
    ):
        if batch < 1 or limit < 0 or not 0 <= rank < world_size:
            raise ValueError(
                f"batch is {batch}, limit {limit}, rank {rank} of {world_size}; use a batch of 1 "
                f"or more, a limit of 0 (all) or more, and ranks from 0 below world_size"
            )
        self._config = config
        self._shape = shape
        self._device = _with_index(device)
        self._batch = batch
        self._shards = ShardSet(folder, config.cache)
        check_frame_choice(self._shards, config.frame_choice)
        self._settings = _settings(config, self._shards, shape, 0, self._device, draw_frame=False)
        self._quarantine = Quarantine(self._shards, (), config.max_bad_fraction)
        self._count = min(limit, self._shards.samples) if limit else self._shards.samples
        own = range(self._count * rank // world_size, self._count * (rank + 1) // world_size)
        self._parts = (own,) if parts is None else parts
        if parts is not None:
            self._count = sum(map(len, parts))
        self._end: weakref.finalize | None = None

    def __len__(self) -> int:
        """Clips over all ranks."""
        return self._count

    def __iter__(self) -> Iterator[AudioVideoBatch]:
        """Begins again from the first clip; an earlier iteration of this loader ends.

        Raises:
            OSError: a shard cannot be read.
            DataFaultError: more clips are damaged than `config.max_bad_fraction` allows.
        """
        self.close()
        stream = ClipStream(
            self._settings,
            self._shards,
            self._config,
            self._shape,
            self._device,
            self._batch,
            self._quarantine,
            partial(_in_packing_order, self._shards, self._quarantine),
            None,
        )
        positions = (
            np.arange(start, min(start + self._batch, part.stop), dtype=np.int64)
            for part in self._parts
            for start in range(part.start, part.stop, self._batch)
        )
        ahead = Prefetcher(stream.batches(positions), self._config.prefetch_batches)
        self._end = weakref.finalize(self, _end, ahead, stream)
        while True:
            try:
                batch = ahead.next()
            except StopIteration:
                self.close()
                return
            yield _taken(batch)

    @property
    def quarantine(self) -> list[QuarantinedSample]:
        """Clips of this rank's part that were left out."""
        return list(self._quarantine.samples)

    def close(self) -> None:
        """End readers and decoders of an iteration that was not finished."""
        if self._end is not None:
            self._end()


# Not methods: a loader that its background thread refers to would never be given up.
def _planned(
    plan: SamplePlan | MixturePlan,
    augmentation: Augmentation,
    quarantine: Quarantine,
    positions: np.ndarray,
) -> list[ReadTask]:
    """What to read in training: the planned samples, then those mixed into some of them, with
    substitutes for those left out."""
    own, partners = [], []
    for position, planned in zip(positions.tolist(), plan.at(positions), strict=True):
        own.append(_kept(quarantine, _planned_and_substitutes(plan, position, planned)))
        if mix_share(augmentation, plan.seed, position) < 1:
            partners.append(_kept(quarantine, _partners(plan, position, planned.epoch)))
    return own + partners


def _planned_and_substitutes(
    plan: SamplePlan | MixturePlan, position: int, planned: PlannedSample
) -> Iterator[ReadTask]:
    yield ReadTask(position, planned.epoch, planned.shard, planned.sample)
    for attempt in itertools.count():
        substitute = plan.substitute(position, attempt)
        yield ReadTask(position, substitute.epoch, substitute.shard, substitute.sample)


def _partners(plan: SamplePlan | MixturePlan, position: int, epoch: int) -> Iterator[ReadTask]:
    """Clips to mix into the one at a position: any of all sets, as published."""
    for attempt in itertools.count():
        shard, sample = any_sample(plan.ends, plan.seed, "partner", position, attempt)
        yield ReadTask(position, epoch, shard, sample, partner=True)


def _kept(quarantine: Quarantine, tasks: Iterator[ReadTask]) -> ReadTask:
    """The first that is not left out."""
    task = next(tasks)
    for _ in range(MAXIMUM_SUBSTITUTES):
        if not quarantine.leaves_out(task):
            return task
        task = next(tasks)
    raise DataFaultError(
        f"position {task.position}: {MAXIMUM_SUBSTITUTES} clips in a row are in quarantine"
    )


def _in_packing_order(
    shards: ShardSet, quarantine: Quarantine, positions: np.ndarray
) -> list[ReadTask]:
    """What to read in validation: the samples themselves, less those left out."""
    tasks = [ReadTask(position, 0, *shards.at(position)) for position in positions.tolist()]
    return [task for task in tasks if not quarantine.leaves_out(task)]


def _check_batches(global_batch: int, micro_batch: int, lanes: int, world_size: int) -> None:
    check_ranks(lanes, world_size)
    if global_batch % lanes:
        raise ValueError(
            f"lanes is {lanes}, which does not divide global_batch = {global_batch}; "
            f"use {default_lanes(global_batch)}"
        )
    if micro_batch < 1 or (global_batch // world_size) % micro_batch:
        fitting = max(
            size
            for size in range(1, max(1, min(micro_batch, global_batch // world_size)) + 1)
            if (global_batch // world_size) % size == 0
        )
        raise ValueError(
            f"micro_batch is {micro_batch}, but {world_size} ranks x {micro_batch} does not divide "
            f"global_batch = {global_batch}; use micro_batch = {fitting}"
        )


def _check_cache(config: DataConfig, shards: ShardSet, lanes: int) -> None:
    """Say when pieces of remote shards will be thrown away before they are used up."""
    remote = sum(
        file.bytes for file, one in zip(shards.files, shards.sets, strict=True) if one.remote
    )
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    in_use = min(remote, ranks * lanes * config.shuffle_window * remote // shards.samples)
    field = "data.shuffle_window"
    if config.augmentation.mixup_prob:  # Any clip of the set may be mixed in.
        in_use, field = remote, "data.augmentation.mixup_prob"
    if in_use > config.cache.limit_bytes > 0:
        log.warning(
            "data.cache_gigabytes is %g, and %s draws from %.3g GB of %s at a time: much will be "
            "fetched again and again; raise it, or lower %s",
            config.cache_gigabytes,
            field,
            in_use / 1e9,
            shards.folder,
            field,
        )


def _settings(
    config: DataConfig,
    shards: ShardSet,
    shape: ClipShape,
    seed: int,
    device: torch.device,
    draw_frame: bool,
) -> ReaderSettings:
    return ReaderSettings(
        shards=shards,
        seed=seed,
        frame_choice=config.frame_choice,
        image_size=shape.image_size,
        audio_samples=(shape.audio_frames - 1) * HOP_SAMPLES + WINDOW_SAMPLES,
        draw_frame=draw_frame,
        gpu=device.index if device.type == "cuda" else None,
        frames_per_clip=config.frames_per_clip,
        window_seconds=config.window_seconds,
        augmentation=config.augmentation if draw_frame else None,
    )


def _with_index(device: torch.device) -> torch.device:
    """Threads have a current GPU each, so the loader's thread must be told which one."""
    if device.type == "cuda" and device.index is None:
        return torch.device("cuda", torch.cuda.current_device())
    return device


def _taken(batch: AudioVideoBatch) -> AudioVideoBatch:
    """Tell the allocator that the taker's stream uses memory of the loader's stream."""
    if batch.log_mel.is_cuda:
        stream = torch.cuda.current_stream(batch.log_mel.device)
        batch.log_mel.record_stream(stream)
        batch.frames.record_stream(stream)
    return batch


def _end(ahead: Prefetcher[AudioVideoBatch], stream: ClipStream) -> None:
    ahead.stop()
    stream.interrupt()
    ahead.join()
    stream.close()
