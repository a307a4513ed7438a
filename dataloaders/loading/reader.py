"""Reads one position of the sample plan: fetches the bytes and chooses frames and crop.

Runs in worker processes, so it imports neither torch nor DALI. Everything random is drawn from the
position in the plan (`sampling.philox`), so it does not depend on which worker reads when. Damaged
samples are return values, not exceptions; so is a shard that cannot be read after all retries,
which ends the run.

Only decoding has a time limit. Storage may take minutes without a fault of the clip: its errors
have retries of their own, and if it never answers, the rank's watchdog ends the rank.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np

from cavmae.dataloaders.config import Augmentation, ClipShape, DataConfig
from cavmae.dataloaders.constants import AUDIO_HZ, FRAMES_PER_CLIP, MIDDLE_FRAME, WINDOW_SAMPLES
from cavmae.dataloaders.loading.augment import (
    Box,
    is_flipped,
    random_crop,
    stored_center_crop,
)
from cavmae.dataloaders.media.decode_clip import MAXIMUM_SOURCE_PIXELS
from cavmae.dataloaders.media.decode_frame import (
    FrameError,
    decode_frame,
    decode_original,
)
from cavmae.dataloaders.media.errors import MAXIMUM_CLIP_BYTES
from cavmae.dataloaders.media.headers import (
    HeaderError,
    check_audio,
    check_frame,
    check_jpeg,
    payload_of,
)
from cavmae.dataloaders.media.video_size import nvdec_decodes
from cavmae.dataloaders.process_pool import time_limit
from cavmae.dataloaders.sampling.philox import random_words
from cavmae.dataloaders.shards.format import ShardError
from cavmae.dataloaders.shards.shard_set import ShardSet

SHORTEST_AUDIO_SAMPLES = WINDOW_SAMPLES
"""Shorter audio would give a constant log-mel."""
DECODE_SECONDS = 30.0
"""A reader that decodes a clip for longer hangs: ten frames of 720p H.264 take up to 1.7 s."""

WHOLE: Box = (0.0, 0.0, 1.0, 1.0)
"""The crop of frames that are not read."""
MIXED_IN_DRAWS = 1 << 61
"""Counters of the draws for mixed-in clips start here, beyond every position that a run reaches."""


@dataclass(frozen=True)
class ReaderSettings:
    """Settings that all clips of one loader share."""

    shards: ShardSet
    config: DataConfig
    shape: ClipShape
    seed: int
    training: bool
    """Draw window, frames and augmentation for the position; otherwise use the center and the
    middle frame."""
    gpu: int | None
    """Index of the GPU on which DALI decodes frames; None: on the CPU."""

    @property
    def augmentation(self) -> Augmentation:
        return self.config.augmentation if self.training else Augmentation()

    @property
    def jpegs(self) -> bool:
        """Whether DALI decodes the frames as images: JPEGs, and MJPEG, whose frames are JPEGs. Its
        video decoder takes MJPEG on a CPU only, and more time."""
        return self.shards.tier == "frames" or self.shards.video_codec == "mjpeg"

    def dali_decodes(self, height: int, width: int) -> bool:
        """Whether DALI has a decoder for frames of the `video` tier; else the readers decode."""
        codec = str(self.shards.video_codec)
        if self.jpegs or self.gpu is None:
            return codec != "h264"
        return nvdec_decodes(width, height, codec)


@dataclass(frozen=True)
class ReadTask:
    """A position of the plan and the sample to read for it."""

    position: int
    epoch: int
    shard: int
    sample: int
    mixed_in: bool = False
    """The sample is mixed into the clip at this position."""

    @property
    def draw(self) -> int:
        """Counter of the random draws for the clip (window, frames, crop, flip)."""
        return self.position + MIXED_IN_DRAWS * self.mixed_in


@dataclass(frozen=True)
class EncodedClip:
    """A clip ready for the decoders."""

    task: ReadTask
    sample_id: str
    labels: tuple[str, ...]
    audio: bytes
    """FLAC or WAV; empty if sound is not read."""
    frames: tuple[bytes, ...]
    """JPEGs or one-frame videos; one zero byte each where `pixels` are given; none if pictures are
    not read."""
    pixels: tuple[np.ndarray, ...] | None
    """`(height, width, 3)` uint8 each, if DALI has no decoder for the video."""
    crop: Box
    """Crop of the frames."""
    flipped: bool
    frame_seconds: tuple[float, ...]
    audio_seconds: tuple[float, float]
    """Start and length of the audio window."""


@dataclass(frozen=True)
class BadSample:
    """The sample can never be used."""

    task: ReadTask
    sample_id: str
    reason: str
    detail: str


@dataclass(frozen=True)
class StorageError:
    """A shard could not be read after all retries; the sample itself may be intact."""

    detail: str


class ClipReader:
    """Callable that turns a `ReadTask` into an `EncodedClip`, `BadSample` or `StorageError`.

    Pickled without open files.

    Args:
        settings: of the loader.
        decode_seconds: the process is ended if decoding the frames of a clip takes longer.
    """

    def __init__(self, settings: ReaderSettings, decode_seconds: float = DECODE_SECONDS):
        self.settings = settings
        self.decode_seconds = decode_seconds
        self.shards = settings.shards
        self.config = settings.config
        self.augmentation = settings.augmentation

    def __call__(self, task: ReadTask) -> EncodedClip | BadSample | StorageError:
        try:
            sample_id = self.shards.sample_id(task.shard, task.sample)
            try:
                return self._read(task, sample_id)
            except ShardError as error:
                return BadSample(task, sample_id, error.reason, error.detail)
            except FrameError as error:
                return BadSample(task, sample_id, "video_unreadable", str(error))
            except HeaderError as error:
                return BadSample(task, sample_id, "wrong_header", str(error))
        except OSError as error:
            return StorageError(f"{error}; check the storage and rerun the same command to resume")

    def _read(self, task: ReadTask, sample_id: str) -> EncodedClip | BadSample:
        description = self.shards.description(task.shard, task.sample)
        hears, sees = "audio" in self.config.modalities, "video" in self.config.modalities
        height = width = 0
        frames, whole = [], None
        try:
            labels = tuple(str(label) for label in description["labels"])
            if hears:
                audio_samples = int(description["audio"]["samples"])
                clip_seconds = audio_samples / AUDIO_HZ
                if 2 * audio_samples > MAXIMUM_CLIP_BYTES:
                    raise ValueError(f"{audio_samples} samples of audio")
            else:
                audio_samples, clip_seconds = 0, float(description["video"]["seconds"])
            window = self._window(task.draw, clip_seconds)
            if sees:
                height = int(description["video"]["height"])
                width = int(description["video"]["width"])
                frames = self._choose_frames(task.draw, description, window)
                whole = description["video"].get("cropped_from")
                _check_sizes(width, height, whole)
        except (KeyError, TypeError, ValueError, IndexError, OverflowError) as error:
            return BadSample(task, sample_id, "bad_schema", f"{type(error).__name__}: {error}")
        if hears and audio_samples < SHORTEST_AUDIO_SAMPLES:
            return BadSample(task, sample_id, "audio_too_short", f"{audio_samples} samples")
        encoded, pixels, crop = (), None, WHOLE
        augmentation, seed = self.augmentation, self.settings.seed
        if sees:
            encoded, pixels = self._read_frames(task, frames, height, width)
            center = stored_center_crop(height, width, self.settings.shape.image_size, whole)
            crop = random_crop(height, width, center, augmentation, seed, task.draw)
        start, length = window or (0.0, clip_seconds)
        audio = b""
        if hears:
            audio = self.shards.member(task.shard, task.sample, self.shards.audio_codec)
            check_audio(audio, self.shards.audio_codec, audio_samples)
        return EncodedClip(
            task,
            sample_id,
            labels,
            audio,
            encoded,
            pixels,
            crop,
            is_flipped(augmentation, seed, task.draw),
            tuple(seconds for _, _, seconds in frames),
            (start, min(length, self.settings.shape.audio_samples / AUDIO_HZ)),
        )

    def _read_frames(
        self, task: ReadTask, frames: list[tuple[int, int, float]], height: int, width: int
    ) -> tuple[tuple[bytes, ...], tuple[np.ndarray, ...] | None]:
        """Encoded frames, and their pixels if DALI has no decoder for them.

        Args:
            frames: as `_choose_frames` returns them.
        """
        shard, sample = task.shard, task.sample
        placeholder = (b"\0",) * len(frames)
        if self.shards.tier == "frames":
            names = [f"{chosen}.jpg" for chosen, _, _ in frames]
            jpegs = tuple(self.shards.member(shard, sample, name) for name in names)
            for jpeg in jpegs:
                check_jpeg(jpeg, width, height)
            return jpegs, None
        if self.shards.tier == "original":
            source = self.shards.member(shard, sample, "source")
            with time_limit(self.decode_seconds):
                return placeholder, tuple(
                    decode_original(source, seconds, width, height) for _, _, seconds in frames
                )
        videos = tuple(self.shards.frame(shard, sample, index) for _, index, _ in frames)
        for video in videos:
            check_frame(video, str(self.shards.video_codec), width, height)
        if self.settings.jpegs:
            jpegs = tuple(payload_of(video) for video in videos)
            for jpeg in jpegs:
                check_jpeg(jpeg, width, height)
            return jpegs, None
        if self.settings.dali_decodes(height, width):
            return videos, None
        with time_limit(self.decode_seconds):
            return placeholder, tuple(decode_frame(video, width, height) for video in videos)

    def _window(self, draw: int, clip_seconds: float) -> tuple[float, float] | None:
        """Start and length of the window in seconds; None: the clip from its start."""
        if not self.config.window_seconds:
            return None
        length = min(self.config.window_seconds, clip_seconds)
        share = 0.5
        if self.settings.training:
            share = int(random_words(self.settings.seed, "window", draw, 1)[0]) / 2**32
        start = int(share * (clip_seconds - length) * AUDIO_HZ) / AUDIO_HZ
        return start, length

    def _choose_frames(
        self, draw: int, description: dict[str, Any], window: tuple[float, float] | None
    ) -> list[tuple[int, int, float]]:
        """Choose frames: each one's number among the ten, its index in the video, and its time.

        Each frame comes from its own equal part of the window. Only the `frames` tier is limited
        to the ten: `by_time` may choose any moment of the others, where the first number has no
        meaning.
        """
        count = self.config.frames_per_clip
        inside = [0.5] * count
        if self.settings.training:
            words = random_words(self.settings.seed, "frame", draw, count)
            inside = (words / 2.0**32).tolist()
        shares = [(part + share) / count for part, share in enumerate(inside)]
        ten = description["ten_frames"]
        start, length = window or (0.0, float(description["video"]["seconds"]))
        moments = [start + share * length for share in shares]
        any_moment = self.shards.tier != "frames" and self.config.frame_choice == "by_time"
        if any_moment and (window is not None or self.settings.training):
            times = np.asarray(description["video"]["times_seconds"], dtype=np.float64)
            shown = np.maximum(0, np.searchsorted(times, moments, side="right") - 1)
            return [(MIDDLE_FRAME, int(index), float(times[index])) for index in shown]
        if window is None:
            places = [int(share * FRAMES_PER_CLIP) for share in shares]
        else:
            ten_seconds = np.array([float(frame["seconds"]) for frame in ten])
            places = [int(np.abs(ten_seconds - moment).argmin()) for moment in moments]
        return [(at, int(ten[at]["index"]), float(ten[at]["seconds"])) for at in places]


def _check_sizes(width: int, height: int, whole: dict[str, int] | None) -> None:
    """Refuse sizes that no packed picture has, `whole` being what it was cut from.

    Raises:
        KeyError, TypeError, ValueError: the sizes are wrong.
    """
    parts = [(width, 0, width), (height, 0, height)]
    if whole is not None:
        parts = [(width, whole["left"], whole["width"]), (height, whole["top"], whole["height"])]
    for part, start, side in parts:
        if not start >= 0 < part <= side - start:
            raise ValueError(f"a video of {width} x {height} pixels, cropped from {whole}")
    if parts[0][2] * parts[1][2] > MAXIMUM_SOURCE_PIXELS:
        raise ValueError(f"a video of {parts[0][2]} x {parts[1][2]} pixels")


def check_set(shards: ShardSet, config: DataConfig) -> None:
    """Refuse a set that lacks what is to be read, or that was packed with another frame choice.

    Raises:
        ValueError: names the set and the fix.
    """
    has = shards.modality
    of_run = f"set data.modality to {has} (in fine-tuning classifier.mode to {has}only)"
    shards.check_has(config.modality, of_run)
    if "video" in config.modalities:
        check_frame_choice(shards, config.frame_choice)


def check_frame_choice(shards: ShardSet, frame_choice: str) -> None:
    """Refuse a frame choice that the set was not packed with.

    Raises:
        ValueError: names the set, both choices and the fix.
    """
    by_ten = shards.tier == "frames" or frame_choice == "published"
    if by_ten and shards.frame_choice != frame_choice:
        raise ValueError(
            f"data.frame_choice is {frame_choice}, but the ten frames in {shards.folder} were "
            f"chosen {shards.frame_choice}; set data.frame_choice to {shards.frame_choice}, or "
            f"pack again with --frame-choice {frame_choice}"
        )
