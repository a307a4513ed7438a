"""What the tracker writes is in metrics.jsonl first and in a real MLflow store after, and MLflow's
troubles never reach the training loop. The store is SQLite, one for all tests of this file: making
it takes seconds."""

import json
import math
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from cavmae.trainer.config.configs import TrackingConfig
from cavmae.trainer.tracking import tracker as tracker_module
from cavmae.trainer.tracking.code_snapshot import git_commit
from cavmae.trainer.tracking.metrics_file import read_metrics
from cavmae.trainer.tracking.tracker import Tracker, flatten

PARAMETERS: dict[str, object] = {
    "steps": 10,
    "model": {"width": 96},
    "note": "x" * 7000,
    "data": {"train": "shards"},
}


NO_DATABASE = b"this is no database" * 1000


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs")


@pytest.fixture
def run_dir(runs: Path, request: pytest.FixtureRequest) -> Path:
    return runs / request.node.name


def stored(tracker: Tracker):
    from mlflow import MlflowClient

    return MlflowClient(tracker.uri).get_run(tracker.run_id)


def history(tracker: Tracker, name: str) -> list[tuple[int, float]]:
    from mlflow import MlflowClient

    metrics = MlflowClient(tracker.uri).get_metric_history(tracker.run_id, name)
    return sorted((metric.step, metric.value) for metric in metrics)


def wait_until(condition: Callable[[], bool]) -> None:
    deadline_seconds = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline_seconds, "waited 30 s"
        time.sleep(0.02)


def test_metrics_are_in_the_file_and_in_the_store(run_dir: Path) -> None:
    tracker = Tracker(TrackingConfig(), run_dir, PARAMETERS)
    tracker.log_metrics({"loss": 2.5, "accuracy": 0.125}, step=10)
    tracker.log_metrics({"loss": 1.5}, step=20)
    assert [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()] == [
        {
            "step": 10,
            "unix_seconds": pytest.approx(time.time(), abs=60),
            "loss": 2.5,
            "accuracy": 0.125,
        },
        {"step": 20, "unix_seconds": pytest.approx(time.time(), abs=60), "loss": 1.5},
    ]
    tracker.close()
    assert tracker.failures == 0
    assert history(tracker, "loss") == [(10, 2.5), (20, 1.5)]
    assert history(tracker, "accuracy") == [(10, 0.125)]


def test_the_default_store_and_its_files_lie_beside_the_run_folder(
    run_dir: Path, runs: Path
) -> None:
    tracker = Tracker(TrackingConfig(), run_dir, PARAMETERS)
    figure, file = run_dir / "masks.png", run_dir / "summary.json"
    figure.write_bytes(b"png")
    file.write_text("{}")
    tracker.log_file(figure, "figures")
    tracker.log_file(file)
    tracker.close()
    assert tracker.uri == f"sqlite:///{runs}/mlflow.db"
    assert (runs / "mlflow.db").is_file()
    (artifacts,) = (runs / "mlartifacts").glob(f"{tracker.run_id}/artifacts")
    assert (artifacts / "figures" / "masks.png").read_bytes() == b"png"
    assert (artifacts / "summary.json").read_text() == "{}"
    assert json.loads((artifacts / "config.json").read_text()) == PARAMETERS


@pytest.mark.field
@pytest.mark.parametrize("name", ["lr=1?wd=0", "My%20Drive", "a #1, b & c"])
def test_a_store_lies_in_a_folder_of_any_name(tmp_path: Path, name: str) -> None:
    folder = tmp_path / name
    folder.mkdir()
    tracker = Tracker(TrackingConfig(experiment="odd"), folder / "run", PARAMETERS)
    tracker.close()
    assert stored(tracker).info.status == "FINISHED"
    (saved,) = folder.glob(f"mlartifacts/{tracker.run_id}/artifacts/config.json")
    assert json.loads(saved.read_text()) == PARAMETERS
    assert list(tmp_path.iterdir()) == [folder], "nothing lies elsewhere"


def test_parameters_are_dotted_names_and_long_values_are_cut(run_dir: Path) -> None:
    tracker = Tracker(TrackingConfig(), run_dir, PARAMETERS)
    tracker.close()
    parameters = stored(tracker).data.params
    assert parameters["steps"] == "10"
    assert parameters["model.width"] == "96"
    assert parameters["data.train"] == "shards"
    assert parameters["note"] == "x" * 6000


