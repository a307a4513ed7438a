"""Worker processes that can be lost one by one, with optional limits on time, CPU time and memory.

Reading and decoding unknown files can hang or crash a process. `concurrent.futures` gives up its
whole pool then; here that costs one task, and a new process takes over.

Why not DALI's own workers (`external_source(parallel=True)`): as of DALI 2.4 they outlive a rank
that is killed, for good; they die of SIGBUS in a container with the usual 64 MB of /dev/shm; they
import the parent's main script again, which has to be guarded for it; and a pipeline that is
rebuilt after a decode error restarts all of them (1 s). The processes here run nothing but the job,
exit when their parent does (however it ends), and use no shared memory.
"""

import math
import multiprocessing
import os
import pickle
import queue
import resource
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any, Literal, TypeVar

T = TypeVar("T")

LOOKAHEAD_PER_WORKER = 8
"""Tasks of `run_in_order` that are submitted or finished while an earlier one runs."""
START_ATTEMPTS = 3
"""Processes in a row that may die before they are ready; then the installation is to blame."""

# The child must import this very tree, whatever is installed, and never the parent's main script.
_CHILD = (
    "import sys; sys.path[:] = sys.argv[2:]; "
    "from cavmae.dataloaders.process_pool import serve; serve(int(sys.argv[1]))"
)


@dataclass(frozen=True)
class TaskLimits:
    """What one task may use; None means no limit.

    Attributes:
        seconds: wall time.
        cpu_seconds: CPU time, rounded up to whole seconds; does not depend on the machine's load.
        memory_bytes: address space of the worker process.
    """

    seconds: float | None = None
    cpu_seconds: float | None = None
    memory_bytes: int | None = None


FailureReason = Literal[
    "timeout", "cpu_limit", "memory_limit", "worker_crashed", "unexpected_error"
]


@dataclass(frozen=True)
class Failure:
    """Stands in for the result of a task that exceeded a limit or killed its process."""

    reason: FailureReason
    detail: str


class JobError(RuntimeError):
    """The job raised an exception; the message is the worker's traceback.

    Attributes:
        summary: the exception and its place, in one line.
    """

    def __init__(self, message: str, summary: str = ""):
        super().__init__(message)
        self.summary = summary


class PoolClosed(RuntimeError):
    """The pool was closed before the task had finished."""


class ProcessPool:
    """Runs `job(task)` in worker processes, each one task after the other.

    A future's result is the job's, or a `Failure`; it raises `JobError` if the job raised,
    `PoolClosed` after `close`, and `RuntimeError` if the processes do not start. All methods may be
    called from any thread.

    Args:
        job: callable that can be pickled, as can its tasks and results; each process has a copy.
        workers: number of processes.
        limits: for each task.
    """

    def __init__(self, job: Callable[[Any], Any], workers: int, limits: TaskLimits | None = None):
        self._job = job
        self._limits = limits or TaskLimits()
        self._tasks: queue.SimpleQueue[tuple[Future[Any], Any] | None] = queue.SimpleQueue()
        self._closed: Exception | None = None
        self._lock = threading.Lock()
        self._failed_starts = 0
        self._workers: set[_Worker] = set()
        self._threads = [threading.Thread(target=self._work, daemon=True) for _ in range(workers)]
        for thread in self._threads:
            thread.start()

    def submit(self, task: Any) -> "Future[Any]":
        """Queue a task; tasks begin in the order in which they are submitted."""
        future: Future[Any] = Future()
        with self._lock:
            if self._closed is None:
                self._tasks.put((future, task))
            else:
                future.set_exception(self._closed)
        return future

    def close(self) -> None:
        """End all processes; unfinished futures raise `PoolClosed`."""
        self._close(PoolClosed("the pool was closed"))
        for thread in self._threads:
            thread.join()

    def _close(self, error: Exception) -> None:
        with self._lock:
            if self._closed is None:
                self._closed = error
            with suppress(queue.Empty):
                while entry := self._tasks.get_nowait():
                    entry[0].set_exception(self._closed)
            for _ in self._threads:
                self._tasks.put(None)
            for worker in self._workers:
                worker.process.kill()

    def _work(self) -> None:
        """Hand tasks to one process after the other, each until it dies."""
        held: deque[tuple[Future[Any], Any]] = deque()  # The process runs the first one.
        worker = None
        try:
            worker = self._started_worker()
            while entry := self._tasks.get():
                held.append(entry)
                if worker.process.poll() is not None:  # Died while idle.
                    worker = self._replaced(worker)
                worker.send(entry[1])
                while held:
                    if len(held) == 1 and (ahead := self._task_ahead()):
                        held.append(ahead)
                        worker.send(ahead[1])
                    result = worker.receive()
                    if self._closed is not None:
                        raise self._closed
                    future, _ = held.popleft()
                    if isinstance(result, JobError):
                        future.set_exception(result)
                    else:
                        future.set_result(result)
                    if isinstance(result, Failure) and result.reason != "memory_limit":
                        worker = self._replaced(worker)
                        for _, task in held:
                            worker.send(task)
        except Exception as error:  # The pool is closed, or cannot be used any more.
            self._close(error)
            for future, _ in held:
                future.set_exception(error)
        finally:
            if worker is not None:
                worker.end()

    def _task_ahead(self) -> tuple["Future[Any]", Any] | None:
        """A task to queue behind a running one, so that the process need not wait for this thread;
        None if an idle process could run it now."""
        with suppress(queue.Empty):
            if self._tasks.qsize() > len(self._threads):
                return self._tasks.get_nowait()
        return None

    def _replaced(self, worker: "_Worker") -> "_Worker":
        worker.end()
        with self._lock:
            self._workers.discard(worker)
        return self._started_worker()

    def _started_worker(self) -> "_Worker":
        while True:
            with self._lock:
                if self._closed is not None:
                    raise self._closed
                worker = _Worker(self._limits)
                self._workers.add(worker)
            ready = worker.start(self._job)
            with self._lock:
                if ready:
                    self._failed_starts = 0
                    return worker
                self._workers.discard(worker)
                self._failed_starts += 1
                failed = self._failed_starts
            cause = worker.end()
            if failed >= START_ATTEMPTS:
                raise RuntimeError(f"worker processes do not start: they die with {cause}")


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """In a job: fail the task with "timeout" if the block takes longer.

    For a part that takes only as long as the task itself makes it take: what it waits for, such as
    a slow disk, stays outside. The kernel ends the process, even in a loop that never returns to
    Python.
    """
    before = signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, *before)


