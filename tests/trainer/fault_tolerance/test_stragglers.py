"""The rank that the others wait for is named."""

import signal
import time
from pathlib import Path

import pytest
import torch
from starts import Start
from tiny_run import tiny_run

from cavmae.trainer.config.configs import TrackingConfig, WatchdogConfig
from cavmae.trainer.fault_tolerance.stragglers import RankTimer, StragglerMonitor
from cavmae.trainer.tracking.metrics_file import read_metrics


def test_own_time_ends_where_the_rank_first_meets_others() -> None:
    own = RankTimer(torch.device("cpu"))
    for _ in range(2):
        own.begin_step()
        time.sleep(0.02)
        own.batch_ready()
        time.sleep(0.03)
        own.before_sync()
        time.sleep(0.4)
        own.before_sync()
    assert 0.05 <= own.pop_mean() < 0.15
    assert own.pop_mean() == 0.0, "what was taken is not counted again"


def test_a_rank_is_named_when_it_stays_the_slowest(caplog: pytest.LogCaptureFixture) -> None:
    monitor = StragglerMonitor(1.5, ["a", "b", "c"])
    for seconds in ([1.0, 1.1, 2.0], [1.0, 1.1, 2.0], [1.0, 2.0, 1.1], [1.0, 1.1, 2.0]):
        monitor.update(seconds, 3.0)
    assert not caplog.records, "another one each time is noise"
    found = [monitor.update([1.0, 1.1, 2.0], 3.0) for _ in range(3)]
    assert found[-1] == {"slowest_rank": 2.0, "slowest_rank_ratio": pytest.approx(2 / 1.1)}
    (record,) = caplog.records
    assert "rank 2 on c is a straggler" in record.message


def test_a_slow_rank_that_costs_nothing_is_not_named(caplog: pytest.LogCaptureFixture) -> None:
    monitor = StragglerMonitor(1.5, ["a", "b"])
    for _ in range(5):
        monitor.update([0.01, 0.03], 1.0)
    assert not caplog.records


@pytest.mark.slow
def test_a_rank_on_a_throttled_core_is_named_with_its_host(
    packed_synthetic: Path, tmp_path: Path
) -> None:
    config = tiny_run(
        packed_synthetic,
        tmp_path / "run",
        steps=3000,
        tracking=TrackingConfig(every_steps=5),
        watchdog=WatchdogConfig(straggler_ratio=1.5),
    )
    start = Start(config, 2, tmp_path)
    start.wait_for(tmp_path / "run/checkpoints/step-000000010/manifest.json")
    throttled, deadline = start.processes[1], time.monotonic() + 200
    while "straggler" not in start.log.read_text():
        assert time.monotonic() < deadline, start.log.read_text()[-3000:]
        throttled.send_signal(signal.SIGSTOP)
        time.sleep(0.09)
        throttled.send_signal(signal.SIGCONT)
        time.sleep(0.01)
    for process in start.processes:
        process.send_signal(signal.SIGTERM)
    assert "rank 1 on " in start.finish()
    last = list(read_metrics(tmp_path / "run/metrics.jsonl"))[-1]
    assert {"slowest_rank", "slowest_rank_ratio"} <= last.keys()
