"""Parses a command line into the configuration of a run."""

from collections.abc import Sequence
from typing import TypeVar

from cavmae.trainer.config.configs import FinetuneConfig, RunConfig
from cavmae.trainer.config.recipes import RECIPES
from cavmae.trainer.config.serialize import load_run_config

Config = TypeVar("Config", bound=RunConfig)


def parse(arguments: list[str], kinds: Sequence[type[Config]], prog: str) -> Config:
    """Parse a recipe and the fields that override it.

    Args:
        arguments: a recipe's name or the path of a saved `config.json`, then `--field value`s.
        kinds: the dataclasses that the command accepts: `PretrainConfig`, `FinetuneConfig`, or
            subclasses that add fields with defaults.
        prog: name of the command, for its help.

    Raises:
        ValueError: the recipe does not exist or is for another command, or a dataclass refuses a
            field.
        SystemExit: `--help`, or a field that does not exist (the message names it).
    """
    import tyro

    # The deepspeed launcher puts this first; LOCAL_RANK in the environment has the same value.
    arguments = [word for word in arguments if not word.startswith("--local_rank=")]
    known = [name for name, recipe in RECIPES.items() if _kind_of(recipe(), kinds) is not None]
    names = ", ".join(known)
    if not arguments or arguments[0].startswith("-"):
        if not {"-h", "--help"} & set(arguments):
            raise ValueError(f"name a recipe ({names}) or a saved config.json first")
        kind, base = kinds[0], kinds[0]()
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
                f"{name} is for `cavmae {command}`; `{prog}` takes {names}, or the config.json of "
                "one of its runs"
            )
        kind = found
        base = kind(**vars(recipe))
    return tyro.cli(kind, prog=prog, default=base, args=arguments, description=description)


def _kind_of(recipe: RunConfig, kinds: Sequence[type[Config]]) -> type[Config] | None:
    return next((kind for kind in kinds if issubclass(kind, type(recipe))), None)
