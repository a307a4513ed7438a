"""The parts of `cavmae bench report`: sections of paragraphs, tables and pictures."""

import io
from collections.abc import Iterator
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


def bars_grid(bars: dict[str, Any]) -> Grid:
    """Make the table of the bars that a record was judged by."""
    rows = [(name, shown(one["value"]), one["bar"], met(one["met"])) for name, one in bars.items()]
    return Grid("Targets", ("what", "value", "bar", "met"), rows)


def drawn(title: str, figure: "Figure") -> Picture:
    """Render a matplotlib figure."""
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=100)
    return Picture(title, file.getvalue())


def shown(value: Any) -> str:
    """Format a value: four digits, `-` for None."""
    if value is None:
        return "-"
    return f"{value:,.4g}" if isinstance(value, float) else str(value)


def met(value: bool | None) -> str:
    """Format whether a bar was met; None: not judged."""
    return "-" if value is None else "yes" if value else "NO"


def share(value: float | None) -> str:
    """Format a share as a percentage."""
    return "-" if value is None else f"{value:.1%}"


def gigabytes(value: float | None) -> str:
    """Format bytes."""
    return "-" if value is None else f"{value / 1e9:.2f} GB"


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
