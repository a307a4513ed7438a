"""What a GPU check finds of training: the fastest batch, and the largest one."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from cavmae.benchmarks.gpu import steps
from cavmae.benchmarks.gpu.setting import Check
from cavmae.benchmarks.gpu.steps import SEARCH_SHARE, best, large_contrast, largest_batch
from cavmae.benchmarks.harness.process_memory import no_memory_left
from cavmae.benchmarks.harness.records import read_record, write_record
from cavmae.benchmarks.step.predict import step_records


@pytest.mark.parametrize("limit", [8, 9, 15, 16, 100, 1000, 1023, 5000])
@pytest.mark.parametrize("known", [1, 8])
def test_the_largest_batch_is_found_to_within_its_share(limit: int, known: int) -> None:
    tried: list[int] = []

    def fits(batch: int) -> bool:
        tried.append(batch)
        return batch <= limit

    found = largest_batch(fits, known)
    assert found <= limit
    assert limit - found <= max(1, SEARCH_SHARE * found)
    assert len(tried) == len(set(tried)) <= 20


def test_the_fastest_row_is_the_best_one_and_skipped_ones_are_none() -> None:
    rows = [
        {"batch": 32, "compile": False, "samples_per_second": 10.0},
        {"batch": 64, "compile": True, "samples_per_second": 30.0},
        {"batch": 128, "compile": True, "skipped": "out of memory"},
        {"batch": 64, "compile": False, "samples_per_second": 20.0},
    ]
    assert best(rows) is rows[1]
    assert best(rows[2:3]) is None


def test_a_contrastive_batch_is_timed_with_its_backward_pass() -> None:
    found = large_contrast(64, 16, torch.device("cpu"), repeats=2)
    assert found["contrastive_pairs"] == 64
    assert found["contrastive_seconds"] > 0


class Gpu:
    """Stands for `compare`: fastest at batch 4, and with room for batches up to `most`."""

    def __init__(self, most: int) -> None:
        self.most = most
        self.tried: list[tuple[int, bool]] = []

    def __call__(self, settings: Any, *_: Any, **__: Any) -> dict[str, Any]:
        (setting,) = settings.values()
        self.tried.append((setting.batch, setting.choices.compile))
        if setting.batch > self.most:
            return {"ours": {"skipped": "CUDA out of memory"}}
        return {"ours": {"samples_per_second": 10.0 - abs(setting.batch - 4), "mfu": 0.5}}


@pytest.fixture
def on_cpu(monkeypatch: pytest.MonkeyPatch) -> Check:
    monkeypatch.setattr(steps, "measure_rates", lambda *_: {"flops_per_second": 1.0})
    return Check("cpu", True, "", float("inf"), "")


def test_three_batches_that_fit_are_measured_and_the_fastest_is_compiled(
    on_cpu: Check, monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    gpu = Gpu(most=8)
    monkeypatch.setattr(steps, "compare", gpu)
    *_, found = steps.eager(on_cpu)
    assert gpu.tried == [(16, False), (8, False), (4, False), (2, False)]
    assert found.key == "batch 4: 10 samples/s, 50% MFU"
    entry = {"status": "passed", "details": found.details}
    path = write_record(tmp_path, "gpu-check", torch.device("cpu"), {}, {"eager": entry})
    later = Gpu(most=2)
    monkeypatch.setattr(steps, "compare", later)
    *_, found = steps.compiled(replace(on_cpu, record=str(path)))
    assert later.tried == [(4, True), (2, True)]
    assert found.key == "batch 2: 8 samples/s, 50% MFU"


def test_a_gpu_on_which_no_batch_fits_fails_the_stage(
    on_cpu: Check, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(steps, "compare", Gpu(most=0))
    *_, found = steps.eager(on_cpu)
    assert found.beyond == ["no batch fits, down to 1"]


@pytest.mark.parametrize(
    ("message", "none_left"),
    [
        ("CUDA out of memory. Tried to allocate 2.00 GiB", True),
        ("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`", True),
        ("Triton Error [CUDA]: out of memory", True),
        ("CUDA error: device-side assert triggered", False),
    ],
)
def test_a_library_that_gets_no_memory_has_run_out_of_it_as_torch_has(
    message: str, none_left: bool
) -> None:
    assert no_memory_left(RuntimeError(message)) == none_left


def test_the_steps_of_a_check_are_read_as_records_that_a_prediction_is_compared_with(
    tmp_path: Any,
) -> None:
    step = {"configuration": {"compile": True}, "results": {"bf16": {"batch": 8}}}
    entry = {"status": "skipped", "details": {"steps": [step]}}
    path = write_record(tmp_path, "gpu-check", torch.device("cpu"), {}, {"prediction": entry})
    (found,) = step_records(read_record(path))
    assert (found.configuration, found.results) == (step["configuration"], step["results"])
    assert found.hardware == read_record(path).hardware
    bare = write_record(tmp_path, "step", torch.device("cpu"), {}, {})
    assert step_records(read_record(bare)) == [read_record(bare)]
