"""Processes that read (or try out) clips for one rank.

Why not DALI's own workers (`external_source(parallel=True)`): seen with DALI 2.4, they outlive a
rank that is killed, for good; they die of SIGBUS in a container with the usual 64 MB of /dev/shm;
they import the parent's main script again, which has to be guarded for it; and a pipeline that is
rebuilt after a decode error starts them all anew (1 s). The processes here run nothing but the job,
end when the parent's end of their pipe closes (whatever ended the parent) and use no shared
memory; one that crashes is replaced, and the task that it was at is known.
"""

import contextlib
import itertools
import os
import pickle
import queue
import signal
import subprocess
import sys
import threading
import traceback
from collections.abc import Callable
from typing import Any

_READY = "ready"

# The child must import this very tree, whatever is installed, and never the parent's main script.
_CHILD = (
    "import pickle, sys; sys.path[:] = pickle.load(sys.stdin.buffer); "
    "from cavmae.dataloaders.loading.reader_pool import serve; serve()"
)


class WorkerDied(RuntimeError):
    """The process that was at this task died; the task may or may not be the cause."""


class WorkerFailed(RuntimeError):
    """The job raised an exception; holds the worker's traceback."""


class PoolClosed(RuntimeError):
    """The pool was interrupted while a result was waited for."""


class WorkerPool:
    """Runs `job(task)` in `count` processes; results are fetched by ticket, in any order.

    To be used by one thread at a time, except `interrupt`.

    Args:
        job: callable that can be pickled, as can its tasks and results; one copy per process.
        count: processes.
    """

    def __init__(self, job: Callable[[Any], Any], count: int):
        self._job = job
        self._arrived: queue.SimpleQueue[tuple[_Worker | None, Any]] = queue.SimpleQueue()
        self._results: dict[int, Any] = {}
        self._tickets = itertools.count()
        self._workers = [_Worker(job, self._arrived) for _ in range(count)]

    def submit(self, task: Any) -> int:
        """Hand out a task; returns its ticket."""
        ticket = next(self._tickets)
        min(self._workers, key=lambda worker: len(worker.tasks)).send(ticket, task)
        return ticket

    def result(self, ticket: int, timeout_seconds: float | None = None) -> Any:
        """Wait for the result of one ticket.

        Raises:
            WorkerDied: the process died at this task.
            WorkerFailed: the job raised an exception.
            PoolClosed: `interrupt` was called.
            RuntimeError: the processes cannot start.
            TimeoutError: nothing arrived for `timeout_seconds`.
        """
        while ticket not in self._results:
            try:
                worker, message = self._arrived.get(timeout=timeout_seconds)
            except queue.Empty:
                raise TimeoutError(f"no result for {timeout_seconds} s") from None
            if worker is None:
                raise PoolClosed
            if message is None:
                self._replace(worker)
            elif message == _READY:
                worker.ready = True
            else:
                arrived, value = message
                del worker.tasks[arrived]
                self._results[arrived] = value
        value = self._results.pop(ticket)
        if isinstance(value, WorkerDied | WorkerFailed):
            raise value
        return value

    def _replace(self, worker: "_Worker") -> None:
        """Start a new process for a dead one; only the task that it was at is lost."""
        exit_status = worker.end()
        if not worker.ready:
            raise RuntimeError(
                f"a reader process ended with exit status {exit_status} before it was ready; its "
                f"own words are above, on stderr"
            )
        heir = _Worker(self._job, self._arrived)
        self._workers[self._workers.index(worker)] = heir
        for place, (ticket, task) in enumerate(worker.tasks.items()):
            if place == 0:
                cause = f"signal {-exit_status}" if exit_status < 0 else f"status {exit_status}"
                self._results[ticket] = WorkerDied(f"its process ended with {cause}")
            else:
                heir.send(ticket, task)

    def interrupt(self) -> None:
        """Make a `result` that waits in another thread raise `PoolClosed`."""
        self._arrived.put((None, None))

    def close(self) -> None:
        """End all processes."""
        for worker in self._workers:
            worker.end()


class _Worker:
    """One process, the tasks it has not answered, and the thread that takes in its answers."""

    def __init__(
        self,
        job: Callable[[Any], Any],
        arrived: "queue.SimpleQueue[tuple[_Worker | None, Any]]",
    ):
        self.tasks: dict[int, Any] = {}
        self.ready = False
        # The children do no linear algebra; OpenBLAS would reserve memory for every core.
        environment = {**os.environ, "OPENBLAS_NUM_THREADS": "1"}
        self.process = subprocess.Popen(
            [sys.executable, "-c", _CHILD],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment,
        )
        self._write(sys.path)
        self._write(job)
        self._thread = threading.Thread(target=self._take_in, args=(arrived,), daemon=True)
        self._thread.start()

    def send(self, ticket: int, task: Any) -> None:
        self.tasks[ticket] = task
        self._write((ticket, task))

    def _write(self, message: Any) -> None:
        assert self.process.stdin is not None
        # If it died, the thread that takes in its answers reports that.
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.write(pickle.dumps(message, protocol=5))
            self.process.stdin.flush()

    def _take_in(self, arrived: "queue.SimpleQueue[tuple[_Worker | None, Any]]") -> None:
        assert self.process.stdout is not None
        while True:
            try:
                message = pickle.load(self.process.stdout)
            except (EOFError, OSError, ValueError, pickle.UnpicklingError):
                arrived.put((self, None))
                return
            arrived.put((self, message))

    def end(self) -> int:
        """Kill the process; returns its exit status."""
        self.process.kill()
        exit_status = self.process.wait()
        self._thread.join()
        for pipe in (self.process.stdin, self.process.stdout):
            assert pipe is not None
            with contextlib.suppress(BrokenPipeError):  # what was not flushed has no reader
                pipe.close()
        return exit_status


def serve() -> None:
    """Main function of a worker process."""
    # Ctrl-C reaches the whole terminal; the parent decides what it means.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    tasks = sys.stdin.buffer
    results = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # whatever a library prints must not end up between the results
    try:
        job = pickle.load(tasks)
        pickle.dump(_READY, results)
        results.flush()
        while True:
            ticket, task = pickle.load(tasks)
            try:
                value = job(task)
            except Exception:  # shown where the result is wanted
                value = WorkerFailed(traceback.format_exc())
            pickle.dump((ticket, value), results, protocol=5)
            results.flush()
    except (EOFError, BrokenPipeError):
        os._exit(0)  # the parent closed its end, or is gone
