"""Fields of the data plane. Imports nothing heavy, so that `--help` answers at once."""

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
    """Changes of training clips, all drawn for a clip's place in the plan; published pretraining
    has none.

    Raises:
        ValueError: a value out of its range.
    """

    min_crop_area: float = 1.0
    """Least share of a frame's area that a random crop takes; 1: the middle, as published."""
    flip: bool = False
    """Flip frames left to right, half of the time."""
    frequency_mask: int = 0
    """Bins of the log-mel at most that are masked (published fine-tuning: 48); 0: none."""
    time_mask: int = 0
    """Frames of the log-mel at most that are masked (published fine-tuning: 192); 0: none."""
    noise: bool = False
    """Add noise to the log-mel and shift it in time, as published fine-tuning does."""
    mixup_prob: float = 0.0
    """Share of the clips that another clip of the training set is mixed into, sound and frames
    (published fine-tuning: 0.5); 0: none."""

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
    """Where the clips come from and how they are read.

    Raises:
        ValueError: a count or share out of its range.
    """

    train: str = ""
    """Folder of one tier of packed shards to train on, such as `shards/video`, or a URL of it
    (s3://, gs://, https://); several of them, separated by commas, are trained on together."""
    mixture: tuple[float, ...] = ()
    """Share of each of several training sets, in any unit; empty: every clip as often as any."""
    sampling: Literal["uniform", "weighted"] = "uniform"
    """`weighted`: clips of rare classes come more often, by the `weights.npy` that packing writes;
    an epoch is as long as before."""
    validation: str = ""
    """Folder or URL of packed shards that are never trained on; empty: no held-out scores."""
    cache_folder: str = "~/.cache/cavmae/shards"
    """Where a node keeps pieces of remote shards; all its ranks share it."""
    cache_gigabytes: float = 100.0
    """Of those pieces at most; 0: nothing is kept, and each clip is fetched by itself."""
    frame_choice: Literal["by_time", "published"] = "by_time"
    """`by_time`: the frame shown at a time drawn from the clip. `published`: one of the ten frame
    indexes of the original code, which takes the frame before the index that it computes."""
    frames_per_clip: int = 1
    """Frames of a clip, each from its own equal part of what is heard. The models here take 1."""
    window_seconds: float = 0.0
    """Length of the part of a clip that is heard and seen, drawn anew each time (validation: the
    middle one); 0: the clip's beginning, as published."""
    augmentation: Augmentation = Augmentation()
    log_mel_mean: float = -5.081
    """Subtracted from the log-mel (natural log); the published AudioSet mean."""
    log_mel_std: float = 4.4849
    """The log-mel is divided by this after the mean is subtracted; the published value."""
    shuffle_window: int = 4096
    """Samples of a lane among which the order is shuffled (whole shards are shuffled as well)."""
    reader_workers: int = 2
    """Processes per rank that read shards."""
    decode_threads: int = 2
    """CPU threads per rank that decode."""
    video_pipelines: int = 1
    """DALI pipelines per rank that take turns; on a GPU each keeps about one NVDEC busy."""
    prefetch_batches: int = 2
    """Decoded micro-batches kept ready per rank."""
    max_bad_fraction: float = 0.01
    """Share of the clips seen that may be unreadable before the run stops with a table of them.
    The first ten bad clips never stop it."""

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
