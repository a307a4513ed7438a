"""What comes from outside is printed as it is, tables fit a terminal, and pipes get plain rows."""

import io
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from random import Random

import pytest
from rich.cells import cell_len
from rich.table import Table

from cavmae.console import (
    Bar,
    clock,
    counted,
    plain_console,
    print_json,
    print_rows,
    printable,
    shortened,
)

COLUMNS = ("rank", "score", "source", "labels")
PATH = "/datasets/audioset/unbalanced_train_segments/videos/part-07/Zw3Jk9xQb1E_000030.mp4"
ROWS = [(1, "0.912", PATH, "dog, bark"), (2, "0.880", "b.mp4", None)]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], Terminal]:
    """Standard output and error on a terminal of some width."""

    def of_width(width: int) -> Terminal:
        screen = Terminal()
        monkeypatch.setenv("COLUMNS", str(width))
        monkeypatch.setenv("TERM", "xterm")
        monkeypatch.setattr(sys, "stdout", screen)
        monkeypatch.setattr(sys, "stderr", screen)
        return screen

    return of_width


def without_style(screen: Terminal) -> list[str]:
    return re.sub(r"\x1b\[\d*m", "", screen.getvalue()).splitlines()


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


@pytest.mark.field
@pytest.mark.parametrize("forced", [{}, {"FORCE_COLOR": "1", "TERM": "dumb", "COLUMNS": "40"}])
def test_a_pipe_gets_a_line_for_each_row_whatever_the_environment(
    forced: dict[str, str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, value in forced.items():
        monkeypatch.setenv(name, value)
    print_rows(COLUMNS, ROWS, paths=("source",))
    assert capsys.readouterr().out == (
        f"rank\tscore\tsource\tlabels\n1\t0.912\t{PATH}\tdog, bark\n2\t0.880\tb.mp4\t\n"
    )


@pytest.mark.field
def test_a_name_can_not_add_a_cell_a_line_or_an_escape_sequence(
    capsys: pytest.CaptureFixture[str],
) -> None:
    hostile = "a\tb\nc\x1b[31m\u202egpj\u2028\udcff é\u00a0👩\u200d🔬"
    print_rows(("name", "label"), [(hostile, "x")])
    assert capsys.readouterr().out.splitlines()[1:] == [
        "a\\tb\\nc\\x1b[31m\\u202egpj\\u2028\\udcff é\u00a0👩\u200d🔬\tx"
    ]


@pytest.mark.parametrize("width", [45, 60, 80, 120])
def test_a_table_fits_the_terminal_and_shortens_paths_in_the_middle(
    width: int, terminal: Callable[[int], Terminal]
) -> None:
    screen = terminal(width)
    print_rows(COLUMNS, ROWS, paths=("source",), whole=("labels",))
    lines = without_style(screen)
    assert max(map(cell_len, lines)) <= width
    (row,) = (line for line in lines if "0.912" in line)  # one line, not three
    shown = row.split()[2].partition("...")
    assert PATH.startswith(shown[0]) and PATH.endswith(shown[2]) and "dog, bark" in row
    assert bool(shown[1]) == (width < 120)


@pytest.mark.parametrize("width", [30, 80])
def test_more_columns_than_fit_are_shown_below_each_other(
    width: int, terminal: Callable[[int], Terminal]
) -> None:
    screen = terminal(width)
    columns = [f"val_metric_{number}" for number in range(20)]
    print_rows(columns, [list(range(20))])
    lines = without_style(screen)
    assert max(map(cell_len, lines)) <= width
    assert all(any(name in line for line in lines) for name in columns)


def test_a_text_is_shortened_by_the_cells_that_it_takes() -> None:
    assert shortened("short", 5) == "short"
    assert shortened("/a/long/path/clip.mp4", 11) == "/a/l....mp4"
    for width in (12, 13):
        assert width - 2 <= cell_len(shortened("犬の鳴き声/公園/朝.mp4", width)) <= width


@pytest.mark.field
def test_any_table_fits_any_terminal(terminal: Callable[[int], Terminal]) -> None:
    """With letters of two cells, of none, and joined ones, on which rich's own tables fail."""
    random = Random(1)
    for _ in range(300):
        width, count = random.randint(12, 160), random.randint(1, 9)
        columns = ["c" * random.randint(1, 12) + str(n) for n in range(count)]
        rows = [
            [
                "".join(random.choices("ab/犬é👩\u200d🔬 -[", k=random.choice([0, 3, 60])))
                for _ in columns
            ]
            for _ in range(3)
        ]
        screen = terminal(width)
        print_rows(columns, rows, title="t" * 40, paths=random.sample(columns, count // 2))
        assert max(map(cell_len, screen.getvalue().splitlines())) <= width
        screen = terminal(width)
        print_rows(["a"], [[rows[0][0]]])
        assert "".join(screen.getvalue().split()[2:]) == "".join(rows[0][0].split()), "all is there"


def test_a_document_is_json_whatever_is_in_it(capsys: pytest.CaptureFixture[str]) -> None:
    print_json({"score": float("nan"), "names": ("\udcff\n", "é"), 1: [float("inf"), 0.5]})
    assert json.loads(capsys.readouterr().out) == {
        "score": None,
        "names": ["\udcff\n", "é"],
        "1": [None, 0.5],
    }


@pytest.mark.field
def test_a_reader_that_has_seen_enough_is_no_error(tmp_path: Path) -> None:
    """As `cavmae ... | head -1`, buffered and not."""
    code = (
        "import sys; from cavmae.command import exit_code; from cavmae.console import print_row\n"
        "def command(_):\n  for n in range(100_000): print_row((n, 'x' * 50))\n"
        "sys.exit(exit_code(command, []))"
    )
    for unbuffered in ("", "1"):
        writer = subprocess.Popen(
            [sys.executable, "-c", code],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=os.environ | {"PYTHONUNBUFFERED": unbuffered},
        )
        assert writer.stdout and writer.stderr
        writer.stdout.readline()
        writer.stdout.close()
        assert (writer.wait(60), writer.stderr.read()) == (141, b"")
        writer.stderr.close()


def test_a_bar_on_a_terminal_shows_what_is_done_and_left(
    terminal: Callable[[int], Terminal],
) -> None:
    screen = terminal(100)
    with Bar("checking", 40, "clips", done=10) as bar:
        bar.count(10, "3 skipped")
    shown = screen.getvalue()
    assert "checking" in shown and "20/40" in shown and "3 skipped" in shown


@pytest.mark.field
def test_what_goes_into_a_pipe_does_not_go_to_the_bar(
    terminal: Callable[[int], Terminal], monkeypatch: pytest.MonkeyPatch
) -> None:
    screen, pipe = terminal(100), io.StringIO()
    monkeypatch.setattr(sys, "stdout", pipe)
    for number in counted(range(2), "checking", 2, "clips"):
        print(f"row {number}")
    assert pipe.getvalue() == "row 0\nrow 1\n" and "row" not in screen.getvalue()


def test_without_a_terminal_there_is_a_line_now_and_then_with_the_time_left(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    now = 100.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    for _ in counted([4] * 10, "embedding", 40, "clips", size=int):
        now += 4
    assert capsys.readouterr().err.splitlines() == [
        "embedding: 12 of 40 clips, 1/s, 0:00:28 left",
        "embedding: 24 of 40 clips, 1/s, 0:00:16 left",
        "embedding: 36 of 40 clips, 1/s, 0:00:04 left",
    ]


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0:00:00"), (59.6, "0:01:00"), (3723, "1:02:03"), (90000, "25:00:00")]
)
def test_clock_writes_hours_minutes_and_seconds(seconds: float, text: str) -> None:
    assert clock(seconds) == text


def test_ordinary_text_stays_as_it_is() -> None:
    assert [printable(value) for value in (None, 0.5, "né [x]")] == ["", "0.5", "né [x]"]
