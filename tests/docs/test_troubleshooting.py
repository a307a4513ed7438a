"""A message that the page of troubleshooting quotes is one that the code can print."""

import ast
import functools
import re
from pathlib import Path
from typing import get_args

import pytest

from cavmae.dataloaders.media.errors import Reason

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs/reference/troubleshooting.md").read_text()
QUOTED = re.findall(r"```text\n(.*?)\n```", PAGE, flags=re.DOTALL)
SHORTEST = 12
"""Characters of its own that a message needs, so that `{a}: {b}` does not pass for any."""


@functools.cache
def messages() -> list[re.Pattern[str]]:
    """What the texts of the code can become: anything, or nothing, where a value is put in."""
    patterns = []
    for files in ("cavmae/*.py", "cluster/**/*.py", "dataloaders/**/*.py", "trainer/**/*.py"):
        for path in sorted(ROOT.glob(files)):
            for node in ast.walk(ast.parse(path.read_text())):
                parts = constants(node)
                if sum(map(len, parts)) >= SHORTEST:
                    patterns.append(re.compile(".*".join(map(re.escape, parts)), re.DOTALL))
    return patterns


def constants(node: ast.AST) -> list[str]:
    """What a text has of its own, without the values that are put in; empty for other code."""
    if isinstance(node, ast.JoinedStr):
        parts = [
            str(part.value) if isinstance(part, ast.Constant) else "\0" for part in node.values
        ]
        return "".join(parts).split("\0")
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return re.split(r"%[-.\d]*[sdgf]", node.value)
    return []


@pytest.mark.parametrize("message", QUOTED, ids=lambda message: message[:50])
def test_every_message_quoted_is_one_of_the_code(message: str) -> None:
    assert any(pattern.fullmatch(message) for pattern in messages())


def test_a_message_that_no_code_has_is_found_out() -> None:
    assert not any(pattern.fullmatch("lanes is 48, which is too many") for pattern in messages())


def test_every_reason_to_leave_out_a_clip_is_explained() -> None:
    assert [reason for reason in get_args(Reason) if f"`{reason}`" not in PAGE] == []
