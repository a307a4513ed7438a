"""Fields of the data plane. Imports nothing heavy, so that `--help` answers at once."""

import math
import os
from dataclasses import dataclass
from typing import Annotated, Literal

from cavmae.dataloaders.shards.storage import CacheSettings
from cavmae.field_checks import (
    CheckedFields,
    Fraction,
    Limit,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
)


@dataclass(frozen=True)
class Augmentation(CheckedFields, section="data.augmentation"):
    """Changes of training clips, all drawn for a clip's place in the plan; published pretraining
    has none.

    Raises:
        ValueError: a value out of its range.
    """

    min_crop_area: Annotated[
        float, Limit(lambda x: 0 < x <= 1, "a fraction above 0 and up to 1")
    ] = 1.0
    """Least share of a frame's area that a random crop takes; 1: the middle, as published."""
    flip: bool = False
    """Flip frames left to right, half of the time."""
    frequency_mask: NonNegativeInt = 0
    """Bins of the log-mel at most that are masked (published fine-tuning: 48); 0: none."""
    time_mask: NonNegativeInt = 0
    """Frames of the log-mel at most that are masked (published fine-tuning: 192); 0: none."""
    noise: bool = False
    """Add noise to the log-mel and shift it in time, as published fine-tuning does."""
    mixup_prob: Fraction = 0.0
    """Share of the clips that another clip of the training set is mixed into, sound and frames
    (published fine-tuning: 0.5); 0: none."""

    @property
    def changes_sound(self) -> bool:
        return bool(self.frequency_mask or self.time_mask or self.noise)


@dataclass(frozen=True)
class DataConfig(CheckedFields, section="data"):
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
    cache_gigabytes: NonNegativeFloat = 100.0
    """Of those pieces at most; 0: nothing is kept, and each clip is fetched by itself."""
    frame_choice: Literal["by_time", "published"] = "by_time"
    """`by_time`: the frame shown at a time drawn from the clip. `published`: one of the ten frame
    indexes of the original code, which takes the frame before the index that it computes."""
    frames_per_clip: PositiveInt = 1
    """Frames of a clip, each from its own equal part of what is heard. The models here take 1."""
    window_seconds: NonNegativeFloat = 0.0
    """Length of the part of a clip that is heard and seen, drawn anew each time (validation: the
    middle one); 0: the clip's beginning, as published."""
    augmentation: Augmentation = Augmentation()
    log_mel_mean: float = -5.081
    """Subtracted from the log-mel (natural log); the published AudioSet mean."""
    log_mel_std: PositiveFloat = 4.4849
    """The log-mel is divided by this after the mean is subtracted; the published value."""
    shuffle_window: PositiveInt = 4096
    """Samples of a lane among which the order is shuffled (whole shards are shuffled as well)."""
    reader_workers: PositiveInt = 2
    """Processes per rank that read shards."""
    decode_threads: PositiveInt = 2
    """CPU threads per rank that decode."""
    video_pipelines: PositiveInt = 1
    """DALI pipelines per rank that take turns; on a GPU each keeps about one NVDEC busy."""
    prefetch_batches: PositiveInt = 2
    """Decoded micro-batches kept ready per rank."""
    max_bad_fraction: Fraction = 0.01
    """Share of the clips seen that may be unreadable before the run stops with a table of them.
    The first ten bad clips never stop it."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.mixture and len(self.mixture) != len(self.train_folders):
            raise ValueError(
                f"data.mixture has {len(self.mixture)} shares and data.train names "
                f"{len(self.train_folders)} sets; give one share for each"
            )
        if not all(0 < share < math.inf for share in self.mixture):
            raise ValueError(f"data.mixture is {self.mixture}; use shares above 0")

    @property
    def train_folders(self) -> list[str]:
        """Folders or URLs of the training sets."""
        return [folder.strip() for folder in self.train.split(",") if folder.strip()]

    @property
    def cache(self) -> CacheSettings:
        folder = os.path.expanduser(self.cache_folder)
        return CacheSettings(folder, int(self.cache_gigabytes * 1e9))
