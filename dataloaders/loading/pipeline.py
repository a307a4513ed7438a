"""From positions in the plan to batches: read, decode, mix, compute the log-mel.

    tasks -> reader processes -> DALI -> mixup -> log-mel -> AudioVideoBatch

Three chained generators, driven by the loader's background thread while readers and DALI's threads
work. Damaged clips are replaced on the way.
"""

import logging
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from contextlib import AbstractContextManager, nullcontext
from itertools import chain
from typing import Any

import numpy as np
import torch

from cavmae.dataloaders.batch import AudioVideoBatch
from cavmae.dataloaders.constants import AUDIO_HZ
from cavmae.dataloaders.loading.augment import (
    mixed_waveform,
    mixup_lambda,
    spec_augment,
)
from cavmae.dataloaders.loading.dali import ClipDecoder, DecodedClips, DecodeError
from cavmae.dataloaders.loading.quarantine import (
    CRASH,
    HANG,
    Journal,
    Quarantine,
    find_culprits,
)
from cavmae.dataloaders.loading.reader import (
    DECODE_SECONDS,
    BadSample,
    ClipReader,
    EncodedClip,
    ReaderSettings,
    ReadTask,
    StorageError,
)
from cavmae.dataloaders.media.log_mel import log_mel
from cavmae.dataloaders.process_pool import Failure, ProcessPool, made_ahead

MAXIMUM_DEATHS = 5
"""Reader processes that may die, or hang, while reading intact clips before the run stops."""

log = logging.getLogger(__name__)


