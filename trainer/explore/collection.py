"""The clips of the page: their embeddings in memory, their media where shards are at hand."""

from dataclasses import dataclass
from typing import Any

import matplotlib
import numpy as np
import pyarrow.compute as pc
import torch
from av.error import FFmpegError

from cavmae.dataloaders.constants import HOP_SAMPLES, MIDDLE_FRAME, WINDOW_SAMPLES
from cavmae.dataloaders.media.audio_codec import decode_audio
from cavmae.dataloaders.media.decode_frame import FrameError
from cavmae.dataloaders.media.log_mel import log_mel
from cavmae.dataloaders.shards.shard_set import ShardSet
from cavmae.dataloaders.tools.inspect import frame_pixels
from cavmae.trainer.embeddings.faiss_index import Ranked, nearest
from cavmae.trainer.embeddings.parquet_store import EmbeddingSet
from cavmae.trainer.inference.media import Window

MEL_BINS = 128


@dataclass(frozen=True, eq=False)  # Gradio's states are told apart by their hash
class Subject:
    """What is looked at: a clip of the set, or a file.

    Attributes:
        name: for people; it may hold anything.
        facts: lines about it, likewise.
        window: what the model hears and sees of it, of a file its first window; None: no media at
            hand.
        vectors: (width,) float32 by column, of those it has.
        row: of a clip of the set.
    """

    name: str
    facts: str
    window: Window | None
    vectors: dict[str, np.ndarray]
    row: int | None = None


class Collection:
    """The clips of a folder of embeddings, all of whose vectors are read into memory: 4 bytes x
    rows x width for each modality.

    Args:
        embeddings: the folder.
        shards: that they come from; None: not at hand.

    Attributes:
        embeddings, shards: those.
        table: a row for each clip, without embeddings.
        vectors: (rows, width) float32 of length 1, by column.

    Raises:
        ValueError: a file is damaged, or a vector is not finite or all zeros.
        OSError: a file can't be read.
    """

    def __init__(self, embeddings: EmbeddingSet, shards: ShardSet | None) -> None:
        self.embeddings, self.shards = embeddings, shards
        self.table = embeddings.all_clips()
        self.vectors = {column: self._read(column) for column in embeddings.vectors}

    def _read(self, column: str) -> np.ndarray:
        found = np.empty((self.embeddings.rows, self.embeddings.origin.width), np.float32)
        first = 0
        for some in self.embeddings.unit_vectors(column):
            found[first : first + len(some)] = some
            first += len(some)
        return found

    def __len__(self) -> int:
        return self.embeddings.rows

    def clip(self, row: int) -> dict[str, Any]:
        """Return what is known of a clip: every column but embeddings."""
        return self.table.slice(row, 1).to_pylist()[0]

    def row_of(self, sample_id: str) -> int:
        """Find a clip by its id.

        Raises:
            ValueError: there is none.
        """
        row: int = pc.index(self.table["sample_id"], sample_id).as_py()
        if row < 0:
            raise ValueError(
                f"no clip has the id {sample_id!r}; give one such as {self.clip(0)['sample_id']}"
            )
        return row

    def nearest(self, column: str, vector: np.ndarray, top: int) -> Ranked:
        """Rank clips by the cosine of a column with a vector, (width,) float32 of any length.

        Raises:
            ValueError: the vector is not finite, or all zeros.
        """
        length = np.linalg.norm(vector)
        if not np.isfinite(length) or length == 0:
            raise ValueError("its embedding is not finite, or all zeros; look at the weights")
        return nearest([self.vectors[column]], vector / length, min(top, len(self)))

    def window(self, row: int) -> Window | None:
        """Decode the sound and the middle frame of a clip; None: no media at hand.

        Raises:
            OSError: the shard can't be read.
            ValueError, FFmpegError, FrameError: the clip is damaged.
        """
        if self.shards is None:
            return None
        place = self.shards.at(self.clip(row)["position"])
        described = self.shards.description(*place)
        audio = frame = None
        if "audio" in described:
            stored = decode_audio(self.shards.member(*place, self.shards.audio_codec))
            audio = (stored / 32768).astype(np.float32)
        if "video" in described:
            frame = frame_pixels(self.shards, *place, MIDDLE_FRAME)
        return Window((0.0, self.clip(row)["seconds"]), audio, frame)

    def subject(self, row: int) -> Subject:
        """Return a clip of the set as what is looked at; a clip that does not decode has no window,
        and its facts say why."""
        clip = self.clip(row)
        facts = [
            f"labels: {', '.join(clip['labels']) or 'none'}",
            f"source: {clip['source_path']} from {clip['source_start_seconds']:g} s, "
            f"{clip['seconds']:.1f} s",
        ]
        try:
            window = self.window(row)
            facts += ["no media at hand: the shards are not where they were"] * (window is None)
        except (OSError, ValueError, FFmpegError, FrameError) as error:
            window = None
            facts.append(f"no media: {error}")
        vectors = {column: values[row] for column, values in self.vectors.items()}
        return Subject(clip["sample_id"], "\n".join(facts), window, vectors, row)


def spectrogram(waveform: np.ndarray) -> np.ndarray:
    """Draw the log-mel of (samples,) float32 at 16 kHz: (mel bins, frames, 3) uint8, low below."""
    frames = max(1, (len(waveform) - WINDOW_SAMPLES) // HOP_SAMPLES + 1)
    heard = log_mel([torch.from_numpy(waveform)], MEL_BINS, frames, torch.device("cpu"))
    values = heard[0].numpy().T[::-1]  # (mel bins, frames)
    lowest, highest = np.percentile(values, (2, 100))  # digital silence is far below all else
    scaled = (values - lowest) / max(highest - lowest, 1e-6)
    return (matplotlib.colormaps["magma"](scaled.clip(0, 1))[..., :3] * 255).astype(np.uint8)
