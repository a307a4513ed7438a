"""What a reader worker does for one place of the plan: fetch the bytes, choose frame and crop.

Runs in worker processes, so it imports neither torch nor DALI. Everything random is drawn from the
position in the plan (`random_streams`), hence does not depend on which worker reads when. Damaged
samples are answers, not exceptions; a shard that cannot be read, however often it was tried, is an
answer too and ends the run.
"""

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from cavmae.dataloaders.one_frame import FrameError, cut_frame, decode_frame
from cavmae.dataloaders.random_streams import random_words
from cavmae.dataloaders.shards import AUDIO_HZ, FRAMES_PER_CLIP, ShardError, ShardSet

SHORTEST_AUDIO_SAMPLES = 400
"""One window of the log-mel; less would make a constant input."""
LARGEST_SIDE = 1 << 14
"""Pixels; packing writes far less, and decoders would want memory for what is stated."""
MIDDLE_FRAME = FRAMES_PER_CLIP // 2
"""The one of the ten frames that is used where nothing is drawn."""

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


@dataclass(frozen=True)
class ReadTask:
    """One place of the plan and the sample to read for it."""

    position: int
    epoch: int
    shard: int
    sample: int


@dataclass(frozen=True)
class EncodedClip:
    """A clip ready for the decoders."""

    task: ReadTask
    sample_id: str
    labels: tuple[str, ...]
    flac: bytes
    picture: bytes
    """A JPEG or a one-frame video; one zero byte where `pixels` are given."""
    pixels: np.ndarray | None
    """`(height, width, 3)` uint8 where DALI has no decoder for the video."""
    resized: tuple[int, int]
    """Height and width before the crop."""
    crop: tuple[float, float]
    """Top and left of the crop, each as a share of what the crop leaves over."""
    frame_seconds: float
    audio_seconds: tuple[float, float]
    """Start and length of the audio that is heard."""


@dataclass(frozen=True)
class Damage:
    """The sample can never be used."""

    task: ReadTask
    sample_id: str
    reason: str
    detail: str


@dataclass(frozen=True)
class ReadFailure:
    """A shard could not be read, however often it was tried; says nothing about the sample."""

    detail: str


class ClipReader:
    """Callable that turns a `ReadTask` into an `EncodedClip`, `Damage` or `ReadFailure`.

    Pickled without open files.
    """

    def __init__(self, settings: ReaderSettings):
        self.settings = settings
        self.shards = settings.shards

    def __call__(self, task: ReadTask) -> EncodedClip | Damage | ReadFailure:
        try:
            sample_id = self.shards.sample_id(task.shard, task.sample)
            try:
                return self._read(task, sample_id)
            except ShardError as error:
                return Damage(task, sample_id, error.reason, error.detail)
            except FrameError as error:
                return Damage(task, sample_id, "video_unreadable", str(error))
        except OSError as error:
            return ReadFailure(
                f"{error}; check the storage and start again: the run goes on where it was"
            )

    def _read(self, task: ReadTask, sample_id: str) -> EncodedClip | Damage:
        description = self.shards.description(task.shard, task.sample)
        try:
            labels = tuple(str(label) for label in description["labels"])
            audio_samples = int(description["audio"]["samples"])
            height = int(description["video"]["height"])
            width = int(description["video"]["width"])
            chosen, index, frame_seconds = self._choose_frame(task.position, description)
            if not 0 < min(height, width) <= max(height, width) <= LARGEST_SIDE:
                raise ValueError(f"a video of {width} x {height} pixels")
        except (KeyError, TypeError, ValueError, IndexError, OverflowError) as error:
            return Damage(task, sample_id, "bad_schema", f"{type(error).__name__}: {error}")
        if audio_samples < SHORTEST_AUDIO_SAMPLES:
            return Damage(task, sample_id, "audio_too_short", f"{audio_samples} samples")
        extension = "mp4" if self.shards.tier == "video" else f"{chosen}.jpg"
        picture = self.shards.member(task.shard, task.sample, extension)
        pixels = None
        if self.shards.tier == "video" and self._dali_decodes(height, width):
            picture = cut_frame(picture, index)
        elif self.shards.tier == "video":
            picture, pixels = b"\0", decode_frame(picture, index)
        resized, crop = resize_and_crop(height, width, self.settings.image_size)
        heard = min(audio_samples, self.settings.audio_samples)
        return EncodedClip(
            task,
            sample_id,
            labels,
            self.shards.member(task.shard, task.sample, "flac"),
            picture,
            pixels,
            resized,
            crop,
            frame_seconds,
            (0.0, heard / AUDIO_HZ),
        )

    def _choose_frame(self, position: int, description: dict[str, Any]) -> tuple[int, int, float]:
        """Which of the ten frames, its index in the video, and its time.

        The `video` tier is not bound to the ten: `by_time` there draws any moment of the clip. The
        first number has no meaning then.
        """
        ten_frames = description["ten_frames"]
        chosen = MIDDLE_FRAME
        if self.settings.draw_frame:
            word = int(random_words(self.settings.seed, "frame", position, 1)[0])
            if self.shards.tier == "video" and self.settings.frame_choice == "by_time":
                times = np.asarray(description["video"]["times_seconds"], dtype=np.float64)
                moment = word / 2**32 * float(description["video"]["seconds"])
                index = max(0, int(np.searchsorted(times, moment, side="right")) - 1)
                return chosen, index, float(times[index])
            chosen = word * FRAMES_PER_CLIP >> 32
        frame = ten_frames[chosen]
        return chosen, int(frame["index"]), float(frame["seconds"])

    def _dali_decodes(self, height: int, width: int) -> bool:
        codec = str(self.shards.video_codec)
        if self.settings.gpu is not None:
            return min(height, width) >= NVDEC_SMALLEST_SIDE[codec]
        return codec in CPU_VIDEO_CODECS


def resize_and_crop(
    height: int, width: int, size: int
) -> tuple[tuple[int, int], tuple[float, float]]:
    """Short side to `size`, then the middle `size` x `size` pixels, rounded as torchvision does.

    Returns:
        Height and width after the resize; top and left of the crop, each as a share (0 to 1) of
        the pixels that the crop leaves over.
    """
    short = min(height, width)
    resized = (size * height // short, size * width // short)
    left_over = [side - size for side in resized]
    start = [round(pixels / 2) for pixels in left_over]
    top, left = (
        pixels / over if over else 0.0 for pixels, over in zip(start, left_over, strict=True)
    )
    return resized, (top, left)


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
