"""Strict reading of the YAML files of queues and sweeps; errors name the place."""

from pathlib import Path
from typing import Any, TypeVar

from cavmae.cluster.config import RAY_KINDS, RayRunConfig
from cavmae.cluster.train import check_run
from cavmae.text_table import read_text
from cavmae.trainer.config.parse import parse
from cavmae.trainer.tracking.sqlite_uri import sqlite_uri

T = TypeVar("T")


def read_yaml(path: Path) -> Any:
    """Read a YAML document.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not YAML, or not text.
    """
    import yaml

    class Loader(yaml.SafeLoader):
        """Refuses a key that is there twice, of which YAML's own keeps the last."""

        def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
            names: set[str] = set()
            for key, _ in node.value:
                name = str(key.value)
                if name in names:
                    line = key.start_mark.line + 1
                    raise ValueError(f"{path}, line {line}: key {name} is there twice")
                names.add(name)
            return super().construct_mapping(node, deep)

    try:
        return yaml.load(read_text(path), Loader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f"{path}, line {mark.line + 1}" if mark else str(path)
        raise ValueError(f"{place}: not YAML ({getattr(error, 'problem', error)})") from error


def check_keys(values: Any, known: set[str], needed: set[str], where: str) -> None:
    """Raise ValueError if `values` is no mapping, or a key is unknown or missing."""
    if not isinstance(values, dict):
        raise ValueError(f"{where} is {values!r}; use a mapping with {', '.join(sorted(known))}")
    for name in sorted(values.keys() - known):
        raise ValueError(f"{where}: unknown key {name}; use {', '.join(sorted(known))}")
    for name in sorted(needed - values.keys()):
        raise ValueError(f"{where}: key {name} is missing")


def checked(values: dict[str, Any], name: str, default: T, kind: type[T], where: str) -> T:
    """Return a value of the file, or its default.

    Raises:
        ValueError: the value has another type.
    """
    value = values.get(name, default)
    if type(value) is not kind:
        shown = {int: "a whole number", dict: "a mapping", str: "a text"}[kind]
        raise ValueError(f"{where}: {name} is {value!r}; use {shown}")
    return value


def words_of(fields: dict[str, Any]) -> list[str]:
    """Turn fields of a run into words of a command line."""
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
    """Return the words that all runs of a file share: `fields`, and one MLflow experiment."""
    return [
        f"--tracking.experiment={document.get('experiment', path.stem)}",
        f"--tracking.uri={sqlite_uri((folder / 'mlflow.db').absolute())}",
        *words_of(checked(document, "fields", {}, dict, str(path))),
    ]


def checked_run(words: list[str], where: str) -> RayRunConfig:
    """Parse the arguments of `cavmae train`.

    Raises:
        ValueError: a field is unknown or out of range, or the ranks cannot share a batch.
    """
    try:
        config = parse(words, RAY_KINDS, where)
        check_run(config)
    except SystemExit as error:  # the parser has printed which field
        raise ValueError(f"{where} has an invalid field") from error
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error
    return config
