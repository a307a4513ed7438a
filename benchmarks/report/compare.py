"""`cavmae bench compare A.json B.json`: what became slower from one record to another.

Each time and rate that both have is a ratio of medians with a 95% interval, so that noise is not
mistaken for a change: a regression is slower than the threshold with its whole interval.
"""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Annotated, Any, Literal

import numpy as np
import tyro

from cavmae.benchmarks.harness.measurements import Measurement, measurements
from cavmae.benchmarks.harness.records import Record, read_record
from cavmae.console import JsonOption, print_json, print_rows
from cavmae.field_checks import CheckedFields, NonNegativeFloat
from cavmae.trainer.tracking.tracker import flatten

MIN_VALUES = 3
"""Values of a measurement that an interval needs in each record."""
RESAMPLES = 2000
INTERVAL_PERCENT = (2.5, 97.5)
_ABSENT = "not recorded"
_PLACES = {"out", "work_dir", "run_dir", "cache"}
_WAYS = {
    "repeats", "rounds", "warm_up", "seconds", "minutes", "memory_samples", "look_every_seconds",
    "workers", "windows", "precision", "only", "compile", "device", "golden", "stages", "budget",
}  # fmt: skip
"""Settings of how and how often something is measured, not of what."""
_WAYS_OF_SUITE = {"data": {"batches"}, "step": {"memory"}, "train": {"steps", "part_steps"}}

Verdict = Literal["slower", "faster", "", "not judged"]


@dataclass(frozen=True)
class Change:
    """How many times as long something takes in the second record; of a rate, the inverse.

    Attributes:
        name: name of the measurement.
        before, after: the measurement in the first record and in the second.
        ratio: ratio of the medians; above 1 is slower.
        low, high: interval of the ratio; None where there are too few values for one.
    """

    name: str
    before: Measurement
    after: Measurement
    ratio: float
    low: float | None
    high: float | None

    def verdict(self, threshold: float) -> Verdict:
        """Judge the whole interval."""
        if self.low is None or self.high is None:
            return "not judged"
        if self.low > 1 + threshold:
            return "slower"
        return "faster" if self.high < 1 / (1 + threshold) else ""

    def __str__(self) -> str:
        return f"{self.name} {self.ratio:.2f}x ({self.low:.2f} to {self.high:.2f})"


@dataclass(frozen=True)
class CompareConfig(CheckedFields, JsonOption):
    """Print what became slower from one record to another; exit code 1 for a regression."""

    before: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="A.json")]
    """The record to compare with."""
    after: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="B.json")]
    """The record to judge."""
    threshold: NonNegativeFloat = 0.05
    """A regression is slower by more than this share."""
    allow_different: bool = False
    """Compare records of different benchmarks and settings too."""


def main(arguments: list[str]) -> int:
    """Compare and print; returns 1 where something became slower, else 0."""
    config = tyro.cli(CompareConfig, prog="cavmae bench compare", args=arguments)
    before, after = read_record(config.before), read_record(config.after)
    refused, noted = differences(before, after)
    if refused and not config.allow_different:
        raise ValueError(
            f"{config.before} and {config.after} did not measure the same: {'; '.join(refused)}; "
            "--allow-different compares them anyway"
        )
    old, new = measurements(before), measurements(after)
    if config.json:
        found = changes(old, new)
        rows = [asdict(one) | {"verdict": one.verdict(config.threshold)} for one in found]
        print_json({"different": [*refused, *noted], "changes": rows})
        return int(any(row["verdict"] == "slower" for row in rows))
    for line in (*refused, *noted):
        print(f"different {line}")
    if not old or not new:
        bare = before if not old else after
        print(f"{bare.path.name}: `{bare.suite}` records no times and no rates: nothing to compare")
        return 0
    found = changes(old, new)
    if not found:
        raise ValueError(
            f"{config.before} and {config.after} have no times and no rates in common; compare "
            "records with the same parts"
        )
    moved = [one for one in found if one.before.values != one.after.values]
    if moved:
        print_rows(_COLUMNS, _rows(moved, config.threshold))
    if len(moved) < len(found):
        print(f"{len(found) - len(moved)} more are the same to the last digit")
    for record, names in ((before, old.keys() - new.keys()), (after, new.keys() - old.keys())):
        if names:
            print(f"only in {record.path.name}: {', '.join(sorted(names))}")
    slower = [one for one in found if one.verdict(config.threshold) == "slower"]
    for one in slower:
        print(f"regression: {one}")
    unjudged = sum(one.low is None for one in found)
    if unjudged:
        print(f"{unjudged} of {len(found)} not judged: fewer than {MIN_VALUES} values")
    if not slower:
        print(f"no regression beyond {config.threshold:.0%}")
    return 1 if slower else 0


