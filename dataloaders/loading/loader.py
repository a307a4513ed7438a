"""Deterministic loaders of packed clips, as batches on the training device.

The batches depend on configuration, seed and position alone: a loader that starts at position k
yields exactly what one that has reached k by itself does, whatever the number of readers. Clips
that cannot be decoded are quarantined by name and reason; in training the plan has a substitute for
their position, and nothing else changes.

Work happens in a background thread, in reader processes and in DALI's threads. None of it outlives
the loader, the interpreter or the process, however they end.
"""

import itertools
import logging
import math
import os
import weakref
from collections.abc import Iterable, Iterator, Sequence
from functools import partial

import numpy as np
import torch

from cavmae.dataloaders.batch import AudioVideoBatch
from cavmae.dataloaders.config import Augmentation, ClipShape, DataConfig
from cavmae.dataloaders.loading.augment import mixup_lambda
from cavmae.dataloaders.loading.pipeline import ClipStream
from cavmae.dataloaders.loading.prefetch import Prefetcher
from cavmae.dataloaders.loading.quarantine import (
    DataFaultError,
    Journal,
    Quarantine,
    QuarantinedSample,
    find_culprits,
)
from cavmae.dataloaders.loading.reader import ReaderSettings, ReadTask, check_set
from cavmae.dataloaders.sampling.mixture import MixturePlan, training_plan
from cavmae.dataloaders.sampling.sample_plan import (
    PlannedSample,
    SamplePlan,
    any_sample,
)
from cavmae.dataloaders.sampling.step_shares import StepShares
from cavmae.dataloaders.shards.shard_set import ShardSet
from cavmae.dataloaders.shards.storage import RemoteFolder

MAXIMUM_SUBSTITUTES = 100

log = logging.getLogger(__name__)


class TrainLoader:
    """Yields endless micro-batches of one rank, in the order of the sample plan.

    Args:
        config: the set and how to read it.
        shape: of the clips in the batches.
        seed: of the run; decides the order of samples and the choice of frames.
        shares: how ranks and micro-batches share the clips of a step.
        rank: this process.
        device: of the batches; a GPU also decodes the frames.
        start_position: first position of the first step, a multiple of the lanes.
        quarantine: ids, or ids with reasons, of clips that the run found damaged before.
        journal: where to record the clips being decoded.
        suspects: clips that crashed ranks, of all nodes, were decoding; those at positions of this
            rank are tried first.

    Attributes:
        wait_seconds: total time spent waiting for batches.

    Raises:
        FileNotFoundError: `config.train` has no packed shards.
        ValueError: the position starts no step, the set is too small, or it was packed with
            another frame choice.
    """

    def __init__(
        self,
        config: DataConfig,
        shape: ClipShape,
        *,
        seed: int,
        shares: StepShares,
        rank: int,
        device: torch.device,
        start_position: int = 0,
        quarantine: Iterable[str | tuple[str, str]] = (),
        journal: Journal | None = None,
        suspects: Iterable[ReadTask] = (),
    ):
        if start_position % shares.lanes:
            raise ValueError(
                f"start_position is {start_position}, which is not the start of a step; use a "
                f"multiple of lanes = {shares.lanes}"
            )
        settings = _settings(config, config.train_folders, shape, seed, device, training=True)
        shards = settings.shards
        plan = training_plan(config, shards, seed, shares.lanes)
        _check_cache(config, shards, math.ceil(shares.lanes / shares.world_size))
        self._quarantine = Quarantine(shards, quarantine, config.max_bad_fraction)
        self._last_position = -1
        self.wait_seconds = 0.0
        own = set(shares.offsets(rank).tolist())
        tried = [
            task
            for task in dict.fromkeys(suspects)
            if task.position >= start_position
            and (task.position - start_position) % shares.global_batch in own
        ]
        for bad in find_culprits(settings, tried):
            self._quarantine.add(bad)
            if journal is not None:
                journal.keep(bad)
        stream = ClipStream(
            settings,
            shares.largest_micro_batch * (2 if config.augmentation.mixup_prob else 1),
            self._quarantine,
            partial(_planned, plan, config.augmentation, self._quarantine),
            journal,
        )
        positions = (
            start_position + step * shares.global_batch + some
            for step in itertools.count()
            for some in shares.micro_batches(rank)
        )
        self._prefetcher = Prefetcher(stream.batches(positions), config.prefetch_batches)
        self._end = weakref.finalize(self, _end, self._prefetcher, stream)

    def __iter__(self) -> Iterator[AudioVideoBatch]:
        """Continue where the last iterator stopped.

        Raises:
            OSError: a shard cannot be read.
            DataFaultError: more clips are damaged than `config.max_bad_fraction` allows.
        """
        for batch in self._prefetcher:
            self.wait_seconds = self._prefetcher.wait_seconds
            self._last_position = int(batch.positions[-1])
            yield _on_current_stream(batch)

    @property
    def quarantine(self) -> list[QuarantinedSample]:
        """Excluded clips, including those found up to the last batch yielded.

        Clips that the readers found beyond it are not listed: a run that resumes here finds them
        again.
        """
        return [
            sample for sample in self._quarantine.samples if sample.position <= self._last_position
        ]

    def close(self) -> None:
        """End readers and decoders; further calls do nothing."""
        self._end()


