"""Tables of any program, read in one way; errors name file and line."""

from pathlib import Path

import pytest

from cavmae.text_table import read_table


@pytest.mark.field
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
@pytest.mark.parametrize("separator", [",", ";", "\t"])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_marks_line_ends_and_separators_make_no_difference(
    encoding: str, separator: str, end: str, tmp_path: Path
) -> None:
    lines = ["# a comment, with; all\tof them", "id,name", '-x, "a,b;c\td"', "", "#1,é"]
    text = end.join([lines[0], *(line.replace(",", separator) for line in lines[1:])])
    (tmp_path / "t.csv").write_bytes((text + end).encode(encoding))
    table = read_table(tmp_path / "t.csv")
    quoted = "a,b;c\td".replace(",", separator)
    assert table.columns == ("id", "name") and table.place.endswith("t.csv, line 2")
    assert table.rows == [
        (f"{tmp_path}/t.csv, line 3", {"id": "-x", "name": quoted}),
        (f"{tmp_path}/t.csv, line 5", {"id": "#1", "name": "é"}),
    ]
    assert table.empty_rows == [f"{tmp_path}/t.csv, line 4"]


@pytest.mark.field
@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "t.csv is empty"),
        (b"# only a comment\n", "t.csv is empty"),
        ("a,b\n1,é\n".encode("latin-1"), "line 2: not text in UTF-8 .*; save it as UTF-8"),
        ("a,b\n".encode("utf-16-le"), "line 1: not text, it has NUL bytes"),
        (b"a,a\n", "line 1: column 'a' is duplicated"),
        (b'a,b\n1,2\n"3,4\n5,6\n', "line 3: unexpected end of data; check its quotes"),
        (b'a,b\n"1\n2",3\n4,5,6\n', "line 4: 3 columns, the header has 2"),
    ],
)
def test_what_is_no_table_is_refused_by_file_and_line(
    data: bytes, message: str, tmp_path: Path
) -> None:
    (tmp_path / "t.csv").write_bytes(data)
    with pytest.raises(ValueError, match=rf"t\.csv.*{message}|{message}"):
        read_table(tmp_path / "t.csv")
