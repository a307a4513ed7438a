"""What a soak calls flat, got over and as it should be."""

import dataclasses
import random
from itertools import islice
from pathlib import Path

import pytest

from cavmae.benchmarks.faults import soak
from cavmae.benchmarks.faults.leak_check import Life, Usage, lives
from cavmae.benchmarks.faults.soak_faults import FAULTS, Endured, drawn

SECONDS = range(0, 300, 5)
FAULT = Endured("a rank is killed (SIGKILL)", 0.0, 57, 50, 50, 20.0, "rank 1 failed")
RANK = Life("rank", 1, 300.0, judged=True, memory_bytes=1e9)
EQUAL = {"samples_equal": True, "largest_difference": 0.0}


def life(
    memory: list[float], handles: list[int] | None = None, process: int = 1, born: float = 0.0
) -> list[Usage]:
    handles = handles or [40] * len(memory)
    return [
        Usage("rank", process, born, born + second, int(used), held)
        for second, used, held in zip(SECONDS, memory, handles, strict=False)
    ]


def test_a_process_that_takes_its_memory_at_the_start_is_flat() -> None:
    (found,) = lives(life([1e6 * min(second, 60) + 500e6 for second in SECONDS]))
    assert found.judged and found.flat
    assert found.memory_growth_bytes == 0 and found.seconds == 295


@pytest.mark.parametrize(
    ("memory", "handles"),
    [
        ([500e6 + 0.3e6 * second for second in SECONDS], [40 for _ in SECONDS]),
        ([500e6 for _ in SECONDS], [40 + second // 30 for second in SECONDS]),
    ],
    ids=["memory", "handles"],
)
def test_a_process_that_grows_all_the_time_is_not(memory: list[float], handles: list[int]) -> None:
    (found,) = lives(life(memory, handles))
    assert found.judged and not found.flat


def test_a_peak_is_no_growth() -> None:
    (found,) = lives(life([900e6 if second == 250 else 500e6 for second in SECONDS]))
    assert found.flat


def test_only_the_controller_may_import_something_at_a_first_failure() -> None:
    grown = Life("controller", 1, 300.0, True, memory_bytes=400e6, memory_growth_bytes=54e6)
    assert grown.flat
    assert not dataclasses.replace(grown, kind="rank").flat
    assert not dataclasses.replace(grown, memory_growth_bytes=90e6).flat


def test_a_process_that_ended_early_is_not_judged() -> None:
    (found,) = lives(life([100e6 * number for number in range(1, 20)]))
    assert not found.judged and found.seconds == 90


def test_a_number_that_a_later_process_has_again_is_another_life() -> None:
    first, second = life([500e6] * 60), life([800e6] * 60, born=1000.0)
    assert [found.memory_bytes for found in lives([*first, *second])] == [500e6, 800e6]


def test_all_faults_come_before_one_comes_again() -> None:
    def first(seed: int, count: int = 2 * len(FAULTS)) -> list[str]:
        return list(islice(drawn(random.Random(seed)), count))

    order = first(3)
    assert sorted(order[: len(FAULTS)]) == sorted(FAULTS) == sorted(order[len(FAULTS) :])
    assert order == first(3) != first(4)


def test_a_soak_goes_on_from_what_it_has_written(tmp_path: Path) -> None:
    path, options = tmp_path / "progress.json", soak.SoakConfig(minutes=1, seed=3)
    ended = soak.Progress(path, options)
    ended.faults.append(FAULT)
    ended.samples.extend(life([500e6] * 3))
    ended.seconds = 33.0
    ended.write()
    again = soak.Progress(path, dataclasses.replace(options, minutes=60))
    assert (again.faults, again.samples, again.seconds) == ([FAULT], ended.samples, 33.0)
    with pytest.raises(ValueError, match=r"holds a soak of .*'seed': 3.*give another --work-dir"):
        soak.Progress(path, dataclasses.replace(options, seed=4))


def test_going_back_further_than_the_newest_whole_checkpoint_is_seen() -> None:
    assert FAULT.from_newest and FAULT.steps_lost == 7
    assert not dataclasses.replace(FAULT, resumed_step=40).from_newest
    went_on = dataclasses.replace(FAULT, resumed_step=None)
    assert went_on.from_newest and went_on.steps_lost == 0


@pytest.mark.parametrize(
    ("change", "missed"),
    [
        ({}, []),
        ({"found": EQUAL | {"samples_equal": False}}, ["samples_equal"]),
        ({"found": EQUAL | {"largest_difference": 1e-9}}, ["losses_equal_bit_for_bit"]),
        (
            {"faults": [dataclasses.replace(FAULT, resumed_step=40)]},
            ["no_whole_checkpoint_passed_over"],
        ),
        ({"watched": []}, ["processes_were_watched_long_enough"]),
        (
            {"watched": [RANK, dataclasses.replace(RANK, handles_growth=5.0)]},
            ["memory_and_handles_are_flat"],
        ),
        (
            {"problem": "a step after 57 did not happen", "found": {}},
            [
                "every_fault_came_and_the_run_finished",
                "losses_equal_bit_for_bit",
                "samples_equal",
            ],
        ),
    ],
)
def test_each_criterion_can_be_missed(change: dict[str, object], missed: list[str]) -> None:
    given = {"faults": [FAULT], "watched": [RANK], "found": EQUAL, "problem": ""} | change
    criteria = soak.results(**given)["criteria"]  # pyright: ignore
    assert sorted(name for name, met in criteria.items() if not met) == missed


def test_a_soak_of_no_time_is_refused() -> None:
    with pytest.raises(ValueError, match=r"minutes is 0; use a value above 0"):
        soak.SoakConfig(minutes=0)
