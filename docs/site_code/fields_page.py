"""The site's page of all fields of a run, generated from the dataclasses and the recipes.

It is not a file: the site generates it when it is built (`site_hooks.py`) and the tests read it, so
it is never out of date.
"""

import ast
import inspect
import re
import textwrap
from collections.abc import Callable, Iterator
from dataclasses import dataclass, is_dataclass
from typing import Any, Literal, get_args, get_origin, get_type_hints

from cavmae.cluster.config import ClusterConfig
from cavmae.trainer.config.configs import FinetuneConfig, PretrainConfig, RunConfig
from cavmae.trainer.config.recipes import RECIPES

CLUSTER = "On Ray: `cavmae train`, `cavmae submit`"


@dataclass(frozen=True)
class Field:
    """A field that a command line takes.

    Attributes:
        section: title of its section of the page.
        path: dotted name, such as `data.train`.
        kind, default, meaning: Markdown; the meaning is empty if the field has no docstring.
        recipes: its value in each recipe that changes the default.
    """

    section: str
    path: str
    kind: str
    default: str
    meaning: str
    recipes: dict[str, str]


def fields() -> list[Field]:
    """Return the fields of all runs, of pretraining, of fine-tuning and of runs on Ray."""
    declared_again = {*PretrainConfig.__annotations__, *FinetuneConfig.__annotations__}
    found = [
        field
        for kind, title in (
            (RunConfig, "Every run"),
            (PretrainConfig, "Pretraining"),
            (FinetuneConfig, "Fine-tuning"),
        )
        for field in _fields_of(kind, title)
        if kind is not RunConfig or field.path not in declared_again
    ]
    found += [
        Field(CLUSTER, path, kind, _shown(_value(ClusterConfig(), path)), meaning, {})
        for path, kind, meaning in _declared(ClusterConfig)
    ]
    return found


def fields_page() -> str:
    """Return the page in Markdown."""
    recipes = [
        f"| `{name}` | `cavmae {_command_of(recipe())}` | {_first_paragraph(recipe)} |"
        for name, recipe in RECIPES.items()
    ]
    parts = [
        "# Fields of a run",
        "A run is a recipe and the fields that you override. `data.cache_gigabytes` here is "
        "`--data.cache-gigabytes 50` on the command line, and `cache_gigabytes` of `data` in the "
        "`config.json` of a run. Booleans are flags: `--engine.compile` or `--engine.no-compile`. "
        "Recipes that change the default are listed after the meaning of the field.",
        "## Recipes",
        "\n".join(["| recipe | command | what |", "| --- | --- | --- |", *recipes]),
    ]
    everything = fields()
    for section in dict.fromkeys(field.section for field in everything):
        rows = [_row(field) for field in everything if field.section == section]
        header = ["| field | type | default | what |", "| --- | --- | --- | --- |"]
        parts += [f"## {section}", "\n".join([*header, *rows])]
    return "\n\n".join(parts) + "\n"


def _fields_of(kind: type[RunConfig], title: str) -> Iterator[Field]:
    """Yield the fields that a kind of run declares itself."""
    made = {name: recipe() for name, recipe in RECIPES.items()}
    recipes = {name: recipe for name, recipe in made.items() if isinstance(recipe, kind)}
    for path, type_, meaning in _declared(kind):
        default = _value(kind(), path)
        differing = {
            name: _shown(_value(recipe, path))
            for name, recipe in recipes.items()
            if _value(recipe, path) != default
        }
        part = path.rpartition(".")[0]
        section = f"`{part}`" if part else title
        yield Field(section, path, type_, _shown(default), meaning, differing)


def _declared(kind: type, prefix: str = "") -> Iterator[tuple[str, str, str]]:
    """Yield path, type and docstring of every field that a dataclass declares, recursively."""
    body = ast.parse(textwrap.dedent(inspect.getsource(kind))).body[0]
    assert isinstance(body, ast.ClassDef)
    types = get_type_hints(kind)
    for line, after in zip(body.body, [*body.body[1:], None], strict=True):
        if not (isinstance(line, ast.AnnAssign) and isinstance(line.target, ast.Name)):
            continue
        name = line.target.id
        if is_dataclass(types[name]):
            yield from _declared(types[name], f"{prefix}{name}.")
        elif name != "FIXED":
            said = after.value if isinstance(after, ast.Expr) else None
            text = said.value if isinstance(said, ast.Constant) else ""
            meaning = re.sub(r"\s+", " ", str(text))
            yield prefix + name, _kind(types[name]), meaning


def _value(config: Any, path: str) -> Any:
    for name in path.split("."):
        config = getattr(config, name)
    return config


def _kind(type_: Any) -> str:
    if get_origin(type_) is Literal:
        return ", ".join(f"`{choice}`" for choice in get_args(type_))
    if get_origin(type_) is tuple:
        return f"{get_args(type_)[0].__name__}s"
    name: str = type_.__name__
    return {"str": "text", "bool": "true or false"}.get(name, name)


def _shown(value: Any) -> str:
    if value in ("", ()):
        return "empty"
    return f"`{str(value).lower() if isinstance(value, bool) else value}`"


def _row(field: Field) -> str:
    recipes = "; ".join(f"{name} {value}" for name, value in field.recipes.items())
    what = field.meaning + (f"<br>*Recipes:* {recipes}" if recipes else "")
    return f"| `{field.path}` | {field.kind} | {field.default} | {what} |"


def _command_of(recipe: RunConfig) -> str:
    return "finetune" if isinstance(recipe, FinetuneConfig) else "pretrain"


def _first_paragraph(recipe: Callable[[], RunConfig]) -> str:
    return re.sub(r"\s+", " ", (inspect.getdoc(recipe) or "").partition("\n\n")[0])
