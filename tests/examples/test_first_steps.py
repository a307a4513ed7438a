"""The notebook goes from a folder of videos to a search, wherever its folder is."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

NOTEBOOK = Path(__file__).parents[2] / "examples" / "first_steps.ipynb"
NOTEBOOK_CELLS = json.loads(NOTEBOOK.read_text())["cells"]
CODE = ["".join(cell["source"]) for cell in NOTEBOOK_CELLS if cell["cell_type"] == "code"]
SHELL = """
def shell(command):
    import subprocess
    subprocess.run(command, shell=True, check=True)
"""


def as_python(code: str) -> str:
    """Write the lines that a kernel hands to a shell, with its values in braces, as Python."""
    joined = code.replace("\\\n", "")
    return re.sub(r"^!(.*)$", lambda line: f"shell(f{line[1]!r})", joined, flags=re.MULTILINE)


def test_it_has_ten_cells_and_no_outputs() -> None:
    assert len(NOTEBOOK_CELLS) == 10
    for cell in NOTEBOOK_CELLS[1:]:
        assert (cell["outputs"], cell["execution_count"]) == ([], None)


@pytest.mark.slow
@pytest.mark.field  # ipython#14151, jupyter/notebook#5261: another environment's command, no main
def test_its_cells_run_in_order_on_a_folder_of_videos(tmp_path: Path) -> None:
    """As in a kernel: the folder of the notebook is the current one, PATH is another environment's,
    and the main module is no file."""
    from cavmae.dataloaders.tools.synthetic import generate

    folder = tmp_path / "my first steps"  # a name that a shell takes apart
    generate(folder / "videos", 10, seed=1, workers=1)
    for number, video in enumerate(sorted(folder.glob("videos/*.mp4"))[:8]):
        named = folder / "videos" / ("dog bark" if number % 2 else "sea") / f"CLIP {number}.MP4"
        named.parent.mkdir(exist_ok=True)
        video.rename(named)
    cells = "\n".join(map(as_python, CODE))
    done = subprocess.run(
        [sys.executable, "-c", SHELL + cells],
        cwd=folder,
        env={"PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1", "HOME": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "10 videos, the first one" in done.stdout
    made = folder / "first_steps"
    report = [json.loads(one) for one in (made / "shards/report.jsonl").read_text().splitlines()]
    assert not [one for one in report if one.get("reason")]
    assert (made / "run/weights.pt").is_file() and (made / "found.png").stat().st_size > 10_000
    assert "tensor([[" in done.stdout and "sea" in done.stdout


def test_without_videos_some_are_generated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    exec(CODE[0].replace("24, seed", "2, seed"), {})
    assert "videos does not exist: 24 videos" in capsys.readouterr().out
    assert len(list((tmp_path / "videos").glob("*.mp4"))) == 2
