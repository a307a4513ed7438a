"""The section of a record on the terminal, as `cavmae bench report` has it but for its plots."""

from pathlib import Path

from rich.console import Console
from rich.table import Table

from cavmae.benchmarks.harness.records import read_record
from cavmae.benchmarks.report.sections import section


def show(path: Path) -> None:
    """Print text and tables of a record, of each cell the first line, and its path."""
    record = read_record(path)
    made = section(record, [record])
    console = Console(width=160, highlight=False, markup=False)
    for words in made.words:
        console.print(words)
    for grid in made.grids:
        table = Table(*grid.header, title=grid.title, title_justify="left")
        for row in grid.rows:
            table.add_row(*(text.partition("\n")[0] for text in row))
        console.print(table)
    print(f"record: {path}")
