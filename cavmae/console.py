"""What commands print: tables that fit the terminal, plain rows where there is none, JSON for
programs, and how far something long has come.

Names, labels and errors come from outside: `[id]` or `:x:` in them are no markup and no picture,
and what would move the cursor or end a line is written as an escape.
"""

import json
import math
import sys
import time
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Annotated, Any, TypeVar

import tyro
from rich.cells import cell_len, set_cell_size
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Column, Table

T = TypeVar("T")

_FILE_WIDTH = 160
"""Where no terminal has a width, so that names are not cut or wrapped."""
_LEAST_PATH, _LEAST_TEXT = 12, 8
"""Characters to which a column of paths, or of other words, may be narrowed on a terminal."""
_LINE_SECONDS = 10.0
_CONTROL = ("Cc", "Cf", "Cs", "Zl", "Zp")
_JOINERS = "\u200c\u200d"  # of letters and pictures


def plain_console(**options: Any) -> Console:
    """Make a console with rich's options whose texts, also those in tables, have no markup."""
    console = Console(markup=False, emoji=False, **options)
    if not console.is_terminal:
        console.width = max(console.width, _FILE_WIDTH)
    return console


# -------------------------------------------------------------------------------------- rows


@dataclass(frozen=True, kw_only=True)
class JsonOption:
    """The option of every command that prints rows."""

    json: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Print one JSON document, and nothing else on standard output."""


def print_rows(
    columns: Sequence[str],
    rows: Iterable[Sequence[object]],
    *,
    title: str = "",
    paths: Sequence[str] = (),
) -> None:
    """Print a table on standard output: on a terminal one that fits its width, elsewhere a line for
    each row with tabs between its cells, after one with the columns.

    Args:
        columns: their names; all empty: no line for them.
        rows: cells; None is an empty one.
        title: line above the table.
        paths: columns that are shortened in the middle, not wrapped, where the width is too small.
    """
    cells = [[printable(cell) for cell in row] for row in rows]
    lines = [[title]] if title else []
    lines += [columns] if any(columns) else []
    console = plain_console(highlight=False)
    if on_terminal(console):
        console.print(_fitted(columns, cells, printable(title), paths, console.width))
    else:
        for line in (*lines, *cells):
            print_row(line)


def print_row(cells: Iterable[object]) -> None:
    """Print one line of cells with tabs between them, at once."""
    print("\t".join(map(printable, cells)), flush=True)


def print_json(document: object) -> None:
    """Print a JSON document; numbers that are not finite, which JSON lacks, become null."""
    print(json.dumps(_finite(document), indent=2, allow_nan=False))


def printable(value: object) -> str:
    """Write a value on one line; controls of terminals and of direction, and what is no text,
    become escapes such as `\\t`, `\\x1b`, `\\u202e`."""
    text = "" if value is None else str(value)
    if text.isprintable():
        return text
    return "".join(
        one.encode("unicode_escape").decode()
        if unicodedata.category(one) in _CONTROL and one not in _JOINERS
        else one
        for one in text
    )


def shortened(text: str, width: int) -> str:
    """Cut the middle out of a text that takes more than `width` cells of a terminal."""
    if cell_len(text) <= width:
        return text
    head = (width - 1) // 2
    tail = set_cell_size(text[::-1], width - 1 - head)[::-1]
    return f"{set_cell_size(text, head)}…{tail}"


def on_terminal(console: Console) -> bool:
    """Whether a console writes to a terminal; rich says so of pipes where FORCE_COLOR is set."""
    return console.file.isatty()


def _fitted(
    columns: Sequence[str],
    cells: list[list[str]],
    title: str,
    paths: Sequence[str],
    width: int,
) -> Table:
    """Make a table of at most `width` cells; one row below the other if its columns do not fit."""
    lines = [columns, *cells]
    widths = [max(map(cell_len, column)) for column in zip(*lines, strict=True)]
    borders = 3 * len(columns) + 1
    if sum(min(one, _LEAST_TEXT) for one in widths) + borders > width:
        table = Table(title=title or None, title_justify="left", show_header=False)
        for row in cells:
            for name, cell in zip(columns, row, strict=True):
                table.add_row(name, cell)
            table.add_section()
        return table
    excess = sum(widths) + borders - width
    heads = []
    for place, name in enumerate(columns):
        if name in paths and excess > 0:
            kept = max(_LEAST_PATH, widths[place] - excess)
            excess -= widths[place] - kept
            for row in cells:
                row[place] = shortened(row[place], kept)
        heads.append(Column(name, no_wrap=name in paths, overflow="fold"))
    table = Table(*heads, title=title or None, title_justify="left", show_header=any(columns))
    for row in cells:
        table.add_row(*row)
    return table


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _finite(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


# ---------------------------------------------------------------------------------- progress


class Bar:
    """How much of something long is done, on standard error: a bar with the time left on a
    terminal, elsewhere a line every 10 s. A context.

    Args:
        what: is being done, such as `embedding`.
        total: things in all.
        unit: what they are called, such as `clips`.
        done: of them before this attempt.
        console: where to show it; None: standard error.
    """

    def __init__(
        self, what: str, total: int, unit: str, *, done: int = 0, console: Console | None = None
    ) -> None:
        self._what, self._total, self._unit = what, total, unit
        self._before = self._done = done
        self._began = self._said = time.monotonic()
        self._console = console or plain_console(stderr=True, highlight=False)
        drawn = on_terminal(self._console) and not self._console.is_dumb_terminal
        self._lines = not drawn
        self._drawn = Progress(
            TextColumn(what),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn(unit),
            TextColumn("{task.fields[note]}"),
            TimeRemainingColumn(),
            console=self._console,
            transient=True,
            disable=not drawn,
            redirect_stdout=sys.stdout.isatty(),  # what goes into a pipe must not come here
        )
        self._task = self._drawn.add_task("", total=total, completed=done, note="")

    def __enter__(self) -> "Bar":
        self._drawn.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._drawn.stop()

    def count(self, number: int = 1, note: str = "") -> None:
        """Count some more as done; a note is shown beside it."""
        self._done += number
        self._drawn.update(self._task, completed=self._done, note=note)
        now = time.monotonic()
        if self._lines and now - self._said > _LINE_SECONDS:
            self._said = now
            rate = (self._done - self._before) / (now - self._began)
            left = clock((self._total - self._done) / rate) if rate else "-:--:--"
            text = f"{self._what}: {self._done} of {self._total} {self._unit}, "
            text += f"{note}, " if note else ""
            with suppress(OSError):  # a full disk, or nobody reads any more
                self._console.print(f"{text}{rate:.3g}/s, {left} left", soft_wrap=True)


def counted(
    items: Iterable[T],
    what: str,
    total: int,
    unit: str,
    size: Callable[[T], int] = lambda _: 1,
) -> Iterator[T]:
    """Yield items and show, as `Bar` does, how many are done with.

    Args:
        items: to go through.
        what, total, unit: see `Bar`.
        size: how many things an item stands for.
    """
    with Bar(what, total, unit) as bar:
        for item in items:
            yield item
            bar.count(size(item))


def clock(seconds: float) -> str:
    """Format hours, minutes and seconds, such as `1:02:03`; days are 24 more hours."""
    minutes, second = divmod(round(seconds), 60)
    hour, minute = divmod(minutes, 60)
    return f"{hour}:{minute:02}:{second:02}"
