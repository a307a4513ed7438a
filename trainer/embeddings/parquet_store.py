"""Embeddings of a packed set on disk: one Parquet file for each shard, written atomically.

`origin.json` says what the values come from, so that a restart can't mix two models or two sets;
`embeddings.json` is written last: a folder that has it is complete, and it accounts for every clip.
A file's metadata repeats its origin and names the clips of its shard that were skipped. Rows are in
packing order, vectors are not normalised. What a set lacks, or a run was not trained on, has no
column: pyarrow writes vectors that are null, but can't read them (apache/arrow#35692).
"""

import dataclasses
import hashlib
import json
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch

from cavmae.atomic_write import atomic_write, read_json, remove_leftovers
from cavmae.dataloaders.constants import Modalities
from cavmae.dataloaders.packing.output_folder import locked
from cavmae.dataloaders.shards.format import clip_seconds
from cavmae.dataloaders.shards.shard_set import ShardSet
from cavmae.trainer.config.serialize import load_config, save_config
from cavmae.trainer.evaluation.clip_outputs import OutputBatch, middle_frame

SCHEMA = 1
ORIGIN, DESCRIPTION = "origin.json", "embeddings.json"
VECTORS = {"audio": "audio_embedding", "video": "video_embedding"}
"""Column of each modality."""
_OF_FRAMES = ("frame_seconds", "video_embedding", "frame_embeddings")
ROWS_TOGETHER = 1024
"""Rows that are written, and read, at a time."""

_NOTE = b"cavmae"
"""Key of a file's metadata."""


@dataclass(frozen=True)
class Origin:
    """What the values of a folder of embeddings come from; another origin, another folder.

    Attributes:
        config_sha256: of the run's `config.json`, which says how clips are read.
        frames: of each clip.
        dtype: of stored values.
    """

    weights_sha256: str
    config_sha256: str
    shards_fingerprint: str
    width: int
    frames: int
    dtype: Literal["float32", "float16"]
    schema: int = SCHEMA

    @property
    def torch_dtype(self) -> torch.dtype:
        return getattr(torch, self.dtype)


def file_name(shards: ShardSet, shard: int) -> str:
    """Name the file of a shard: `000003.parquet`."""
    return f"{Path(shards.files[shard].name).stem}.parquet"


@contextmanager
def claimed(out: Path, origin: Origin) -> Iterator[None]:
    """Create the folder, refuse one of another origin, and lock it.

    Raises:
        OSError: it can't be written, holds other things, or another process writes into it.
        ValueError: it was begun with another model, set or settings.
    """
    path = out / ORIGIN
    if path.is_file():
        before = dataclasses.asdict(load_config(path, Origin))
        for name, value in dataclasses.asdict(origin).items():
            if before[name] != value:
                raise ValueError(
                    f"out is {out}, which was begun with {name} {before[name]}, not {value}; give "
                    "another folder, or remove that one"
                )
    elif out.is_dir() and any(out.iterdir()):
        raise FileExistsError(f"out is {out}, which holds other files; give a new or empty folder")
    else:
        out.mkdir(parents=True, exist_ok=True)
        save_config(origin, path)
    with locked(path, f"embedding into {out}"):
        remove_leftovers(out)
        yield


def as_table(
    batch: OutputBatch, shards: ShardSet, origin: Origin, modality: Modalities
) -> pa.Table:
    """Describe clips of a set and their embeddings, a row each."""
    clips, audio, frames = batch.clips, batch.values.get("audio"), batch.values.get("frames")
    places = [shards.at(position) for position in clips.positions.tolist()]
    described = [shards.description(*place) for place in places]
    sources = [one["source"] for one in described]
    columns = {
        "position": clips.positions.numpy(),
        "sample_id": clips.sample_ids,
        "labels": clips.labels,
        "source_path": [source["path"] for source in sources],
        "source_start_seconds": [source["start_seconds"] for source in sources],
        "source_end_seconds": [source["end_seconds"] for source in sources],
        "seconds": [clip_seconds(one) for one in described],
    }
    if audio is not None:
        columns["audio_embedding"] = _lists(audio.numpy())
    if frames is not None and clips.frame_seconds is not None:
        columns["frame_seconds"] = _lists(clips.frame_seconds.numpy())
        columns["video_embedding"] = _lists(middle_frame(frames).contiguous().numpy())
        if origin.frames > 1:
            columns["frame_embeddings"] = _lists(frames.numpy())
    return pa.table(columns, schema=arrow_schema(origin, modality))


