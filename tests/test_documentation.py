"""The documentation names what is there: every module, existing files, existing commands."""

import re
from pathlib import Path

import pytest

from cavmae.cli import BENCHMARKS, COMMANDS, GROUPS
from cavmae.trainer.finetune_recipes import FINETUNE_RECIPES
from cavmae.trainer.recipes import PRETRAIN_RECIPES

ROOT = Path(__file__).resolve().parents[1]
PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("*.md"))]
FOLDERS = ("cavmae", "kernels", "dataloaders", "trainer", "cluster", "benchmarks")


def files_of_the_readme() -> list[str]:
    """Paths of the Python files that the README's file tree names."""
    tree = (ROOT / "README.md").read_text().split("## Files")[1].split("```")[1]
    folders: list[str] = []
    files = []
    for line in tree.strip("\n").splitlines():
        depth = (len(line) - len(line.lstrip())) // 2
        name = line.split()[0]
        folders[depth:] = [name.rstrip("/")]
        if name.endswith(".py"):
            files.append("/".join(folders))
    return files


def test_the_readme_has_a_line_for_every_module_and_no_other() -> None:
    modules = [
        path.relative_to(ROOT).as_posix()
        for folder in FOLDERS
        for path in (ROOT / folder).rglob("*.py")
        if path.name != "__init__.py" and path.resolve() == path
    ]
    assert sorted(files_of_the_readme()) == sorted(modules)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_to_a_file_leads_to_one(page: Path) -> None:
    targets = re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text())
    assert [target for target in targets if not (page.parent / target).exists()] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_command_named_exists(page: Path) -> None:
    code = code_of(page.read_text())
    assert set(re.findall(r"\bcavmae ([a-z][a-z-]*)", code)) <= {*COMMANDS, *GROUPS}
    assert set(re.findall(r"\bcavmae bench ([a-z-]+)", code)) <= {*BENCHMARKS}
    assert set(re.findall(r"\bcavmae pretrain ([a-z_]+)\b(?!/)", code)) <= {*PRETRAIN_RECIPES}
    fine_tuned = set(re.findall(r"\bcavmae finetune ([a-z_0-9]+)\b(?!/)", code))
    assert fine_tuned <= {*FINETUNE_RECIPES}


def code_of(text: str) -> str:
    """Code blocks and code spans of a page, a line each."""
    blocks = re.findall(r"```\w*\n(.*?)```", text, flags=re.DOTALL)
    spans = re.findall(r"`([^`\n]+)`", re.sub(r"```.*?```", "", text, flags=re.DOTALL))
    return "\n".join([*blocks, *spans]) + "\n"
