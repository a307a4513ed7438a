"""`cavmae bench all`: what fits is run, the rest is named, a failure doesn't stop the others."""

import time
from pathlib import Path

import pytest

from cavmae.benchmarks.report import suite
from cavmae.benchmarks.report.suite import SUITE, Benchmark, Turn, budget_seconds, main, why_not
from cavmae.cli import BENCHMARKS

RESULTS = Path(__file__).parents[3] / "benchmarks" / "results"
ORDER = ("--shards", "4", "--samples", "100", "--batch", "32", "--windows", "8")


@pytest.mark.parametrize(("text", "seconds"), [("90s", 90), ("10m", 600), ("1.5h", 5400)])
def test_a_budget_is_a_time(text: str, seconds: float) -> None:
    assert budget_seconds(text) == seconds


@pytest.mark.parametrize("text", ["10", "m", "-1m", "0s", "1 m"])
def test_another_budget_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=f"--budget is {text}; use a time such as"):
        budget_seconds(text)


def test_what_is_left_out_has_a_reason() -> None:
    benchmark = Benchmark("order", Turn(60), None)
    assert why_not(benchmark, benchmark.turn("cpu"), 61) == ""
    assert why_not(benchmark, benchmark.turn("cpu"), 30) == "takes about 60 s: 30 s are left"
    assert why_not(benchmark, benchmark.turn("cuda"), 61) == "tells nothing on this device"
    absent = Benchmark("order", Turn(1), None, needs="no_such_module")
    assert "needs no_such_module" in why_not(absent, absent.turn("cpu"), 60)


def test_every_benchmark_is_in_the_suite() -> None:
    assert {one.name for one in SUITE} == BENCHMARKS.keys() - {"all", "compare", "report"}


def test_a_failure_is_named_and_the_others_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(
        suite,
        "SUITE",
        (
            Benchmark("data", Turn(1, ("--clips", "0")), Turn(1, ("--clips", "0"))),
            Benchmark("order", Turn(1, ORDER), Turn(1, ORDER)),
            Benchmark("step", Turn(1e6), Turn(1e6)),
        ),
    )
    words = ["--budget", "2m", "--work-dir", str(tmp_path / "work")]
    words += ["--out", str(tmp_path / "records"), "--report", str(tmp_path / "report.html")]
    assert main(words) == 1
    said = capsys.readouterr().out
    assert "data: FAILED, a start ended with 1: error: --clips is 0; use 1 or more" in said
    assert "order: done after" in said
    assert "left out: step, which takes about 1e+06 s" in said
    assert f"failed: data; what they said is in {tmp_path / 'work'}" in said
    assert "## order" in (tmp_path / "report.md").read_text()


def test_a_benchmark_that_goes_on_too_long_is_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    long = Turn(1, ("--shards", "20000"))
    monkeypatch.setattr(suite, "SUITE", (Benchmark("order", long, long),))
    words = ["--budget", "3s", "--work-dir", str(tmp_path), "--report", str(tmp_path / "page.html")]
    began = time.monotonic()
    assert main([*words, "--out", str(RESULTS)]) == 1
    assert time.monotonic() - began < 60
    assert "order: FAILED, a start ended with nothing in" in capsys.readouterr().out
