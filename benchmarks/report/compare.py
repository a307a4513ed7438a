"""`cavmae bench compare A.json B.json`: what has become slower from one record to another.

Each time and rate that both have is a ratio of medians with a 95% interval, so that noise is not
taken for a change: a regression is slower than the threshold with its whole interval.
"""

import argparse
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from rich.console import Console
from rich.table import Table

from cavmae.benchmarks.harness.measurements import Measurement, measurements
from cavmae.benchmarks.harness.records import Record, read_record
from cavmae.trainer.tracking.tracker import flatten

LEAST_VALUES = 3
"""Of a measurement in each record, for an interval."""
RESAMPLES = 2000
INTERVAL_PERCENT = (2.5, 97.5)
_ABSENT = "not recorded"
_PLACES = {"out", "work_dir", "run_dir"}
_WAYS = {
    "repeats", "rounds", "warm_up", "seconds", "minutes", "memory_samples", "look_every_seconds",
    "workers", "windows", "precision", "only", "compile", "device", "golden",
}  # fmt: skip
"""Settings that say how and how often something is measured, not what."""
_WAYS_OF_SUITE = {
    "data": {"batches"},
    "step": {"memory"},
    "train": {"steps", "part_steps"},
}

Verdict = Literal["slower", "faster", "", "not judged"]


@dataclass(frozen=True)
class Change:
    """How much longer something takes in the second record; of a rate, the inverse.

    Attributes:
        name: of the measurement.
        before, after: the measurement in the first record and in the second.
        ratio: of the medians; above 1: slower.
        low, high: its interval; None where there are too few values for one.
    """

    name: str
    before: Measurement
    after: Measurement
    ratio: float
    low: float | None
    high: float | None

    def verdict(self, threshold: float) -> Verdict:
        """What the whole interval says."""
        if self.low is None or self.high is None:
            return "not judged"
        if self.low > 1 + threshold:
            return "slower"
        return "faster" if self.high < 1 / (1 + threshold) else ""

    def __str__(self) -> str:
        return f"{self.name} {self.ratio:.2f}x ({self.low:.2f} to {self.high:.2f})"


def parser() -> argparse.ArgumentParser:
    """The command line."""
    arguments = argparse.ArgumentParser(
        prog="cavmae bench compare", description="What became slower from one record to another."
    )
    arguments.add_argument("before", metavar="A.json", help="the record to compare with")
    arguments.add_argument("after", metavar="B.json", help="the record to judge")
    arguments.add_argument(
        "--threshold", type=float, default=0.05, help="share by which something may be slower"
    )
    arguments.add_argument(
        "--allow-different", action="store_true", help="other benchmarks and other settings too"
    )
    return arguments


def main(argv: list[str]) -> int:
    """Compare and print; returns 1 where something has become slower, else 0."""
    flags = parser().parse_args(argv)
    if flags.threshold < 0:
        raise ValueError(f"--threshold is {flags.threshold}; use 0 or more")
    before, after = read_record(flags.before), read_record(flags.after)
    refused, told = differences(before, after)
    if refused and not flags.allow_different:
        raise ValueError(
            f"{flags.before} and {flags.after} did not measure the same: {'; '.join(refused)}; "
            "--allow-different compares them all the same"
        )
    for line in (*refused, *told):
        print(f"different {line}")
    old, new = measurements(before), measurements(after)
    if not old or not new:
        bare = before if not old else after
        print(f"{bare.path.name}: `{bare.suite}` records no time and no rate: nothing to compare")
        return 0
    found = changes(old, new)
    if not found:
        raise ValueError(
            f"{flags.before} and {flags.after} have no time and no rate in common; compare records "
            "with the same parts"
        )
    moved = [one for one in found if one.before.values != one.after.values]
    if moved:
        Console(width=160).print(_table(moved, flags.threshold))
    if len(moved) < len(found):
        print(f"{len(found) - len(moved)} more are the same to the last digit")
    for record, names in ((before, old.keys() - new.keys()), (after, new.keys() - old.keys())):
        if names:
            print(f"only in {record.path.name}: {', '.join(sorted(names))}")
    slower = [one for one in found if one.verdict(flags.threshold) == "slower"]
    for one in slower:
        print(f"regression: {one}")
    unjudged = sum(one.low is None for one in found)
    if unjudged:
        print(f"{unjudged} of {len(found)} not judged: fewer than {LEAST_VALUES} values")
    if not slower:
        print(f"no regression beyond {flags.threshold:.0%}")
    return 1 if slower else 0


