"""Many runs on one cluster: which start, which are preempted, and that no step is lost by it."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from launch import MUTED, ROOT
from tiny_run import losses, tiny_run

from cavmae.cluster.experiments.comparison import compare
from cavmae.cluster.experiments.driver import Driver
from cavmae.cluster.experiments.queue import _ended, next_step
from cavmae.cluster.experiments.queue_file import Experiment, Need, read_experiments
from cavmae.trainer.config.serialize import save_config
from cavmae.trainer.run_status import write_status
from cavmae.trainer.tracking.metrics_file import read_metrics

ABLATIONS = ROOT / "cluster/experiments/paper_ablations.yaml"


def run(name: str, gpus: int, priority: int = 0, state: Any = "waiting") -> Experiment:
    return Experiment(name, priority, [], Need(gpus, gpus), state)


def test_runs_are_compared_in_rows_or_as_json(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a").mkdir()
    lines = '{"step": 4, "loss": "nan"}\n{"step": 8, "loss": 0.25}\n'
    (tmp_path / "a/metrics.jsonl").write_text(lines)
    (tmp_path / "a/summary.json").write_text('{"scores": {"val_loss": NaN, "val_r1_low": 0.1}}')
    states = {"a": "finished", "b": "failed"}
    compare(tmp_path, states, as_json=False)
    assert capsys.readouterr().out == (
        "run\tstate\tloss\tstep\tval_loss\na\tfinished\t0.25\t8\tnan\nb\tfailed\t\t\t\n"
    )
    compare(tmp_path, states, as_json=True)
    assert json.loads(capsys.readouterr().out) == [
        {"run": "a", "state": "finished", "step": 8, "loss": 0.25, "val_loss": None},
        {"run": "b", "state": "failed"},
    ]
    assert (tmp_path / "comparison.png").exists()


def names(experiments: list[Experiment]) -> list[str]:
    return [experiment.name for experiment in experiments]


@pytest.mark.parametrize(
    ("experiments", "start", "preempted"),
    [
        # What fits starts, in the order of priority and of the file.
        ([run("a", 4), run("b", 4), run("c", 4)], ["a", "b"], []),
        ([run("a", 4), run("b", 8, 1)], ["b"], []),
        # A lower one is preempted, the last started first, and no more of them than needed.
        ([run("a", 4, 0, "running"), run("b", 4, 0, "running"), run("c", 4, 1)], [], ["b"]),
        ([run("a", 8, 1, "running"), run("b", 8, 1)], [], []),
        # What a stopping run frees is not given to another.
        ([run("a", 8, 0, "stopping"), run("b", 8, 1), run("c", 1, 0)], [], []),
        # Behind one that waits for its equals, lower ones use what is free; equals do not overtake.
        ([run("a", 6, 1, "running"), run("b", 8, 1), run("c", 2, 1), run("d", 2)], ["d"], []),
        # What is free goes to the one that others are preempted for.
        ([run("a", 6, 0, "running"), run("b", 8, 1), run("c", 2)], [], ["a"]),
        # One that is larger than the cluster keeps nobody waiting.
        ([run("a", 16, 1), run("b", 8)], ["b"], []),
        ([run("a", 16), run("b", 8)], ["b"], []),
    ],
)
def test_which_runs_start_and_which_are_preempted(
    experiments: list[Experiment], start: list[str], preempted: list[str]
) -> None:
    starting, preempting = next_step(experiments, Need(8, 8))
    assert (names(starting), names(preempting)) == (start, preempted)


def test_a_run_that_is_preempted_before_it_has_started_has_not_failed(tmp_path: Path) -> None:
    one = run("a", 1, state="stopping")
    one.driver = Driver(["demo"], tmp_path / "log")
    one.driver.request_stop()
    assert one.driver.wait() == -signal.SIGTERM
    _ended(one, tmp_path)
    assert (one.state, one.failures) == ("waiting", 0)


def test_why_a_run_failed_comes_from_its_status(tmp_path: Path) -> None:
    write_status(tmp_path / "a", state="failed", last_error="of an attempt before")
    driver = Driver(["--help"], tmp_path / "log")
    driver.wait()
    assert "before" not in driver.failure(tmp_path / "a")
    write_status(tmp_path / "a", state="failed", last_error="disk full")
    assert driver.failure(tmp_path / "a") == f"a failed with 0: disk full ({tmp_path}/log)"


def test_the_papers_ablations_are_runs_of_the_published_recipe(tmp_path: Path) -> None:
    words = ["--data.train", "/shards", "--workers", "4", "--gpus-per-worker", "1"]
    experiments = read_experiments(ABLATIONS, tmp_path, words)
    assert len(experiments) == 13 and all(one.retries == 2 for one in experiments)
    assert all(experiment.need == Need(4, 4) for experiment in experiments)
    by_name = {experiment.name: experiment.words for experiment in experiments}
    assert "--mask.audio-ratio=0.85" in by_name["mask-85"]
    assert "--loss.bidirectional" in by_name["both-directions"]
    assert f"--run-dir={tmp_path}/av-mae" in by_name["av-mae"]


def test_a_queue_that_is_rerun_skips_finished_runs(tmp_path: Path) -> None:
    """Unless they are to have more steps now."""
    runs = {"done": {}, "longer": {"fields": {"steps": 40}}, "begun": {}}
    (tmp_path / "file.yaml").write_text(yaml.dump({"recipe": "demo", "runs": runs}))
    for name in ("done", "longer"):
        write_status(tmp_path / name, state="finished", step=400, steps=400)
    experiments = read_experiments(
        tmp_path / "file.yaml", tmp_path, ["--data.train", str(tmp_path)]
    )
    assert {one.name: one.state for one in experiments} == {
        "begun": "waiting",
        "done": "finished",
        "longer": "waiting",
    }


@pytest.mark.parametrize(
    ("document", "message"),
    [
        ({"recipe": "demo", "runs": {}}, "runs is empty"),
        ({"recipe": "demo"}, "key runs is missing"),
        ({"recipe": "demo", "runs": {"a": {"prio": 1}}}, "run a: unknown key prio"),
        ({"recipe": "dem", "runs": {"a": {}}}, "run a: 'dem' is no recipe"),
        ({"recipe": "demo", "runs": ["a", "b"]}, r"runs is \['a', 'b'\]; use a mapping"),
        ({"recipe": "demo", "runs": {"a": {}}, "retries": "no"}, "retries is 'no'; use a whole"),
        ({"recipe": "demo", "runs": {"a": {"priority": 1.5}}}, "run a: priority is 1.5; use a"),
        (
            {"recipe": "demo", "runs": {"a": {"fields": ["x"]}}},
            "run a: fields is .*; use a mapping",
        ),
        (
            {"recipe": "demo", "runs": {"a": {"fields": {"stebs": 3}}}},
            "run a has an invalid field",
        ),
        (
            {"recipe": "demo", "runs": {"a": {"fields": {"workers": 129}}}},
            "run a: there are 129 ranks and global_batch is 128",
        ),
    ],
)
def test_an_invalid_file_is_reported_with_the_run(
    document: dict[str, Any], message: str, tmp_path: Path
) -> None:
    (tmp_path / "file.yaml").write_text(yaml.dump(document))
    with pytest.raises(ValueError, match=message):
        read_experiments(tmp_path / "file.yaml", tmp_path, ["--data.train", str(tmp_path)])


@pytest.mark.field
def test_a_file_of_an_editor_on_windows_is_read_and_a_run_named_twice_is_not_lost(
    tmp_path: Path,
) -> None:
    lines = ["recipe: demo", "runs:", "  a: {fields: {data.train: /s}}"]
    (tmp_path / "file.yaml").write_text("\r\n".join(lines), encoding="utf-16")
    assert [one.name for one in read_experiments(tmp_path / "file.yaml", tmp_path, [])] == ["a"]
    (tmp_path / "file.yaml").write_text("\n".join([*lines, lines[-1]]))
    with pytest.raises(ValueError, match=r"file\.yaml, line 4: key a is there twice"):
        read_experiments(tmp_path / "file.yaml", tmp_path, [])
    (tmp_path / "file.yaml").write_text("recipe: demo\nruns: [a\n")
    with pytest.raises(ValueError, match=r"file\.yaml, line 3: not YAML \(expected ',' or ']'"):
        read_experiments(tmp_path / "file.yaml", tmp_path, [])


def watch(
    queue: "subprocess.Popen[bytes]", path: Path, document: dict[str, Any], folder: Path, log: Path
) -> None:
    """Add a run of higher priority once the first one is at work, and wait for the end."""
    deadline = time.monotonic() + 200
    while not (folder / "low/checkpoints/step-000000010/manifest.json").exists():
        assert queue.poll() is None and time.monotonic() < deadline, log.read_text()
        time.sleep(0.1)
    document["runs"]["high"] = {"priority": 1, "fields": {"steps": 20, "seed": 7}}
    path.write_text(yaml.dump(document))
    assert queue.wait(timeout=400) == 1, "one of them failed"


@pytest.mark.long
@pytest.mark.slow
def test_a_run_is_preempted_and_resumed_and_all_are_compared(
    packed_synthetic: Path, tmp_path: Path
) -> None:
    base = tiny_run(packed_synthetic, tmp_path / "x", steps=150)
    save_config(base, tmp_path / "base.json")
    document: dict[str, Any] = {
        "experiment": "queue",
        "recipe": str(tmp_path / "base.json"),
        "retries": 0,
        # Each takes the machine.
        "fields": {"workers": 1, "cpus_per_worker": len(os.sched_getaffinity(0))},
        "runs": {"low": {}, "wrong": {"fields": {"initial_weights": str(tmp_path / "nowhere")}}},
    }
    path, folder = tmp_path / "queue.yaml", tmp_path / "runs"
    path.write_text(yaml.dump(document))
    with (tmp_path / "log").open("w") as log:
        queue = subprocess.Popen(
            [sys.executable, "-m", "cavmae", "queue", str(path), "--folder", str(folder)],
            cwd=ROOT,
            env=os.environ | {"PYTHONPATH": MUTED},
            stdout=log,
            stderr=subprocess.STDOUT,
        )
    try:
        watch(queue, path, document, folder, tmp_path / "log")
    finally:
        if queue.poll() is None:
            queue.terminate()  # the runs save and stop
            queue.wait(timeout=200)

    assert "in other words" in (folder / "drivers/low.log").read_text(), "as programs see it"
    said = (tmp_path / "log").read_text()
    told = [line for line in said.splitlines() if re.match(r"(low|high|wrong): ", line)]
    of_low = [line for line in told if line.startswith("low")]
    assert of_low == [
        f"low: {s}" for s in ("running", "stopping", "waiting", "running", "finished")
    ]
    assert told.index("high: finished") < len(told) - 1 - told[::-1].index("low: running")
    assert "wrong: failed" in told and "nowhere" in said
    assert len(losses(folder / "low")) == 150
    steps = [int(record["step"]) for record in read_metrics(folder / "low/metrics.jsonl")]
    assert steps == list(range(1, 151)), "no step is done twice"

    rows = (folder / "comparison.csv").read_text().splitlines()
    assert [row.split(",")[:3] for row in rows] == [
        ["run", "state", "loss"],
        ["low", "finished", f"{losses(folder / 'low')[-1]}"],
        ["wrong", "failed", ""],
        ["high", "finished", f"{losses(folder / 'high')[-1]}"],
    ]
    assert (folder / "comparison.png").stat().st_size > 10_000
    from mlflow import MlflowClient

    client = MlflowClient(json.loads((folder / "low/run.json").read_text())["tracking_uri"])
    experiment = client.get_experiment_by_name("queue")
    assert experiment is not None
    runs = {
        run.info.run_name: run.info.run_id for run in client.search_runs([experiment.experiment_id])
    }
    assert {"low", "high", "comparison"} <= runs.keys()
    kept = {item.path for item in client.list_artifacts(runs["comparison"])}
    assert kept == {"comparison.csv", "comparison.png"}
