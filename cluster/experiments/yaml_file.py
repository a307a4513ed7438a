"""The YAML files that name many runs of one recipe: read strictly, errors with the place."""

from pathlib import Path
from typing import Any, TypeVar

from cavmae.cluster.config import RAY_KINDS, RayRunConfig
from cavmae.cluster.train import check_run
from cavmae.trainer.config.parse import parse

T = TypeVar("T")


def read_yaml(path: Path) -> Any:
    """The document.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not YAML.
    """
    import yaml

    try:
        return yaml.safe_load(path.read_text())
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not YAML: {error}") from error


def check_keys(values: Any, known: set[str], needed: set[str], where: str) -> None:
    """Raises ValueError where `values` is no mapping, or a key is unknown or missing."""
    if not isinstance(values, dict):
        raise ValueError(f"{where} is {values!r}; use a mapping with {', '.join(sorted(known))}")
    for name in sorted(values.keys() - known):
        raise ValueError(f"{where}: unknown key {name}; use {', '.join(sorted(known))}")
    for name in sorted(needed - values.keys()):
        raise ValueError(f"{where}: key {name} is missing")


def checked(values: dict[str, Any], name: str, default: T, kind: type[T], where: str) -> T:
    """A value of the file, or its default where it is not given.

    Raises:
        ValueError: a value of another type.
    """
    value = values.get(name, default)
    if type(value) is not kind:
        shown = {int: "a whole number", dict: "a mapping", str: "a text"}[kind]
        raise ValueError(f"{where}: {name} is {value!r}; use {shown}")
    return value


def words_of(fields: dict[str, Any]) -> list[str]:
    """Fields of a run as they stand on a command line."""
    words = []
    for name, value in fields.items():
        option = name.replace("_", "-")
        if isinstance(value, bool):
            group, _, last = option.rpartition(".")
            words.append(f"--{group}{'.' * bool(group)}{'' if value else 'no-'}{last}")
        else:
            words.append(f"--{option}={value}")
    return words


def common_words(document: dict[str, Any], path: Path, folder: Path) -> list[str]:
    """What all runs of a file share: `fields`, and one MLflow experiment in the runs' folder."""
    return [
        f"--tracking.experiment={document.get('experiment', path.stem)}",
        f"--tracking.uri=sqlite:///{(folder / 'mlflow.db').absolute()}",
        *words_of(checked(document, "fields", {}, dict, str(path))),
    ]


def checked_run(words: list[str], where: str) -> RayRunConfig:
    """The run that the words after `cavmae train` name.

    Raises:
        ValueError: a field that there is not, one out of its range, or ranks that can't share a
            batch.
    """
    try:
        config = parse(words, RAY_KINDS, where)
        check_run(config)
    except SystemExit as error:  # the parser has told which field
        raise ValueError(f"{where} has a field that is not as it should be") from error
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error
    return config
