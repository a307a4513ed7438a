"""The times and rates in a record of any benchmark, by name, with every single value.

Records have different contents but one naming scheme: the unit is in the key
(`decode_cpu_seconds`, `samples_per_second`), a timing has `all_seconds`, and `all_X` are the values
that X is the median of. So one walk reads them all.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

from cavmae.benchmarks.harness.records import Record

Unit = Literal["seconds", "per second"]

PASSES = {"forward": "forward", "both": "with backward"}
"""Passes of an operation in records of kernels, and their titles."""
_LABELS = (
    *("fault", "gpus", "zero_stage", "global_batch", "batch", "compile"),
    *("codec", "size", "threads"),
)
"""Fields that identify an entry of a list; entries that have them all in common are one."""
_NOT_MEASURED = {"inputs", "bars", "criteria", "flat_means", "processes", "kinds"}
"""Parts of results: inputs, judgements, and what was watched."""
_NO_COSTS = {"unix_seconds", "best_interval_seconds"}
"""Seconds of which fewer are not better."""
_TIMES_BY_POSITION = "first_batch"
"""A result of `cavmae bench data` whose keys are positions, so they have no unit."""
_COMPUTED = {"scaling", "predict"}
"""Suites whose numbers are the same in each run."""


@dataclass(frozen=True)
class Measurement:
    """The values of one quantity in a record.

    Attributes:
        unit: unit of the values.
        values: above 0; one for each run of a benchmark that repeats runs, because the steps of a
            run are not independent.
        exact: computed, so that one value is enough.
    """

    unit: Unit
    values: tuple[float, ...]
    exact: bool


def measurements(record: Record) -> dict[str, Measurement]:
    """Return all times and rates of a record by name; empty where it has none.

    A rate beside the timing that it was computed from is skipped.
    """
    found: dict[str, tuple[Unit, list[float]]] = {}
    for name, unit, values in _walk(record.results, (), None):
        found.setdefault(name, (unit, []))[1].extend(value for value in values if value > 0)
    exact = record.suite in _COMPUTED
    return {
        name: Measurement(unit, tuple(values), exact)
        for name, (unit, values) in found.items()
        if values
    }


def _walk(
    value: Any, path: tuple[str, ...], unit: Unit | None
) -> Iterator[tuple[str, Unit, list[float]]]:
    if isinstance(value, dict):
        yield from _walk_object(value, path, unit)
    elif isinstance(value, list):
        for item in value:
            if isinstance(item, dict):
                labels = [f"{name} {item[name]}" for name in _LABELS if name in item]
                yield from _walk(item, (*path, *labels), unit)
    elif unit and isinstance(value, int | float) and not isinstance(value, bool):
        yield " ".join(path), unit, [float(value)]


def _walk_object(
    value: dict[str, Any], path: tuple[str, ...], unit: Unit | None
) -> Iterator[tuple[str, Unit, list[float]]]:
    if "all_seconds" in value:
        yield " ".join(path), "seconds", value.get("mean_seconds", value["all_seconds"])
        return
    timed = any(isinstance(child, dict) and "all_seconds" in child for child in value.values())
    for name, child in value.items():
        own = _unit(name) or (None if name in _NO_COSTS else unit)
        if name in _NOT_MEASURED or f"all_{name}" in value:
            continue
        if name.startswith("all_") and own:
            yield " ".join((*path, name.removeprefix("all_"))), own, child
        elif not (timed and own == "per second"):
            yield from _walk(child, (*path, name), own)


def _unit(name: str) -> Unit | None:
    if name.endswith("_per_second"):
        return "per second"
    is_time = name == _TIMES_BY_POSITION or re.search(r"(^|_)seconds(_per_\w+)?$", name)
    return "seconds" if is_time and name not in _NO_COSTS else None