def differences(before: Record, after: Record) -> tuple[list[str], list[str]]:
    """What differs between two records besides their results, a line each.

    Returns:
        What makes them measurements of different things, and what only has to be known.
    """
    refused, told = [], []
    if before.suite != after.suite:
        refused.append(f"benchmark: {before.suite}, then {after.suite}")
    ways = _WAYS | _WAYS_OF_SUITE.get(before.suite, set())
    for name, one, other in _differing(before.configuration, after.configuration):
        setting = name.partition(".")[0]
        # Where only one version has a field, it is not known to differ.
        harmless = setting in ways or _ABSENT in (one, other)
        if setting not in _PLACES:
            (told if harmless else refused).append(f"{name}: {one}, then {other}")
    told += [
        f"{kind} {name}: {one}, then {other}"
        for kind, pair in (
            ("hardware", (before.hardware, after.hardware)),
            ("version of", (before.versions, after.versions)),
        )
        for name, one, other in _differing(*pair)
    ]
    if before.commit != after.commit:
        told.append(f"commit: {before.commit}, then {after.commit}")
    return refused, told


def _differing(
    before: dict[str, Any], after: dict[str, Any]
) -> Iterator[tuple[str, object, object]]:
    """Dotted name and both values of what is not equal."""
    old, new = flatten(before), flatten(after)
    for name in dict.fromkeys((*old, *new)):
        one, other = old.get(name, _ABSENT), new.get(name, _ABSENT)
        if one != other:
            yield name, one, other


def changes(old: dict[str, Measurement], new: dict[str, Measurement]) -> list[Change]:
    """Every time and rate that both have, the one that became slowest first."""
    found = [_change(name, old[name], new[name]) for name in old if name in new]
    return sorted(found, key=lambda one: one.ratio, reverse=True)


def _change(name: str, before: Measurement, after: Measurement) -> Change:
    slow, fast = (after, before) if before.unit == "seconds" else (before, after)
    ratio = float(np.median(slow.values) / np.median(fast.values))
    if before.exact and after.exact:
        return Change(name, before, after, ratio, ratio, ratio)
    if min(len(before.values), len(after.values)) < LEAST_VALUES:
        return Change(name, before, after, ratio, None, None)
    rng = np.random.default_rng(0)
    ratios = _resampled_medians(slow, rng) / _resampled_medians(fast, rng)
    low, high = np.percentile(ratios, INTERVAL_PERCENT)
    return Change(name, before, after, ratio, float(low), float(high))


def _resampled_medians(measured: Measurement, rng: np.random.Generator) -> np.ndarray:
    """Medians of as many values drawn again from these: `(RESAMPLES,)` float64."""
    drawn = rng.choice(measured.values, (RESAMPLES, len(measured.values)))
    return np.median(drawn, axis=1)


def _table(found: list[Change], threshold: float) -> Table:
    table = Table("time or rate", "before", "after", "as long", "95% interval", "values", "")
    for one in found:
        interval = "too few values"
        if one.low is not None and one.high is not None:
            interval = f"{one.low:.2f} to {one.high:.2f}"
        table.add_row(
            one.name,
            _shown(one.before),
            _shown(one.after),
            f"{one.ratio:.2f}x",
            interval,
            f"{len(one.before.values)}, {len(one.after.values)}",
            one.verdict(threshold),
        )
    return table


def _shown(measured: Measurement) -> str:
    unit = "s" if measured.unit == "seconds" else "/s"
    return f"{np.median(measured.values):.4g} {unit}"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
