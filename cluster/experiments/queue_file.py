"""The file of a queue: variants of one recipe, checked before any of them starts."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from cavmae.cluster.config import ClusterConfig
from cavmae.cluster.experiments.driver import Driver
from cavmae.cluster.experiments.yaml_file import (
    check_keys,
    checked,
    checked_run,
    common_words,
    read_yaml,
    words_of,
)
from cavmae.trainer.run_status import read_status

State = Literal["waiting", "running", "stopping", "finished", "stopped", "failed"]


@dataclass(frozen=True)
class Need:
    """Resources that a run needs."""

    cpus: int
    gpus: int

    @classmethod
    def of(cls, cluster: ClusterConfig) -> "Need":
        """Sum up the ranks of a run."""
        return cls(
            cluster.workers * cluster.cpus_per_worker, cluster.workers * cluster.gpus_per_worker
        )

    def fits(self, free: "Need") -> bool:
        return self.cpus <= free.cpus and self.gpus <= free.gpus

    def __add__(self, other: "Need") -> "Need":
        return Need(self.cpus + other.cpus, self.gpus + other.gpus)

    def __sub__(self, other: "Need") -> "Need":
        return Need(self.cpus - other.cpus, self.gpus - other.gpus)


@dataclass
class Experiment:
    """One run of the file.

    Attributes:
        name: name of its run folder.
        priority: higher ones start first and preempt lower ones.
        words: arguments of `cavmae train`.
        need: resources of its ranks.
        state: its current state.
        retries: failed attempts that are allowed.
        failures: failed attempts so far.
        driver: driver of the current attempt.
    """

    name: str
    priority: int
    words: list[str]
    need: Need
    state: State = "waiting"
    retries: int = 0
    failures: int = 0
    driver: Driver | None = field(default=None, repr=False)


def read_experiments(path: Path, folder: Path, words: Sequence[str]) -> list[Experiment]:
    """Read the runs of a file, in its order.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a key or a field is unknown, or the ranks cannot share a batch.
    """
    document = read_yaml(path)
    known = {"experiment", "recipe", "fields", "retries", "runs"}
    check_keys(document, known, {"recipe", "runs"}, str(path))
    runs = checked(document, "runs", {}, dict, str(path))
    common = common_words(document, path, folder)
    retries = checked(document, "retries", 2, int, str(path))
    experiments = []
    for name, run in runs.items():
        run, where = run or {}, f"{path}: run {name}"
        check_keys(run, {"priority", "fields"}, set(), where)
        fields = words_of(checked(run, "fields", {}, dict, where))
        run_words = [
            *(str(document["recipe"]), *common, *fields, *words),
            f"--run-dir={(folder / str(name)).absolute()}",
        ]
        config = checked_run(run_words, where)
        need = Need.of(config.cluster)
        state: State = "finished" if _is_finished(folder / str(name), config.steps) else "waiting"
        priority = checked(run, "priority", 0, int, where)
        experiments.append(Experiment(str(name), priority, run_words, need, state, retries))
    if not experiments:
        raise ValueError(f"{path}: runs is empty; name at least one")
    return experiments


def _is_finished(run_dir: Path, steps: int) -> bool:
    """Return whether an earlier attempt finished a run.

    Args:
        steps: requested steps; 0: as many as its epochs need, which its status has.
    """
    status = read_status(run_dir)
    return (
        status is not None and status.state == "finished" and status.step == (steps or status.steps)
    )
