"""One JSON record a benchmark run: what was measured, on what, with which code.

A number without its hardware, versions and spread cannot be compared with the next one.
"""

import datetime
import json
import platform
import re
import statistics
from collections.abc import Mapping
from dataclasses import dataclass, fields
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from cavmae.atomic_write import write_text
from cavmae.field_checks import CheckedFields
from cavmae.trainer.tracking.code_snapshot import git_commit
from cavmae.trainer.tracking.hardware import hardware

RESULTS = "benchmarks/results"
RECORD_SCHEMA = 2
_PACKAGES = ("torch", "triton", "numpy", "flash-attn", "deepspeed", "nvidia-dali-cuda130")


@dataclass(frozen=True, kw_only=True)
class RecordedConfig(CheckedFields):
    """Options of a benchmark that writes a record."""

    out: str = RESULTS
    """Folder of the record."""


def timing(seconds: list[float]) -> dict[str, Any]:
    """Return the median, the spread and every single time.

    Args:
        seconds: one time or more.
    """
    quartiles = statistics.quantiles(seconds, n=4) if len(seconds) > 1 else seconds * 3
    return {
        "median_seconds": statistics.median(seconds),
        "lower_quartile_seconds": quartiles[0],
        "upper_quartile_seconds": quartiles[2],
        "minimum_seconds": min(seconds),
        "maximum_seconds": max(seconds),
        "all_seconds": seconds,
    }


def spread(ratios: list[float]) -> dict[str, float]:
    """Return the median and the extremes of ratios of neighbouring runs."""
    return {"median": statistics.median(ratios), "minimum": min(ratios), "maximum": max(ratios)}


def extremes(ratios: Mapping[str, float], form: str = ".2f", unit: str = "x") -> str:
    """Format the `spread` of ratios: each in the format, the median with its unit."""
    median, low, high = (format(ratios[key], form) for key in ("median", "minimum", "maximum"))
    return f"{median}{unit} ({low} to {high})"


def bar(
    value: float | None,
    *,
    at_least: float | None = None,
    below: float | None = None,
    judged: bool = True,
) -> dict[str, Any]:
    """Return a value beside its bar, one of the two; `met` is None where it is not judged here, or
    there is no value."""
    if at_least is not None:
        text, met = f"at least {at_least:g}", value is not None and value >= at_least
    else:
        assert below is not None
        text, met = f"below {below:g}", value is not None and value < below
    return {"value": value, "bar": text, "met": met if judged and value is not None else None}


def versions() -> dict[str, str | None]:
    """Return versions of Python and the packages that matter to a step; None: not installed."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = None
    return found


def _portable(value: Any) -> Any:
    """Reduce an absolute path of this machine to its last name."""
    is_path = isinstance(value, str) and Path(value).is_absolute()
    return Path(value).name if is_path else value


def write_record(
    folder: str | Path,
    suite: str,
    device: torch.device,
    configuration: dict[str, Any],
    results: dict[str, Any],
    *,
    replaces: Path | None = None,
) -> Path:
    """Write `<suite>-<date>-<commit>.json` and return its path.

    A second record of the same suite, second and commit replaces the first.

    Args:
        folder: created where it is missing.
        suite: name of the benchmark.
        configuration: every flag and size that the results depend on.
        results: JSON values.
        replaces: the record of this run with the results so far, whose place it takes.
    """
    now = datetime.datetime.now(datetime.UTC)
    code = re.sub(r"\b[0-9a-f]{40}\b", lambda full: full[0][:10], git_commit() or "unknown")
    record = {
        "schema": RECORD_SCHEMA,
        "suite": suite,
        "time": now.isoformat(timespec="seconds"),
        "commit": code,
        "hardware": hardware(device),
        "versions": versions(),
        "configuration": {name: _portable(value) for name, value in configuration.items()},
        "results": results,
    }
    path = replaces or Path(folder) / f"{suite}-{now:%Y%m%dT%H%M%S}-{code}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps(record, indent=2) + "\n")
    return path


@dataclass(frozen=True)
class Record:
    """A record that was read back.

    Attributes:
        path: its file.
        suite: name of the benchmark.
        time: when it was written, ISO 8601; the day, of a record put together by hand.
        commit: short git commit of the code.
        hardware, versions: of the machine.
        configuration: flags and sizes that the results depend on.
        results: JSON values.
    """

    path: Path
    suite: str
    time: str
    commit: str
    hardware: dict[str, Any]
    versions: dict[str, str | None]
    configuration: dict[str, Any]
    results: dict[str, Any]


def read_record(path: str | Path) -> Record:
    """Read what `write_record` wrote.

    Raises:
        OSError: there is no such file.
        ValueError: it is no record, or one of another schema.
    """
    path = Path(path)
    try:
        document = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is not JSON ({error}); give a record of `cavmae bench`") from None
    schema = document.get("schema") if isinstance(document, dict) else None
    if schema is None:
        raise ValueError(f"{path} is no record of `cavmae bench`: it has no schema")
    if schema != RECORD_SCHEMA:
        raise ValueError(
            f"{path} has schema {schema} and this version reads {RECORD_SCHEMA}; measure again, or "
            "compare with the version of cavmae that wrote it"
        )
    kinds = {field.name: field.type for field in fields(Record) if field.name != "path"}
    absent = [
        name
        for name, kind in kinds.items()
        if not isinstance(document.get(name), str if kind is str else dict)
    ]
    if absent:
        raise ValueError(f"{path} is no record of `cavmae bench`: it has no {', '.join(absent)}")
    return Record(path=path, **{name: document[name] for name in kinds})
