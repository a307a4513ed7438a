"""The `cavmae` command: what it lists, how it fails, and that it loads nothing heavy to do so."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import cavmae
from cavmae import __version__, cli


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "cavmae", *arguments],
        cwd=Path(__file__).parents[1],
        env=environment,
        capture_output=True,
        text=True,
    )


def test_help_lists_every_command_with_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--help"]) == 0
    text = capsys.readouterr().out
    for name, (_, line) in cli.COMMANDS.items():
        assert any(row.split()[:1] == [name] and line in row for row in text.splitlines())
    assert "bench " in text


def test_bench_help_lists_every_benchmark(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["bench", "--help"]) == 0
    text = capsys.readouterr().out
    for name, (_, line) in cli.BENCHMARKS.items():
        assert any(row.split()[:1] == [name] and line in row for row in text.splitlines())


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["nonsense"], "error: `cavmae nonsense` is not a command; see `cavmae --help`\n"),
        (
            ["bench", "nonsense"],
            "error: `cavmae bench nonsense` is not a command; see `cavmae bench --help`\n",
        ),
    ],
)
def test_an_unknown_command_is_one_line_and_exit_code_2(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(words) == 2
    assert capsys.readouterr() == ("", message)


def test_version_is_that_of_the_package(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"cavmae {__version__}\n"


def test_help_and_the_state_of_jobs_import_no_heavy_library() -> None:
    code = (
        "import sys; from cavmae import cli; cli.main(['--help']);"
        "heavy = {'torch', 'ray', 'mlflow', 'deepspeed'};"
        "print(sorted({'numpy', 'tyro', *heavy} & set(sys.modules)));"
        "import cavmae.cluster.jobs; print(sorted(heavy & set(sys.modules)))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.stdout.splitlines()[-2:] == ["[]", "[]"], result.stderr


@pytest.fixture
def broken_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A subcommand `broken` whose module the test writes to the returned file."""
    folder = tmp_path / "extra"
    folder.mkdir()

    monkeypatch.setattr(cavmae, "__path__", [*cavmae.__path__, str(folder)])
    monkeypatch.setitem(cli.COMMANDS, "broken", ("broken", "Fails."))
    monkeypatch.delitem(sys.modules, "cavmae.broken", raising=False)
    monkeypatch.delenv("CAVMAE_DEBUG", raising=False)
    return folder / "broken.py"


def test_a_value_error_of_ours_is_one_line_and_exit_code_1(
    broken_command: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    broken_command.write_text("def main(arguments):\n    raise ValueError('steps is 0; use 1')\n")
    assert cli.main(["broken"]) == 1
    assert capsys.readouterr().err == "error: steps is 0; use 1\n"


def test_a_missing_file_is_one_line_that_names_it(
    broken_command: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    broken_command.write_text(
        "from pathlib import Path\ndef main(arguments):\n    Path(arguments[0]).read_text()\n"
    )
    assert cli.main(["broken", "no/such/file"]) == 1
    message = capsys.readouterr().err
    assert message.startswith("error: ") and "no/such/file" in message
    assert len(message.splitlines()) == 1


def test_a_value_error_of_a_library_keeps_its_traceback(broken_command: Path) -> None:
    broken_command.write_text("import json\ndef main(arguments):\n    json.loads('{')\n")
    with pytest.raises(ValueError, match="Expecting"):
        cli.main(["broken"])


def test_cavmae_debug_keeps_every_traceback(
    broken_command: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken_command.write_text("def main(arguments):\n    raise ValueError('steps is 0')\n")
    monkeypatch.setenv("CAVMAE_DEBUG", "1")
    with pytest.raises(ValueError, match="steps is 0"):
        cli.main(["broken"])


def test_the_exit_code_is_the_commands_own(broken_command: Path) -> None:
    broken_command.write_text("def main(arguments):\n    return 7\n")
    assert cli.main(["broken"]) == 7


def test_the_word_that_the_deepspeed_launcher_adds_is_left_out(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert cli.main(["--local_rank=1", "--version"]) == 0
    assert capsys.readouterr().out == f"cavmae {__version__}\n"


def test_python_m_cavmae_runs_the_command() -> None:
    assert run("--version").stdout == f"cavmae {__version__}\n"
    assert run("nonsense").returncode == 2


@pytest.mark.field
def test_a_name_that_begins_with_a_dash_is_answered_with_how_to_write_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "-clips").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stopped:
        cli.main(["pack", "-clips", "out"])
    assert stopped.value.code == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last == "error: -clips was read as an option; the file of that name is ./-clips"


@pytest.mark.field
def test_a_name_that_is_no_utf_8_can_be_printed(tmp_path: Path) -> None:
    folder = os.fsencode(tmp_path) + b"/caf\xe9"
    os.mkdir(folder)
    words = [b"cluster-files", folder, b"--run=demo --data.train=/s --run-dir=/r", b"--image=i"]
    found = subprocess.run([sys.executable, "-m", "cavmae", *words], capture_output=True)
    assert found.returncode == 0 and b"caf\\udce9" in found.stdout
