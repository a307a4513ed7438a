"""The file of a sweep: one recipe, the fields that vary, and when a trial is given up."""

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from cavmae.cluster.experiments.queue_file import Need
from cavmae.cluster.experiments.yaml_file import (
    check_keys,
    checked,
    checked_run,
    common_words,
    read_yaml,
    words_of,
)
from cavmae.trainer.config.serialize import read_json, write_json

DISTRIBUTIONS = ("choice", "grid", "uniform", "log_uniform", "whole")


@dataclass(frozen=True)
class Varied:
    """A field that trials differ in.

    Attributes:
        distribution: `choice` draws one of the values and `grid` takes each of them; `uniform`,
            `log_uniform` and `whole` (numbers) draw between two bounds, both included.
        values: what is chosen from, or the two bounds.
    """

    distribution: str
    values: tuple[Any, ...]


@dataclass(frozen=True)
class Sweep:
    """What a file asks for.

    Attributes:
        words: after `cavmae train`, of every trial.
        space: what varies, by the field's name on the command line.
        trials: draws from the space, each of all points of its grids.
        metric: which of a run's metrics trials are compared by, and whether more of it is better.
        mode: which end of it is better.
        steps: of a trial that is not given up.
        grace_steps: nothing is given up before.
        reduction: of the trials that have come to a rung, one in so many goes on from there; the
            next rung is at so many times the steps.
        retries: of a trial that fails.
        seed: of the draws.
        need: what the ranks of a trial take.
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
    """Read and check a sweep: each varied field is tried with each of its values or bounds.

    Args:
        path: YAML.
        folder: where the trials' run folders go.
        words: fields of every trial, after those of the file.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a key, a field or a value that is not as it should be.
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
    grace = found["grace_steps"] or config.validation.every_steps
    least = {"trials": 1, "reduction": 2, "retries": 0, "seed": 0}
    for name, low in least.items():
        if found[name] < low:
            raise ValueError(f"{where}: {name} is {found[name]}; use {low} or more")
    if not 0 < grace <= config.steps:
        raise ValueError(f"{where}: grace_steps is {grace}; use 1 to steps, {config.steps}")
    return Sweep(
        all_words,
        space,
        trials=found["trials"],
        metric=checked(document, "metric", "", str, where),
        mode=mode,
        steps=config.steps,
        grace_steps=grace,
        reduction=found["reduction"],
        retries=found["retries"],
        seed=found["seed"],
        need=Need.of(config.cluster),
    )


def keep_or_compare(sweep: Sweep, path: Path, *, begun: bool) -> None:
    """Note what a sweep was begun with, or see that it goes on with the same.

    Args:
        sweep: as it is asked for now.
        path: JSON in the folder of the sweep.
        begun: whether trials are there already.

    Raises:
        ValueError: the sweep was begun with something else; Tune would go on with that.
    """
    asked = json.loads(json.dumps(dataclasses.asdict(sweep)))  # tuples as JSON has them
    if not begun:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, asked)
        return
    before = read_json(path)
    for name, value in asked.items():
        if before[name] != value:
            raise ValueError(
                f"{name} is {value!r} and the sweep in {path.parent} was begun with "
                f"{before[name]!r}; use that again, or give another --folder"
            )


def _varied(value: Any, where: str) -> Varied:
    names = ", ".join(DISTRIBUTIONS)
    if not isinstance(value, dict) or len(value) != 1 or next(iter(value)) not in DISTRIBUTIONS:
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