class ClipStream:
    """Reads and decodes batches of one set.

    Args:
        settings: for the readers; the batches are on its GPU, or on the CPU.
        maximum_batch: maximum number of clips decoded for a batch.
        quarantine: clips to exclude; damaged clips are added.
        choose: tasks to read for some positions, given the quarantine; may skip positions. Clips
            that are mixed into others come last.
        journal: where to record what is being decoded.
    """

    def __init__(
        self,
        settings: ReaderSettings,
        maximum_batch: int,
        quarantine: Quarantine,
        choose: Callable[[np.ndarray], list[ReadTask]],
        journal: Journal | None,
    ):
        self._settings = settings
        self._config = config = settings.config
        self._device = torch.device("cpu" if settings.gpu is None else f"cuda:{settings.gpu}")
        self._maximum_batch = maximum_batch
        self._quarantine = quarantine
        self._choose = choose
        self._journal = journal
        self._side_stream = None if settings.gpu is None else torch.cuda.Stream(self._device)
        self._pool = ProcessPool(ClipReader(settings, DECODE_SECONDS), config.reader_workers)
        self._deaths = 0
        count = config.video_pipelines
        self._decoders: list[ClipDecoder | None] = [None] * count
        self._decoding: list[list[EncodedClip]] = [[] for _ in range(count)]

    def batches(self, positions: Iterable[np.ndarray]) -> Iterator[AudioVideoBatch]:
        """Yield the batches at the given positions, in order; can be called once.

        Raises:
            OSError: a shard cannot be read.
            DataFaultError: too many clips are damaged.
            RuntimeError: readers die, or DALI refuses intact clips.
        """
        for clips, decoded in self._decode(self._read(positions)):
            yield self._batch(clips, decoded)

    def end_readers(self) -> None:
        """End the readers; `batches`, waiting for one in another thread, raises `PoolClosed`."""
        self._pool.close()

    def close(self) -> None:
        """Release the decoders after `end_readers`, when no thread uses the stream any more."""
        self._decoders.clear()
        if self._journal is not None:
            self._journal.clear()

    # ------------------------------------------------------------------------------- reading

    def _read(self, positions: Iterable[np.ndarray]) -> Iterator[list[EncodedClip]]:
        submitted = (
            [(task, self._pool.submit(task)) for task in self._choose(some)] for some in positions
        )
        for batch in made_ahead(submitted, self._config.prefetch_batches + 1):
            answers = ((task, self._answer(task, future)) for task, future in batch)
            clips = [clip for task, answer in answers for clip in self._intact_clip(task, answer)]
            self._quarantine.seen += len(clips)
            if clips:
                yield clips

    def _intact_clip(
        self, task: ReadTask, answer: EncodedClip | BadSample | StorageError
    ) -> list[EncodedClip]:
        """The clip that a reader made of a task, its replacement, or none."""
        while True:
            if isinstance(answer, StorageError):
                raise OSError(answer.detail)
            if isinstance(answer, BadSample):
                self._exclude(answer)
            if isinstance(answer, EncodedClip) and not self._quarantine.excludes(task):
                return [answer]
            chosen = self._choose(np.array([task.position]))
            replacements = [one for one in chosen if one.mixed_in == task.mixed_in]
            if not replacements:
                return []
            (task,) = replacements
            answer = self._answer(task, self._pool.submit(task))

    def _exclude(self, bad: BadSample) -> None:
        self._quarantine.add(bad)
        if self._journal is not None and bad.reason in (HANG, CRASH):
            self._journal.keep(bad)

    def _answer(
        self, task: ReadTask, future: "Future[Any]"
    ) -> EncodedClip | BadSample | StorageError:
        while isinstance(answer := future.result(), Failure):
            if self._quarantine.excludes(task):  # found since the reader began
                sample_id = self._settings.shards.sample_id(task.shard, task.sample)
                return BadSample(task, sample_id, answer.reason, answer.detail)
            culprits = find_culprits(self._settings, [task])
            if culprits:
                return culprits[0]
            self._deaths += 1
            log.warning("a reader ended while reading an intact clip: %s", answer.detail)
            if self._deaths > MAXIMUM_DEATHS:
                raise RuntimeError(
                    f"{self._deaths} reader processes died, the last one: {answer.detail}; is "
                    f"memory short? data.reader_workers is {self._config.reader_workers}"
                )
            future = self._pool.submit(task)
        return answer

    # ------------------------------------------------------------------------------ decoding

    def _decode(
        self, batches: Iterator[list[EncodedClip]]
    ) -> Iterator[tuple[list[EncodedClip], DecodedClips]]:
        """Decode one batch in each decoder while the next is read and the previous is finished."""
        number = -1
        for number, clips in enumerate(batches):
            slot = number % len(self._decoders)
            decoded = self._collect(slot)
            self._schedule(slot, clips)
            yield from decoded
        for later in range(1, len(self._decoders) + 1):
            yield from self._collect((number + later) % len(self._decoders))

    def _schedule(self, slot: int, clips: list[EncodedClip]) -> None:
        self._decoding[slot] = clips
        if self._journal is not None:
            self._journal.write(chain.from_iterable(self._decoding))
        decoder = self._decoders[slot]
        if decoder is None:
            decoder = self._decoders[slot] = ClipDecoder.of(
                self._settings,
                self._maximum_batch,
                self._config.threads(gpu=self._settings.gpu is not None),
            )
        decoder.schedule(clips)

    def _collect(self, slot: int) -> list[tuple[list[EncodedClip], DecodedClips]]:
        """A decoder's clips and their content, after replacing those that DALI refuses."""
        unexplained: DecodeError | None = None
        while self._decoding[slot]:
            clips, decoder = self._decoding[slot], self._decoders[slot]
            assert decoder is not None
            try:
                with self._on_side_stream():
                    decoded = decoder.collect()
                if not any(self._quarantine.excludes(clip.task) for clip in clips):
                    self._decoding[slot] = []
                    return [(clips, decoded)]
                # An earlier batch has quarantined a clip of which this one decodes an intact frame.
            except DecodeError as error:
                self._decoders[slot] = None
                culprits = find_culprits(self._settings, [clip.task for clip in clips])
                if not culprits and unexplained is not None:
                    raise RuntimeError(
                        f"DALI refused a batch twice whose clips it decodes one by one: {error}"
                    ) from error
                unexplained = None if culprits else error
                for bad in culprits:
                    self._exclude(bad)
            clips = [intact for clip in clips for intact in self._intact_clip(clip.task, clip)]
            self._decoding[slot] = []
            if clips:
                self._schedule(slot, clips)
        return []

    # ----------------------------------------------------------------------------- finishing

    def _on_side_stream(self) -> AbstractContextManager[object]:
        """A CUDA stream beside the model's: neither waits for the other."""
        return nullcontext() if self._side_stream is None else torch.cuda.stream(self._side_stream)

    def _batch(self, clips: list[EncodedClip], decoded: DecodedClips) -> AudioVideoBatch:
        own = [clip for clip in clips if not clip.task.mixed_in]
        mixed_labels = {clip.task.position: clip.labels for clip in clips[len(own) :]}
        augmentation, seed = self._settings.augmentation, self._settings.seed
        weights = torch.tensor(
            [mixup_lambda(augmentation, seed, clip.task.position) for clip in own]
        )
        # Row of the clip that each clip which is mixed in belongs to.
        row_of = {clip.task.position: row for row, clip in enumerate(own)}
        rows = [row_of[clip.task.position] for clip in clips[len(own) :]]
        hears, sees = "audio" in self._config.modalities, "video" in self._config.modalities
        with self._on_side_stream():
            spectrogram = self._log_mel(clips, decoded, rows, weights) if hears else None
            frames = self._frames(decoded, rows, weights) if sees else None
        if self._side_stream is not None:
            self._side_stream.synchronize()
        return AudioVideoBatch(
            log_mel=spectrogram,
            frames=frames,
            positions=torch.tensor([clip.task.position for clip in own]),
            epochs=torch.tensor([clip.task.epoch for clip in own]),
            sample_ids=tuple(clip.sample_id for clip in own),
            labels=tuple(clip.labels for clip in own),
            frame_seconds=torch.tensor([one.frame_seconds for one in own]) if sees else None,
            audio_seconds=torch.tensor([one.audio_seconds for one in own]) if hears else None,
            mixup_lambda=weights,
            mixed_labels=tuple(mixed_labels.get(clip.task.position, ()) for clip in own),
        )

    def _log_mel(
        self,
        clips: list[EncodedClip],
        decoded: DecodedClips,
        rows: list[int],
        weights: torch.Tensor,
    ) -> torch.Tensor:
        """Normalised log-mel of the batch, with the last clips mixed into those at `rows`."""
        settings, count = self._settings, len(weights)
        shape, augmentation, seed = settings.shape, settings.augmentation, settings.seed
        waveforms = [
            self._windowed(clip, waveform)
            for clip, waveform in zip(clips, decoded.waveforms, strict=True)
        ]
        if rows:
            waveforms = [waveform.astype(np.float32) / 32768 for waveform in waveforms]
            for row, second in zip(rows, waveforms[count:], strict=True):
                waveforms[row] = mixed_waveform(waveforms[row], second, weights[row].item())
        heard = [torch.from_numpy(waveform) for waveform in waveforms[:count]]
        spectrogram = log_mel(heard, shape.mel_bins, shape.audio_frames, self._device)
        changes = [
            spec_augment(augmentation, shape.audio_frames, shape.mel_bins, seed, clip.task.position)
            for clip in clips[:count]
            if augmentation.changes_log_mel
        ]
        for row, change in enumerate(changes):
            spectrogram[row, slice(*change.frames)] = 0
            spectrogram[row, :, slice(*change.bins)] = 0
        spectrogram -= self._config.log_mel_mean
        spectrogram /= self._config.log_mel_std
        for row, change in enumerate(changes):
            if change.noise is not None:
                noise = torch.from_numpy(change.noise).to(self._device)
                spectrogram[row] = (spectrogram[row] + noise).roll(change.shift, 0)
        return spectrogram

    def _frames(
        self, decoded: DecodedClips, rows: list[int], weights: torch.Tensor
    ) -> torch.Tensor:
        """Frames of the batch, with the last clips mixed into those at `rows`."""
        frames, count = torch.as_tensor(decoded.frames), len(weights)
        if rows:
            weight = weights[rows].to(frames.device)[:, None, None, None, None]
            frames[rows] = weight * frames[rows] + (1 - weight) * frames[count:]
        return frames[:count]

    def _windowed(self, clip: EncodedClip, waveform: np.ndarray) -> np.ndarray:
        """The part of the waveform in the clip's window."""
        if not self._config.window_seconds:
            return waveform
        start, length = (round(seconds * AUDIO_HZ) for seconds in clip.audio_seconds)
        return waveform[start : start + length]
