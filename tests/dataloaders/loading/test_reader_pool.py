"""Reader processes: results by ticket, deaths noticed and repaired, nothing left behind."""

import math
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from cavmae.dataloaders.loading.reader_pool import PoolClosed, WorkerDied, WorkerFailed, WorkerPool


@pytest.fixture
def start() -> Iterator[Callable[..., WorkerPool]]:
    """Start a pool that ends with the test."""
    pools = []

    def pool(job: Callable[[Any], Any], count: int) -> WorkerPool:
        pools.append(WorkerPool(job, count))
        return pools[-1]

    yield pool
    for one in pools:
        one.close()


def process_ids(pool: WorkerPool) -> list[int]:
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
def test_results_come_by_ticket_in_any_order(start: Callable[..., WorkerPool], count: int) -> None:
    pool = start(math.factorial, count)
    tickets = [pool.submit(number) for number in range(20)]
    results = [pool.result(ticket) for ticket in reversed(tickets)]
    assert results == [math.factorial(number) for number in reversed(range(20))]


def test_large_results_do_not_block_many_waiting_tasks(start: Callable[..., WorkerPool]) -> None:
    pool = start(bytes, 1)
    tickets = [pool.submit(100_000) for _ in range(300)]
    assert sum(len(pool.result(ticket)) for ticket in tickets) == 300 * 100_000


def test_an_exception_of_the_job_shows_the_workers_traceback(
    start: Callable[..., WorkerPool],
) -> None:
    pool = start(math.factorial, 1)
    bad, good = pool.submit(-1), pool.submit(5)
    with pytest.raises(WorkerFailed, match="not defined for negative"):
        pool.result(bad)
    assert pool.result(good) == 120


def test_a_crash_loses_only_the_task_it_happened_at(start: Callable[..., WorkerPool]) -> None:
    pool = start(eval, 1)
    tickets = [pool.submit(task) for task in ("1 + 1", "__import__('os').abort()", "2 + 2", "3")]
    assert pool.result(tickets[0]) == 2
    with pytest.raises(WorkerDied, match="signal 6"):
        pool.result(tickets[1])
    assert [pool.result(ticket) for ticket in tickets[2:]] == [4, 3]


def test_a_killed_idle_worker_is_replaced(start: Callable[..., WorkerPool]) -> None:
    pool = start(math.factorial, 1)
    assert pool.result(pool.submit(4)) == 24
    os.kill(process_ids(pool)[0], signal.SIGKILL)
    first = pool.submit(5)
    try:
        assert pool.result(first) == 120
    except WorkerDied:  # it had the task already when it died
        assert pool.result(pool.submit(5)) == 120


def test_workers_that_cannot_start_are_an_error_not_an_endless_restart(
    start: Callable[..., WorkerPool], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "path", [])
    pool = start(math.factorial, 1)
    with pytest.raises(RuntimeError, match="before it was ready"):
        pool.result(pool.submit(3))


def test_a_result_can_be_waited_for_with_a_limit(start: Callable[..., WorkerPool]) -> None:
    pool = start(time.sleep, 1)
    with pytest.raises(TimeoutError):
        pool.result(pool.submit(60), timeout_seconds=1.0)


def test_another_thread_can_end_the_waiting(start: Callable[..., WorkerPool]) -> None:
    pool = start(time.sleep, 1)
    ticket = pool.submit(60)
    timer = threading.Timer(0.5, pool.interrupt)
    timer.start()
    with pytest.raises(PoolClosed):
        pool.result(ticket)
    timer.join()


def test_close_ends_the_processes_even_at_work() -> None:
    pool = WorkerPool(time.sleep, 2)
    tickets = [pool.submit(60) for _ in range(2)]
    processes = process_ids(pool)
    pool.close()
    assert len(tickets) == 2
    assert all(ended(process) for process in processes)


PARENT = """
import math, sys, time
from cavmae.dataloaders.loading.reader_pool import WorkerPool
pool = WorkerPool(math.factorial, 2)
assert pool.result(pool.submit(3)) == 6
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
    parent = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    workers = [int(process) for process in parent.stdout.readline().split()]
    if end == "is_killed":
        parent.kill()
    assert parent.wait(20) == (0 if end == "exits" else -signal.SIGKILL)
    assert len(workers) == 2
    assert all(ended(process) for process in workers)


def test_what_a_job_prints_does_not_mix_with_results(start: Callable[..., WorkerPool]) -> None:
    pool = start(print, 1)
    assert pool.result(pool.submit("a line on stdout")) is None
    assert pool.result(pool.submit("another")) is None


def test_workers_start_without_torch(start: Callable[..., WorkerPool]) -> None:
    """Importing torch would cost each of them 2 s and 200 MB."""
    pool = start(eval, 1)
    loaded = "[__import__('cavmae.dataloaders.loading.reader'), set(__import__('sys').modules)][1]"
    modules = pool.result(pool.submit(loaded))
    assert "cavmae.dataloaders.loading.reader" in modules
    assert not {"torch", "nvidia.dali", "webdataset"} & modules