def run_in_order(
    job: Callable[[Any], Any], tasks: Iterable[Any], *, workers: int, limits: TaskLimits
) -> Generator[Any]:
    """Yield `job(task)`, or a `Failure`, for each task in order; an exception is a `Failure` too.

    The processes end with the generator.

    Raises:
        RuntimeError: the processes do not start.
    """
    with closing(ProcessPool(job, workers, limits)) as pool:
        for future in made_ahead(map(pool.submit, tasks), workers * LOOKAHEAD_PER_WORKER):
            yield _result_or_failure(future)


def made_ahead(items: Iterable[T], count: int) -> Iterator[T]:
    """Yield items, such as futures, in order, each when `count` have been made, itself included."""
    pending: deque[T] = deque()
    for item in items:
        pending.append(item)
        if len(pending) == count:
            yield pending.popleft()
    while pending:
        yield pending.popleft()


def _result_or_failure(future: "Future[Any]") -> Any:
    try:
        return future.result()
    except JobError as error:  # One file's surprise must not end a run over millions.
        return Failure("unexpected_error", error.summary)


class _Worker:
    """One process, as its thread in the parent sees it."""

    def __init__(self, limits: TaskLimits):
        self._limits = limits
        self._connection, other = multiprocessing.Pipe()
        with other:
            self.process = subprocess.Popen(
                [sys.executable, "-c", _CHILD, str(other.fileno()), *map(str, sys.path)],
                stdin=subprocess.DEVNULL,
                stdout=2,  # Whatever a library prints goes to stderr.
                pass_fds=[other.fileno()],
                # The children do no linear algebra; OpenBLAS would reserve memory for every core.
                env={**os.environ, "OPENBLAS_NUM_THREADS": "1"},
            )

    def start(self, job: Callable[[Any], Any]) -> bool:
        """Send the job and wait until the process is ready for tasks; False: it died."""
        try:
            self._connection.send((self._limits, job))
            return self._connection.recv()
        except (EOFError, OSError):
            return False

    def send(self, task: Any) -> None:
        with suppress(OSError):  # It has died, which `receive` reports.
            self._connection.send(task)

    def receive(self) -> Any:
        """The result of the oldest task sent, a `Failure`, or a `JobError`."""
        try:
            if not self._connection.poll(self._limits.seconds):
                return Failure("timeout", f"over {self._limits.seconds:g} s")
            return self._connection.recv()
        except (EOFError, OSError):
            cause = self.end()
        if cause == "signal SIGXCPU":
            return Failure("cpu_limit", f"over {self._limits.cpu_seconds:g} s of CPU time")
        if cause == "signal SIGALRM":
            return Failure("timeout", "over its `time_limit`")
        return Failure("worker_crashed", f"its process died with {cause}")

    def end(self) -> str:
        """Kill the process unless it has ended; returns what it died with."""
        self._connection.close()
        self.process.kill()
        status = self.process.wait()
        return f"signal {signal.Signals(-status).name}" if status < 0 else f"exit code {status}"


def serve(descriptor: int) -> None:
    """Main function of a worker process; `descriptor` is its end of the pipe."""
    # Ctrl-C reaches the whole terminal; the parent decides what it means.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    connection = Connection(descriptor)
    with suppress(EOFError, ConnectionError):  # The parent has ended.
        limits, job = connection.recv()
        if limits.memory_bytes is not None:
            _limit(resource.RLIMIT_AS, limits.memory_bytes)
        connection.send(True)
        # A thread receives, so that a process whose job hangs exits with its parent.
        tasks: queue.SimpleQueue[bytes] = queue.SimpleQueue()
        threading.Thread(target=_receive, args=(connection, tasks), daemon=True).start()
        while True:
            connection.send(_run(job, tasks.get(), limits))


def _receive(connection: Connection, tasks: "queue.SimpleQueue[bytes]") -> None:
    while True:
        try:
            tasks.put(connection.recv_bytes())
        except (EOFError, OSError):
            os._exit(0)


def _run(job: Callable[[Any], Any], pickled: bytes, limits: TaskLimits) -> Any:
    if limits.cpu_seconds is not None:  # SIGXCPU ends the process at the soft limit.
        _limit(resource.RLIMIT_CPU, math.ceil(time.process_time() + limits.cpu_seconds))
    try:
        return job(pickle.loads(pickled))
    except Exception as error:
        if isinstance(error, MemoryError) and limits.memory_bytes is not None:
            return Failure("memory_limit", f"over {limits.memory_bytes} bytes")
        where = traceback.extract_tb(error.__traceback__)[-1]
        summary = f"{type(error).__name__}: {error} ({where.filename}:{where.lineno})"
        return JobError(traceback.format_exc(), summary)


def _limit(kind: int, value: int) -> None:
    _, most = resource.getrlimit(kind)
    if most == resource.RLIM_INFINITY or most > value:
        resource.setrlimit(kind, (value, most))