class ValidationLoader:
    """Yields the first clips of a set in packing order, each with its middle frame, per iteration.

    Each rank reads a contiguous part, so the concatenated parts are the whole set in order. A clip
    that cannot be decoded is skipped and listed in `quarantine`.

    Args:
        config: how to read the set.
        shape: of the clips in the batches.
        folder: one tier of packed shards.
        batch: clips per batch; the last one of a rank may be smaller.
        rank: this process among `world_size`.
        world_size: ranks that share the clips.
        device: of the batches.
        limit: maximum number of clips over all ranks; 0: all.
        parts: positions in packing order to read, None: the rank's. No batch spans two parts, so
            the result for a clip does not depend on the other parts.

    Raises:
        FileNotFoundError: `folder` has no packed shards.
        ValueError: a number is out of range, or the set was packed with another frame choice.
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
        self._batch = batch
        self._settings = _settings(config, folder, shape, 0, device, training=False)
        shards = self._settings.shards
        self._quarantine = Quarantine(shards, (), config.max_bad_fraction)
        count = min(limit, shards.samples) if limit else shards.samples
        own = range(count * rank // world_size, count * (rank + 1) // world_size)
        self._parts = (own,) if parts is None else parts
        self._end: weakref.finalize | None = None

    def __iter__(self) -> Iterator[AudioVideoBatch]:
        """Start over from the first clip; ends an earlier iteration of this loader.

        Raises:
            OSError: a shard cannot be read.
            DataFaultError: more clips are damaged than `config.max_bad_fraction` allows.
        """
        self.close()
        stream = ClipStream(
            self._settings,
            self._batch,
            self._quarantine,
            partial(_in_packing_order, self._settings.shards, self._quarantine),
            None,
        )
        positions = (
            np.arange(start, min(start + self._batch, part.stop), dtype=np.int64)
            for part in self._parts
            for start in range(part.start, part.stop, self._batch)
        )
        prefetcher = Prefetcher(stream.batches(positions), self._settings.config.prefetch_batches)
        self._end = weakref.finalize(self, _end, prefetcher, stream)
        yield from map(_on_current_stream, prefetcher)
        self.close()

    @property
    def clips(self) -> int:
        """Clips of this rank's part, excluded ones among them."""
        return sum(map(len, self._parts))

    @property
    def quarantine(self) -> list[QuarantinedSample]:
        """Excluded clips of this rank's part."""
        return self._quarantine.samples

    def close(self) -> None:
        """End readers and decoders of an unfinished iteration."""
        if self._end is not None:
            self._end()


