"""From positions to batches: ask the readers, decode, mix, compute the log-mel; replace what is
damaged.

    tasks -> reader processes -> DALI -> mixing -> log-mel -> AudioVideoBatch

Three generators, one after the other, all driven by the loader's background thread; readers and
DALI's threads work meanwhile.
"""

import logging
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext

import numpy as np
import torch

from cavmae.dataloaders.batch import AudioVideoBatch, ClipShape
from cavmae.dataloaders.config import DataConfig
from cavmae.dataloaders.loading.augment import (
    SpectrogramChange,
    mix_share,
    mixed_waveform,
    spectrogram_change,
)
from cavmae.dataloaders.loading.dali import ClipDecoder, DecodedClips, DecodeError
from cavmae.dataloaders.loading.quarantine import ClipTrial, Journal, Quarantine, find_culprits
from cavmae.dataloaders.loading.reader import (
    BadSample,
    ClipReader,
    EncodedClip,
    ReaderSettings,
    ReadTask,
    StorageError,
)
from cavmae.dataloaders.loading.reader_pool import WorkerDied, WorkerPool
from cavmae.dataloaders.media.log_mel import log_mel
from cavmae.dataloaders.shards.shard_set import AUDIO_HZ, ShardSet

MAXIMUM_DEATHS = 5
"""Reader processes that may die at sound clips before the run stops."""

log = logging.getLogger(__name__)


