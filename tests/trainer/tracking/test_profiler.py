"""A profiled run leaves a trace of the steps that were asked for, and nothing else changes."""

import dataclasses
import gzip
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from starts import Start
from tiny_run import losses, tiny_finetuning, tiny_run
from torch.profiler import record_function

from cavmae.dataloaders.sampling.step_shares import StepShares
from cavmae.trainer import trainer
from cavmae.trainer.config.configs import (
    CheckpointConfig,
    PretrainConfig,
    ProfileConfig,
    TrackingConfig,
    ValidationConfig,
    WatchdogConfig,
)
from cavmae.trainer.cost_model.run_rates import RunRates
from cavmae.trainer.distributed.engine import Update
from cavmae.trainer.fault_tolerance.lease import Lease
from cavmae.trainer.fault_tolerance.preemption import StopRequest
from cavmae.trainer.fault_tolerance.stragglers import RankTimer, StragglerMonitor
from cavmae.trainer.fault_tolerance.watchdog import Watchdog
from cavmae.trainer.run_status import StatusWriter
from cavmae.trainer.tracking.profiler import StepProfile
from cavmae.trainer.trainer import Trainer

PARTS = ("data wait", "begin step", "forward", "backward", "update")
CPU = torch.device("cpu")


def trace(path: Path) -> list[dict[str, Any]]:
    return json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]


def names(path: Path) -> list[str]:
    return [event.get("name", "") for event in trace(path)]


@pytest.mark.slow
def test_each_rank_traces_the_steps_and_their_parts(packed_synthetic: Path, tmp_path: Path) -> None:
    plain = tiny_run(packed_synthetic, tmp_path / "plain")
    profiled = tiny_run(
        packed_synthetic, tmp_path / "run", profile=ProfileConfig(steps=2, after_steps=4)
    )
    Start(plain, 2, tmp_path).finish()
    text = Start(profiled, 2, tmp_path).finish()
    assert not (tmp_path / "plain/profile").exists()
    assert losses(tmp_path / "run") == losses(tmp_path / "plain")
    for rank in (0, 1):
        path = tmp_path / f"run/profile/step-000000004-rank-{rank}.json.gz"
        assert str(path) in (tmp_path / f"run/logs/rank-{rank}.log").read_text()
        found = names(path)
        assert [found.count(f"ProfilerStep#{step}") > 0 for step in range(3, 7)] == [
            False,
            True,
            True,
            False,
        ]
        assert all(found.count(part) >= 2 for part in PARTS)
    assert "https://ui.perfetto.dev" in text
    assert "operators that took most time" in text


@pytest.mark.slow
def test_a_start_that_ends_before_says_so_and_one_that_goes_on_traces_its_own_steps(
    packed_synthetic: Path, tmp_path: Path
) -> None:
    """Of fine-tuning, as the one above is of pretraining."""
    profile = ProfileConfig(steps=1, after_steps=30)
    run = tiny_finetuning(packed_synthetic, tmp_path / "run", steps=5, profile=profile)
    text = Start(run, 1, tmp_path).finish()
    assert "profile.after_steps is 30, which this attempt did not reach" in text
    assert not (tmp_path / "run/profile").exists()
    profile = ProfileConfig(steps=1, after_steps=2)
    Start(dataclasses.replace(run, steps=10, profile=profile), 1, tmp_path).finish()
    assert "forward" in names(tmp_path / "run/profile/step-000000007-rank-0.json.gz")


class Watching(Watchdog):
    """Attributes: watches, whether something long would be taken for a step that hangs."""

    def __init__(self, folder: Path) -> None:
        super().__init__(WatchdogConfig(hang_ratio=0), folder, 0)
        self.watches = True

    @contextmanager
    def pause(self) -> Iterator[None]:
        with super().pause():
            self.watches = False
            yield
            self.watches = True

    def close(self) -> None:
        super().close()
        self.watches = False


class Batches(list[Any]):
    """Of a loader that is never waited for."""

    wait_seconds = 0.0


