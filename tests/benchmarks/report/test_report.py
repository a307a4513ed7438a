"""`cavmae bench report`: one page that needs nothing else and drops nothing."""

import json
import re
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch

from cavmae.benchmarks.faults.leak_check import Life
from cavmae.benchmarks.faults.outcome import Row
from cavmae.benchmarks.faults.soak import results as soak_results
from cavmae.benchmarks.faults.soak_faults import Endured
from cavmae.benchmarks.harness.records import read_record, timing, write_record
from cavmae.benchmarks.report.report import main, write_report

RESULTS = Path(__file__).parents[3] / "benchmarks" / "results"
STEP = "step-20261123T112301-b643018af8"
CPU = torch.device("cpu")


def page(tmp_path: Path) -> str:
    """The Markdown page of the records in `records`."""
    _, text = write_report(tmp_path / "records", tmp_path / "report.html")
    return text.read_text()


def record(tmp_path: Path, suite: str, results: dict[str, Any], **settings: Any) -> Path:
    return write_record(tmp_path / "records", suite, CPU, settings, results)


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page of the records that the repository keeps."""
    out = tmp_path_factory.mktemp("report") / "report.html"
    assert main(["--results", str(RESULTS), "--out", str(out)]) == 0
    return out


def test_the_page_needs_nothing_else(kept: Path) -> None:
    text = kept.read_text()
    sources = re.findall(r'src="([^"]{22})', text)
    assert len(sources) >= 6
    assert set(sources) == {"data:image/png;base64,"}
    assert not re.search(r"<(script|link)\b|@import|href=", text)


def test_every_record_is_on_the_page(kept: Path) -> None:
    text = kept.with_suffix(".md").read_text()
    for path in RESULTS.glob("*.json"):
        assert f"\n## {read_record(path).suite}\n" in text
        assert f"`{path.name}`" in text


def test_markdown_has_its_pictures_beside_it(kept: Path) -> None:
    pictures = re.findall(r"\]\((report_files/[^)]+)\)", kept.with_suffix(".md").read_text())
    assert len(pictures) == len(set(pictures)) >= 6
    assert all((kept.parent / name).stat().st_size > 1000 for name in pictures)


def test_tables_hold_the_numbers_of_the_records(tmp_path: Path) -> None:
    fault = Row(7.03, 30.6, 0, 10, True, 0.0, 0.0, "the undisturbed run", "rank 0 failed")
    record(tmp_path, "faults", {"a node is killed": asdict(fault)})
    for name in (STEP, "data-20261125T165254-8c4112c768"):
        shutil.copy(RESULTS / f"{name}.json", tmp_path / "records")
    text = page(tmp_path)
    assert "| fp32, cavmae | 6,790 ms | 0.5891 | 0.1373 |" in text
    assert "| cavmae frames, 2 workers | 250.2 | 8.125 ms | 0.64 s |" in text
    assert (
        "| a node is killed | 7.0 s | 30.6 s | 0 of 10 | equal | bit for bit | rank 0 failed |"
        in text
    )


def test_a_kind_that_is_not_known_is_shown_with_its_numbers(tmp_path: Path) -> None:
    record(tmp_path, "brand-new", {"speed": 12.5, "part": {"count": 3, "names": ["a"]}})
    assert "| speed | 12.5 |\n| part count | 3 |" in page(tmp_path)


def test_a_file_that_is_no_record_is_named(tmp_path: Path) -> None:
    record(tmp_path, "shuffle", {"perfect": {"pairs_again": 0.1}})
    (tmp_path / "records" / "notes.json").write_text("{}")
    assert re.search(r"Not a record: .*notes\.json", page(tmp_path))


def test_text_of_a_record_stays_text(tmp_path: Path) -> None:
    record(tmp_path, "faults", {"a | <script>`x": {"failed": "rank 0\n<b>*was*</b> | gone"}})
    html, text = write_report(tmp_path / "records", tmp_path / "report.html")
    assert r"| a \| \<script\>\`x |" in text.read_text()
    assert "<td>FAILED: rank 0 &lt;b&gt;*was*&lt;/b&gt; | gone</td>" in html.read_text()


def test_mfu_comes_from_the_matrix_rate_of_the_same_machine_only(tmp_path: Path) -> None:
    step = json.loads((RESULTS / f"{STEP}.json").read_text())
    kernels = json.loads(next(RESULTS.glob("kernels-*.json")).read_text())
    kernels["results"]["ceilings"]["flops_per_second"] = 274.5e9
    folder = tmp_path / "records"
    folder.mkdir()
    (folder / "step.json").write_text(json.dumps(step))
    for hardware, share in ((kernels["hardware"], "-"), (step["hardware"], "50.0%")):
        (folder / "kernels.json").write_text(json.dumps(kernels | {"hardware": hardware}))
        assert f"| fp32, cavmae | 6,790 ms | 0.5891 | 0.1373 | {share} | - | - |" in page(tmp_path)


def test_a_gpu_check_shows_throughput_and_memory_over_batch_sizes(tmp_path: Path) -> None:
    rows = [
        {"batch": batch, "compile": compiled, "samples_per_second": 10.0 * batch, "tflops": 0.4,
         "peak_memory_bytes": batch * 10**9, "all_seconds": [1.0]}
        for compiled in (False, True)
        for batch in (1, 2)
    ]  # fmt: skip
    rows.append({"batch": 4, "compile": True, "skipped": "time is spent"})
    kernels = {
        "sizes": {"dtype": "bf16"},
        "backend": "triton",
        "ceilings": {"bytes_per_second": 1e12, "flops_per_second": 1e12},
        "cases": {},
        "bars": {},
    }
    passed = {"status": "passed", "reason": "", "key": "2 of 3", "seconds": 1.0}
    skipped = {"status": "skipped", "reason": "no folder", "key": "", "seconds": 0.0, "details": {}}
    results = {
        "golden": skipped,
        "baseline": skipped,
        "speed": passed | {"details": kernels},
        "eager": passed | {"details": {"rows": rows[:2]}},
        "compiled": passed | {"details": {"rows": rows[2:]}},
    }
    record(tmp_path, "gpu-check", results)
    text = page(tmp_path)
    assert "| golden | skipped | 0 s |  | no folder |" in text
    assert "| speed | passed | 1 s | 2 of 3 |  |" in text
    assert "| 2, compiled | 20 | 0.4 | 40.0% | - | 2.00 GB |" in text
    assert "throughput-and-memory-over-batch-size-bf16.png" in text


def test_a_sweep_shows_throughput_mfu_and_memory_over_batch_sizes(tmp_path: Path) -> None:
    results: dict[str, Any] = {"machine": {"fp32": {"flops_per_second": 1e12}}}
    for batch in (1, 2):
        one = timing([0.5]) | {
            "samples_per_second": 2.0 * batch, "tflops": 0.4, "mfu": 0.4, "mfu_of_datasheet": 0.1,
            "peak_memory_bytes": batch * 10**9, "energy": {"joules_per_sample": 7.0},
        }  # fmt: skip
        results[f"fp32 batch {batch}"] = {
            "precision": "fp32",
            "batch": batch,
            "cavmae": one,
            "published": {"skipped": "CUDA out of memory"},
            "memory": {"ratio": 0.5, "bar": 0.7, "met": True},
            "speedup": {"median": 2.0, "minimum": 1.9, "maximum": 2.1},
        }
    record(tmp_path, "step", results)
    text = page(tmp_path)
    assert "| fp32 batch 2, cavmae | 500 ms | 4 | 0.4 | 40.0% | 10.0% | 2.00 GB | 7 |" in text
    assert "0.50 times its memory (at most 0.7: met)" in text
    assert "fp32 batch 1, published: CUDA out of memory" in text
    assert "over-batch-sizes.png" in text


def test_ablations_show_time_and_memory_of_each_change(tmp_path: Path) -> None:
    change = {"ratio": {"median": 1.25, "minimum": 1.2, "maximum": 1.3}, "memory_ratio": 0.5}
    results = {"bf16": {"blocks recomputed": change}}
    write_record(tmp_path, "ablations", torch.device("cpu"), {}, results)
    page = tmp_path / "report.html"
    assert main(["--results", str(tmp_path), "--out", str(page)]) == 0
    text = page.with_suffix(".md").read_text()
    assert "| bf16 | blocks recomputed | 1.250 | 1.200 | 1.300 | 0.500 |" in text


def test_the_training_loop_shows_each_part_beside_its_floor(tmp_path: Path) -> None:
    shares = {"data_wait": 0.01, "forward": 0.4, "backward": 0.5, "optimizer": 0.08, "loop": 0.01}
    one = {
        "step": timing([2.0]),
        "samples_per_second": 4.0,
        "tflops": 0.9,
        "mfu": 0.45,
        "mfu_of_datasheet": None,
        "shares": shares,
        "peak_memory_bytes": 10**9,
        "energy": {"joules_per_sample": None, "source": "nothing can be read"},
        "parts": {
            "decoder": {"forward": timing([0.6]) | {"flops": 10**9, "bytes": 10**8,
                                                    "floor_seconds": 0.2}},
            "loop": {"step": timing([0.001])},
        },
    }  # fmt: skip
    machine = {"flops_per_second": 2e12, "bytes_per_second": 1e10, "datasheet": None}
    bars = {"share of the loop": {"value": 0.02, "bar": "below 0.03", "met": True}}
    record(tmp_path, "train", {"machine": machine, "synthetic": one, "bars": bars})
    text = page(tmp_path)
    assert "| synthetic | 2,000 ms | 4 | 0.9 | 45.0% | - | 1.00% | 1.00% | 1.00 GB | - |" in text
    assert "| share of the loop | 0.02 | below 0.03 | yes |" in text
    assert "| decoder, forward | 600 ms | 200 ms | 3.00 | 1 | 0.10 GB |" in text
    assert "| loop | 1 ms | - | - | - | - |" in text
    assert "Datasheet: none known. Energy: nothing can be read." in text
    assert "a-step-by-parts-synthetic-batches.png" in text


def test_a_soak_shows_its_verdict_and_its_picture(tmp_path: Path) -> None:
    fault = Endured("a reader is killed", 60.0, 40, 30, None, 1.5, "another reader was started")
    life = Life("rank", 1, 600.0, True, 1e9, 2e6, 0.0)
    found = {"samples_equal": True, "largest_difference": 0.0}
    path = record(tmp_path, "soak", soak_results([fault], [life], found, ""))
    drawn = next(RESULTS.glob("shuffle-*.png")).read_bytes()
    path.with_suffix(".png").write_bytes(drawn)
    text = page(tmp_path)
    assert "Verdict: passed." in text
    assert "| rank | 1 | 10 min | 1.00 GB | +2.0 MB | +2.0 MB | 0 |" in text
    assert "| 0 min | a reader is killed | 1.5 s | 0 |" in text
    picture = tmp_path / "report_files" / "soak-drawn-with-the-record.png"
    assert picture.read_bytes() == drawn


def test_no_records_and_other_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="which has no record; run a benchmark first"):
        write_report(tmp_path, tmp_path / "report.html")
    with pytest.raises(ValueError, match="name an HTML file"):
        write_report(RESULTS, tmp_path / "report.pdf")
