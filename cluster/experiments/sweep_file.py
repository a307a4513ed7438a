"""The file of a sweep: one recipe, the search space, and when a trial is stopped early."""

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from cavmae.atomic_write import read_json, write_json
from cavmae.cluster.experiments.queue_file import Need
from cavmae.cluster.experiments.yaml_file import (
    check_keys,
    checked,
    checked_run,
    common_words,
    read_yaml,
    words_of,
)

DISTRIBUTIONS = ("choice", "grid", "uniform", "log_uniform", "whole")


@dataclass(frozen=True)
class Varied:
    """A field of the search space.

    Attributes:
        distribution: `choice` samples one of the values and `grid` tries each of them; `uniform`,
            `log_uniform` and `whole` (numbers) sample between two bounds, both included.
        values: the choices, or the two bounds.
    """

    distribution: str
    values: tuple[Any, ...]


@dataclass(frozen=True)
class Sweep:
    """A sweep as its file describes it.

    Attributes:
        words: arguments of `cavmae train` that all trials share.
        space: search space, by the field's name on the command line.
        trials: samples of the space, each at every point of its grids.
        metric: metric of a run by which trials are compared.
        mode: whether a larger or a smaller value is better.
        steps: steps of a trial that is not stopped early.
        grace_steps: steps before which no trial is stopped early.
        reduction: ASHA's reduction factor: one in so many trials at a rung continues, and the next
            rung is at so many times the steps.
        retries: times that a failed trial is retried.
        seed: seed of the samples.
        need: resources of a trial's ranks.
    """

    words: list[str]
    space: dict[str, Varied]
    trials: int
    metric: str
    mode: Literal["max", "min"]
    steps: int
    grace_steps: int
    reduction: int
    retries: int
    seed: int
    need: Need


def read_sweep(path: Path, folder: Path, words: Sequence[str]) -> Sweep:
    """Read and check a sweep, every field of the space with each of its values or bounds.

    Args:
        path: YAML file.
        folder: folder of the trials' run folders.
        words: fields of every trial, which override those of the file.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a key, a field or a value is invalid.
    """
    document, where = read_yaml(path), str(path)
    numbers = {"trials": 16, "grace_steps": 0, "reduction": 4, "retries": 2, "seed": 0}
    known = {"experiment", "recipe", "fields", "space", "metric", "mode", *numbers}
    check_keys(document, known, {"recipe", "space", "metric"}, where)
    all_words = [str(document["recipe"]), *common_words(document, path, folder), *words]
    space = {
        str(name): _varied(value, f"{where}: space: {name}")
        for name, value in checked(document, "space", {}, dict, where).items()
    }
    if not space:
        raise ValueError(f"{where}: space is empty; name at least one field")
    config = checked_run(all_words, where)
    for name, varied in space.items():
        for value in varied.values:
            checked_run([*all_words, *words_of({name: value})], f"{where}: space: {name}")
    mode = document.get("mode", "max")
    if mode not in ("max", "min"):
        raise ValueError(f"{where}: mode is {mode!r}; use max or min")
    if not config.steps:
        raise ValueError(f"{where}: steps is 0; set it in fields, so that trials can be compared")
    found = {
        name: checked(document, name, default, int, where) for name, default in numbers.items()
    }
    minimum = {"trials": 1, "reduction": 2, "retries": 0, "seed": 0}
    for name, low in minimum.items():
        if found[name] < low:
            raise ValueError(f"{where}: {name} is {found[name]}; use {low} or more")
    grace = found.pop("grace_steps") or config.validation.every_steps
    if not 0 < grace <= config.steps:
        raise ValueError(f"{where}: grace_steps is {grace}; use 1 to steps, {config.steps}")
    return Sweep(
        all_words,
        space,
        metric=checked(document, "metric", "", str, where),
        mode=mode,
        steps=config.steps,
        grace_steps=grace,
        need=Need.of(config.cluster),
        **found,
    )


def keep_or_compare(sweep: Sweep, path: Path, *, started: bool) -> None:
    """Save a sweep's settings, or check that it is resumed with the same ones.

    Args:
        sweep: the sweep as it is requested now.
        path: JSON file in the folder of the sweep.
        started: whether it has trials already.

    Raises:
        ValueError: the sweep was started with other settings, which Tune would keep using.
    """
    requested = json.loads(json.dumps(dataclasses.asdict(sweep)))  # tuples as JSON has them
    if not started:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, requested)
        return
    before = read_json(path)
    for name, value in requested.items():
        if before[name] != value:
            raise ValueError(
                f"{name} is {value!r} and the sweep in {path.parent} was started with "
                f"{before[name]!r}; use that again, or give another --folder"
            )


def _varied(value: Any, where: str) -> Varied:
    if not isinstance(value, dict) or len(value) != 1 or next(iter(value)) not in DISTRIBUTIONS:
        names = ", ".join(DISTRIBUTIONS)
        raise ValueError(f"{where} is {value!r}; use one of {names}, as in {{uniform: [0, 1]}}")
    ((distribution, values),) = value.items()
    if not isinstance(values, list) or not values:
        raise ValueError(f"{where}: {distribution} is {values!r}; use a list")
    if distribution in ("uniform", "log_uniform", "whole"):
        kinds = (int,) if distribution == "whole" else (int, float)
        numbers = [one for one in values if type(one) in kinds]
        if len(numbers) != 2 or len(values) != 2 or numbers[0] >= numbers[1]:
            shown = ", whole ones" * (distribution == "whole")
            raise ValueError(
                f"{where}: {distribution} is {values!r}; use two numbers{shown}, the lower first "
                "(in YAML 1.0e-5, not 1e-5)"
            )
        if distribution == "log_uniform" and numbers[0] <= 0:
            raise ValueError(f"{where}: log_uniform is {values!r}; use numbers above 0")
    return Varied(distribution, tuple(values))
