"""A run that needs more memory than there is reports it, with flags that would fit."""

import dataclasses
import logging
import os
import re
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from launch import ROOT, run_ranks
from tiny_run import MODEL, tiny_finetuning, tiny_run

from cavmae.trainer.checkpoint.format import MANIFEST
from cavmae.trainer.checkpoint.store import Store
from cavmae.trainer.config.configs import EngineConfig, FinetuneConfig, PretrainConfig, RunConfig
from cavmae.trainer.config.serialize import save_config
from cavmae.trainer.distributed.env import Ranks
from cavmae.trainer.fault_tolerance.host_memory import Memory
from cavmae.trainer.fault_tolerance.oom import (
    OutOfMemory,
    check_machines,
    check_memory,
    is_out_of_memory,
    oom_guard,
)
from cavmae.trainer.model.config import ModelConfig

CHILD = Path(__file__).with_name("oom_child.py")
MACHINES = Path(__file__).with_name("host_memory_ranks.py")
ALONE, TWO = Ranks(0, 1, 0, 1), Ranks(0, 2, 0, 2)
CPU = torch.device("cpu")
SHALLOW = ModelConfig(modality_depth=2, decoder_depth=1)
"""Of the base model's width: traced in a second, and its clips take gigabytes all the same."""
BASE = PretrainConfig(
    global_batch=256,
    micro_batch=128,
    lanes=64,
    model=SHALLOW,
    engine=EngineConfig(zero_stage=1, dtype="bf16"),
)
GB = 10**9


