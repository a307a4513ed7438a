"""Fields of the data plane. Imports nothing heavy, so that `--help` answers at once."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class DataConfig:
    """Where the clips come from and how they are read.

    Raises:
        ValueError: a count or share out of its range.
    """

    train: str = ""
    """Folder of one tier of packed shards to train on, such as `shards/video`."""
    validation: str = ""
    """Folder of packed shards that are never trained on; empty: no held-out scores."""
    frame_choice: Literal["by_time", "published"] = "by_time"
    """`by_time`: the frame shown at a time drawn from the clip. `published`: one of the ten frame
    indexes of the original code, which takes the frame before the index that it computes."""
    log_mel_mean: float = -5.081
    """Subtracted from the log-mel (natural log); the published AudioSet mean."""
    log_mel_deviation: float = 4.4849
    """The log-mel is divided by this after the mean is subtracted; the published value."""
    shuffle_window: int = 4096
    """Samples of a lane among which the order is shuffled (whole shards are shuffled as well)."""
    reader_workers: int = 2
    """Processes per rank that read shards."""
    decode_threads: int = 2
    """CPU threads per rank that decode."""
    prefetch_batches: int = 2
    """Decoded micro-batches kept ready per rank."""
    maximum_bad_share: float = 0.01
    """Share of the clips seen that may be unreadable before the run stops with a table of them.
    The first ten bad clips never stop it."""

    def __post_init__(self) -> None:
        for field in ("shuffle_window", "reader_workers", "decode_threads", "prefetch_batches"):
            if getattr(self, field) < 1:
                raise ValueError(f"data.{field} is {getattr(self, field)}; use 1 or more")
        if not 0 <= self.maximum_bad_share <= 1:
            raise ValueError(
                f"data.maximum_bad_share is {self.maximum_bad_share}; use a share from 0 to 1"
            )
        if self.log_mel_deviation <= 0:
            raise ValueError(
                f"data.log_mel_deviation is {self.log_mel_deviation}; use a value above 0"
            )
