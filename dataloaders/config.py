"""Fields of the data plane. Imports nothing heavy, so that `--help` answers at once."""

import math
import os
from dataclasses import dataclass
from typing import Annotated, Literal

from cavmae.dataloaders.constants import HOP_SAMPLES, WINDOW_SAMPLES, Modalities
from cavmae.field_checks import (
    CheckedFields,
    Fraction,
    Limit,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
)

CPU_DECODE_THREADS, GPU_DECODE_THREADS = 2, 8
"""Of a pipeline by default. DALI keeps 100 NVDEC decoders, and each thread may need one of each of
the 11 sizes of frames (`media/video_size.py`)."""


@dataclass(frozen=True)
class ClipShape:
    """The clip shape that a model expects."""

    audio_frames: int
    """Frames of the log-mel, one every 10 ms; shorter clips are padded, longer ones cut."""
    mel_bins: int
    """Mel filters."""
    image_size: int
    """Height and width of a video frame in pixels."""

    @property
    def audio_samples(self) -> int:
        """Audio samples that the log-mel covers."""
        return (self.audio_frames - 1) * HOP_SAMPLES + WINDOW_SAMPLES


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
class Augmentation(CheckedFields, section="data.augmentation"):
    """Augmentation of training clips, a function of the clip's position in the sample plan;
    published pretraining has none."""

    min_crop_area: Annotated[
        float, Limit(lambda x: 0 < x <= 1, "a fraction above 0 and up to 1")
    ] = 1.0
    """Minimum fraction of a frame's area for random crops; 1: center crop, as published."""
    flip: bool = False
    """Flip frames horizontally with probability 0.5."""
    frequency_mask: NonNegativeInt = 0
    """Maximum mel bins masked (SpecAugment; published fine-tuning: 48); 0: none."""
    time_mask: NonNegativeInt = 0
    """Maximum time frames masked (SpecAugment; published fine-tuning: 192); 0: none."""
    noise: bool = False
    """Add noise to the log-mel and shift it in time, as in published fine-tuning."""
    mixup_prob: Fraction = 0.0
    """Probability that another training clip is mixed in (mixup), audio and frames (published
    fine-tuning: 0.5); 0: no mixup."""

    @property
    def changes_log_mel(self) -> bool:
        return bool(self.frequency_mask or self.time_mask or self.noise)


@dataclass(frozen=True)
class DataConfig(CheckedFields, section="data"):
    """Where the clips come from and how they are read.

    Raises:
        ValueError: a field is out of range, or `mixture` does not fit `train`.
    """

    train: str = ""
    """Folder or URL (s3://, gs://, https://) of one tier of packed shards to train on, such as
    `shards/video`; several of them, separated by commas, are mixed."""
    mixture: tuple[float, ...] = ()
    """Relative weight of each of several training sets; empty: all clips are equally likely."""
    sampling: Literal["uniform", "weighted"] = "uniform"
    """`weighted`: sample clips of rare classes more often, by the `weights.npy` that packing
    writes; the length of an epoch stays the same."""
    validation: str = ""
    """Folder or URL of packed validation shards; empty: no validation."""
    modality: Modalities = "both"
    """What is read and decoded of a clip, and what the model computes: sound and pictures, or one
    of them alone. In fine-tuning `classifier.mode` decides."""
    cache_folder: str = "~/.cache/cavmae/shards"
    """Cache of remote shards on each node, shared by its ranks."""
    cache_gigabytes: NonNegativeFloat = 100.0
    """Maximum size of the cache; 0: no cache, each clip is fetched on its own."""
    frame_choice: Literal["by_time", "published"] = "by_time"
    """`by_time`: the frame shown at a time drawn from the clip. `published`: one of the ten frame
    indices of the original code, which takes the frame before the index that it computes."""
    frames_per_clip: PositiveInt = 1
    """Frames per clip, one from each of as many equal time segments. These models take 1."""
    window_seconds: NonNegativeFloat = 0.0
    """Length of a random crop in time of each clip, audio and frames (validation: the center
    crop); 0: the beginning of the clip, as published."""
    augmentation: Augmentation = Augmentation()
    log_mel_mean: float = -5.081
    """Subtracted from the log-mel (natural log); the published AudioSet mean."""
    log_mel_std: PositiveFloat = 4.4849
    """The log-mel is divided by this after the mean is subtracted; the published value."""
    shuffle_window: PositiveInt = 4096
    """Samples of a lane that are shuffled together (the order of shards is shuffled as well)."""
    reader_workers: PositiveInt = 2
    """Reader processes per rank."""
    decode_threads: NonNegativeInt = 0
    """Threads of each decode pipeline; each decodes one frame of a batch at a time, on a GPU too.
    0: 2 on a CPU, 8 on a GPU."""
    video_pipelines: PositiveInt = 1
    """DALI pipelines per rank, used in turn: with 2 the next batch is decoded while one is
    finished. Each takes its own threads and memory."""
    jpeg_hardware_load: Fraction = 1.0
    """Fraction of a batch's JPEGs for the JPEG engine of a GPU that has one. Below 1 the place in a
    batch decides between two decoders, whose pictures differ a little."""
    jpeg_width_hint: NonNegativeInt = 0
    """Pixels; with `jpeg_height_hint` the size of picture for which that engine allocates memory at
    the start; 0: as pictures come."""
    jpeg_height_hint: NonNegativeInt = 0
    """Pixels; see `jpeg_width_hint`."""
    prefetch_batches: PositiveInt = 2
    """Decoded micro-batches to prefetch per rank."""
    max_bad_fraction: Fraction = 0.01
    """Fraction of unreadable clips, of those seen, above which the run stops with a table of them.
    The first ten bad clips never stop it."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.mixture and len(self.mixture) != len(self.train_folders):
            raise ValueError(
                f"data.mixture has {len(self.mixture)} weights and data.train names "
                f"{len(self.train_folders)} sets; give one weight for each"
            )
        if not all(0 < weight < math.inf for weight in self.mixture):
            raise ValueError(f"data.mixture is {self.mixture}; use weights above 0")

    @property
    def train_folders(self) -> list[str]:
        """Folders or URLs of the training sets; a folder's own name may have commas."""
        if "," in self.train and os.path.isdir(self.train):
            return [self.train]
        return [folder.strip() for folder in self.train.split(",") if folder.strip()]

    @property
    def modalities(self) -> tuple[Literal["audio", "video"], ...]:
        """What is read, one by one."""
        return ("audio", "video") if self.modality == "both" else (self.modality,)

    def threads(self, *, gpu: bool) -> int:
        """Threads of each decode pipeline."""
        return self.decode_threads or (GPU_DECODE_THREADS if gpu else CPU_DECODE_THREADS)

    @property
    def cache(self) -> CacheSettings:
        folder = os.path.expanduser(self.cache_folder)
        return CacheSettings(folder, int(self.cache_gigabytes * 1e9))
