"""Tasks that hang, crash or raise cost only themselves."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from cavmae.dataloaders.packing.worker_pool import Failure, TaskLimits, run_in_order

LIMITS = TaskLimits(seconds=60)


def test_results_come_in_the_order_of_the_arguments() -> None:
    numbers = [str(number) for number in range(40)]
    assert list(run_in_order(int, numbers, workers=2, limits=LIMITS)) == list(range(40))


def test_a_task_over_its_limit_is_killed_and_the_others_go_on() -> None:
    results = list(run_in_order(time.sleep, [0, 3600, 0, 0], workers=1, limits=TaskLimits(1)))
    assert results == [None, Failure("timeout", "over 1 s"), None, None]


def be_busy(cpu_seconds: float) -> None:
    time.sleep(0.5)
    began = time.process_time()
    while time.process_time() < began + cpu_seconds:
        pass


def test_cpu_time_is_limited_task_by_task() -> None:
    """Each task has the whole of it; waiting costs none."""
    tasks = [0.6, 0.6, 0.6, 0.6, 3600, 0]
    results = list(run_in_order(be_busy, tasks, workers=1, limits=TaskLimits(60, cpu_seconds=2)))
    assert results == [None] * 4 + [Failure("cpu_limit", "over 2 s of CPU time"), None]


def test_memory_is_limited() -> None:
    limits = TaskLimits(60, memory_bytes=1 << 30)
    first, last = run_in_order(bytes, [1 << 31, 3], workers=1, limits=limits)
    assert (first, last) == (Failure("memory_limit", "over 1073741824 bytes"), b"\0\0\0")


@pytest.mark.parametrize(
    ("function", "argument", "how"),
    [(os._exit, 3, "exit code 3"), (signal.raise_signal, signal.SIGSEGV, "SIGSEGV")],
)
def test_a_crash_is_reported_and_the_others_go_on(
    function: Callable[[int], None], argument: int, how: str
) -> None:
    results = list(run_in_order(function, [argument] * 3, workers=1, limits=LIMITS))
    assert [result.reason for result in results] == ["worker_crashed"] * 3
    assert all(how in result.detail for result in results)


def test_an_exception_is_reported_with_its_place() -> None:
    one, two = run_in_order(int, ["1", "x"], workers=1, limits=LIMITS)
    assert one == 1
    assert two.reason == "worker_crashed"
    assert "ValueError" in two.detail and "worker_pool.py" in two.detail


def test_no_process_is_left_when_the_results_are_dropped() -> None:
    own_number = "__import__('os').getpid()"
    results = run_in_order(eval, [own_number] * 100, workers=2, limits=LIMITS)
    workers = {next(results) for _ in range(20)}
    results.close()
    for number in workers:
        with pytest.raises(ProcessLookupError):
            os.kill(number, 0)


def test_a_worker_that_hangs_ends_when_its_parent_is_killed(tmp_path: Path) -> None:
    script = (
        "from cavmae.dataloaders.packing.worker_pool import TaskLimits, run_in_order\n"
        'hang = \'import os, time; open(f"{os.getpid()}", "w"); time.sleep(3600)\'\n'
        "next(run_in_order(exec, [hang], workers=1, limits=TaskLimits(3600)))\n"
    )
    parent = subprocess.Popen([sys.executable, "-c", script], cwd=tmp_path, env=_environment())
    _wait_until(lambda: any(tmp_path.iterdir()))
    (worker,) = (int(path.name) for path in tmp_path.iterdir())
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    _wait_until(lambda: not _runs(worker))


def _environment() -> dict[str, str]:
    repository = str(Path(__file__).parents[3])
    return {**os.environ, "PYTHONPATH": repository}


def _wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline, "it did not happen within a minute"
        time.sleep(0.01)


def _runs(process: int) -> bool:
    try:
        state = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


def test_nothing_to_do_gives_nothing() -> None:
    assert list(run_in_order(int, [], workers=2, limits=LIMITS)) == []
