"""A sweep's file is checked before anything starts, and ASHA stops trials that fall behind."""

import csv
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from launch import ROOT
from tiny_run import losses, tiny_run

from cavmae.cluster.experiments.sweep_file import Varied, keep_or_compare, read_sweep
from cavmae.trainer.config.serialize import save_config

SWEEP: dict[str, Any] = {
    "recipe": "demo",
    "fields": {"data.train": "shards", "steps": 100, "validation.every_steps": 20},
    "metric": "loss",
    "mode": "min",
    "space": {"optimizer.learning_rate": {"log_uniform": [1e-5, 1e-2]}},
}


def read(tmp_path: Path, document: Any, *words: str) -> Any:
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump(document))
    return read_sweep(path, tmp_path / "runs", words)


def test_a_sweep_has_defaults_and_takes_words(tmp_path: Path) -> None:
    sweep = read(tmp_path, SWEEP, "--workers=4", "--cpus-per-worker=2")
    assert sweep.space == {"optimizer.learning_rate": Varied("log_uniform", (1e-5, 1e-2))}
    assert (sweep.trials, sweep.steps, sweep.grace_steps, sweep.reduction) == (16, 100, 20, 4)
    assert (sweep.need.cpus, sweep.need.gpus) == (8, 0)
    assert "--tracking.experiment=mine" in sweep.words


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"space": {}}, "space is empty"),
        ({"space": {"seed": [1, 2]}}, r"space: seed is \[1, 2\]; use one of choice, grid"),
        ({"space": {"seed": {"choice": []}}}, r"choice is \[\]; use a list"),
        ({"space": {"seed": {"whole": [1, 2.5]}}}, "use two numbers, whole ones"),
        ({"space": {"seed": {"whole": [2, 1]}}}, "the lower first"),
        ({"space": {"loss.scale": {"uniform": ["1e-5", 1]}}}, "in YAML 1.0e-5, not 1e-5"),
        ({"space": {"loss.scale": {"log_uniform": [0, 1]}}}, "use numbers above 0"),
        ({"space": {"no.such": {"choice": [1]}}}, "space: no.such has an invalid field"),
        (
            {"space": {"mask.audio_ratio": {"uniform": [0.5, 1.0]}}},
            "space: mask.audio_ratio has an invalid field",
        ),
        ({"mode": "most"}, "mode is 'most'; use max or min"),
        ({"metric": 3}, "metric is 3; use a text"),
        ({"trials": 0}, "trials is 0; use 1 or more"),
        ({"reduction": 1}, "reduction is 1; use 2 or more"),
        ({"grace_steps": 101}, "grace_steps is 101; use 1 to steps, 100"),
        ({"fields": {"data.train": "shards"}}, "steps is 0; set it in fields"),
        ({"colour": "blue"}, "unknown key colour"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_is_not_as_it_should_be_is_named(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    document = SWEEP | {"recipe": "paper_audioset"} | changes
    with pytest.raises(ValueError, match=message):
        read(tmp_path, document)


def test_a_sweep_that_was_started_with_something_else_is_refused(tmp_path: Path) -> None:
    sweep, kept = read(tmp_path, SWEEP), tmp_path / "runs/sweep.json"
    keep_or_compare(sweep, kept, started=False)
    keep_or_compare(sweep, kept, started=True)
    more = read(tmp_path, SWEEP | {"trials": 32})
    with pytest.raises(ValueError, match=r"trials is 32 and the sweep in .* was started with 16"):
        keep_or_compare(more, kept, started=True)
    wider = {"optimizer.learning_rate": {"log_uniform": [1e-6, 1e-2]}}
    with pytest.raises(ValueError, match="space is"):
        keep_or_compare(read(tmp_path, SWEEP | {"space": wider}), kept, started=True)


@pytest.mark.long
@pytest.mark.slow
def test_a_trial_that_falls_behind_is_stopped_early_and_a_finished_sweep_is_not_run_again(
    packed_synthetic: Path, tmp_path: Path
) -> None:
    steps = 150  # so many that the trial cannot finish before it is stopped
    config = tiny_run(packed_synthetic, tmp_path / "unused", steps=steps)
    save_config(config, tmp_path / "config.json")
    document = {
        "recipe": str(tmp_path / "config.json"),
        "trials": 1,
        "metric": "loss",
        "mode": "min",
        "grace_steps": 5,
        "reduction": 2,
        "space": {"optimizer.learning_rate": {"grid": [1e-3, 1e-12]}},  # learns, and doesn't
    }
    (tmp_path / "sweep.yaml").write_text(yaml.safe_dump(document))
    one_at_a_time = f"--cpus-per-worker={len(os.sched_getaffinity(0))}"

    def sweep() -> str:
        done = subprocess.run(
            [
                *(sys.executable, "-m", "cavmae", "sweep", "sweep.yaml", "--folder=runs"),
                *("--workers=1", one_at_a_time),
            ],
            cwd=tmp_path,
            env=os.environ | {"PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
            timeout=400,
        )
        assert done.returncode == 0, done.stderr[-5000:]
        return done.stderr

    assert "trial-00000: --optimizer.learning-rate=0.001\n" in sweep()
    rows = list(csv.DictReader((tmp_path / "runs/comparison.csv").open()))
    assert [row["state"] for row in rows] == ["finished", "stopped early"]
    assert 5 <= len(losses(tmp_path / "runs/trial-00001")) < steps
    metrics = [tmp_path / f"runs/trial-0000{number}/metrics.jsonl" for number in range(2)]
    before = [path.read_bytes() for path in metrics]
    assert "trial-00000: --optimizer.learning-rate=0.001\n" in sweep()
    assert [path.read_bytes() for path in metrics] == before
