"""The documentation names what is there: existing files, headings, commands, options
and fields."""

import ast
import re
from functools import cache
from pathlib import Path

import pytest
from commands_page import RUN_COMMANDS, commands
from fields_page import fields

from cavmae.cli import BENCHMARKS, COMMANDS, GROUPS
from cavmae.trainer.config.recipes import FINETUNE_RECIPES, PRETRAIN_RECIPES

ROOT = Path(__file__).resolve().parents[1]
PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").rglob("*.md"))]
TAKE_FIELDS_TOO = (*RUN_COMMANDS, "cavmae queue", "cavmae sweep", "cavmae bench autotune")


def folders_of_code() -> list[Path]:
    wings = (ROOT / name for name in ("trainer", "kernels", "dataloaders", "cluster", "benchmarks"))
    return sorted({file.parent for wing in wings for file in wing.rglob("*.py")})


@pytest.mark.parametrize("folder", folders_of_code(), ids=lambda path: str(path.relative_to(ROOT)))
def test_a_folder_of_code_is_small_and_says_what_it_is_for(folder: Path) -> None:
    files = [path for path in folder.glob("*.py") if path.name != "__init__.py"]
    assert len(files) <= 15
    purpose = ast.get_docstring(ast.parse((folder / "__init__.py").read_text()))
    assert purpose and purpose.splitlines()[0].endswith((".", ":", ","))


def test_the_readme_is_one_screen() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= 60


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_leads_to_a_file_and_a_heading_of_it(page: Path) -> None:
    prose = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    links = re.findall(r"\]\((?!https?:)([^)#]*)(?:#([^)]*))?\)", prose)
    targets = [(page.parent / target if target else page, anchor) for target, anchor in links]
    assert [str(path) for path, _ in targets if not path.is_file()] == []
    wrong = [
        (path.name, anchor) for path, anchor in targets if anchor and anchor not in anchors(path)
    ]
    assert wrong == []


def anchors(page: Path) -> set[str]:
    """The names by which GitHub calls a page's headings."""
    prose = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    headings = re.findall(r"^#+ (.*)$", prose, flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", one.lower()).replace(" ", "-") for one in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_command_named_exists(page: Path) -> None:
    code = code_of(page.read_text())
    assert set(re.findall(r"\bcavmae ([a-z][a-z-]*)", code)) <= {*COMMANDS, *GROUPS}
    assert set(re.findall(r"\bcavmae bench ([a-z-]+)", code)) <= {*BENCHMARKS}
    assert set(re.findall(r"\bcavmae pretrain ([a-z_]+)\b(?!/)", code)) <= {*PRETRAIN_RECIPES}
    fine_tuned = set(re.findall(r"\bcavmae finetune ([a-z_0-9]+)\b(?!/)", code))
    assert fine_tuned <= {*FINETUNE_RECIPES}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_option_named_with_a_command_is_one_of_it(page: Path) -> None:
    wrong = [
        (name, option)
        for name, options in options_of(code_of(page.read_text()))
        for option in options
        if option not in {*known_options()[name], "--help"}
    ]
    assert wrong == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_option_with_a_dot_is_a_field(page: Path) -> None:
    sections = {field.path.partition(".")[0] for field in fields() if "." in field.path}
    options = re.findall(rf"--(?:{'|'.join(sections)})\.[\w.-]+", code_of(page.read_text()))
    named = {option for option in options if not option.endswith(".")}  # that is one of a section
    assert named <= known_options()["cavmae train"]


def code_of(text: str) -> str:
    """Code blocks and code spans of a page, a line each."""
    blocks = re.findall(r"```\w*\n(.*?)```", text, flags=re.DOTALL)
    spans = re.findall(r"`([^`\n]+)`", re.sub(r"```.*?```", "", text, flags=re.DOTALL))
    return "\n".join([*blocks, *spans]) + "\n"


def options_of(code: str) -> list[tuple[str, list[str]]]:
    """Each command that stands there, with its options: `("cavmae bench step", ["--out"])`."""
    lines = re.sub(r"\\\n", " ", code).splitlines()
    found = []
    for line in lines:
        for words in re.findall(r"\bcavmae ([a-z][^#|&;`'\"]*)", line):
            first = words.split()
            name = " ".join(["cavmae", *first[: 2 if first[0] in GROUPS else 1]])
            options = re.findall(r"(?<!\S)--[a-z][\w.-]*", words)
            if options:
                found.append((name, options))
    return found


@cache
def known_options() -> dict[str, set[str]]:
    """The options of each command, as they are typed."""
    own = {
        one.name: {word for option in one.options for word in re.findall(r"--[\w.-]+", option.call)}
        for one in commands()
    }
    of_runs = set()
    for field in fields():
        part, _, name = field.path.replace("_", "-").rpartition(".")
        prefix = f"--{part}." if part else "--"
        of_runs |= {prefix + name} | ({f"{prefix}no-{name}"} if "true" in field.kind else set())
    return {
        name: options | of_runs if name in TAKE_FIELDS_TOO else options
        for name, options in own.items()
    }
