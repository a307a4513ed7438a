"""What a reader worker does for one place of the plan: fetch the bytes, choose frame and crop.

Runs in worker processes, so it imports neither torch nor DALI. Everything random is drawn from the
position in the plan (`random_streams`), hence does not depend on which worker reads when. Damaged
samples are answers, not exceptions; a shard that cannot be read, however often it was tried, is an
answer too and ends the run.
"""

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from cavmae.dataloaders.config import Augmentation
from cavmae.dataloaders.loading.augment import Box, is_mirrored, middle_box, random_box
from cavmae.dataloaders.media.decode_frame import FrameError, decode_frame, decode_original
from cavmae.dataloaders.sampling.philox import random_words
from cavmae.dataloaders.shards.shard_set import AUDIO_HZ, FRAMES_PER_CLIP, ShardError, ShardSet

SHORTEST_AUDIO_SAMPLES = 400
"""One window of the log-mel; less would make a constant input."""
LARGEST_SIDE = 1 << 14
"""Pixels; packing writes far less, and decoders would want memory for what is stated."""
MIDDLE_FRAME = FRAMES_PER_CLIP // 2
"""The one of the ten frames that is used where nothing is drawn."""

PARTNER_DRAWS = 1 << 61
"""Counters of the draws for clips that are mixed into others start here, beyond every position that
a run can reach."""

CPU_VIDEO_CODECS = ("vp9", "mjpeg")
"""What DALI decodes without a GPU."""
NVDEC_SMALLEST_SIDE = {"vp9": 128, "h264": 48, "mjpeg": 64}
"""Pixels; NVDEC refuses smaller frames (NVDEC Video Decoder API Programming Guide, table 1)."""


@dataclass(frozen=True)
class ReaderSettings:
    """What all clips of one loader have in common."""

    shards: ShardSet
    seed: int
    frame_choice: Literal["by_time", "published"]
    image_size: int
    audio_samples: int
    """Samples that the log-mel looks at."""
    draw_frame: bool
    """Draw the frame for the position; otherwise take the middle one of the ten."""
    gpu: int | None
    """Number of the GPU on which DALI decodes frames; None: the CPU does."""
    frames_per_clip: int = 1
    window_seconds: float = 0.0
    """Part of the clip that is heard and seen; 0: from the beginning."""
    augmentation: Augmentation | None = None
    """None: nothing is drawn for the position, as in validation."""


@dataclass(frozen=True)
class ReadTask:
    """One place of the plan and the sample to read for it."""

    position: int
    epoch: int
    shard: int
    sample: int
    partner: bool = False
    """It is mixed into the clip at this position."""

    @property
    def draw(self) -> int:
        """Counter of what is drawn for the clip (window, frames, crop, flip)."""
        return self.position + PARTNER_DRAWS * self.partner


@dataclass(frozen=True)
class EncodedClip:
    """A clip ready for the decoders."""

    task: ReadTask
    sample_id: str
    labels: tuple[str, ...]
    sound: bytes
    """FLAC or WAV."""
    pictures: tuple[bytes, ...]
    """JPEGs or one-frame videos; one zero byte each where `pixels` are given."""
    pixels: tuple[np.ndarray, ...] | None
    """`(height, width, 3)` uint8 each, where DALI has no decoder for the video."""
    box: Box
    """Of the pictures, what the model sees."""
    mirrored: bool
    frame_seconds: tuple[float, ...]
    audio_seconds: tuple[float, float]
    """Start and length of the audio that is heard."""


@dataclass(frozen=True)
class BadSample:
    """The sample can never be used."""

    task: ReadTask
    sample_id: str
    reason: str
    detail: str


@dataclass(frozen=True)
class StorageError:
    """A shard could not be read, however often it was tried; says nothing about the sample."""

    detail: str