def watched_while_written(
    config: ProfileConfig, folder: Path, patch: pytest.MonkeyPatch
) -> list[tuple[str, bool]]:
    """Ten steps of the loop in which nothing is computed; for the trace, each barrier of the ranks
    and the last commit, in order, whether the watchdog watched."""
    found: list[tuple[str, bool]] = []
    watchdog = Watching(folder)

    class NotedProfile(StepProfile):
        def _write(self, profiler: torch.profiler.profile) -> None:
            found.append(("trace", watchdog.watches))
            super()._write(profiler)

    patch.setattr(trainer.dist, "barrier", lambda: found.append(("barrier", watchdog.watches)))
    patch.setattr(trainer, "reduce_step", lambda *_: ({}, [0, 0, 0], [1.0]))
    engine: Any = SimpleNamespace(
        module=None,
        zero_stage=0,
        backward=lambda _: None,
        update=lambda _: Update(True, gradient_norm=torch.tensor(1.0)),
    )
    nothing: Any = SimpleNamespace(
        **dict.fromkeys(
            ("begin_step", "loss", "begin", "log_step", "keep", "score"), lambda *_: None
        ),
        metrics=dict,
        commit=lambda: not found.append(("commit", watchdog.watches)),
        **{"failures": 0, "is_open": False, "is_writing": False},
    )
    loop = Trainer.__new__(Trainer)  # nothing is built
    loop.config = PretrainConfig(
        steps=10,
        tracking=TrackingConfig(every_steps=10),
        validation=ValidationConfig(every_steps=10),
        checkpoint=CheckpointConfig(every_steps=10),
    )
    vars(loop).update(
        {"step": 0, "skipped": 0, "skipped_in_a_row": 0, "retry_save_at": -1},
        shares=StepShares(1, 1, 1, 1),
        **{"device": CPU, "steps_per_epoch": 1.0, "span": record_function, "engine": engine},
        rates=RunRates(PretrainConfig(), 1, CPU, record_function),
        **dict.fromkeys(("task", "saver", "logger", "epoch_weights", "validator"), nothing),
        loader=Batches([SimpleNamespace(to=lambda _: SimpleNamespace(sample_ids=()))] * 10),
        stop=StopRequest(None, 60.0),
        lease=Lease(),
        status=StatusWriter(folder, rank=1),
        timer=RankTimer(CPU),
        stragglers=StragglerMonitor(0, ["host"]),
        watchdog=watchdog,
        profiler=NotedProfile(config, folder, rank=0, start_step=0, device=CPU),
    )
    loop._loop()
    return found


def test_ranks_write_their_traces_and_wait_for_each_other_in_no_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = ProfileConfig(steps=2, after_steps=3)
    found = watched_while_written(config, tmp_path, monkeypatch)
    assert found == [("trace", False), ("barrier", False), ("commit", False)]


def test_the_last_checkpoint_is_there_before_a_trace_of_the_last_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = ProfileConfig(steps=2, after_steps=8)
    found = watched_while_written(config, tmp_path, monkeypatch)
    assert found == [("commit", False), ("trace", False), ("barrier", False)]


def test_a_trace_that_the_end_of_a_run_cuts_off_is_written_in_no_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = ProfileConfig(steps=20, after_steps=3)
    assert watched_while_written(config, tmp_path, monkeypatch) == [
        ("commit", False),
        ("trace", False),
    ]


@pytest.mark.parametrize(("field", "value"), [("steps", -1), ("after_steps", 0)])
def test_fields_out_of_range_are_refused(field: str, value: int) -> None:
    with pytest.raises(ValueError, match=rf"profile\.{field} is {value}"):
        ProfileConfig(**{field: value})


def test_allocations_of_a_gpu_are_recorded_in_the_profiled_steps_alone(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    recorded, gpu = [], torch.device("cuda")

    def record_history(enabled: str | None = "all", max_entries: int = 0) -> None:
        recorded.append(enabled)

    monkeypatch.setattr(torch.cuda.memory, "_record_memory_history", record_history)
    config = ProfileConfig(steps=2, after_steps=3)
    states = []
    profile = StepProfile(config, tmp_path, rank=0, start_step=10, device=gpu)
    for _ in range(7):
        states.append(recorded[-1] if recorded else None)
        profile.step()
    profile.close()
    assert states == [None, None, None, "all", "all", None, None]


def test_a_run_that_ends_in_a_profiled_step_keeps_its_history_of_allocations(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    recorded = []
    monkeypatch.setattr(
        torch.cuda.memory, "_record_memory_history", lambda **how: recorded.append(how)
    )
    config = ProfileConfig(steps=2, after_steps=1)
    profile = StepProfile(config, tmp_path, rank=0, start_step=0, device=torch.device("cuda"))
    profile.step()
    profile.close()
    assert len(recorded) == 1


def test_a_trace_that_cannot_be_written_is_told_and_ends_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "profile").write_text("no folder")
    config = ProfileConfig(steps=1, after_steps=1)
    profile = StepProfile(config, tmp_path / "profile", rank=0, start_step=0, device=CPU)
    for _ in range(3):
        profile.step()
    profile.close()
    assert "could not be written" in caplog.text