def test_more_parameters_than_mlflow_takes_in_a_request_are_all_logged(run_dir: Path) -> None:
    parameters: dict[str, object] = {f"field_{index}": index for index in range(250)}
    tracker = Tracker(TrackingConfig(), run_dir, parameters)
    tracker.close()
    assert parameters.keys() <= stored(tracker).data.params.keys()


def test_the_commit_of_the_code_is_recorded(run_dir: Path) -> None:
    tracker = Tracker(TrackingConfig(), run_dir, PARAMETERS)
    tracker.close()
    run = stored(tracker)
    assert run.data.params["git_commit"] == str(git_commit())
    assert run.data.tags.get("mlflow.source.git.commit") == git_commit()


def test_cpu_use_of_the_machine_is_recorded(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL", "0.1")
    tracker = Tracker(TrackingConfig(), run_dir, PARAMETERS)
    wait_until(lambda: "system/cpu_utilization_percentage" in stored(tracker).data.metrics)
    tracker.close()


def test_cpu_use_goes_on_where_it_stopped(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL", "0.1")
    first = Tracker(TrackingConfig(), run_dir, PARAMETERS)
    name = "system/cpu_utilization_percentage"
    wait_until(lambda: len(history(first, name)) >= 3)
    first.close("KILLED")
    samples = len(history(first, name))
    second = Tracker(TrackingConfig(), run_dir, PARAMETERS, run_id=first.run_id)
    wait_until(lambda: len(history(second, name)) > samples)
    second.close()
    steps = [step for step, _ in history(second, name)]
    assert steps == list(range(len(steps)))


@pytest.mark.parametrize("status", ["FINISHED", "FAILED"])
def test_the_run_ends_with_the_status_given(run_dir: Path, status) -> None:
    tracker = Tracker(TrackingConfig(), run_dir, PARAMETERS)
    assert stored(tracker).info.status == "RUNNING"
    tracker.close(status)
    assert stored(tracker).info.status == status


def test_a_run_goes_on_under_its_id(run_dir: Path) -> None:
    first = Tracker(TrackingConfig(), run_dir, PARAMETERS)
    first.log_metrics({"loss": 2.0}, step=1)
    first.close("KILLED")
    second = Tracker(TrackingConfig(), run_dir, PARAMETERS, run_id=first.run_id, start_step=1)
    assert stored(second).info.status == "RUNNING"
    second.log_metrics({"loss": 1.0}, step=2)
    second.close()
    assert second.run_id == first.run_id
    assert history(second, "loss") == [(1, 2.0), (2, 1.0)]
    assert [record["step"] for record in read_metrics(run_dir / "metrics.jsonl")] == [1, 2]


def test_a_parameter_changed_on_resume_is_said_and_kept_as_a_tag(
    run_dir: Path, caplog: pytest.LogCaptureFixture
) -> None:
    first = Tracker(TrackingConfig(), run_dir, PARAMETERS)
    first.close("KILLED")
    second = Tracker(TrackingConfig(), run_dir, PARAMETERS | {"steps": 20}, run_id=first.run_id)
    second.close("KILLED")
    assert "steps was 10 and is now 20" in caplog.text
    assert stored(second).data.params["steps"] == "10"
    assert stored(second).data.tags["changed.steps"] == "20"
    third = Tracker(TrackingConfig(), run_dir, PARAMETERS, run_id=first.run_id)
    third.close()
    assert stored(third).data.tags["changed.steps"] == "10"
    changed = [tag for tag in stored(third).data.tags if tag.startswith("changed.")]
    assert changed == ["changed.steps"]


def test_records_after_the_resumed_step_are_dropped(run_dir: Path) -> None:
    first = Tracker(TrackingConfig(), run_dir, PARAMETERS)
    for step in (10, 20, 30):
        first.log_metrics({"loss": float(step)}, step)
    first.close("KILLED")
    second = Tracker(TrackingConfig(), run_dir, PARAMETERS, run_id=first.run_id, start_step=20)
    second.log_metrics({"loss": 31.0}, step=30)
    second.close()
    records = read_metrics(run_dir / "metrics.jsonl")
    assert [(record["step"], record["loss"]) for record in records] == [
        (10, 10.0),
        (20, 20.0),
        (30, 31.0),
    ]


def test_a_line_cut_short_by_a_power_cut_is_dropped(run_dir: Path) -> None:
    run_dir.mkdir()
    (run_dir / "metrics.jsonl").write_text('{"step": 1, "loss": 3.0}\n{"step": 2, "lo')
    tracker = Tracker(TrackingConfig(), run_dir, PARAMETERS, start_step=2)
    tracker.log_metrics({"loss": 1.0}, step=3)
    tracker.close()
    assert [record["step"] for record in read_metrics(run_dir / "metrics.jsonl")] == [1, 3]


def test_a_damaged_line_is_an_error_that_names_it(run_dir: Path) -> None:
    run_dir.mkdir()
    (run_dir / "metrics.jsonl").write_text('{"step": 1}\nnonsense\n{"step": 3}\n')
    with pytest.raises(ValueError, match=r"metrics\.jsonl line 2 is not JSON"):
        Tracker(TrackingConfig(), run_dir, PARAMETERS, start_step=3)


def test_a_value_that_is_not_finite_is_strict_json_and_reads_back(run_dir: Path) -> None:
    tracker = Tracker(TrackingConfig(), run_dir, PARAMETERS)
    tracker.log_metrics({"loss": math.nan, "norm": math.inf}, step=1)
    tracker.close()

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    json.loads((run_dir / "metrics.jsonl").read_text(), parse_constant=refuse)
    (record,) = read_metrics(run_dir / "metrics.jsonl")
    assert math.isnan(record["loss"]) and record["norm"] == math.inf
    assert math.isnan(history(tracker, "loss")[0][1])


def test_a_store_that_breaks_during_the_run_is_said_once_and_loses_no_metrics(
    runs: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    shutil.copy(runs / "mlflow.db", tmp_path)
    run_dir = tmp_path / "run"
    tracker = Tracker(TrackingConfig(experiment="breaks"), run_dir, PARAMETERS)
    tracker.log_metrics({"loss": 3.0}, step=1)
    wait_until(lambda: history(tracker, "loss") == [(1, 3.0)])
    (tmp_path / "mlflow.db").write_bytes(NO_DATABASE)
    for step in range(2, 12):
        tracker.log_metrics({"loss": 3.0}, step)
    tracker.close()
    assert tracker.failures >= 10
    assert [record["step"] for record in read_metrics(run_dir / "metrics.jsonl")] == list(
        range(1, 12)
    )
    messages = [record.message for record in caplog.records if "did not take" in record.message]
    assert len(messages) == 1 and str(run_dir / "metrics.jsonl") in messages[0]
    assert "metrics after step 1 are not in MLflow" in caplog.text


def test_what_a_store_missed_is_sent_when_it_is_back(runs: Path, tmp_path: Path) -> None:
    shutil.copy(runs / "mlflow.db", tmp_path)
    store = tmp_path / "mlflow.db"
    tracker = Tracker(TrackingConfig(experiment="away"), tmp_path / "run", PARAMETERS)
    tracker.log_metrics({"loss": 1.0}, step=1)
    wait_until(lambda: history(tracker, "loss") == [(1, 1.0)])
    whole = store.read_bytes()
    store.write_bytes(NO_DATABASE)
    for step in range(2, 5):
        tracker.log_metrics({"loss": float(step)}, step)
    wait_until(lambda: tracker.failures >= 3)
    assert (tmp_path / "run/mlflow_unsent.json").exists()
    store.write_bytes(whole)
    tracker.log_metrics({"loss": 5.0}, 5)
    tracker.close()
    assert history(tracker, "loss") == [(step, float(step)) for step in range(1, 6)]
    assert not (tmp_path / "run/mlflow_unsent.json").exists()


def test_what_a_store_missed_to_the_end_is_sent_by_the_next_start(
    runs: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    shutil.copy(runs / "mlflow.db", tmp_path)
    store, config = tmp_path / "mlflow.db", TrackingConfig(experiment="away")
    tracker = Tracker(config, tmp_path / "run", PARAMETERS)
    tracker.log_metrics({"loss": 1.0}, step=1)
    wait_until(lambda: history(tracker, "loss") == [(1, 1.0)])
    whole = store.read_bytes()
    store.write_bytes(NO_DATABASE)
    for step in range(2, 6):
        tracker.log_metrics({"loss": float(step)}, step)
    tracker.close()
    assert "the next attempt of this run sends them" in caplog.text
    store.write_bytes(whole)
    later = Tracker(config, tmp_path / "run", PARAMETERS, tracker.run_id, start_step=4)
    later.log_metrics({"loss": 50.0}, step=5)
    later.close()
    found = dict(history(later, "loss"))  # Step 1, whose scores might have been missing, twice.
    assert found == {1: 1.0, 2: 2.0, 3: 3.0, 4: 4.0, 5: 50.0}
    assert not (tmp_path / "run/mlflow_unsent.json").exists()


@pytest.mark.slow
def test_runs_that_start_together_share_a_new_store_even_where_its_making_was_cut_short(
    tmp_path: Path,
) -> None:
    (tmp_path / "mlflow.db.0123.partial").write_bytes(b"SQLite format 3\0 and no more")
    (tmp_path / "mlflow.db.0123.partial-journal").write_bytes(b"of the file that was cut short")
    code = """
import sys
from pathlib import Path
from cavmae.trainer.config.configs import TrackingConfig
from cavmae.trainer.tracking.tracker import Tracker
Tracker(TrackingConfig(experiment="one"), Path(sys.argv[1]), {}).close()
"""
    starts = [
        subprocess.Popen(
            [sys.executable, "-c", code, str(tmp_path / f"run-{number}")],
            cwd=Path(__file__).parents[3],
            stderr=subprocess.PIPE,
            text=True,
        )
        for number in range(3)
    ]
    for start in starts:
        said = start.communicate(timeout=200)[1]
        assert start.returncode == 0, said
    assert not list(tmp_path.glob("mlflow.db.*.partial*"))


def test_a_run_starts_without_its_store_and_sends_all_when_it_is_there(
    runs: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store, noted = tmp_path / "mlflow.db", []
    store.write_bytes(NO_DATABASE)
    tracker = Tracker(
        TrackingConfig(experiment="late"),
        tmp_path / "run",
        PARAMETERS,
        on_run=lambda *run: noted.append(run),
    )
    assert "can't be reached; training goes on" in caplog.text
    tracker.log_metrics({"loss": 1.0}, step=1)
    wait_until(lambda: tracker.failures > 0)
    shutil.copy(runs / "mlflow.db", store)
    tracker.log_metrics({"loss": 2.0}, step=2)
    tracker.close()
    assert history(tracker, "loss") == [(1, 1.0), (2, 2.0)]
    assert noted == [(tracker.run_id, tracker.uri)] and stored(tracker).data.params["steps"] == "10"
    assert not (tmp_path / "run/mlflow_unsent.json").exists()


def test_what_a_run_without_its_store_left_is_sent_by_the_next_attempt(
    runs: Path, tmp_path: Path
) -> None:
    from mlflow import MlflowClient

    store, figure = tmp_path / "mlflow.db", tmp_path / "figure.png"
    store.write_bytes(NO_DATABASE)
    figure.write_bytes(b"a figure")
    first = Tracker(TrackingConfig(experiment="later"), tmp_path / "run", PARAMETERS)
    first.log_metrics({"loss": 1.0}, step=1)
    first.log_file(figure, "figures")
    first.close()
    shutil.copy(runs / "mlflow.db", store)
    second = Tracker(TrackingConfig(experiment="later"), tmp_path / "run", PARAMETERS, start_step=1)
    second.close()
    assert history(second, "loss") == [(1, 1.0)]
    (file,) = MlflowClient(second.uri).list_artifacts(second.run_id, "figures")
    assert file.path == "figures/figure.png"
    assert not (tmp_path / "run/mlflow_unsent.json").exists()


def test_no_exception_ends_the_sending_and_what_is_refused_holds_up_nothing(
    run_dir: Path, tmp_path: Path
) -> None:
    tracker = Tracker(TrackingConfig(), run_dir, PARAMETERS)
    tracker.log_file(tmp_path / "gone.png")
    tracker._send(tracker_module._Request(lambda: {}["of a library that changed"]))
    tracker.log_metrics({"loss": 2.0}, step=2)
    tracker.close()
    assert history(tracker, "loss") == [(2, 2.0)]
    assert tracker.failures == 2


def test_a_store_that_is_slow_is_said_once(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(tracker_module, "BEHIND_RECORDS", 3)
    tracker = Tracker(TrackingConfig(), run_dir, PARAMETERS)
    answers = threading.Event()
    tracker._send(tracker_module._Request(answers.wait))
    for step in range(1, 9):
        tracker.log_metrics({"loss": 1.0}, step)
    answers.set()
    tracker.close()
    assert caplog.text.count("is slow or away") == 1
    assert len(history(tracker, "loss")) == 8


def test_metrics_that_do_not_fit_on_the_disk_are_written_with_the_next_ones(
    run_dir: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tracker = Tracker(TrackingConfig(), run_dir, PARAMETERS)
    file = tracker._metrics_file
    with open("/dev/full", "ab", buffering=0) as tracker._metrics_file:
        for step in (1, 2):
            tracker.log_metrics({"loss": float(step)}, step)
    tracker._metrics_file = file
    tracker.log_metrics({"loss": 3.0}, 3)
    tracker.close()
    assert [one["step"] for one in read_metrics(run_dir / "metrics.jsonl")] == [1, 2, 3]
    assert caplog.text.count("ALARM: metrics could not be written") == 1
    assert "are lost" not in caplog.text


def test_metrics_that_never_fit_on_the_disk_are_counted_at_the_end(
    run_dir: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tracker = Tracker(TrackingConfig(), run_dir, PARAMETERS)
    tracker._metrics_file.close()
    with open("/dev/full", "ab", buffering=0) as tracker._metrics_file:
        for step in (1, 2):
            tracker.log_metrics({"loss": float(step)}, step)
        tracker.close()
    assert f"ALARM: the last 2 lines of {run_dir / 'metrics.jsonl'} are lost" in caplog.text


def test_a_store_that_refuses_a_new_run_is_an_error_naming_the_field(
    run_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        ValueError, match=r"tracking.uri is nonsense://here.*\n*.*Set tracking.uri to"
    ):
        Tracker(TrackingConfig(uri="nonsense://here"), run_dir, PARAMETERS)
    assert not list(tmp_path.iterdir()), "no file is named after a server"


def test_a_resume_whose_run_the_store_lost_is_a_warning(
    run_dir: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tracker = Tracker(TrackingConfig(), run_dir, PARAMETERS, run_id="0123")
    tracker.log_metrics({"loss": 1.0}, 1)
    tracker.close()
    assert "training goes on" in caplog.text and "0123" in caplog.text
    assert [one["step"] for one in read_metrics(run_dir / "metrics.jsonl")] == [1]


def test_a_deleted_experiment_is_an_error_that_says_how_to_restore_it(run_dir: Path) -> None:
    from mlflow import MlflowClient

    tracker = Tracker(TrackingConfig(experiment="gone"), run_dir, PARAMETERS)
    tracker.close()
    MlflowClient(tracker.uri).delete_experiment(stored(tracker).info.experiment_id)
    with pytest.raises(ValueError, match=r"'gone' was deleted.*mlflow experiments restore"):
        Tracker(TrackingConfig(experiment="gone"), run_dir, PARAMETERS)


def test_neither_the_tracker_nor_the_engine_imports_mlflow() -> None:
    """DeepSpeed would; once both are there, it can be imported as ever."""
    code = """
import sys
import cavmae.trainer.tracking.tracker, cavmae.trainer.distributed.engine
print("mlflow" in sys.modules)
import mlflow
print(mlflow.__name__)
"""
    output = subprocess.check_output([sys.executable, "-c", code], text=True)
    assert output == "False\nmlflow\n"


def test_telemetry_is_off() -> None:
    code = """
import sys, tempfile, pathlib
from cavmae.trainer.config.configs import TrackingConfig
from cavmae.trainer.tracking.tracker import Tracker
try:
    Tracker(TrackingConfig(uri="nonsense://"), pathlib.Path(tempfile.mkdtemp()), {})
except ValueError:
    from mlflow.telemetry.utils import is_telemetry_disabled
    print(is_telemetry_disabled())
"""
    # An environment without the variables by which MLflow knows that it is being tested.
    root = Path(__file__).parents[3]
    environment = {"PYTHONPATH": str(root), "PATH": os.environ["PATH"]}
    output = subprocess.check_output([sys.executable, "-c", code], text=True, env=environment)
    assert output == "True\n"


def test_flatten_joins_the_names_of_nested_dictionaries() -> None:
    assert flatten({"a": 1, "b": {"c": {"d": 2}, "e": (3,)}}) == {"a": 1, "b.c.d": 2, "b.e": (3,)}