class ClipStream:
    """Reads and decodes batches of one set.

    Args:
        settings: what the readers need to know.
        shards: the set.
        config: readers, threads and normalisation.
        shape: of the clips that come out.
        device: where they come out.
        maximum_batch: most clips that are decoded for a batch.
        quarantine: clips to leave out; clips found damaged are added.
        choose: what to read at some positions, given the quarantine; may leave positions out. The
            clips that are mixed into others come last.
        journal: where to note what is being decoded.
    """

    def __init__(
        self,
        settings: ReaderSettings,
        shards: ShardSet,
        config: DataConfig,
        shape: ClipShape,
        device: torch.device,
        maximum_batch: int,
        quarantine: Quarantine,
        choose: Callable[[np.ndarray], list[ReadTask]],
        journal: Journal | None,
    ):
        self._shards = shards
        self._config = config
        self._shape = shape
        self._device = device
        self._settings = settings
        self._maximum_batch = maximum_batch
        self._quarantine = quarantine
        self._choose = choose
        self._journal = journal
        self._side_stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._trial = ClipTrial(settings)
        self._pool = WorkerPool(ClipReader(settings), config.reader_workers)
        self._deaths = 0
        count = config.video_pipelines
        self._decoders: list[ClipDecoder | None] = [None] * count
        self._under_way: list[list[EncodedClip]] = [[] for _ in range(count)]

    def batches(self, positions: Iterable[np.ndarray]) -> Iterator[AudioVideoBatch]:
        """Batches at the given positions, in order; to be used once.

        Raises:
            OSError: a shard cannot be read.
            DataFaultError: too many clips are damaged.
            RuntimeError: readers die, or DALI refuses clips that are sound.
        """
        for clips, decoded in self._decode(self._read(positions)):
            yield self._batch(clips, decoded)

    def interrupt(self) -> None:
        """Make `batches`, waiting for a reader in another thread, raise `PoolClosed`."""
        self._pool.interrupt()

    def close(self) -> None:
        """End the readers; nothing may use the stream afterwards."""
        self._pool.close()
        self._decoders.clear()
        if self._journal is not None:
            self._journal.clear()

    # ------------------------------------------------------------------------------- reading

    def _read(self, positions: Iterable[np.ndarray]) -> Iterator[list[EncodedClip]]:
        asked: deque[list[tuple[ReadTask, int]]] = deque()
        for some in positions:
            asked.append([(task, self._pool.submit(task)) for task in self._choose(some)])
            if len(asked) > self._config.prefetch_batches:
                yield from self._receive(asked.popleft())
        while asked:
            yield from self._receive(asked.popleft())

    def _receive(self, asked: list[tuple[ReadTask, int]]) -> Iterator[list[EncodedClip]]:
        clips = [clip for task, ticket in asked for clip in self._sound_clip(task, ticket)]
        self._quarantine.count_seen(len(clips))
        if clips:
            yield clips

    def _sound_clip(self, task: ReadTask, ticket: int) -> list[EncodedClip]:
        """The clip that was asked for, what replaces it, or none."""
        while True:
            answer = self._answer(task, ticket)
            if isinstance(answer, StorageError):
                raise OSError(answer.detail)
            if isinstance(answer, BadSample):
                self._quarantine.add(answer)
            if isinstance(answer, EncodedClip) and not self._quarantine.leaves_out(task):
                return [answer]
            replacement = self._replacement(task)
            if not replacement:
                return []
            task = replacement[0]
            ticket = self._pool.submit(task)

    def _replacement(self, task: ReadTask) -> list[ReadTask]:
        """What is read instead of a clip that is left out now, if anything is."""
        chosen = self._choose(np.array([task.position]))
        return [one for one in chosen if one.partner == task.partner]

    def _answer(self, task: ReadTask, ticket: int) -> EncodedClip | BadSample | StorageError:
        while True:
            try:
                return self._pool.result(ticket)
            except WorkerDied as death:
                culprits = find_culprits(self._trial, self._shards, [task])
                if culprits:
                    return culprits[0]
                self._deaths += 1
                log.warning("a reader died (%s) at a sound clip", death)
                if self._deaths > MAXIMUM_DEATHS:
                    raise RuntimeError(
                        f"{self._deaths} reader processes died, the last one: {death}; is memory "
                        f"short? data.reader_workers is {self._config.reader_workers}"
                    ) from death
                ticket = self._pool.submit(task)

    # ------------------------------------------------------------------------------ decoding

    def _decode(
        self, batches: Iterator[list[EncodedClip]]
    ) -> Iterator[tuple[list[EncodedClip], DecodedClips]]:
        """A batch is in each decoder while the next is read and the last is finished."""
        number = -1
        for number, clips in enumerate(batches):
            slot = number % len(self._decoders)
            decoded = self._collect(slot)
            self._schedule(slot, clips)
            yield from decoded
        for later in range(1, len(self._decoders) + 1):
            yield from self._collect((number + later) % len(self._decoders))

    def _schedule(self, slot: int, clips: list[EncodedClip]) -> None:
        self._under_way[slot] = clips
        if self._journal is not None:
            self._journal.write(clip for some in self._under_way for clip in some)
        decoder = self._decoders[slot]
        if decoder is None:
            decoder = self._decoders[slot] = ClipDecoder(
                self._shards.tier,
                self._shape.image_size,
                self._maximum_batch,
                self._config.decode_threads,
                self._settings.gpu,
                self._config.frames_per_clip,
            )
        decoder.schedule(clips)

    def _collect(self, slot: int) -> list[tuple[list[EncodedClip], DecodedClips]]:
        """What a decoder's clips decode to, after replacing those that DALI refuses."""
        unexplained: DecodeError | None = None
        while self._under_way[slot]:
            clips, decoder = self._under_way[slot], self._decoders[slot]
            assert decoder is not None
            try:
                with self._on_side_stream():
                    decoded = decoder.collect()
                if not any(self._quarantine.leaves_out(clip.task) for clip in clips):
                    self._under_way[slot] = []
                    return [(clips, decoded)]
                # An earlier batch has found a clip damaged that this one shows a whole frame of.
            except DecodeError as error:
                self._decoders[slot] = None
                culprits = find_culprits(self._trial, self._shards, [clip.task for clip in clips])
                if not culprits and unexplained is not None:
                    raise RuntimeError(
                        f"DALI refuses a batch twice whose clips it decodes one by one: {error}"
                    ) from error
                unexplained = None if culprits else error
                for damage in culprits:
                    self._quarantine.add(damage)
            clips = [sound for clip in clips for sound in self._kept_or_replaced(clip)]
            self._under_way[slot] = []
            if clips:
                self._schedule(slot, clips)
        return []

    def _kept_or_replaced(self, clip: EncodedClip) -> list[EncodedClip]:
        if not self._quarantine.leaves_out(clip.task):
            return [clip]
        return [
            sound
            for task in self._replacement(clip.task)
            for sound in self._sound_clip(task, self._pool.submit(task))
        ]

    # ----------------------------------------------------------------------------- finishing

    def _on_side_stream(self) -> AbstractContextManager[object]:
        """Work for the GPU that must not wait for the model's, nor hold it up."""
        return nullcontext() if self._side_stream is None else torch.cuda.stream(self._side_stream)

    def _batch(self, clips: list[EncodedClip], decoded: DecodedClips) -> AudioVideoBatch:
        own = [clip for clip in clips if not clip.task.partner]
        mixed_labels = {clip.task.position: clip.labels for clip in clips[len(own) :]}
        shares = self._shares(own)
        with self._on_side_stream():
            waveforms, frames = self._mixed(clips, decoded, shares)
            spectrogram = log_mel(
                waveforms, self._shape.mel_bins, self._shape.audio_frames, self._device
            )
            changes = self._changes(own)
            for place, change in enumerate(changes):
                spectrogram[place, slice(*change.frames)] = 0
                spectrogram[place, :, slice(*change.bins)] = 0
            spectrogram -= self._config.log_mel_mean
            spectrogram /= self._config.log_mel_std
            for place, change in enumerate(changes):
                if change.noise is not None:
                    noise = torch.from_numpy(change.noise).to(self._device)
                    spectrogram[place] = (spectrogram[place] + noise).roll(change.shift, 0)
        if self._side_stream is not None:
            self._side_stream.synchronize()
        return AudioVideoBatch(
            log_mel=spectrogram,
            frames=frames,
            positions=torch.tensor([clip.task.position for clip in own]),
            epochs=torch.tensor([clip.task.epoch for clip in own]),
            sample_ids=tuple(clip.sample_id for clip in own),
            labels=tuple(clip.labels for clip in own),
            frame_seconds=torch.tensor([clip.frame_seconds for clip in own]),
            audio_seconds=torch.tensor([clip.audio_seconds for clip in own]),
            shares=shares,
            mixed_labels=tuple(mixed_labels.get(clip.task.position, ()) for clip in own),
        )

    def _shares(self, own: list[EncodedClip]) -> torch.Tensor:
        """`(batch,)` float32: share of each clip itself in what comes out."""
        augmentation, seed = self._settings.augmentation, self._settings.seed
        if augmentation is None:
            return torch.ones(len(own))
        return torch.tensor([mix_share(augmentation, seed, clip.task.position) for clip in own])

    def _mixed(
        self, clips: list[EncodedClip], decoded: DecodedClips, shares: torch.Tensor
    ) -> tuple[list[torch.Tensor], torch.Tensor]:
        """Sounds and frames of the batch: what was decoded, the last clips mixed into theirs."""
        count = len(shares)
        sounds = [
            self._heard(clip, waveform)
            for clip, waveform in zip(clips, decoded.waveforms, strict=True)
        ]
        frames = torch.as_tensor(decoded.frames)
        if len(clips) > count:
            row_of = {clip.task.position: row for row, clip in enumerate(clips[:count])}
            rows = [row_of[clip.task.position] for clip in clips[count:]]
            sounds = [sound.astype(np.float32) / 32768 for sound in sounds]
            for row, second in zip(rows, sounds[count:], strict=True):
                sounds[row] = mixed_waveform(sounds[row], second, shares[row].item())
            of_first = shares[rows].to(frames.device)[:, None, None, None, None]
            frames[rows] = of_first * frames[rows] + (1 - of_first) * frames[count:]
        return [torch.from_numpy(sound) for sound in sounds[:count]], frames[:count]

    def _heard(self, clip: EncodedClip, waveform: np.ndarray) -> np.ndarray:
        """The part of the sound that the clip's window has."""
        if not self._config.window_seconds:
            return waveform
        start, length = (round(seconds * AUDIO_HZ) for seconds in clip.audio_seconds)
        return waveform[start : start + length]

    def _changes(self, clips: list[EncodedClip]) -> list[SpectrogramChange]:
        """Masks, noise and shift of each clip's log-mel; none in validation."""
        augmentation = self._settings.augmentation
        if augmentation is None or not augmentation.changes_sound:
            return []
        return [
            spectrogram_change(
                augmentation,
                self._shape.audio_frames,
                self._shape.mel_bins,
                self._settings.seed,
                clip.task.position,
            )
            for clip in clips
        ]
