"""The file of a queue: runs of one recipe with other fields, checked before any starts."""

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
    """What a run takes of a cluster."""

    cpus: int
    gpus: int

    @classmethod
    def of(cls, cluster: ClusterConfig) -> "Need":
        """All ranks of a run."""
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
        name: of its folder.
        priority: higher ones go first and take the place of lower ones.
        words: after `cavmae train`.
        need: what its ranks take.
        state: where it is.
        failures: attempts that failed.
        driver: of the attempt that is under way.
    """

    name: str
    priority: int
    words: list[str]
    need: Need
    state: State = "waiting"
    failures: int = 0
    driver: Driver | None = field(default=None, repr=False)


def read_experiments(
    path: Path, folder: Path, words: Sequence[str]
) -> tuple[list[Experiment], int]:
    """The runs of a file, in its order, and how often a failed one is tried again.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a key or a field that there is not, or ranks that can't share a batch.
    """
    document = read_yaml(path)
    known = {"experiment", "recipe", "fields", "retries", "runs"}
    check_keys(document, known, {"recipe", "runs"}, str(path))
    runs = checked(document, "runs", {}, dict, str(path))
    common = common_words(document, path, folder)
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
        experiments.append(
            Experiment(str(name), checked(run, "priority", 0, int, where), run_words, need, state)
        )
    if not experiments:
        raise ValueError(f"{path}: runs is empty; name at least one")
    return experiments, checked(document, "retries", 2, int, str(path))


def _is_finished(run_dir: Path, steps: int) -> bool:
    """Whether a former queue has brought a run to its end.

    Args:
        run_dir: folder of the run.
        steps: optimizer steps of the run; 0: as many as its epochs need, which its status has.
    """
    status = read_status(run_dir)
    return (
        status is not None and status.state == "finished" and status.step == (steps or status.steps)
    )
