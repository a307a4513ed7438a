"""Configurations as JSON files, read back strictly: a run that resumes with a field misread, or
silently at its default, is another run.
"""

import dataclasses
import types
import typing
from pathlib import Path
from typing import Any, TypeVar

from cavmae.atomic_write import read_json, write_json
from cavmae.trainer.config.configs import PretrainConfig, RunConfig
from cavmae.trainer.config.finetune_config import FinetuneConfig

Config = TypeVar("Config")


def save_config(config: object, path: str | Path) -> None:
    """Write a configuration dataclass as JSON, whole or not at all.

    Raises:
        ValueError: a float that is not finite, which JSON can't hold.
    """
    assert dataclasses.is_dataclass(config) and not isinstance(config, type)
    write_json(path, dataclasses.asdict(config))


def load_config(path: str | Path, kind: type[Config]) -> Config:
    """Read a configuration that `save_config` wrote.

    Args:
        path: JSON file.
        kind: Dataclass to build; nested dataclasses are built from nested objects.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not JSON, an unknown or missing field, or a value of another type, with the
            field's full name; or what the dataclass itself refuses.
    """
    return _build(read_json(path), kind, "", Path(path))


def load_run_config(path: str | Path) -> RunConfig:
    """Read the configuration of a run of any kind; raises as `load_config` does."""
    kind = FinetuneConfig if "classifier" in read_json(path) else PretrainConfig
    return load_config(path, kind)


def _build(values: dict[str, Any], kind: type[Config], prefix: str, path: Path) -> Config:
    """`prefix` is the dotted name of the object being built, for error messages."""
    hints = typing.get_type_hints(kind)
    fields = {field.name: field for field in dataclasses.fields(kind) if field.init}  # pyright: ignore[reportArgumentType]
    unknown = sorted(values.keys() - fields.keys())
    if unknown:
        raise ValueError(
            f"{path}: unknown field {prefix + unknown[0]}; this version of {kind.__name__} has no "
            f"such field: take it out, or use the version that wrote the file"
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
    """`value` as read from JSON, in the type that the field declares."""
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
