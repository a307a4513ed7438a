"""The plot that a benchmark writes beside its record."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from cavmae.atomic_write import atomic_write

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@contextmanager
def plot_beside(record: Path, width: float, height: float) -> Iterator["Figure"]:
    """Yield an empty figure, which is written under the record's name at the end.

    Args:
        record: file of the record.
        width, height: of the figure, in inches.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    yield figure
    path = record.with_suffix(".png")
    with atomic_write(path) as temporary:
        figure.savefig(temporary, format="png", dpi=100)
    print(f"plot: {path}")