class ClipReader:
    """Callable that turns a `ReadTask` into an `EncodedClip`, `BadSample` or `StorageError`.

    Pickled without open files.
    """

    def __init__(self, settings: ReaderSettings):
        self.settings = settings
        self.shards = settings.shards

    def __call__(self, task: ReadTask) -> EncodedClip | BadSample | StorageError:
        try:
            sample_id = self.shards.sample_id(task.shard, task.sample)
            try:
                return self._read(task, sample_id)
            except ShardError as error:
                return BadSample(task, sample_id, error.reason, error.detail)
            except FrameError as error:
                return BadSample(task, sample_id, "video_unreadable", str(error))
        except OSError as error:
            return StorageError(
                f"{error}; check the storage and start again: the run goes on where it was"
            )

    def _read(self, task: ReadTask, sample_id: str) -> EncodedClip | BadSample:
        description = self.shards.description(task.shard, task.sample)
        try:
            labels = tuple(str(label) for label in description["labels"])
            audio_samples = int(description["audio"]["samples"])
            height = int(description["video"]["height"])
            width = int(description["video"]["width"])
            window = self._window(task.draw, audio_samples / AUDIO_HZ)
            frames = self._choose_frames(task.draw, description, window)
            if not 0 < min(height, width) <= max(height, width) <= LARGEST_SIDE:
                raise ValueError(f"a video of {width} x {height} pixels")
        except (KeyError, TypeError, ValueError, IndexError, OverflowError) as error:
            return BadSample(task, sample_id, "bad_schema", f"{type(error).__name__}: {error}")
        if audio_samples < SHORTEST_AUDIO_SAMPLES:
            return BadSample(task, sample_id, "audio_too_short", f"{audio_samples} samples")
        pictures, pixels = self._pictures(task, frames, height, width)
        augmentation, size = self.settings.augmentation, self.settings.image_size
        box, mirrored = middle_box(height, width, size), False
        if augmentation is not None:
            seed = self.settings.seed
            box = random_box(height, width, size, augmentation, seed, task.draw)
            mirrored = is_mirrored(augmentation, seed, task.draw)
        longest = self.settings.audio_samples / AUDIO_HZ
        start, length = window or (0.0, audio_samples / AUDIO_HZ)
        return EncodedClip(
            task,
            sample_id,
            labels,
            self.shards.member(task.shard, task.sample, self.shards.audio_codec),
            pictures,
            pixels,
            box,
            mirrored,
            tuple(seconds for _, _, seconds in frames),
            (start, min(length, longest)),
        )

    def _pictures(
        self, task: ReadTask, frames: list[tuple[int, int, float]], height: int, width: int
    ) -> tuple[tuple[bytes, ...], tuple[np.ndarray, ...] | None]:
        """The frames, as `_choose_frames` gives them, and their pixels where DALI has no
        decoder."""
        shard, sample = task.shard, task.sample
        nothing = (b"\0",) * len(frames)
        if self.shards.tier == "frames":
            names = [f"{chosen}.jpg" for chosen, _, _ in frames]
            return tuple(self.shards.member(shard, sample, name) for name in names), None
        if self.shards.tier == "original":
            source = self.shards.member(shard, sample, "source")
            return nothing, tuple(
                decode_original(source, seconds, width, height) for _, _, seconds in frames
            )
        videos = tuple(self.shards.frame(shard, sample, index) for _, index, _ in frames)
        if self._dali_decodes(height, width):
            return videos, None
        return nothing, tuple(decode_frame(video) for video in videos)

    def _window(self, draw: int, clip_seconds: float) -> tuple[float, float] | None:
        """Start and length of what is heard and seen; None: the clip from its beginning."""
        if not self.settings.window_seconds:
            return None
        length = min(self.settings.window_seconds, clip_seconds)
        share = 0.5
        if self.settings.draw_frame:
            share = int(random_words(self.settings.seed, "window", draw, 1)[0]) / 2**32
        start = int(share * (clip_seconds - length) * AUDIO_HZ) / AUDIO_HZ
        return start, length

    def _choose_frames(
        self, draw: int, description: dict[str, Any], window: tuple[float, float] | None
    ) -> list[tuple[int, int, float]]:
        """Of each frame: its place among the ten, its index in the video, and its time.

        Each comes from its own equal part of the window. Only the `frames` tier is bound to the
        ten: `by_time` shows any moment of the others; the first number has no meaning then.
        """
        count = self.settings.frames_per_clip
        inside = [0.5] * count
        if self.settings.draw_frame:
            words = random_words(self.settings.seed, "frame", draw, count)
            inside = (words / 2.0**32).tolist()
        shares = [(part + share) / count for part, share in enumerate(inside)]
        ten = description["ten_frames"]
        start, length = window or (0.0, float(description["video"]["seconds"]))
        moments = [start + share * length for share in shares]
        any_moment = self.shards.tier != "frames" and self.settings.frame_choice == "by_time"
        if any_moment and (window is not None or self.settings.draw_frame):
            times = np.asarray(description["video"]["times_seconds"], dtype=np.float64)
            shown = np.maximum(0, np.searchsorted(times, moments, side="right") - 1)
            return [(MIDDLE_FRAME, int(index), float(times[index])) for index in shown]
        if window is None:
            places = [int(share * FRAMES_PER_CLIP) for share in shares]
        else:
            ten_seconds = np.array([float(frame["seconds"]) for frame in ten])
            places = [int(np.abs(ten_seconds - moment).argmin()) for moment in moments]
        return [(at, int(ten[at]["index"]), float(ten[at]["seconds"])) for at in places]

    def _dali_decodes(self, height: int, width: int) -> bool:
        codec = str(self.shards.video_codec)
        if self.settings.gpu is not None:
            return min(height, width) >= NVDEC_SMALLEST_SIDE[codec]
        return codec in CPU_VIDEO_CODECS


def check_frame_choice(shards: ShardSet, frame_choice: str) -> None:
    """Refuse to draw frames by a rule that the set was not packed for.

    Raises:
        ValueError: names the set, both rules and the fix.
    """
    by_ten = shards.tier == "frames" or frame_choice == "published"
    if by_ten and shards.frame_choice != frame_choice:
        raise ValueError(
            f"data.frame_choice is {frame_choice}, but the ten frames in {shards.folder} were "
            f"chosen {shards.frame_choice}; set data.frame_choice to {shards.frame_choice}, or "
            f"pack again with --frame-choice {frame_choice}"
        )
