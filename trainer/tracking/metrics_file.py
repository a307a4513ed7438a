"""The `metrics.jsonl` of a run: a JSON object a line, appended to, cut only where a run resumes."""

import json
from pathlib import Path
from typing import Any

from cavmae.atomic_write import write_text


def read_metrics(path: Path, most: int = 0) -> list[dict[str, float]]:
    """Read records: `step`, `unix_seconds` and the metrics, which may be non-finite.

    A last line without an end, which a power cut leaves, is skipped.

    Args:
        path: the file.
        most: read about so many records of steps, evenly chosen, beside those of scores and the
            last one; 0: all records.

    Raises:
        ValueError: a complete line is not a record.
    """
    return [
        {name: float(value) for name, value in record.items()}
        for record in _read_records(path, most)
    ]


def drop_metrics_after(path: Path, step: int) -> None:
    """Remove the records after `step`, from which the run resumes.

    Raises:
        ValueError: a complete line is not a record.
    """
    if path.exists():
        kept = [json.dumps(one) + "\n" for one in _read_records(path) if one["step"] <= step]
        write_text(path, "".join(kept))


def _read_records(path: Path, most: int = 0) -> list[dict[str, Any]]:
    records = []
    lines = path.read_text().splitlines(keepends=True)
    stride = -(-len(lines) // most) if most else 1
    for number, line in enumerate(lines, start=1):
        if not line.endswith("\n"):
            break
        if number % stride and number < len(lines) and '"loss"' in line:
            continue
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path} line {number} is not JSON: {error}") from error
        if not isinstance(record, dict) or not isinstance(record.get("step"), int):
            raise ValueError(f"{path} line {number} is not a record with a step: {line.strip()}")
        records.append(record)
    return records
