"""The file of a queue: runs of one recipe with other fields, checked before any starts."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

from cavmae.cluster.config import RayPretrainConfig
from cavmae.cluster.driver import Driver
from cavmae.cluster.train import check_run
from cavmae.trainer.pretrain import parse
from cavmae.trainer.run_folder import read_json

T = TypeVar("T")
State = Literal["waiting", "running", "leaving", "finished", "stopped", "failed"]


@dataclass(frozen=True)
class Need:
    """What a run takes of a cluster."""

    cpus: int
    gpus: int

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
        failures: starts that failed.
        driver: of the start that is under way.
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
    document = _read_yaml(path)
    known = {"experiment", "recipe", "fields", "retries", "runs"}
    _check_keys(document, known, {"recipe", "runs"}, str(path))
    runs = _checked(document, "runs", {}, dict, str(path))
    common = [
        f"--tracking.experiment={document.get('experiment', path.stem)}",
        f"--tracking.uri=sqlite:///{(folder / 'mlflow.db').absolute()}",
        *_flags(_checked(document, "fields", {}, dict, str(path))),
    ]
    experiments = []
    for name, run in runs.items():
        run, where = run or {}, f"{path}: run {name}"
        _check_keys(run, {"priority", "fields"}, set(), where)
        fields = _flags(_checked(run, "fields", {}, dict, where))
        run_words = [
            *(str(document["recipe"]), *common, *fields, *words),
            f"--run-dir={(folder / str(name)).absolute()}",
        ]
        try:
            config = parse(run_words, RayPretrainConfig, prog=where)
            cluster = config.cluster
            check_run(config)
        except SystemExit as error:  # the parser has told which field
            raise ValueError(f"{where} has a field that is not as it should be") from error
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from error
        need = Need(
            cluster.workers * cluster.cpus_per_worker, cluster.workers * cluster.gpus_per_worker
        )
        state: State = "finished" if _is_finished(folder / str(name), config.steps) else "waiting"
        experiments.append(
            Experiment(str(name), _checked(run, "priority", 0, int, where), run_words, need, state)
        )
    if not experiments:
        raise ValueError(f"{path}: runs is empty; name at least one")
    return experiments, _checked(document, "retries", 2, int, str(path))


def _is_finished(run_dir: Path, steps: int) -> bool:
    """Whether a former queue has brought a run to its end.

    Args:
        steps: that are asked for; 0: as many as its epochs need, which the run folder knows.
    """
    path = run_dir / "summary.json"
    return path.exists() and read_json(path)["step"] == (steps or read_json(path)["steps"])


def _read_yaml(path: Path) -> Any:
    import yaml

    try:
        return yaml.safe_load(path.read_text())
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not YAML: {error}") from error


def _check_keys(values: Any, known: set[str], needed: set[str], where: str) -> None:
    if not isinstance(values, dict):
        raise ValueError(f"{where} is {values!r}; use a mapping with {', '.join(sorted(known))}")
    for name in sorted(values.keys() - known):
        raise ValueError(f"{where}: unknown key {name}; use {', '.join(sorted(known))}")
    for name in sorted(needed - values.keys()):
        raise ValueError(f"{where}: key {name} is missing")


def _checked(values: dict[str, Any], name: str, default: T, kind: type[T], where: str) -> T:
    """A value of the file, or its default where it is not given."""
    value = values.get(name, default)
    if type(value) is not kind:
        shown = {int: "a whole number", dict: "a mapping"}[kind]
        raise ValueError(f"{where}: {name} is {value!r}; use {shown}")
    return value


def _flags(fields: dict[str, Any]) -> list[str]:
    """As they stand on a command line."""
    flags = []
    for name, value in fields.items():
        option = name.replace("_", "-")
        if isinstance(value, bool):
            group, _, last = option.rpartition(".")
            flags.append(f"--{group}{'.' * bool(group)}{'' if value else 'no-'}{last}")
        else:
            flags.append(f"--{option}={value}")
    return flags