@pytest.mark.slow
def test_a_run_whose_allocation_fails_ends_with_one_line_of_advice(
    packed_synthetic: Path, tmp_path: Path
) -> None:
    model = dataclasses.replace(MODEL, width=256, decoder_width=256)
    config = tiny_run(
        packed_synthetic, tmp_path / "run", global_batch=512, micro_batch=256, lanes=8, model=model
    )
    save_config(config, tmp_path / "config.json")
    done = subprocess.run(
        [sys.executable, str(CHILD), str(tmp_path / "config.json")],
        # glibc gives memory back at once, so that a step has to ask for it anew.
        env=os.environ | {"PYTHONPATH": str(ROOT), "MALLOC_MMAP_THRESHOLD_": "65536"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 1, done.stderr[-3000:]
    last = done.stderr.splitlines()[-1]
    assert re.match(
        r"error: rank 0 ran out of CPU memory: a step takes \d\.\d GB at its peak \(passes\) of "
        r".* GB; what fits: --micro-batch \d+",
        last,
    ), done.stderr[-3000:]


def test_ranks_that_need_more_than_the_machine_has_are_refused() -> None:
    with pytest.raises(
        OutOfMemory,
        match=r"1 ranks take 5\.\d GB at the peak of a step \(passes\) and machine "
        rf"{re.escape(socket.gethostname())} has 4\.0 GB; what fits: --micro-batch \d+",
    ):
        check_memory(BASE, ALONE, Memory(4 * GB, 3 * GB))


def test_fine_tuning_that_needs_more_than_the_machine_has_is_refused() -> None:
    config = FinetuneConfig(
        global_batch=48,
        micro_batch=48,
        lanes=48,
        model=SHALLOW,
        engine=EngineConfig(dtype="fp32"),
    )
    check_memory(config, ALONE, Memory(200 * GB, 190 * GB))
    with pytest.raises(OutOfMemory, match=r"has 4\.0 GB; what fits: --micro-batch \d+"):
        check_memory(config, ALONE, Memory(4 * GB, 3 * GB))


def test_ranks_of_one_machine_share_its_memory() -> None:
    check_memory(BASE, ALONE, Memory(7 * GB, 6 * GB))
    with pytest.raises(OutOfMemory, match="2 ranks take"):
        check_memory(BASE, TWO, Memory(7 * GB, 6 * GB))


def test_what_others_use_is_a_warning_alone(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        check_memory(BASE, ALONE, Memory(16 * GB, 4 * GB))
    assert re.search(r"1 ranks take .* has 4\.0 GB free.*what fits: --micro-b", caplog.text)


def test_a_run_that_surely_fits_is_not_traced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr("cavmae.trainer.fault_tolerance.oom.model_sizes")
    check_memory(dataclasses.replace(BASE, model=MODEL), TWO, Memory(16 * GB, 15 * GB))


@pytest.mark.slow
def test_what_one_machine_refuses_reaches_every_rank_as_a_lasting_error(
    packed_synthetic: Path, tmp_path: Path
) -> None:
    config = tiny_run(packed_synthetic, tmp_path / "run")
    save_config(config, tmp_path / "config.json")
    errors = run_ranks(
        MACHINES, 2, [str(tmp_path / "config.json"), [100 * GB, GB // 1000]], tmp_path
    )
    assert errors[0] == errors[1]
    error, lasting = errors[0]
    assert re.match(r"1 ranks take .* and machine machine-1 has 0\.0 GB; ", error), error
    assert lasting


@pytest.mark.slow
def test_an_error_of_any_kind_on_one_machine_reaches_all_ranks(
    packed_synthetic: Path, tmp_path: Path
) -> None:
    save_config(tiny_run(packed_synthetic, tmp_path / "run"), tmp_path / "config.json")
    errors = run_ranks(MACHINES, 2, [str(tmp_path / "config.json"), [100 * GB, None]], tmp_path)
    assert errors == [["'MemTotal'", False]] * 2


def test_only_the_first_rank_of_a_machine_checks_it(
    monkeypatch: pytest.MonkeyPatch, one_rank: None, tmp_path: Path
) -> None:
    checked: list[tuple[Ranks, bool]] = []

    def check(_: RunConfig, ranks: Ranks, memory: Memory, *, begun: bool) -> None:
        checked.append((ranks, begun))

    monkeypatch.setattr("cavmae.trainer.fault_tolerance.oom.check_memory", check)
    store = Store(str(tmp_path / "checkpoints"))
    first, second = Ranks(2, 4, 0, 2), Ranks(3, 4, 1, 2)
    for ranks in (first, second):
        check_machines(BASE, ranks, store)
    assert checked == [(first, False)]
    (tmp_path / "checkpoints/step-000000002").mkdir(parents=True)
    (tmp_path / "checkpoints/step-000000002" / MANIFEST).touch()
    check_machines(BASE, first, store)
    assert checked[1:] == [(first, True)]


@pytest.fixture
def one_rank(tmp_path: Path) -> Iterator[None]:
    meeting = (tmp_path / "meeting").as_uri()
    dist.init_process_group("gloo", init_method=meeting, rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_a_real_failure_of_torch_is_one_and_others_are_not() -> None:
    with pytest.raises(RuntimeError) as failure:
        torch.empty(1 << 60, dtype=torch.uint8)
    assert is_out_of_memory(failure.value)
    with pytest.raises(RuntimeError) as other:
        torch.matmul(torch.ones(2), torch.ones(3))
    assert not is_out_of_memory(other.value)


def test_fine_tuning_reports_what_would_fit(tmp_path: Path) -> None:
    config = tiny_finetuning(tmp_path, tmp_path / "run", global_batch=4096, micro_batch=4096)
    store = Store(str(tmp_path / "checkpoints"))
    with (
        pytest.raises(
            OutOfMemory, match=r"0 ran out of CPU memory: a step .*; what fits: --micro-batch 2048"
        ),
        oom_guard(config, tmp_path, store, ALONE, CPU),
    ):
        torch.empty(1 << 60, dtype=torch.uint8)


def test_a_store_that_is_down_hides_no_out_of_memory_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def down(_store: object) -> list[int]:
        raise OSError("the store is down")

    monkeypatch.setattr("cavmae.trainer.fault_tolerance.oom.list_checkpoints", down)
    config, store = tiny_run(tmp_path, tmp_path / "run"), Store(str(tmp_path / "checkpoints"))
    with (
        pytest.raises(OutOfMemory, match="0 ran out of CPU memory"),
        oom_guard(config, tmp_path, store, ALONE, CPU),
    ):
        torch.empty(1 << 60, dtype=torch.uint8)


def test_a_full_disk_hides_no_out_of_memory_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(_path: str) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("torch.cuda.memory._dump_snapshot", full)
    monkeypatch.setattr("cavmae.trainer.fault_tolerance.oom._report", lambda *_, **__: "0 ran out")
    config, store = tiny_run(tmp_path, tmp_path / "run"), Store(str(tmp_path / "checkpoints"))
    with (
        pytest.raises(OutOfMemory, match=r"^0 ran out$"),
        oom_guard(config, tmp_path, store, ALONE, torch.device("cuda")),
    ):
        raise MemoryError
    assert "rank-0.pickle could not be written: [Errno 28]" in caplog.text


def test_other_errors_pass_as_they_are(tmp_path: Path) -> None:
    config = tiny_run(tmp_path, tmp_path / "run")
    with (
        pytest.raises(RuntimeError, match="unrelated"),
        oom_guard(config, tmp_path, Store(str(tmp_path)), ALONE, CPU),
    ):
        raise RuntimeError("unrelated")
