"""What comes from outside is printed as it is."""

import io

import pytest
from rich.table import Table

from cavmae.console import plain_console


@pytest.mark.field
@pytest.mark.parametrize(
    "text", ["Cats [id].mp4", "error [/data/x]", "[bold]", "a :cat: b", "\\[x]"]
)
def test_names_and_errors_are_no_markup(text: str) -> None:
    out = io.StringIO()
    table = Table(text, title=text)
    table.add_row(text)
    console = plain_console(file=out)
    console.print(text)
    console.print(table)
    assert out.getvalue().count(text) == 4


def test_a_table_in_a_file_is_wide_enough_for_names() -> None:
    out = io.StringIO()
    table = Table("name", "other")
    table.add_row("x" * 60, "y" * 60)
    plain_console(file=out).print(table)
    assert "x" * 60 in out.getvalue() and "y" * 60 in out.getvalue()
