"""Data configuration. Imports nothing heavy, so that `--help` is fast."""

import math
import os
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class CacheSettings:
    """How a node caches remote shards.

    Attributes:
        folder: on a disk of the node; processes that name the same one share it.
        limit_bytes: size of the cache; 0: nothing is cached.
        chunk_bytes: size of a chunk.
    """

    folder: str
    limit_bytes: int
    chunk_bytes: int = 8 << 20


@dataclass(frozen=True)
class Augmentation:
    """Augmentation of training clips, drawn for a clip's position in the plan.

    Published pretraining has none.

    Raises:
        ValueError: a field is out of range.
    """

    min_crop_area: float = 1.0
    """Minimum area of a random resized crop, as a fraction of the frame; 1: center crop, as
    published."""
    flip: bool = False
    """Flip frames horizontally, half of the time."""
    frequency_mask: int = 0
    """Maximum number of masked bins of the log-mel (published fine-tuning: 48); 0: none."""
    time_mask: int = 0
    """Maximum number of masked frames of the log-mel (published fine-tuning: 192); 0: none."""
    noise: bool = False
    """Add noise to the log-mel and roll it in time, as in published fine-tuning."""
    mixup_prob: float = 0.0
    """Probability of mixup: audio and frames of another training clip are mixed in (published
    fine-tuning: 0.5)."""

    def __post_init__(self) -> None:
        if not 0 < self.min_crop_area <= 1:
            raise ValueError(
                f"data.augmentation.min_crop_area is {self.min_crop_area}; "
                f"use a share above 0 and up to 1"
            )
        if not 0 <= self.mixup_prob <= 1:
            raise ValueError(
                f"data.augmentation.mixup_prob is {self.mixup_prob}; use a share from 0 to 1"
            )
        for field in ("frequency_mask", "time_mask"):
            if getattr(self, field) < 0:
                raise ValueError(
                    f"data.augmentation.{field} is {getattr(self, field)}; use 0 or more"
                )

    @property
    def changes_log_mel(self) -> bool:
        return bool(self.frequency_mask or self.time_mask or self.noise)


@dataclass(frozen=True)
class DataConfig:
    """Data sets, and how to read them.

    Raises:
        ValueError: a field is out of range.
    """

    train: str = ""
    """Training set: a tier of packed shards, such as `shards/video`, as a folder or URL (s3://,
    gs://, https://); or several, separated by commas."""
    mixture: tuple[float, ...] = ()
    """Share of each of several training sets, in any unit; empty: all clips alike."""
    sampling: Literal["uniform", "weighted"] = "uniform"
    """`weighted`: clips of rare classes are sampled more often, by the `weights.npy` that packing
    writes; the length of an epoch stays the same."""
    validation: str = ""
    """Validation set: folder or URL of packed shards; empty: no validation."""
    cache_folder: str = "~/.cache/cavmae/shards"
    """Cache of remote shards on each node, shared by its ranks."""
    cache_gigabytes: float = 100.0
    """Size limit of the cache; 0: no cache, every clip is fetched separately."""
    frame_choice: Literal["by_time", "published"] = "by_time"
    """`by_time`: the frame shown at a time drawn from the clip. `published`: one of the ten frame
    indexes of the original code, which takes the frame before the index that it computes."""
    frames_per_clip: int = 1
    """Frames of a clip, each from its own equal part of the window. The models here take 1."""
    window_seconds: float = 0.0
    """Length of the window of a clip that is used, drawn anew each time (validation: the middle
    one); 0: the start of the clip, as published."""
    augmentation: Augmentation = Augmentation()
    log_mel_mean: float = -5.081
    """Subtracted from the log-mel (natural log); the published AudioSet mean."""
    log_mel_std: float = 4.4849
    """Divides the log-mel after the mean is subtracted; the published AudioSet std."""
    shuffle_window: int = 4096
    """Samples of a lane that are shuffled together (whole shards are shuffled as well)."""
    reader_workers: int = 2
    """Processes per rank that read shards."""
    decode_threads: int = 2
    """Decoding CPU threads per rank."""
    video_pipelines: int = 1
    """Alternating DALI pipelines per rank; on a GPU each keeps about one NVDEC busy."""
    prefetch_batches: int = 2
    """Decoded micro-batches prefetched per rank."""
    max_bad_fraction: float = 0.01
    """Fraction of unreadable clips above which the run stops and lists them. The first ten never
    stop it."""

    def __post_init__(self) -> None:
        for field in (
            "shuffle_window",
            "reader_workers",
            "decode_threads",
            "prefetch_batches",
            "frames_per_clip",
            "video_pipelines",
        ):
            if getattr(self, field) < 1:
                raise ValueError(f"data.{field} is {getattr(self, field)}; use 1 or more")
        if self.mixture and len(self.mixture) != len(self.train_folders):
            raise ValueError(
                f"data.mixture has {len(self.mixture)} shares and data.train names "
                f"{len(self.train_folders)} sets; give one share for each"
            )
        if not all(0 < share < math.inf for share in self.mixture):
            raise ValueError(f"data.mixture is {self.mixture}; use shares above 0")
        if not 0 <= self.cache_gigabytes < math.inf:
            raise ValueError(f"data.cache_gigabytes is {self.cache_gigabytes}; use 0 or more")
        if not 0 <= self.window_seconds < math.inf:
            raise ValueError(f"data.window_seconds is {self.window_seconds}; use 0 or more")
        if not 0 <= self.max_bad_fraction <= 1:
            raise ValueError(
                f"data.max_bad_fraction is {self.max_bad_fraction}; use a share from 0 to 1"
            )
        if self.log_mel_std <= 0:
            raise ValueError(f"data.log_mel_std is {self.log_mel_std}; use a value above 0")

    @property
    def train_folders(self) -> list[str]:
        """Folders or URLs of the training sets."""
        return [folder.strip() for folder in self.train.split(",") if folder.strip()]

    @property
    def cache(self) -> CacheSettings:
        folder = os.path.expanduser(self.cache_folder)
        return CacheSettings(folder, int(self.cache_gigabytes * 1e9))
