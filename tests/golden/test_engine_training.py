"""The published tiny training through DeepSpeed: every ZeRO stage, one and two ranks."""

from collections.abc import Callable
from pathlib import Path

import pytest
from launch import run_ranks

from cavmae.benchmarks.deviations import Deviation

pytestmark = [pytest.mark.golden, pytest.mark.slow]


@pytest.mark.parametrize("world_size", [1, 2])
def test_every_stage_repeats_the_published_training(
    golden_folder: Path,
    tiny_run: str,
    world_size: int,
    check_deviations_of: Callable[[list[Deviation]], None],
    tmp_path: Path,
) -> None:
    arguments = {"folder": str(golden_folder), "run": tiny_run, "stages": [0, 1, 2, 3]}
    script = Path(__file__).with_name("engine_training.py")
    results = run_ranks(script, world_size, arguments, tmp_path)
    assert [result["stage"] for result in results] == [0, 1, 2, 3]
    for result in results:
        check_deviations_of(
            [
                Deviation(**{**fields, "quantity": f"ZeRO {result['stage']} {fields['quantity']}"})
                for fields in result["deviations"]
            ]
        )
