"""From the words of a command line to the configuration of a run."""

import dataclasses
from collections.abc import Sequence
from typing import TypeVar

from cavmae.trainer.config.configs import FinetuneConfig, RunConfig
from cavmae.trainer.config.recipes import RECIPES
from cavmae.trainer.config.serialize import load_run_config

Config = TypeVar("Config", bound=RunConfig)


def parse(arguments: list[str], kinds: Sequence[type[Config]], prog: str) -> Config:
    """The configuration of a command line.

    Args:
        arguments: a recipe's name or the path of a saved `config.json`, then `--field value`s.
        kinds: of run that the command starts: `PretrainConfig`, `FinetuneConfig`, or dataclasses
            that add fields with defaults to them.
        prog: how the command is called, for its help.

    Raises:
        ValueError: no such recipe, one of another kind, or a field that a dataclass refuses.
        SystemExit: `--help`, or a field that does not exist (with a message that names it).
    """
    import tyro

    # The deepspeed launcher puts this first; LOCAL_RANK in the environment says the same.
    arguments = [word for word in arguments if not word.startswith("--local_rank=")]
    known = [name for name, recipe in RECIPES.items() if _kind_of(recipe(), kinds) is not None]
    names = ", ".join(known)
    if not arguments or arguments[0].startswith("-"):
        if not {"-h", "--help"} & set(arguments):
            raise ValueError(f"name a recipe ({names}) or a saved config.json first")
        kind = kinds[0]
        base = kind()
        description = f"First word: a recipe ({names}) or the path of a saved config.json."
    else:
        name, *arguments = arguments
        if name in RECIPES:
            recipe = RECIPES[name]()
            description = RECIPES[name].__doc__ or ""
        elif name.endswith(".json"):
            recipe = load_run_config(name)
            description = f"The run saved in {name}."
        else:
            raise ValueError(f"{name!r} is no recipe; use one of {names}, or a saved config.json")
        found = _kind_of(recipe, kinds)
        if found is None:
            command = "finetune" if isinstance(recipe, FinetuneConfig) else "pretrain"
            raise ValueError(
                f"{name} is for `cavmae {command}`; `{prog}` takes {names}, or a saved config.json "
                "of its own"
            )
        kind = found
        fields = {field.name: getattr(recipe, field.name) for field in dataclasses.fields(recipe)}
        base = kind(**fields)
    return tyro.cli(kind, prog=prog, default=base, args=arguments, description=description)


def _kind_of(recipe: RunConfig, kinds: Sequence[type[Config]]) -> type[Config] | None:
    return next((kind for kind in kinds if issubclass(kind, type(recipe))), None)
