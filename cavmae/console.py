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
from itertools import accumulate, takewhile, zip_longest
from shutil import get_terminal_size
from typing import Annotated, Any, TypeVar

import tyro
from rich.cells import get_character_cell_size
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

T = TypeVar("T")

_FILE_WIDTH = 160
"""Where no terminal has a width, so that names are not cut or wrapped."""
_GAP, _LEAST_PATH, _LEAST_TEXT = 2, 12, 8
"""Cells of a terminal between columns, and to which one of paths, or of words, may be narrowed."""
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
    whole: Sequence[str] = (),
) -> None:
    """Print a table on standard output: on a terminal one that fits its width, elsewhere a line for
    each row with tabs between its cells, after one with the columns.

    Args:
        columns: their names; all empty: no line for them.
        rows: cells; None is an empty one.
        title: line above the table.
        paths: columns that are shortened in the middle, not wrapped, where the width is too small.
        whole: columns that are neither, such as names that are copied.
    """
    cells = [[printable(cell) for cell in row] for row in rows]
    title = printable(title)
    if sys.stdout and sys.stdout.isatty():
        width = get_terminal_size().columns
        above = ["", *_wrapped(title, width)] if title else []
        lines = [*above, *_fitted(columns, cells, paths, whole, width)]
        print("\n".join(lines), flush=True)
        return
    if title:
        print_row([title])
    for line in (columns, *cells) if any(columns) else cells:
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
    if _cells(text) <= width:
        return text
    head, tail = _first_cells(text, (width - 3) // 2), _first_cells(text[::-1], width // 2 - 1)
    return f"{head}...{tail[::-1]}"


def _fitted(
    columns: Sequence[str],
    cells: list[list[str]],
    paths: Sequence[str],
    whole: Sequence[str],
    width: int,
) -> list[str]:
    """Lay out a table in lines of at most `width` cells; a row below the other where its columns do
    not fit beside each other."""
    lines = [columns, *cells]
    widths = [max(map(_cells, column)) for column in zip(*lines, strict=True)]
    room = width - _GAP * (len(columns) - 1)
    narrowed = [n for n, name in enumerate(columns) if name not in whole]
    of_paths = [n for n in narrowed if columns[n] in paths]
    for least, some in ((_LEAST_PATH, of_paths), (_LEAST_TEXT, narrowed)):
        while sum(widths) > room and (wide := [n for n in some if widths[n] > least]):
            widths[max(wide, key=widths.__getitem__)] -= 1
    if sum(widths) > room:
        records = [
            [one] for row in cells for one in (*map(": ".join, zip(columns, row, strict=True)), "")
        ]
        return [line for record in records for line in _laid_out(record, [False], [width])]
    cut = [column in paths for column in columns]
    table = [line for row in cells for line in _laid_out(row, cut, widths)]
    rule = (" " * _GAP).join("-" * one for one in widths)
    return [*_laid_out(columns, cut, widths), rule, *table] if any(columns) else table


def _laid_out(row: Sequence[str], cut: Sequence[bool], widths: Sequence[int]) -> list[str]:
    """Lay out a row in lines; cells that are not cut in their middle take several."""
    parts = [
        [shortened(cell, width)] if short else _wrapped(cell, width)
        for cell, short, width in zip(row, cut, widths, strict=True)
    ]
    return [
        (" " * _GAP)
        .join(part + " " * (width - _cells(part)) for part, width in zip(line, widths, strict=True))
        .rstrip()
        for line in zip_longest(*parts, fillvalue="")
    ]


def _wrapped(text: str, width: int) -> list[str]:
    """Cut a text into lines, between words where that is possible."""
    lines = []
    while _cells(text) > width:
        line = _first_cells(text, width) or text[0]
        if " " in line.strip() and text[len(line)] != " ":
            line = line[: line.rindex(" ")]
        lines.append(line)
        text = text[len(line) :].lstrip()
    return [*lines, text]


def _first_cells(text: str, width: int) -> str:
    """Return as much of a text as `width` cells hold."""
    used = accumulate(map(get_character_cell_size, text))
    return text[: sum(1 for _ in takewhile(lambda total: total <= width, used))]


def _cells(text: str) -> int:
    """Count the cells of a terminal that a text takes; joined characters count one by one."""
    return sum(map(get_character_cell_size, text))


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _finite(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


# ---------------------------------------------------------------------------------- progress


def can_draw(console: Console) -> bool:
    """Return whether bars can be drawn; rich takes a pipe for a terminal if FORCE_COLOR is set."""
    return console.file.isatty() and not console.is_dumb_terminal


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
        drawn = can_draw(self._console)
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
            # What goes into a pipe must not come here.
            redirect_stdout=bool(sys.stdout and sys.stdout.isatty()),
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