def write_file(
    path: Path,
    tables: Sequence[pa.Table],
    origin: Origin,
    modality: Modalities,
    skipped: Sequence[tuple[str, str, str]],
) -> None:
    """Write the file of a shard atomically.

    Args:
        path: of the file.
        tables: its clips, in packing order.
        origin: of the folder.
        modality: what is embedded.
        skipped: id, reason and detail of each clip of the shard that has no row.
    """
    note = json.dumps({"origin": dataclasses.asdict(origin), "skipped": skipped})
    table = pa.concat_tables([arrow_schema(origin, modality).empty_table(), *tables])
    strings = ["sample_id", "source_path", "labels.list.element"]
    # Vectors do not get smaller.
    options: dict[str, Any] = {
        "compression": dict.fromkeys(strings, "zstd"),
        "use_dictionary": strings,
        "row_group_size": ROWS_TOGETHER,
    }
    with atomic_write(path) as temporary:
        pq.write_table(table.replace_schema_metadata({_NOTE: note}), temporary, **options)


def _lists(values: np.ndarray) -> pa.Array:
    """Convert rows of an array to fixed-size lists (of fixed-size lists)."""
    lists = pa.array(values.ravel())
    for size in reversed(values.shape[1:]):
        lists = pa.FixedSizeListArray.from_arrays(lists, size)
    return lists


def arrow_schema(origin: Origin, modality: Modalities) -> pa.Schema:
    """Name the columns of a file and their types."""
    vector = pa.list_(pa.from_numpy_dtype(origin.dtype), origin.width)
    fields = {
        "position": pa.int64(),
        "sample_id": pa.string(),
        "labels": pa.list_(pa.string()),
        "source_path": pa.string(),
        "source_start_seconds": pa.float64(),
        "source_end_seconds": pa.float64(),
        "seconds": pa.float64(),
        "frame_seconds": pa.list_(pa.float32(), origin.frames),
        "audio_embedding": vector,
        "video_embedding": vector,
    }
    if origin.frames > 1:
        fields["frame_embeddings"] = pa.list_(vector, origin.frames)
    absent = {"audio": _OF_FRAMES, "video": (VECTORS["audio"],), "both": ()}[modality]
    return pa.schema([(name, kind) for name, kind in fields.items() if name not in absent])


def file_account(path: Path, origin: Origin) -> tuple[int, list[list[str]]]:
    """Read the number of rows of a file, and id, reason and detail of the clips without one.

    Raises:
        ValueError: it is damaged, or of another origin.
        OSError: it can't be read.
    """
    try:
        found = pq.read_metadata(path)
        note = json.loads((found.metadata or {})[_NOTE])
        if note["origin"] != dataclasses.asdict(origin):
            raise ValueError("it comes from another model, set or settings")
        return found.num_rows, note["skipped"]
    except (ValueError, KeyError, TypeError) as error:  # pyarrow's error is a ValueError
        raise ValueError(
            f"{path} can't be used ({type(error).__name__}: {error}); remove it and embed again"
        ) from error


