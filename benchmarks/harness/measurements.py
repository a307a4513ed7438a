"""The times and rates in a record of any benchmark, by name, with every value that there is.

Records differ in what they hold, but not in how they name it: the unit is in the key
(`decode_cpu_seconds`, `samples_per_second`), a timing has `all_seconds`, and `all_X` are the values
that X is the median of. So one walk reads them all.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

from cavmae.benchmarks.harness.records import Record

Unit = Literal["seconds", "per second"]

_LABELS = ("fault", "gpus", "zero_stage", "global_batch", "batch", "compile")
"""Fields that say which one of a list something is; those that have them all in common are one."""
_NOT_MEASURED = {"inputs", "bars", "criteria", "flat_means", "processes", "kinds"}
"""Parts of results: what went in, what is made of it, and what was watched."""
_NO_COSTS = {"unix_seconds", "best_interval_seconds"}
"""Seconds of which fewer are not better."""
_TIMES_BY_POSITION = "first_batch"
"""Of `cavmae bench data`: its keys are positions, so they have no unit."""
_COMPUTED = {"scaling"}
"""Suites whose numbers come out the same each time."""


@dataclass(frozen=True)
class Measurement:
    """Something that a record has values of.

    Attributes:
        unit: of the values.
        values: above 0; of a benchmark that has starts, one for each: the steps of a start are not
            independent of each other.
        exact: computed, so that one value says it all.
    """

    unit: Unit
    values: tuple[float, ...]
    exact: bool


def measurements(record: Record) -> dict[str, Measurement]:
    """All times and rates of a record by name; empty where it has none.

    A rate beside the timing that it was computed from is left out.
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
