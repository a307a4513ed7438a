"""The section of a record on the terminal, as `cavmae bench report` has it but for its plots."""

from pathlib import Path

from cavmae.benchmarks.harness.records import read_record
from cavmae.benchmarks.report.sections import section
from cavmae.console import print_rows


def show(path: Path) -> None:
    """Print text and tables of a record, of each cell the first line, and its path."""
    record = read_record(path)
    made = section(record, [record])
    for words in made.words:
        print(words)
    for grid in made.grids:
        rows = [[text.partition("\n")[0] for text in row] for row in grid.rows]
        print_rows(grid.header, rows, title=grid.title)
    print(f"record: {path}")
