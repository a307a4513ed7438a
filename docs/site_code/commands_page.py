"""The site's page of all commands, generated from what `--help` prints.

It is not a file: the site generates it when it is built (`site_hooks.py`) and the tests read it, so
it is never out of date.
"""

import inspect
import io
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass

from cavmae.cli import COMMANDS, GROUPS, main

RUN_COMMANDS = ("cavmae pretrain", "cavmae finetune", "cavmae train", "cavmae submit")
"""Commands whose options are the fields of a run, which have their own page."""

_COLUMNS = "100"
"""Width of the help that is parsed: on a wider terminal tyro puts sections side by side."""


@dataclass(frozen=True)
class Option:
    """An option of a command.

    Attributes:
        call: as it is typed, such as `--out STR`.
        meaning: its help.
    """

    call: str
    meaning: str


@dataclass(frozen=True)
class Command:
    """The `--help` of a command.

    Attributes:
        name: such as `cavmae bench step`.
        usage: in one line.
        description: paragraphs.
        options: positional ones first, without `--help`.
    """

    name: str
    usage: str
    description: str
    options: list[Option]


def commands() -> list[Command]:
    """Return every command, groups included, in the order of `cavmae --help`."""
    found = [_command([name], summary) for name, (_, summary) in COMMANDS.items()]
    for group, (members, _) in GROUPS.items():
        found += [_command([group, name], summary) for name, (_, summary) in members.items()]
    return found


def commands_page() -> str:
    """Return the page in Markdown."""
    parts = [
        "# Commands",
        "What `cavmae COMMAND --help` prints.",
        "| exit code | means |\n| --- | --- |\n"
        "| 0 | done |\n"
        "| 1 | failed: one line says what to fix; `CAVMAE_DEBUG=1` shows the traceback |\n"
        "| 2 | wrong usage |\n"
        "| 75 | `cavmae train` was preempted and has saved a checkpoint; rerun it to resume |\n"
        "| 130 | interrupted |",
    ]
    for command in commands():
        parts += [f"## {command.name}", command.description, f"```text\n{command.usage}\n```"]
        if command.name in RUN_COMMANDS:
            parts.append(
                "The first argument is a recipe or the `config.json` of a run; the others override "
                "[the fields of a run](fields.md)."
            )
        elif command.options:
            rows = [f"| `{one.call}` | {one.meaning} |" for one in command.options]
            parts.append("\n".join(["| option | what |", "| --- | --- |", *rows]))
    return "\n\n".join(parts) + "\n"


def _command(words: list[str], summary: str) -> Command:
    name = " ".join(["cavmae", *words])
    head, sections = _sections(_help(words))
    usage, _, description = head.partition("\n\n")
    usage = _short(re.sub(r"\s+", " ", usage.removeprefix("usage: ")).replace("[-h] ", ""))
    if name in RUN_COMMANDS:
        usage, description = f"{name} RECIPE|config.json [--field value ...]", summary
    options = [option for lines in sections for option in _options(lines)]
    return Command(name, usage, inspect.cleandoc(description), options)


def _help(words: list[str]) -> list[str]:
    """Return the lines of `cavmae WORDS --help`, without tyro's boxes around sections."""
    output = io.TextIOWrapper(io.BytesIO(), encoding="utf-8")  # tyro checks the encoding
    with _columns(_COLUMNS), redirect_stdout(output):
        try:
            main([*words, "--help"])
        except SystemExit as end:
            assert not end.code, words
    output.seek(0)
    lines = []
    for line in output.read().splitlines():
        if line.startswith("╭─"):
            lines += ["", line.strip("╭─╮ ") + ":"]
        elif line.startswith("│"):
            lines.append("  " + line.strip("│").removeprefix(" ").rstrip())
        elif not line.startswith("╰"):
            lines.append(line)
    return lines


@contextmanager
def _columns(count: str) -> Iterator[None]:
    before = os.environ.get("COLUMNS")
    os.environ["COLUMNS"] = count
    try:
        yield
    finally:
        os.environ.pop("COLUMNS")
        if before is not None:
            os.environ["COLUMNS"] = before


def _sections(lines: list[str]) -> tuple[str, list[list[str]]]:
    """Return the text before the options, and the lines below each title such as `options:`."""
    titles = [
        index
        for index, line in enumerate(lines)
        if re.fullmatch(r"[a-z._ ]*(options|arguments):", line)
    ]
    assert titles, lines
    ends = [*titles[1:], len(lines)]
    head = "\n".join(lines[: titles[0]]).strip()
    return head, [lines[title + 1 : end] for title, end in zip(titles, ends, strict=True)]


def _options(lines: list[str]) -> Iterator[Option]:
    """Yield the options of a section: an indent of two begins one, a deeper one continues it."""
    described = [index for index, line in enumerate(lines) if line.startswith("  ──")]
    entries: list[list[str]] = []
    for line in lines[described[-1] + 1 if described else 0 :]:
        if re.match(r"  \S", line):
            entries.append(re.split(r"\s{2,}", line.strip(), maxsplit=1))
        elif line.strip():
            entries[-1].append(line.strip())
    for call, *meaning in entries:
        if call != "-h, --help":
            said = " ".join(meaning)
            said = said.removesuffix("(default: '')").removesuffix("(default: )").strip()
            yield Option(_short(call), said)


def _short(call: str) -> str:
    """Shorten `FAULT [FAULT ...]` to `FAULT ...`."""
    return re.sub(r"(\S+) \[\1 \.\.\.\]", r"\1 ...", call)