class EmbeddingSet:
    """A complete folder of embeddings, read file by file.

    Args:
        folder: that `cavmae embed` wrote.

    Attributes:
        folder: that one.
        origin: what the values come from.
        description: `embeddings.json`.
        rows: clips that have embeddings.
        modality: what was embedded.
        vectors: columns of it.

    Raises:
        ValueError: no complete folder of embeddings, or one without clips.
        OSError: it can't be read.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        if not (self.folder / ORIGIN).is_file():
            raise ValueError(
                f"embeddings is {folder}, which has no {ORIGIN}; give a folder that `cavmae embed` "
                "wrote"
            )
        if not (self.folder / DESCRIPTION).is_file():
            raise ValueError(
                f"embeddings is {folder}, which is not complete: it has no {DESCRIPTION}; rerun "
                "the same `cavmae embed` to resume it"
            )
        self.origin = load_config(self.folder / ORIGIN, Origin)
        self.description = read_json(self.folder / DESCRIPTION)
        self._names = [file["name"] for file in self.description["files"]]
        self._ends = list(accumulate(file["rows"] for file in self.description["files"]))
        self.rows = self._ends[-1]
        self.modality: Modalities = self.description.get("modality", "both")
        self.vectors = [column for one, column in VECTORS.items() if self.modality in ("both", one)]
        if not self.rows:
            raise ValueError(
                f"embeddings is {folder}, which has no clip: all {self.description['clips']} were "
                f"skipped; {DESCRIPTION} there has the reasons"
            )

    def unit_vectors(self, column: str) -> Iterator[np.ndarray]:
        """Read all rows of a column in order, some at a time: (rows, width) float32 of length 1.

        Raises:
            ValueError: a vector is not finite or all zeros, or a file is damaged.
            OSError: a file can't be read.
        """
        for number in range(len(self._names)):
            with self._opened(number) as file:
                for batch in file.iter_batches(ROWS_TOGETHER, columns=[column, "sample_id"]):
                    values = _matrix(batch.column(column), self.origin.width)
                    norms = np.linalg.norm(values, axis=1, keepdims=True)
                    bad = np.flatnonzero(~np.isfinite(norms) | (norms == 0))
                    if len(bad):
                        raise ValueError(
                            f"{column} of {batch.column('sample_id')[int(bad[0])]} in "
                            f"{self.folder / self._names[number]} is not finite, or all zeros; "
                            "remove the folder and embed again"
                        )
                    yield values / norms

    def clips(self, rows: Sequence[int]) -> list[dict[str, Any]]:
        """Read some rows by their numbers: every column but embeddings.

        Raises:
            ValueError: a damaged file.
            OSError: a file can't be read.
        """
        found: dict[int, dict[str, Any]] = {}
        for number in sorted({self._file_of(row) for row in rows}):
            first = self._ends[number - 1] if number else 0
            here = [row for row in rows if self._file_of(row) == number]
            with self._opened(number) as file:
                table = file.read(columns=self._described).take([row - first for row in here])
            found |= zip(here, table.to_pylist(), strict=True)
        return [found[row] for row in rows]

    def all_clips(self) -> pa.Table:
        """Read every column but embeddings, a row for each clip; raises as `clips` does."""
        tables = []
        for number in range(len(self._names)):
            with self._opened(number) as file:
                tables.append(file.read(columns=self._described))
        return pa.concat_tables(tables)

    @property
    def _described(self) -> list[str]:
        names = arrow_schema(self.origin, self.modality).names
        return [name for name in names if "embedding" not in name]

    def vectors_of(self, sample_id: str) -> dict[str, np.ndarray]:
        """Read the embeddings of a clip: (width,) float32 by column.

        Raises:
            ValueError: no such clip, or a damaged file.
            OSError: a file can't be read.
        """
        name = f"{sample_id.rpartition('/')[0]}.parquet"
        if name in self._names:
            with self._opened(self._names.index(name)) as file:
                table = file.read(columns=["sample_id", *self.vectors])
            row = pc.index(table["sample_id"], sample_id).as_py()
            if row >= 0:
                return {
                    column: _matrix(table[column][row : row + 1], self.origin.width)[0]
                    for column in self.vectors
                }
        raise ValueError(
            f"query is {sample_id!r}, which is no file, and no clip that {self.folder} has "
            "embeddings of; give a media file, or a sample id such as "
            f"{self.clips([0])[0]['sample_id']}"
        )

    def beside(self, name: str) -> Path:
        """Path of something computed from these values; other values, another path."""
        values = json.dumps([dataclasses.asdict(self.origin), self.description["files"]])
        digest = hashlib.sha256(values.encode()).hexdigest()[:8]
        return self.folder / f"index-{digest}" / name

    def _file_of(self, row: int) -> int:
        return bisect_right(self._ends, row)

    @contextmanager
    def _opened(self, number: int) -> Iterator[pq.ParquetFile]:
        path = self.folder / self._names[number]
        file_account(path, self.origin)
        with pq.ParquetFile(path, memory_map=True) as file:
            yield file


def _matrix(column: pa.ChunkedArray | pa.Array, width: int) -> np.ndarray:
    """Convert a column of fixed-size lists to (rows, width) float32."""
    flat = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
    return flat.flatten().to_numpy().reshape(-1, width).astype(np.float32, copy=False)
