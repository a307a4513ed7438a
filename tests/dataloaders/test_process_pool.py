"""Worker processes: a task that hangs, crashes or raises costs only itself; no process is left."""

import itertools
import math
import os
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from cavmae.dataloaders.process_pool import (
    Failure,
    JobError,
    PoolClosed,
    ProcessPool,
    TaskLimits,
    run_in_order,
    time_limit,
)

LIMITS = TaskLimits(seconds=60)


@pytest.fixture(autouse=True)
def forked_pools() -> None:
    """Here processes are started as they are for users."""


@pytest.fixture
def start() -> Iterator[Callable[..., ProcessPool]]:
    """Start a pool that ends with the test."""
    pools = []

    def pool(
        job: Callable[[Any], Any], workers: int, limits: TaskLimits | None = None
    ) -> ProcessPool:
        pools.append(ProcessPool(job, workers, limits))
        return pools[-1]

    yield pool
    for one in pools:
        one.close()


def process_ids(pool: ProcessPool) -> list[int]:
    return [worker.process.pid for worker in pool._workers]


def ended(process_id: int, seconds: float = 10.0) -> bool:
    """Whether a process ends within some seconds (a zombie has ended)."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        try:
            state = Path(f"/proc/{process_id}/stat").read_text().rpartition(")")[2].split()[0]
        except (FileNotFoundError, ProcessLookupError):
            return True
        if state == "Z":
            return True
        time.sleep(0.05)
    return False


@pytest.mark.parametrize("count", [1, 3])
def test_results_can_be_taken_in_any_order(start: Callable[..., ProcessPool], count: int) -> None:
    pool = start(math.factorial, count)
    futures = [pool.submit(number) for number in range(20)]
    results = [future.result() for future in reversed(futures)]
    assert results == [math.factorial(number) for number in reversed(range(20))]


def test_large_results_do_not_block_many_waiting_tasks(start: Callable[..., ProcessPool]) -> None:
    pool = start(bytes, 1)
    futures = [pool.submit(100_000) for _ in range(300)]
    assert sum(len(future.result()) for future in futures) == 300 * 100_000


def test_an_exception_of_the_job_shows_the_workers_traceback(
    start: Callable[..., ProcessPool],
) -> None:
    pool = start(math.factorial, 1)
    bad, good = pool.submit(-1), pool.submit(5)
    with pytest.raises(JobError, match=r"Traceback(.|\n)*not defined for negative"):
        bad.result()
    assert good.result() == 120


def test_a_crash_loses_only_the_task_it_happened_at(start: Callable[..., ProcessPool]) -> None:
    pool = start(eval, 1)
    futures = [pool.submit(task) for task in ("1 + 1", "__import__('os').abort()", "2 + 2", "3")]
    failure = Failure("worker_crashed", "its process died with signal SIGABRT")
    assert [future.result() for future in futures] == [2, failure, 4, 3]


@pytest.mark.parametrize("workers", [1, 2])
def test_tasks_queued_behind_a_crash_are_run_again(
    start: Callable[..., ProcessPool], workers: int
) -> None:
    pool = start(eval, workers)
    crashing = {2, 3, 7, 12, 29}
    abort = "__import__('os').abort()"
    futures = [pool.submit(abort if number in crashing else str(number)) for number in range(30)]
    failure = Failure("worker_crashed", "its process died with signal SIGABRT")
    expected = [failure if number in crashing else number for number in range(30)]
    assert [future.result() for future in futures] == expected


def test_a_killed_idle_worker_is_replaced(start: Callable[..., ProcessPool]) -> None:
    pool = start(math.factorial, 1)
    assert pool.submit(4).result() == 24
    (process,) = process_ids(pool)
    os.kill(process, signal.SIGKILL)
    assert ended(process)
    assert pool.submit(5).result() == 120


def test_workers_that_cannot_start_are_an_error_not_an_endless_restart(
    start: Callable[..., ProcessPool], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "path", [])
    pool = start(math.factorial, 1)
    with pytest.raises(RuntimeError, match="do not start: they die with exit code 1"):
        pool.submit(3).result()


def test_another_thread_can_close_the_pool_while_a_result_is_waited_for(
    start: Callable[..., ProcessPool],
) -> None:
    pool = start(time.sleep, 1)
    running, queued = pool.submit(60), pool.submit(60)
    timer = threading.Timer(0.5, pool.close)
    timer.start()
    for future in (running, queued, pool.submit(60)):
        with pytest.raises(PoolClosed):
            future.result()
    timer.join()
    with pytest.raises(PoolClosed):
        pool.submit(0).result()


def test_close_ends_the_processes_even_at_work() -> None:
    pool = ProcessPool(time.sleep, 2)
    futures = [pool.submit(60) for _ in range(2)]
    _wait_until(lambda: len(process_ids(pool)) == 2)
    processes = process_ids(pool)
    pool.close()
    assert all(future.done() for future in futures)
    assert all(ended(process) for process in processes)


PARENT = """
import math, sys, time
from cavmae.dataloaders.process_pool import ProcessPool
pool = ProcessPool(math.factorial, 2)
results = [pool.submit(3) for _ in range(20)]
assert [result.result() for result in results] == [6] * 20
while len(pool._workers) < 2:
    time.sleep(0.01)
