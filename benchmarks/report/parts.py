"""The parts of `cavmae bench report`: sections of paragraphs, tables and pictures."""

import io
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Grid:
    """A table. Attributes: title; header, a word for each column; rows, of as many cells."""

    title: str
    header: tuple[str, ...]
    rows: list[tuple[str, ...]]


@dataclass(frozen=True)
class Picture:
    """A plot. Attributes: title; png, the bytes of a PNG file."""

    title: str
    png: bytes


@dataclass(frozen=True)
class Section:
    """A record as text, tables and plots.

    Attributes:
        words: paragraphs before all tables.
        grids, pictures: in their order on the page.
    """

    words: list[str] = field(default_factory=list)
    grids: list[Grid] = field(default_factory=list)
    pictures: list[Picture] = field(default_factory=list)

    def __add__(self, other: "Section") -> "Section":
        return Section(
            self.words + other.words, self.grids + other.grids, self.pictures + other.pictures
        )


Cell = Callable[[Mapping[str, Any]], str]


def table(title: str, columns: Mapping[str, Cell], rows: Iterable[Mapping[str, Any]]) -> Grid:
    """Make a table: `columns` has the header of each and the cell that it makes of a row."""
    cells = [tuple(cell(row) for cell in columns.values()) for row in rows]
    return Grid(title, tuple(columns), cells)


def cell(path: str, form: Callable[[Any], str] | None = None) -> Cell:
    """Make the cell of a value by its dotted path in a row; `-` for None and what is absent."""

    def text(row: Mapping[str, Any]) -> str:
        value: Any = row
        for key in path.split("."):
            value = (value or {}).get(key)
        return "-" if value is None else (form or shown)(value)

    return text


def named(results: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the entries of results with their names, as rows of a table."""
    return [{"name": name} | one for name, one in results.items()]


def bars_grid(bars: dict[str, Any]) -> Grid:
    """Make the table of the bars that a record was judged by."""
    columns = {
        "what": cell("name"),
        "value": cell("value"),
        "bar": cell("bar"),
        "met": cell("met", yes_or_no),
    }
    return table("Targets", columns, named(bars))


def drawn(title: str, figure: "Figure") -> Picture:
    """Render a matplotlib figure."""
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=100)
    return Picture(title, file.getvalue())


def shown(value: Any) -> str:
    """Format a value, a float with four digits."""
    return f"{value:,.4g}" if isinstance(value, float) else str(value)


def yes_or_no(value: bool) -> str:
    """Format whether a bar was met."""
    return "yes" if value else "NO"


def share(value: float) -> str:
    """Format a share as a percentage."""
    return f"{value:.1%}"


def gigabytes(value: float) -> str:
    """Format bytes."""
    return f"{value / 1e9:.2f} GB"


def milliseconds(seconds: float) -> str:
    """Format a time."""
    return f"{seconds * 1e3:,.4g} ms"


def numbers(results: dict[str, Any], path: tuple[str, ...] = ()) -> Iterator[tuple[str, str]]:
    """Yield name and value of all single values on the first two levels."""
    for name, value in results.items():
        if isinstance(value, dict) and not path:
            yield from numbers(value, (name,))
        elif isinstance(value, str | int | float | bool):
            yield " ".join((*path, name)), shown(value)
