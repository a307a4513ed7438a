"""Consoles that print text as it is: names, labels and errors come from outside, and `[id]` or
`:x:` in them are no markup and no picture."""

from typing import Any

from rich.console import Console

_FILE_WIDTH = 160
"""Where no terminal has a width, so that names are not cut or wrapped."""


def plain_console(**options: Any) -> Console:
    """Make a console with rich's options whose texts, also those in tables, have no markup."""
    console = Console(markup=False, emoji=False, **options)
    if not console.is_terminal:
        console.width = max(console.width, _FILE_WIDTH)
    return console
