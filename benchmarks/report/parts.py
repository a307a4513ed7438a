"""What `cavmae bench report` is put together from: sections of words, tables and pictures."""

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
    """What a record says, for people.

    Attributes:
        words: paragraphs before all tables.
        grids, pictures: in their order.
    """

    words: list[str] = field(default_factory=list)
    grids: list[Grid] = field(default_factory=list)
    pictures: list[Picture] = field(default_factory=list)

    def __add__(self, other: "Section") -> "Section":
        return Section(
            self.words + other.words, self.grids + other.grids, self.pictures + other.pictures
        )


def drawn(title: str, figure: "Figure") -> Picture:
    """A matplotlib figure as a picture."""
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=100)
    return Picture(title, file.getvalue())


def shown(value: Any) -> str:
    """A value of a record in a cell: four digits, `-` for nothing."""
    if value is None:
        return "-"
    return f"{value:,.4g}" if isinstance(value, float) else str(value)


def met(value: bool | None) -> str:
    """Whether a bar was met, in a cell; None: not judged."""
    return "-" if value is None else "yes" if value else "NO"


def share(value: float | None) -> str:
    """A share in a cell."""
    return "-" if value is None else f"{value:.1%}"


def gigabytes(value: float | None) -> str:
    """Bytes in a cell."""
    return "-" if value is None else f"{value / 1e9:.2f} GB"


def milliseconds(seconds: float) -> str:
    """A time in a cell."""
    return f"{seconds * 1e3:,.4g} ms"


def numbers(results: dict[str, Any], path: tuple[str, ...] = ()) -> Iterator[tuple[str, str]]:
    """Name and value of all single values on the first two levels."""
    for name, value in results.items():
        if isinstance(value, dict) and not path:
            yield from numbers(value, (name,))
        elif isinstance(value, str | int | float | bool):
            yield " ".join((*path, name)), shown(value)
