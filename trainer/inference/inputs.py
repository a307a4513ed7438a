"""Files as they are named on a command line: paths, URLs, folders, and a list on standard input."""

import os
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path


def listed_files(inputs: Iterable[str]) -> Iterator[str]:
    """Yield the files that the words of a command name.

    Args:
        inputs: paths and URLs of files; folders, whose files at any depth are taken in the order of
            their names, without hidden ones; `-`: a path or URL in each line of standard input.

    Raises:
        ValueError: a folder without files.
    """
    for word in inputs:
        if word == "-":
            for line in sys.stdin:
                if name := line.rstrip("\r\n"):
                    yield name
        elif os.path.isdir(word):
            found = sorted(
                path
                for path in Path(word).rglob("*")
                if path.is_file()
                and not any(p.startswith(".") for p in path.relative_to(word).parts)
            )
            if not found:
                raise ValueError(f"{word} is a folder without files; give one that has some")
            yield from map(str, found)
        else:
            yield word


class Skipped:
    """Files that can't be used, told as they are met.

    Attributes:
        reasons: path and reason of each.
    """

    def __init__(self) -> None:
        self.reasons: list[tuple[str, str]] = []

    def add(self, name: str, error: Exception) -> None:
        """Note a file, and say why on standard error."""
        self.reasons.append((name, str(error)))
        print(f"skipped: {error}", file=sys.stderr, flush=True)
