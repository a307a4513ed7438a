"""Configurations as JSON files, read back strictly: a run that resumes with a misread field, or one
silently at its default, is a different run.
"""

import dataclasses
import types
import typing
from pathlib import Path
from typing import Any, TypeVar

from cavmae import __version__
from cavmae.atomic_write import read_json, write_json
from cavmae.trainer.config.configs import FinetuneConfig, PretrainConfig, RunConfig

Config = TypeVar("Config")

SCHEMA = 2
"""Of a run's config.json: raised when a field is renamed or removed. Version 0.1.0 wrote none."""
ADDED: dict[str, Any] = {
    "model.decoder": "self",
    "model.decoded_share": 1.0,
    "new_decoder": False,
}
"""Fields that came after files of this schema were written, by what was done without them."""


def save_config(config: object, path: str | Path) -> None:
    """Write a configuration dataclass as JSON, atomically; that of a run gets the schema number.

    Raises:
        ValueError: a float is not finite, which JSON can't hold.
    """
    assert dataclasses.is_dataclass(config) and not isinstance(config, type)
    schema = {"schema": SCHEMA} if isinstance(config, RunConfig) else {}
    write_json(path, schema | dataclasses.asdict(config))


def load_config(path: str | Path, kind: type[Config]) -> Config:
    """Read a configuration that `save_config` wrote.

    Args:
        path: JSON file.
        kind: dataclass to build; nested dataclasses are built from nested objects.

    Raises:
        FileNotFoundError: no such file.
        ValueError: the file is not JSON, another version wrote it, a field is unknown, missing or
            of another type (with its full name), or the dataclass itself refuses a value.
    """
    document = read_json(path)
    if issubclass(kind, RunConfig):
        _check_schema(document.pop("schema", None), Path(path))
    return _build(document, kind, "", Path(path))


def load_run_config(path: str | Path) -> RunConfig:
    """Read the configuration of a pretraining or fine-tuning run.

    Raises:
        FileNotFoundError, ValueError: see `load_config`.
    """
    kind = FinetuneConfig if "classifier" in read_json(path) else PretrainConfig
    return load_config(path, kind)


def _check_schema(schema: object, path: Path) -> None:
    """Refuse a run's config.json of another version, with what its run.json says about the code.

    Raises:
        ValueError: names both versions and what to do.
    """
    if schema == SCHEMA:
        return
    run_file = path.with_name("run.json")
    record = read_json(run_file) if run_file.exists() else {}
    commit, code = ((record.get(name) or [None])[-1] for name in ("git_commits", "code"))
    origin = (
        f"was written by another version (schema {schema})"
        if schema
        else "has no schema number, like those of version 0.1.0"
    )
    raise ValueError(
        f"{path} {origin} of cavmae{f', commit {commit}' if commit else ''}; this is version "
        f"{__version__}, which cannot read it. To resume or evaluate that run, use its own code"
        f"{f', kept in {path.parent}/code/{code}.tar.gz' if code else ''}; or start a new run with "
        "its weights.pt as --initial-weights"
    )


def _build(values: dict[str, Any], kind: type[Config], prefix: str, path: Path) -> Config:
    """Build a dataclass; `prefix` is the dotted name of its section, for error messages."""
    hints = typing.get_type_hints(kind)
    fields = {field.name: field for field in dataclasses.fields(kind) if field.init}  # pyright: ignore[reportArgumentType]
    added = {name: ADDED[prefix + name] for name in fields if prefix + name in ADDED}
    values = added | values
    unknown = sorted(values.keys() - fields.keys())
    if unknown:
        raise ValueError(
            f"{path}: unknown field {prefix + unknown[0]}; this version of {kind.__name__} has no "
            f"such field: remove it, or use the version that wrote the file"
        )
    missing = sorted(fields.keys() - values.keys())
    if missing:
        raise ValueError(
            f"{path}: field {prefix + missing[0]} is missing; add it, or use the version that "
            f"wrote the file"
        )
    return kind(
        **{name: _convert(values[name], hints[name], prefix + name, path) for name in fields}
    )


def _convert(value: Any, hint: Any, name: str, path: Path) -> Any:
    """Convert a value read from JSON to the type that the field declares."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if dataclasses.is_dataclass(hint) and isinstance(hint, type) and isinstance(value, dict):
        return _build(value, hint, f"{name}.", path)
    if origin is typing.Literal and any(
        value == choice and type(value) is type(choice) for choice in arguments
    ):
        return value
    if origin is tuple and isinstance(value, list):
        repeated = len(arguments) == 2 and arguments[1] is ...
        if repeated or len(value) == len(arguments):
            hints = arguments[:1] * len(value) if repeated else arguments
            return tuple(
                _convert(item, item_hint, f"{name}[{index}]", path)
                for index, (item, item_hint) in enumerate(zip(value, hints, strict=True))
            )
    if (
        origin in (types.UnionType, typing.Union)
        and len(arguments) == 2
        and types.NoneType in arguments
    ):
        (some,) = set(arguments) - {types.NoneType}
        return None if value is None else _convert(value, some, name, path)
    if hint is float and type(value) is int:  # JSON of another writer may drop the ".0"
        return float(value)
    if hint in (bool, int, float, str) and type(value) is hint:
        return value
    expected = hint.__name__ if isinstance(hint, type) and origin is None else str(hint)
    raise ValueError(f"{path}: field {name} is {value!r}; expected {expected}")