def differences(before: Record, after: Record) -> tuple[list[str], list[str]]:
    """Describe what differs between two records besides their results, a line each.

    Returns:
        Differences that make a comparison meaningless, and those that a reader has to know.
    """
    refused, noted = [], []
    if before.suite != after.suite:
        refused.append(f"benchmark: {before.suite}, then {after.suite}")
    ways = _WAYS | _WAYS_OF_SUITE.get(before.suite, set())
    for name, one, other in _differing(before.configuration, after.configuration):
        setting = name.partition(".")[0]
        # A field that only one version has may not differ.
        harmless = setting in ways or _ABSENT in (one, other)
        if setting not in _PLACES:
            (noted if harmless else refused).append(f"{name}: {one}, then {other}")
    noted += [
        f"{kind} {name}: {one}, then {other}"
        for kind, pair in (
            ("hardware", (before.hardware, after.hardware)),
            ("version of", (before.versions, after.versions)),
        )
        for name, one, other in _differing(*pair)
    ]
    if before.commit != after.commit:
        noted.append(f"commit: {before.commit}, then {after.commit}")
    return refused, noted


def _differing(
    before: dict[str, Any], after: dict[str, Any]
) -> Iterator[tuple[str, object, object]]:
    """Yield dotted name and both values of everything that differs."""
    old, new = flatten(before), flatten(after)
    for name in dict.fromkeys((*old, *new)):
        one, other = old.get(name, _ABSENT), new.get(name, _ABSENT)
        if one != other:
            yield name, one, other


def changes(old: dict[str, Measurement], new: dict[str, Measurement]) -> list[Change]:
    """Compare every time and rate that both have, the largest slowdown first."""
    found = [_change(name, old[name], new[name]) for name in old if name in new]
    return sorted(found, key=lambda one: one.ratio, reverse=True)


def _change(name: str, before: Measurement, after: Measurement) -> Change:
    slow, fast = (after, before) if before.unit == "seconds" else (before, after)
    ratio = float(np.median(slow.values) / np.median(fast.values))
    if before.exact and after.exact:
        return Change(name, before, after, ratio, ratio, ratio)
    if min(len(before.values), len(after.values)) < MIN_VALUES:
        return Change(name, before, after, ratio, None, None)
    rng = np.random.default_rng(0)
    ratios = _resampled_medians(slow, rng) / _resampled_medians(fast, rng)
    low, high = np.percentile(ratios, INTERVAL_PERCENT)
    return Change(name, before, after, ratio, float(low), float(high))


def _resampled_medians(measured: Measurement, rng: np.random.Generator) -> np.ndarray:
    """Return bootstrap medians: (RESAMPLES,) float64."""
    drawn = rng.choice(measured.values, (RESAMPLES, len(measured.values)))
    return np.median(drawn, axis=1)


_COLUMNS = ("time or rate", "before", "after", "as long", "95% interval", "values", "verdict")


def _rows(found: list[Change], threshold: float) -> Iterator[tuple[str, ...]]:
    for one in found:
        interval = "too few values"
        if one.low is not None and one.high is not None:
            interval = f"{one.low:.2f} to {one.high:.2f}"
        yield (
            one.name,
            _shown(one.before),
            _shown(one.after),
            f"{one.ratio:.2f}x",
            interval,
            f"{len(one.before.values)}, {len(one.after.values)}",
            one.verdict(threshold),
        )


def _shown(measured: Measurement) -> str:
    unit = "s" if measured.unit == "seconds" else "/s"
    return f"{np.median(measured.values):.4g} {unit}"
