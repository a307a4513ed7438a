"""The page on a run: all of it in one file, whatever a name or a label holds, and never at the cost
of the run."""

import base64
import json
import re
import time
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser
from pathlib import Path

import pytest
from matplotlib.figure import Figure
from tiny_run import save_untrained

from cavmae import cli
from cavmae.atomic_write import write_json
from cavmae.html_page import page
from cavmae.trainer.run_status import write_status
from cavmae.trainer.tracking.figures import save_figure
from cavmae.trainer.tracking.line_chart import POINTS_SHOWN, line_chart, thinned
from cavmae.trainer.tracking.run_report import RECORDS_READ, report_or_warn, write_report

HOSTILE = "</td><script>alert(1)</script><img src=//evil.example/x onerror='x'> \" & \udcff"
COMMAND = "cavmae pretrain demo --run-dir runs/x --tracking.uri http://me:secret@host/"


class Page(HTMLParser):
    """What a browser would find: elements with what they load, and the text."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(path.read_text())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data + "\n"


def step(number: int, **metrics: float | str) -> str:
    loss = {"loss": 5 / number, "skipped_updates": 0.0}
    return json.dumps({"step": number, "unix_seconds": 0.0, **loss, **metrics}) + "\n"


@pytest.fixture
def run_dir(packed_synthetic: Path, tmp_path: Path) -> Path:
    """A run of two attempts that has had its share of trouble, with hostile names everywhere."""
    folder = tmp_path / "run <b>"
    save_untrained(packed_synthetic, folder)
    times = "attempt_seconds", "data_wait_seconds", "validation_seconds", "checkpoint_seconds"
    (folder / "metrics.jsonl").write_text(
        step(10, skipped_updates=3.0, **dict(zip(times, (50.0, 5.0, 0.0, 1.0), strict=True)))
        + step(20, loss="nan", skipped_updates=1.0, **dict.fromkeys(times, 0.0))
        + step(30, skipped_updates=2.0, **dict(zip(times, (40.0, 4.0, 10.0, 2.0), strict=True)))
        + '{"step": 30, "val_loss": 2.5, "val_accuracy": 0.5, "val_accuracy_low": 0.25, '
        '"val_accuracy_high": 0.75}\n'
    )
    write_json(
        folder / "run.json",
        {"commands": [COMMAND, COMMAND + HOSTILE], "hardware": [{"ranks": 8, "gpu": "H200"}] * 2},
    )
    results = {"options": {"shards": HOSTILE}, "audio": {"r1": 0.5, "r1_low": 0.4, "r1_high": 0.6}}
    (folder / "evaluation").mkdir()
    write_json(folder / "evaluation/retrieve.json", results)
    state = folder / "checkpoints/step-000000030/attempt-2/run_state.json"
    state.parent.mkdir(parents=True)
    write_json(state, {"quarantine": [[HOSTILE, "crc_mismatch"]]})
    for number in (10, 30):
        save_figure(Figure((1, 1)), folder / f"figures/similarity-step-{number:09d}.png")
    write_status(folder, state="failed", step=30, steps=40, attempt=2, last_error=HOSTILE)
    return folder


def test_the_page_has_what_the_run_is_about(run_dir: Path) -> None:
    assert cli.main(["report", str(run_dir)]) == 0
    found = Page(run_dir / "report.html")
    text = re.sub(r"\s+", " ", found.text)
    assert COMMAND.replace("me:secret", "***") in text and "secret" not in text
    assert "recipe demo" in text and "model.width 128 32" in text
    assert "shards/frames 24 " in text and "gpu H200" in text
    assert "val_accuracy 0.5 0.25 to 0.75" in text and "audio.r1 0.5 0.4 to 0.6" in text
    assert "attempts 2 " in text and "crc_mismatch" in text
    assert "skipped updates 5 " in text, "3 in the first attempt, 2 in the second"
    for part in ("waiting for data 0:00:09", "validation 0:00:10", "checkpoints 0:00:03"):
        assert part in text
    assert "training 0:01:08" in text and "all 0:01:30" in text
    pictures = [one["alt"] for tag, one in found.elements if tag == "img"]
    assert "similarity-step-000000030.png" in pictures
    assert "similarity-step-000000010.png" not in pictures


@pytest.mark.field
def test_what_comes_from_outside_is_text_and_nothing_is_loaded(run_dir: Path) -> None:
    write_report(run_dir, run_dir / "report.html")
    found = Page(run_dir / "report.html")
    assert found.text.count("<script>alert(1)</script>") >= 4
    tags = {tag for tag, _ in found.elements}
    assert not tags & {"script", "link", "iframe", "object", "a", "b"}
    for _, attributes in found.elements:
        assert not {"onerror", "href", "srcset", "style"} & attributes.keys()
        assert (attributes.get("src") or "data:image/").startswith("data:image/")
    policy = next(one["content"] for tag, one in found.elements if "http-equiv" in one)
    assert policy and policy.startswith("default-src 'none'")
    assert "<title>&lt;x&gt;</title>" in page("<x>", "")


def test_curves_stay_in_their_frame_and_leave_gaps_where_there_is_no_number() -> None:
    points = [(1, 5.0), (2, float("nan")), (3, 1.0), (4, 2.0), (5, float("inf"))]
    drawing = ElementTree.fromstring(line_chart("a < b & c", {"x": points, "same": [(2, 3.0)]}))
    lines = drawing.findall("{*}polyline")
    assert len(lines) == 3
    for line in lines:
        for corner in line.attrib["points"].split():
            x, y = map(float, corner.split(","))
            assert 64 <= x <= 412 and 24 <= y <= 184
    assert "a < b & c" in [text.text for text in drawing.findall("{*}text")]


def test_a_long_run_is_thinned_and_keeps_its_end_and_its_scores(run_dir: Path) -> None:
    assert len(thinned([(n, 0.0) for n in range(10_001)])) <= POINTS_SHOWN + 1
    assert thinned([(n, 0.0) for n in range(10_001)])[-1] == (10_000, 0.0)
    count = 4 * RECORDS_READ
    lines = [step(n, attempt_seconds=float(n), skipped_updates=0.0) for n in range(1, count)]
    lines.insert(17, '{"step": 17, "val_loss": 2.5, "val_r1": 0.5, "val_r1_low": 0.4}\n')
    (run_dir / "metrics.jsonl").write_text("".join(lines))
    began = time.process_time()
    write_report(run_dir, run_dir / "report.html")
    assert time.process_time() - began < 3
    found = Page(run_dir / "report.html").text
    assert "validation at step 17" in found and "5:33:19" in found
    chart = re.search(r"svg\+xml;base64,(\S+)\"", (run_dir / "report.html").read_text())
    assert chart and f"{count - 1}" in base64.b64decode(chart[1]).decode()


def test_a_run_of_which_little_is_known_has_a_page(
    packed_synthetic: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_untrained(packed_synthetic, tmp_path / "run")
    (tmp_path / "run/trained_on.npz").unlink()
    assert cli.main(["report", str(tmp_path / "run"), f"--out={tmp_path / 'page.html'}"]) == 0
    text = Page(tmp_path / "page.html").text
    assert "no status" in text and text.count("Nothing on record.") == 6
    assert cli.main(["report", str(tmp_path)]) == 1
    assert "has no config.json; give the folder of a run" in capsys.readouterr().err


def test_a_page_that_can_not_be_written_does_not_fail_the_run(
    run_dir: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (run_dir / "metrics.jsonl").write_text("no JSON\n")
    report_or_warn(run_dir)
    assert "report.html could not be written" in caplog.text and "line 1" in caplog.text
    assert not (run_dir / "report.html").exists()
