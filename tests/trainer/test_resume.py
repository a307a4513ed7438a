"""A run that is killed, stopped or given other ranks goes on exactly where it was."""

import dataclasses
import json
import os
import re
import shutil
import signal
from pathlib import Path
from typing import Literal

import pytest
import torch
from starts import Start
from tiny_run import losses, tiny_run

from cavmae.benchmarks.harness.object_store import object_store
from cavmae.trainer.checkpoint.format import (
    MANIFEST,
    checkpoint_name,
    list_checkpoints,
    step_of,
    verify_checkpoint,
)
from cavmae.trainer.checkpoint.store import Store
from cavmae.trainer.config.configs import CheckpointConfig, EngineConfig, WatchdogConfig
from cavmae.trainer.fault_tolerance.lease import Lease
from cavmae.trainer.fault_tolerance.preemption import (
    START_AGAIN_EXIT_CODE,
    request_stop,
    requested_stop,
)
from cavmae.trainer.fault_tolerance.watchdog import HANG_EXIT_CODE

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def straight(packed_synthetic: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """20 steps on two ranks without a break."""
    folder = tmp_path_factory.mktemp("straight")
    Start(tiny_run(packed_synthetic, folder / "run"), 2, folder).finish()
    assert len(losses(folder / "run")) == 20
    return folder / "run"


def test_a_killed_run_ends_bit_for_bit_as_one_that_was_not(
    packed_synthetic: Path, straight: Path, tmp_path: Path
) -> None:
    config = tiny_run(packed_synthetic, tmp_path / "run")
    killed = Start(config, 2, tmp_path)
    killed.signal_after(signal.SIGKILL, tmp_path / "run/checkpoints/step-000000010" / MANIFEST)
    for process in killed.processes:
        process.wait(timeout=60)
    text = Start(config, 2, tmp_path).finish()
    assert "resuming from" in text
    assert losses(tmp_path / "run") == losses(straight)
    ours, theirs = (torch.load(run / "weights.pt") for run in (tmp_path / "run", straight))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    run = json.loads((tmp_path / "run/run.json").read_text())
    assert len(run["git_commits"]) == 2, "both starts are on record, in one MLflow run"
    assert len(run["commands"]) == len(run["hardware"]) == 2
    assert "attempts</td><td>2<" in (tmp_path / "run/report.html").read_text()


def test_a_killed_run_goes_on_from_an_object_store(
    packed_synthetic: Path, straight: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With two ranks bit for bit, then with one; what was half uploaded is passed over."""
    with object_store() as server:
        for name, value in (server.environment | {"TMPDIR": str(tmp_path)}).items():
            monkeypatch.setenv(name, value)
        server.make_bucket("bucket")
        store = Store("s3://bucket/run")
        checkpoint = CheckpointConfig(every_steps=5, folder=store.location())
        config = tiny_run(packed_synthetic, tmp_path / "run", checkpoint=checkpoint)
        killed = Start(config, 2, tmp_path)
        killed.wait_until(lambda: "step-000000010" in list_checkpoints(store), "checkpoint 10")
        for process in killed.processes:
            process.kill()
            process.wait(timeout=60)
        newest = list_checkpoints(store)[-1]
        store.put("step-000000099/state/mp_rank_00_model_states.pt", b"half of it")
        text = Start(dataclasses.replace(config, steps=15), 2, tmp_path).finish()
        assert f"resuming from s3://bucket/run/{newest}" in text
        kept = ["step-000000010", "step-000000015"]
        assert list_checkpoints(store) == kept and store.folders() == ["lease", *kept]
        assert losses(tmp_path / "run")[:15] == losses(straight)[:15]
        text = Start(config, 1, tmp_path).finish()
        assert "resuming from s3://bucket/run/step-000000015" in text
    assert losses(tmp_path / "run") == pytest.approx(losses(straight), rel=1e-5)
    assert not (tmp_path / "run/checkpoints").exists()
    assert not list(tmp_path.glob("cavmae-checkpoint-*")), "copies have gone"


def test_a_torn_checkpoint_is_named_and_the_one_before_is_used(
    packed_synthetic: Path, straight: Path, tmp_path: Path
) -> None:
    shutil.copytree(straight, tmp_path / "run")
    newest = tmp_path / "run/checkpoints/step-000000020"
    torn = next(newest.glob("attempt-1/state/*optim_states.pt"))
    torn.write_bytes(torn.read_bytes()[:-100])
    text = Start(tiny_run(packed_synthetic, tmp_path / "run"), 2, tmp_path).finish()
    assert "step-000000020 is corrupt or incomplete" in text and torn.name in text
    assert "resuming from" in text and "step-000000010" in text
    assert losses(tmp_path / "run") == losses(straight)


def test_a_full_disk_costs_a_checkpoint_and_not_the_run(
    packed_synthetic: Path, straight: Path, tmp_path: Path
) -> None:
    """A file of the second rank goes to /dev/full, which answers as a full disk does."""
    config = tiny_run(packed_synthetic, tmp_path / "run", checkpoint=CheckpointConfig(4))
    start = Start(config, 2, tmp_path)
    folder = tmp_path / "run/checkpoints"
    start.wait_for(folder / "step-000000004" / MANIFEST)
    blocked = folder / "step-000000012/attempt-1/state"
    blocked.mkdir(parents=True)
    (blocked / "zero_pp_rank_1_mp_rank_00_optim_states.pt").symlink_to("/dev/full")
    text = start.finish()
    assert "ALARM: the checkpoint of step 12 could not be written (rank 1: " in text
    assert "No space left on device" in text
    assert losses(tmp_path / "run") == losses(straight)
    assert sorted(path.name for path in folder.iterdir()) == ["step-000000016", "step-000000020"]
    last = json.loads((tmp_path / "run/metrics.jsonl").read_text().splitlines()[-1])
    assert last["checkpoint_failures"] == 1


def test_a_full_disk_at_the_end_is_an_error_that_says_what_to_do(
    packed_synthetic: Path, tmp_path: Path
) -> None:
    config = tiny_run(packed_synthetic, tmp_path / "run", checkpoint=CheckpointConfig(10))
    blocked = tmp_path / "run/checkpoints/step-000000020/attempt-1/state"
    start = Start(config, 1, tmp_path)
    start.wait_for(tmp_path / "run/checkpoints/step-000000010" / MANIFEST)
    blocked.mkdir(parents=True)
    (blocked / "mp_rank_00_model_states.pt").symlink_to("/dev/full")
    assert start.processes[0].wait(timeout=300) == 1
    text = start.log.read_text()
    assert "error: the checkpoint of step 20, the last of this attempt" in text
    assert [one.name for one in (tmp_path / "run/checkpoints").iterdir()] == ["step-000000010"]


def test_a_rank_that_is_stopped_ends_the_others_with_their_stacks(
    packed_synthetic: Path, straight: Path, tmp_path: Path
) -> None:
    watchdog = WatchdogConfig(hang_ratio=20, min_seconds=3, max_pause_seconds=30)
    config = tiny_run(packed_synthetic, tmp_path / "run", watchdog=watchdog)
    start = Start(config, 2, tmp_path)
    start.wait_for(tmp_path / "run/checkpoints/step-000000010" / MANIFEST)
    stopped, waiting = start.processes
    stopped.send_signal(signal.SIGSTOP)
    try:
        assert waiting.wait(timeout=200) == HANG_EXIT_CODE
        text = start.log.read_text()
        assert "HANG: no step for " in text and "hangs/rank-1.txt" in text
        assert "in train\n" in (tmp_path / "run/hangs/rank-1.txt").read_text()
    finally:
        stopped.kill()
        stopped.wait()
    Start(config, 2, tmp_path).finish()
    assert losses(tmp_path / "run") == losses(straight)


def test_sigterm_saves_and_the_run_goes_on_bit_for_bit(
    packed_synthetic: Path, straight: Path, tmp_path: Path
) -> None:
    config = tiny_run(packed_synthetic, tmp_path / "run")
    stopped = Start(config, 2, tmp_path)
    stopped.signal_after(signal.SIGTERM, tmp_path / "run/checkpoints/step-000000010" / MANIFEST)
    assert "Rerun the same command to resume" in stopped.finish()
    assert len(losses(tmp_path / "run")) < 20
    # A start that leaves the dtype open takes the run's own, whatever this processor does best.
    open_dtype = dataclasses.replace(config.engine, dtype="auto")
    Start(dataclasses.replace(config, engine=open_dtype), 2, tmp_path).finish()
    assert losses(tmp_path / "run") == losses(straight)


@pytest.mark.parametrize(
    ("zero_stage", "starts"),
    [
        (2, [(2, 10), (1, 20)]),
        (3, [(1, 10), (2, 20)]),
        (1, [(4, 5), (3, 15), (4, 20)]),  # three ranks have 2, 3 and 3 of 8 clips
    ],
)
def test_other_rank_counts_go_on_with_the_same_losses_and_some_checkpoints_are_kept_for_good(
    packed_synthetic: Path,
    straight: Path,
    tmp_path: Path,
    zero_stage: Literal[0, 1, 2, 3],
    starts: list[tuple[int, int]],
) -> None:
    run = tiny_run(
        packed_synthetic,
        tmp_path / "run",
        engine=EngineConfig(zero_stage=zero_stage, dtype="fp32"),
        checkpoint=CheckpointConfig(every_steps=5, keep_last=1, keep_every=10),
    )
    text = ""
    for world_size, steps in starts:
        text = Start(dataclasses.replace(run, steps=steps), world_size, tmp_path).finish()
    assert "resuming from" in text
    assert losses(tmp_path / "run") == pytest.approx(losses(straight), rel=1e-5)
    kept = list_checkpoints(Store(tmp_path / "run/checkpoints"))
    assert [step_of(one) for one in kept] == [10, 20]


def test_a_run_that_goes_on_refuses_another_seed(
    packed_synthetic: Path, straight: Path, tmp_path: Path
) -> None:
    shutil.copytree(straight, tmp_path / "run")
    start = Start(tiny_run(packed_synthetic, tmp_path / "run", seed=5), 1, tmp_path)
    assert start.processes[0].wait(timeout=120) != 0
    assert "was started with seed 0 and cannot resume with 5" in start.log.read_text()


def test_a_run_has_one_owner(
    packed_synthetic: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A start is refused while another one lives, and ends when another one has taken over."""
    config = tiny_run(packed_synthetic, tmp_path / "run", steps=2000)
    monkeypatch.setattr("cavmae.trainer.fault_tolerance.lease.RENEW_SECONDS", 0.3)
    torn = tmp_path / "run/checkpoints/step-000000001/attempt-1/state"
    torn.mkdir(parents=True)  # in flight
    with Lease() as living:
        living.take({"run_dir": Store(tmp_path / "run")})
        start = Start(config, 1, tmp_path)
        assert start.processes[0].wait(timeout=120) == 1
        assert f"error: run_dir {tmp_path / 'run'} is in use by process {os.getpid()} on" in (
            start.log.read_text()
        )
        assert torn.exists()
    start = Start(config, 1, tmp_path)
    start.wait_for(tmp_path / "run/checkpoints/step-000000010" / MANIFEST)
    holder = json.loads((tmp_path / "run/lease/attempt-2.json").read_text())
    (tmp_path / "run/lease/attempt-3.json").write_text(json.dumps(holder | {"start": "another"}))
    newest = list_checkpoints(Store(tmp_path / "run/checkpoints"))[-1]
    assert start.processes[0].wait(timeout=120) == 1
    text = start.log.read_text()
    assert "error: run_dir" in text and "was taken over by process" in text
    assert list_checkpoints(Store(tmp_path / "run/checkpoints"))[-1] <= step_after(newest)


def step_after(name: str) -> str:
    return checkpoint_name(step_of(name) + 10)


def test_a_finished_run_that_is_started_again_keeps_its_scores(
    packed_synthetic: Path, tmp_path: Path
) -> None:
    run = tiny_run(packed_synthetic, tmp_path / "run", steps=1)
    data = dataclasses.replace(run.data, validation=run.data.train)
    run = dataclasses.replace(run, data=data)
    scores = []
    for _ in range(2):
        Start(run, 1, tmp_path).finish()
        scores.append(json.loads((tmp_path / "run/summary.json").read_text())["scores"])
    assert scores[0] and scores[0] == scores[1]


def test_a_request_in_the_run_folder_saves_and_every_rank_left_its_log(
    packed_synthetic: Path, tmp_path: Path
) -> None:
    config = tiny_run(packed_synthetic, tmp_path / "run", steps=2000)
    start = Start(config, 2, tmp_path)
    start.wait_for(tmp_path / "run/checkpoints/step-000000010" / MANIFEST)
    request_stop(tmp_path / "run", "room for another run")
    text = start.finish()
    assert re.search(r"Stopped at step \d+/2000 \(room for another run\)", text)
    store = Store(tmp_path / "run/checkpoints")
    newest = list_checkpoints(store)[-1]
    verify_checkpoint(store, newest)
    assert step_of(newest) == len(losses(tmp_path / "run")), "no step is lost"
    assert requested_stop(tmp_path / "run") == "", "the next start is not asked"
    for rank in range(2):
        lines = (tmp_path / f"run/logs/rank-{rank}.log").read_text()
        assert f"Stopped at step {step_of(newest)}/2000" in lines
    Start(dataclasses.replace(config, steps=step_of(newest) + 1), 1, tmp_path).finish()


def test_a_rank_that_cannot_save_in_time_ends_and_the_run_goes_on_from_before(
    packed_synthetic: Path, straight: Path, tmp_path: Path
) -> None:
    """The checkpoint is written to a pipe that nobody reads."""
    checkpoint = CheckpointConfig(every_steps=10, grace_seconds=1.5)
    config = tiny_run(packed_synthetic, tmp_path / "run", checkpoint=checkpoint)
    start = Start(config, 1, tmp_path)
    start.wait_for(tmp_path / "run/checkpoints/step-000000010" / MANIFEST)
    for step in range(11, 21):
        blocked = tmp_path / f"run/checkpoints/step-{step:09d}/attempt-1/state"
        blocked.mkdir(parents=True)
        os.mkfifo(blocked / "mp_rank_00_model_states.pt")
    start.processes[0].send_signal(signal.SIGTERM)
    assert start.processes[0].wait(timeout=200) == START_AGAIN_EXIT_CODE
    text = start.log.read_text()
    assert "stop requested (SIGTERM): saving after this step" in text
    assert "not saved within checkpoint.grace_seconds = 1.5" in text
    text = Start(config, 1, tmp_path).finish()
    assert "resuming from" in text and "step-000000010" in text
    assert losses(tmp_path / "run") == pytest.approx(losses(straight), rel=1e-5)