print(*[worker.process.pid for worker in pool._workers], flush=True)
if "wait" in sys.argv:
    time.sleep(60)
"""


@pytest.mark.parametrize("end", ["exits", "is_killed"])
def test_workers_end_with_their_parent_however_it_ends(tmp_path: Path, end: str) -> None:
    """The script has no `if __name__ == "__main__"`: workers never import it."""
    script = tmp_path / "parent.py"
    script.write_text(PARENT)
    command = [sys.executable, str(script), *(["wait"] if end == "is_killed" else [])]
    parent = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=_environment())
    assert parent.stdout is not None
    workers = [int(process) for process in parent.stdout.readline().split()]
    if end == "is_killed":
        parent.kill()
    assert parent.wait(20) == (0 if end == "exits" else -signal.SIGKILL)
    assert len(workers) == 2
    assert all(ended(process) for process in workers)


def test_what_a_job_prints_does_not_mix_with_results(start: Callable[..., ProcessPool]) -> None:
    pool = start(print, 1)
    assert pool.submit("a line on stdout").result() is None
    assert pool.submit("another").result() is None


def test_workers_start_without_torch(start: Callable[..., ProcessPool]) -> None:
    """Importing torch would cost each of them 2 s and 200 MB."""
    pool = start(eval, 1)
    loaded = "[__import__('cavmae.dataloaders.loading.reader'), set(__import__('sys').modules)][1]"
    modules = pool.submit(loaded).result()
    assert "cavmae.dataloaders.loading.reader" in modules
    assert not {"torch", "nvidia.dali", "webdataset"} & modules


# --------------------------------------------------------------------------------- run_in_order


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


def wait_then_hang(seconds: tuple[float, float]) -> str:
    waits, hangs = seconds
    time.sleep(waits)
    with time_limit(0.3):
        time.sleep(hangs)
    time.sleep(waits)
    return "done"


def test_only_a_part_of_a_job_has_a_time_limit() -> None:
    """A loop in C that never returns to Python is ended too."""
    tasks = [(0.5, 0), (0, 3600), (0, 0)]
    results = list(run_in_order(wait_then_hang, tasks, workers=1, limits=TaskLimits()))
    assert results == ["done", Failure("timeout", "over its `time_limit`"), "done"]
    (failure,) = run_in_order(count_for_ever, [0], workers=1, limits=TaskLimits())
    assert failure.reason == "timeout"


def count_for_ever(start: int) -> None:
    with time_limit(0.3):
        deque(itertools.count(start), maxlen=0)


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
    assert two.reason == "unexpected_error"
    assert "ValueError" in two.detail and "process_pool.py" in two.detail


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
        "from cavmae.dataloaders.process_pool import TaskLimits, run_in_order\n"
        'hang = \'import os, time; open(f"{os.getpid()}", "w"); time.sleep(3600)\'\n'
        "next(run_in_order(exec, [hang], workers=1, limits=TaskLimits(3600)))\n"
    )
    parent = subprocess.Popen([sys.executable, "-c", script], cwd=tmp_path, env=_environment())
    _wait_until(lambda: any(tmp_path.iterdir()))
    (worker,) = (int(path.name) for path in tmp_path.iterdir())
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    assert ended(worker, 60)


def _environment() -> dict[str, str]:
    repository = str(Path(__file__).parents[2])
    return {**os.environ, "PYTHONPATH": repository}


def _wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline, "it did not happen within a minute"
        time.sleep(0.01)


def test_nothing_to_do_gives_nothing() -> None:
    assert list(run_in_order(int, [], workers=2, limits=LIMITS)) == []
