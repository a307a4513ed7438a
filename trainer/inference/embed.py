"""Embeddings of files without packing, as one Parquet file; `cavmae embed` with files."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from cavmae.atomic_write import atomic_write
from cavmae.console import counted
from cavmae.trainer.inference.inputs import Skipped, listed_files
from cavmae.trainer.inference.load import load
from cavmae.trainer.inference.results import Embedding

ROWS_TOGETHER = 1024
"""Rows that are written at a time."""


@dataclass(frozen=True)
class EmbeddedFiles:
    """What was written.

    Attributes:
        files: that have embeddings.
        rows: of the table: files, or their windows.
        skipped: path and reason of each file that has none.
    """

    files: int
    rows: int
    skipped: list[tuple[str, str]]


def embed_files(
    source: str, inputs: Sequence[str], out: Path, *, windows: bool, dtype: str, batch: int
) -> EmbeddedFiles:
    """Write a row for each file, or for each of its windows.

    Columns: `path`; `start_seconds`, `end_seconds`; `audio_embedding`, `video_embedding`, null
    where there is no sound or no picture. Vectors are not normalised.

    Args:
        source: as of `cavmae.load`.
        inputs: as of `listed_files`.
        out: the Parquet file.
        windows: a row for each window instead of their mean; always so of a model that was trained
            on `data.window_seconds`.
        dtype: of stored values, `float32` or `float16`.
        batch: windows that are computed together.

    Raises:
        ValueError: the model can't embed, or no file can be used.
        OSError: `out` can't be written.
    """
    model = load(source, batch=batch)
    skipped, names = Skipped(), list(listed_files(inputs))
    # No lists of a fixed size: pyarrow can't read those that are null (apache/arrow#35692).
    vector = pa.list_(pa.from_numpy_dtype(dtype))
    schema = pa.schema(
        {
            "path": pa.string(),
            "start_seconds": pa.float64(),
            "end_seconds": pa.float64(),
            "audio_embedding": vector,
            "video_embedding": vector,
        }
    )

    files = written = 0
    out.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(out) as temporary, pq.ParquetWriter(temporary, schema) as writer:
        rows: list[dict[str, Any]] = []
        for number, found in model.embed_each(
            counted(names, "embedding", len(names), "files"),
            windows=windows or None,
            failed=lambda number, error: skipped.add(names[number], error),
        ):
            files += 1
            rows += _rows(names[number], found, dtype)
            if len(rows) >= ROWS_TOGETHER:
                writer.write_table(pa.Table.from_pylist(rows, schema))
                written += len(rows)
                rows.clear()
        writer.write_table(pa.Table.from_pylist(rows, schema))
        written += len(rows)
        writer.add_key_value_metadata({"cavmae": json.dumps({"skipped": skipped.reasons})})
        if not files:
            raise ValueError(f"none of {len(names)} files can be used; the lines above say why")
    return EmbeddedFiles(files, written, skipped.reasons)


def _rows(name: str, found: Embedding, dtype: str) -> list[dict[str, Any]]:
    """Make the rows of a file: one, or one for each window, in order."""
    sides = {"audio_embedding": (found.audio, found.audio_seconds)}
    sides["video_embedding"] = (found.video, found.video_seconds)
    by_window: dict[tuple[float, float], dict[str, Any]] = {}
    whole: dict[str, Any] = {}
    for column, (vectors, seconds) in sides.items():
        if vectors is None:
            continue
        values = vectors.numpy().astype(dtype)
        if values.ndim == 1:
            whole[column] = values
        else:
            for (start, end), value in zip(seconds.tolist(), values, strict=True):
                by_window.setdefault((start, end), {})[column] = value
    if whole:
        ends = [one for _, seconds in sides.values() for one in seconds[:, 1].tolist()]
        by_window = {(0.0, max(ends)): whole}
    return [
        {"path": name, "start_seconds": start, "end_seconds": end} | columns
        for (start, end), columns in sorted(by_window.items(), key=lambda item: item[0])
    ]
