"""`cavmae bench all`: what fits is run, the rest is named, a failure doesn't stop the others."""

import time
from pathlib import Path

import pytest

from cavmae.benchmarks.report import suite
from cavmae.benchmarks.report.suite import SUITE, Benchmark, Turn, budget_seconds, main, why_skipped
from cavmae.cli import BENCHMARKS

RESULTS = Path(__file__).parents[3] / "benchmarks" / "results"
ORDER = ("--shards", "4", "--samples", "100", "--batch", "32", "--windows", "8")
ABSENT = ("--golden", "absent")


@pytest.mark.parametrize(("text", "seconds"), [("90s", 90), ("10m", 600), ("1.5h", 5400)])
def test_a_budget_is_a_time(text: str, seconds: float) -> None:
    assert budget_seconds(text) == seconds


@pytest.mark.parametrize("text", ["10", "m", "-1m", "0s", "1 m"])
def test_another_budget_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=f"budget is {text}; use a time such as"):
        budget_seconds(text)


def test_a_skipped_benchmark_has_a_reason() -> None:
    benchmark = Benchmark("shuffle", Turn(60), None)
    assert why_skipped(benchmark, benchmark.cpu, 61) == ""
    assert why_skipped(benchmark, benchmark.cpu, 30) == "takes about 60 s: 30 s are left"
    assert why_skipped(benchmark, benchmark.cuda, 61) == "means nothing on this device"
    absent = Benchmark("shuffle", Turn(1), None, needs="no_such_module")
    assert "needs no_such_module" in why_skipped(absent, absent.cpu, 60)
    absent = Benchmark("explore", Turn(1), None, program="no-such-program")
    assert why_skipped(absent, absent.cpu, 60) == "needs the program no-such-program"


def test_every_benchmark_is_in_the_suite() -> None:
    assert {one.name for one in SUITE} == BENCHMARKS.keys() - {"all", "compare", "report", "golden"}


def test_a_failure_is_named_and_the_others_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(
        suite,
        "SUITE",
        (
            Benchmark("gpu-check", Turn(1, ABSENT), Turn(1, ABSENT)),
            Benchmark("shuffle", Turn(1, ORDER), Turn(1, ORDER)),
            Benchmark("step", Turn(1e6), Turn(1e6)),
        ),
    )
    words = ["--budget", "2m", "--work-dir", str(tmp_path / "work")]
    words += ["--out", str(tmp_path / "records"), "--report", str(tmp_path / "report.html")]
    assert main(words) == 1
    said = capsys.readouterr().out
    assert "gpu-check: FAILED, ended with exit code 1: error: --golden is absent" in said
    assert "shuffle: done after" in said
    assert "skipped: step, which takes about 1e+06 s" in said
    assert f"failed: gpu-check; their logs are in {tmp_path / 'work'}" in said
    assert "## shuffle" in (tmp_path / "report.md").read_text()


def test_a_benchmark_that_goes_on_too_long_is_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    long = Turn(1, ("--shards", "20000"))
    monkeypatch.setattr(suite, "SUITE", (Benchmark("shuffle", long, long),))
    words = ["--budget", "3s", "--work-dir", str(tmp_path), "--report", str(tmp_path / "page.html")]
    began = time.monotonic()
    assert main([*words, "--out", str(RESULTS)]) == 1
    assert time.monotonic() - began < 60
    assert "shuffle: FAILED, still running after 3 s" in capsys.readouterr().out
