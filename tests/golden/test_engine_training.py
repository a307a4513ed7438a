"""The published tiny trainings through DeepSpeed: every ZeRO stage on two ranks, and one rank."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from launch import run_ranks

from cavmae.benchmarks.conformance.tolerances import Deviation

pytestmark = [pytest.mark.golden, pytest.mark.slow]


@pytest.mark.parametrize(
    ("world_size", "stages"), [(1, [1]), (2, [0, 1, 2, 3])], ids=["one rank", "two ranks"]
)
def test_every_stage_repeats_the_published_training(
    tiny_run: Path,
    world_size: int,
    stages: list[int],
    check_deviations_of: Callable[[list[Deviation]], None],
    tmp_path: Path,
) -> None:
    run = str(tiny_run)
    for deviations in of_stages("engine_training.py", world_size, run, stages, tmp_path):
        check_deviations_of(deviations)


def test_every_stage_repeats_the_published_fine_tuning(
    finetune_run: Path,
    check_deviations_of: Callable[[list[Deviation]], None],
    tmp_path: Path,
) -> None:
    run = str(finetune_run)
    for deviations in of_stages("engine_finetuning.py", 2, run, [0, 1, 2, 3], tmp_path):
        check_deviations_of(deviations)


def of_stages(
    script: str, world_size: int, run: str, stages: list[int], tmp_path: Path
) -> Iterator[list[Deviation]]:
    """Deviations of a script's training, for one ZeRO stage after the other."""
    path = Path(__file__).with_name(script)
    results = run_ranks(path, world_size, {"run": run, "stages": stages}, tmp_path)
    assert [result["stage"] for result in results] == stages
    for result in results:
        yield [
            Deviation(**{**fields, "quantity": f"ZeRO {result['stage']} {fields['quantity']}"})
            for fields in result["deviations"]
        ]
