"""Text that people hand us: files of any program, read in one way, and names that are no text.

Spreadsheets save UTF-16, or UTF-8 with a mark, end lines as Windows does and separate columns with
`;` or tabs where a comma is the decimal point; published lists begin with lines of comments.
"""

import codecs
import csv
import io
from dataclasses import dataclass
from pathlib import Path

SEPARATORS = ",;\t"


@dataclass(frozen=True)
class TextTable:
    """A table with a header.

    Attributes:
        place: file and line of the header, for errors.
        columns: names of the columns.
        rows: file and line of each row, for errors, and its values by column.
        empty_rows: file and line of rows without any value, which are not among `rows`.
    """

    place: str
    columns: tuple[str, ...]
    rows: list[tuple[str, dict[str, str]]]
    empty_rows: list[str]


def in_utf8(text: str) -> str:
    """Write what UTF-8 does not have as backslash escapes: bytes of file names, lone surrogates."""
    return text.encode(errors="backslashreplace").decode()


def read_text(path: str | Path) -> str:
    """Read a text file in UTF-8, with or without a mark, or in UTF-16 with one; lines end in LF.

    Raises:
        OSError: the file can't be read.
        ValueError: it is not such text; the line is named.
    """
    data = Path(path).read_bytes()
    utf_16 = data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    encoding = "utf-16" if utf_16 else "utf-8-sig"
    try:
        text = data.decode(encoding)
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise ValueError(
            f"{path}, line {line}: not text in UTF-8 ({error.reason}); save it as UTF-8"
        ) from error
    if "\0" in text:
        line = text[: text.index("\0")].count("\n") + 1
        raise ValueError(f"{path}, line {line}: not text, it has NUL bytes; save it as UTF-8")
    return io.StringIO(text, newline=None).read()


def read_table(path: str | Path) -> TextTable:
    """Read a table whose columns are separated by commas, semicolons or tabs, as its header shows.

    Lines that begin with `#` above the header are comments; spaces around separators are dropped.

    Raises:
        OSError: the file can't be read.
        ValueError: it is not a table: not text, empty, a column that is there twice, a row with
            another number of columns than the header, or a quote that isn't closed.
    """
    lines = io.StringIO(read_text(path)).readlines()
    comments = 0
    while comments < len(lines) and (
        lines[comments].startswith("#") or not lines[comments].strip()
    ):
        comments += 1
    if comments == len(lines):
        raise ValueError(f"{path} is empty; its first line has to name the columns")
    separator = max(SEPARATORS, key=lines[comments].count)
    reader = csv.reader(lines[comments:], delimiter=separator, strict=True, skipinitialspace=True)
    rows, empty, last = [], [], 0
    header = f"{path}, line {comments + 1}"
    try:
        columns = tuple(name.strip() for name in next(reader))
        twice = next((name for name in columns if columns.count(name) > 1), None)
        if twice is not None:
            raise ValueError(f"{header}: column {twice!r} is duplicated")
        last = reader.line_num
        for row in reader:
            place, last = f"{path}, line {comments + last + 1}", reader.line_num
            if not any(value.strip() for value in row):
                empty.append(place)
            elif len(row) != len(columns):
                raise ValueError(
                    f"{place}: {len(row)} columns, the header has {len(columns)}; columns are "
                    f"separated by {separator!r}, and a text that holds one needs quotes"
                )
            else:
                rows.append((place, dict(zip(columns, row, strict=True))))
    except csv.Error as error:
        raise ValueError(
            f"{path}, line {comments + last + 1}: {error}; check its quotes"
        ) from error
    return TextTable(header, columns, rows, empty)
