"""The pages that are made from the code leave nothing out, and nothing unexplained."""

import dataclasses
import functools
import re
from typing import Any

import pytest
from commands_page import Command, commands, commands_page
from fields_page import fields, fields_page

from cavmae.cli import COMMANDS, GROUPS
from cavmae.cluster.config import ClusterConfig
from cavmae.trainer.config.configs import FinetuneConfig, PretrainConfig
from cavmae.trainer.config.recipes import RECIPES

NAMES = [
    *(f"cavmae {name}" for name in COMMANDS),
    *(f"cavmae {group} {name}" for group, (names, _) in GROUPS.items() for name in names),
]


@functools.cache
def command_of() -> dict[str, Command]:
    return {command.name: command for command in commands()}


def paths(config: Any, prefix: str = "") -> set[str]:
    """Every field of a dataclass, down to the last one."""
    found: set[str] = set()
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            found |= paths(value, f"{prefix}{field.name}.")
        else:
            found.add(prefix + field.name)
    return found


def test_every_command_has_a_section() -> None:
    sections = re.findall(r"^## (cavmae .*)$", commands_page(), flags=re.MULTILINE)
    assert sections == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_every_command_and_every_option_of_it_says_what_it_does(name: str) -> None:
    command = command_of()[name]
    assert command.description
    assert [one.call for one in command.options if not one.meaning.partition("(default:")[0]] == []


@pytest.mark.parametrize("name", NAMES)
def test_every_option_of_the_usage_is_in_the_table(name: str) -> None:
    command = command_of()[name]
    calls = " ".join(option.call for option in command.options)
    named = re.findall(r"--[a-z][\w.-]*", command.usage.replace("--field", ""))
    assert [option for option in named if option not in calls] == []


def test_an_option_has_its_whole_meaning() -> None:
    options = command_of()["cavmae pack"].options
    meaning = next(one.meaning for one in options if one.call == "--clips-per-shard INT")
    assert meaning == "Clips of the list in each shard, skipped ones included. (default: 1000)"


def test_every_field_of_every_run_is_on_the_page() -> None:
    assert {field.path for field in fields()} == (
        paths(PretrainConfig()) | paths(FinetuneConfig()) | paths(ClusterConfig())
    )


def test_every_field_says_what_it_means() -> None:
    assert [field.path for field in fields() if not field.meaning] == []


def test_every_field_has_a_row_with_its_default() -> None:
    page = fields_page()
    assert [one.path for one in fields() if f"| `{one.path}` | {one.kind} | " not in page] == []
    assert "| `optimizer.beta1` | float | `0.95` | Decay rate of the first moment, the " in page


def test_a_recipe_that_differs_from_the_default_is_named_with_its_value() -> None:
    batch = next(field for field in fields() if field.path == "global_batch")
    default = PretrainConfig().global_batch
    assert batch.recipes == {
        name: f"`{recipe().global_batch}`"
        for name, recipe in RECIPES.items()
        if recipe().global_batch != default
    }
