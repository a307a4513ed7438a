"""What a step does on the run folder, which a thousand ranks share: next to nothing."""

import json
from pathlib import Path

import pytest
from launch import run_ranks
from starts import place_store
from tiny_run import tiny_run

from cavmae.trainer.config.configs import CheckpointConfig, TrackingConfig
from cavmae.trainer.config.serialize import save_config

STEPS, LOGGED = 24, 8


@pytest.mark.slow
def test_between_checkpoints_only_the_first_rank_uses_the_run_folder(
    packed_synthetic: Path, tmp_path: Path
) -> None:
    """It looks for a stop request once a second, writes status and lease every ten, and has a file
    for what MLflow lacks. At the start the last rank lists the checkpoints as well."""
    config = tiny_run(
        packed_synthetic,
        tmp_path / "run",
        steps=STEPS,
        checkpoint=CheckpointConfig(every_steps=1000),
        tracking=TrackingConfig(every_steps=LOGGED),
    )
    place_store(tmp_path)
    save_config(config, tmp_path / "config.json")
    run_ranks(
        Path(__file__).with_name("file_operations_ranks.py"),
        2,
        str(tmp_path / "config.json"),
        tmp_path,
    )
    first, second = (
        json.loads((tmp_path / f"result-2.json.{rank}").read_text()) for rank in range(2)
    )
    assert {step for step, _, _ in first} >= {0, STEPS}, "the start and the end are noted"
    steps = range(2, STEPS)
    assert [one for one in second if one[0] in steps] == []
    names = {name.partition(".")[0] for step, _, name in first if step in steps}
    assert names <= {"/stop", "/status", "/mlflow_unsent", "/lease", "/lease/attempt-1"}
    start = [name for step, _, name in second if step == 0]
    own = {"", "/logs", "/logs/rank-1.log", "/checkpoints"}
    assert set(start) <= own, "of no other rank, however many"