# Not methods: a loader that its background thread refers to would never be collected.
def _planned(
    plan: SamplePlan | MixturePlan,
    augmentation: Augmentation,
    quarantine: Quarantine,
    positions: np.ndarray,
) -> list[ReadTask]:
    """Tasks of training: the planned samples, then those mixed into some of them, with substitutes
    for excluded ones."""
    own, mixed_in = [], []
    for position, planned in zip(positions.tolist(), plan.at(positions), strict=True):
        own.append(_first_usable(quarantine, _planned_and_substitutes(plan, position, planned)))
        if mixup_lambda(augmentation, plan.seed, position) < 1:
            candidates = _mix_sources(plan, position, planned.epoch)
            mixed_in.append(_first_usable(quarantine, candidates))
    return own + mixed_in


def _planned_and_substitutes(
    plan: SamplePlan | MixturePlan, position: int, planned: PlannedSample
) -> Iterator[ReadTask]:
    substitutes = (plan.substitute(position, attempt) for attempt in itertools.count())
    for shard, sample, epoch in itertools.chain([planned], substitutes):
        yield ReadTask(position, epoch, shard, sample)


def _mix_sources(plan: SamplePlan | MixturePlan, position: int, epoch: int) -> Iterator[ReadTask]:
    """Candidates to mix into the clip at a position: any clip of all sets, as published."""
    for attempt in itertools.count():
        shard, sample = any_sample(plan.ends, plan.seed, "mix_source", position, attempt)
        yield ReadTask(position, epoch, shard, sample, mixed_in=True)


def _first_usable(quarantine: Quarantine, tasks: Iterator[ReadTask]) -> ReadTask:
    for task in itertools.islice(tasks, MAXIMUM_SUBSTITUTES):
        if not quarantine.excludes(task):
            return task
    raise DataFaultError(
        f"position {next(tasks).position}: {MAXIMUM_SUBSTITUTES} clips in a row are in quarantine"
    )


def _in_packing_order(
    shards: ShardSet, quarantine: Quarantine, positions: np.ndarray
) -> list[ReadTask]:
    """Tasks of validation: the samples at the positions, without excluded ones."""
    tasks = [ReadTask(position, 0, *shards.at(position)) for position in positions.tolist()]
    return [task for task in tasks if not quarantine.excludes(task)]


def _check_cache(config: DataConfig, shards: ShardSet, lanes: int) -> None:
    """Warn if the cache is smaller than the remote bytes in use at a time."""
    remote = sum(
        file.bytes
        for file, number in zip(shards.files, shards.set_of, strict=True)
        if isinstance(shards.storages[number], RemoteFolder)
    )
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    in_use = min(remote, ranks * lanes * config.shuffle_window * remote // shards.samples)
    field = "data.shuffle_window"
    if config.augmentation.mixup_prob:  # Any clip of the set may be mixed in.
        in_use, field = remote, "data.augmentation.mixup_prob"
    if in_use > config.cache.limit_bytes > 0:
        log.warning(
            "data.cache_gigabytes is %g, but %s draws from %.3g GB of %s at a time: much will be "
            "fetched repeatedly; raise it, or lower %s",
            config.cache_gigabytes,
            field,
            in_use / 1e9,
            shards.folder,
            field,
        )


def _settings(
    config: DataConfig,
    folders: str | list[str],
    shape: ClipShape,
    seed: int,
    device: torch.device,
    training: bool,
) -> ReaderSettings:
    """Open a set, and check that it was packed for this configuration."""
    shards = ShardSet(folders, config.cache)
    check_set(shards, config)
    gpu = None
    if device.type == "cuda":  # Made explicit: each thread has its own current GPU.
        gpu = torch.cuda.current_device() if device.index is None else device.index
    return ReaderSettings(shards, config, shape, seed, training, gpu)


def _on_current_stream(batch: AudioVideoBatch) -> AudioVideoBatch:
    """Tell the allocator that the consumer's stream uses memory of the loader's stream."""
    for tensor in (batch.log_mel, batch.frames):
        if tensor is not None and tensor.is_cuda:
            tensor.record_stream(torch.cuda.current_stream(tensor.device))
    return batch


def _end(prefetcher: Prefetcher[AudioVideoBatch], stream: ClipStream) -> None:
    prefetcher.stop()
    stream.end_readers()
    prefetcher.join()
    stream.close()
