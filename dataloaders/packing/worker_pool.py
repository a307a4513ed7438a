"""Worker processes that can be lost one by one.

Decoding files of strangers can hang or crash a process. `concurrent.futures` gives up the whole
pool then, so this one watches each worker by itself: a task that runs over its limits is ended, a
crash is noticed, all become a `Failure` of that task alone, and a new worker takes the place.
"""

import contextlib
import math
import multiprocessing
import os
import resource
import signal
import threading
import time
import traceback
from collections.abc import Callable, Generator, Iterable
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from typing import Any, Literal

LOOKAHEAD_PER_WORKER = 8
"""Finished results kept while an earlier task still runs: bounds memory."""
STARTS_WITHOUT_A_TASK = 3
"""Workers that may die before their first task until the cause must be the installation."""


@dataclass(frozen=True)
class Failure:
    """A task without a result."""

    reason: Literal["timeout", "cpu_limit", "memory_limit", "worker_crashed"]
    detail: str


@dataclass(frozen=True)
class TaskLimits:
    """What one task may use before it is given up.

    Attributes:
        seconds: of time.
        cpu_seconds: of CPU time, whole seconds at least; independent of how busy the machine is.
        memory_bytes: address space of the worker: a hostile file ends its own worker, not the
            machine.
    """

    seconds: float
    cpu_seconds: float = float("inf")
    memory_bytes: int = 6 << 30


def run_in_order(
    function: Callable[[Any], Any],
    arguments: Iterable[Any],
    *,
    workers: int,
    limits: TaskLimits,
) -> Generator[Any]:
    """Yield `function(argument)`, or a `Failure`, for each argument, in the order given.

    `function` must be importable by name. Processes end with the iterator, or with their parent.
    An exception of `function` is a `Failure` as well.

    Raises:
        RuntimeError: the workers die before they take a task.
    """
    pool = _Pool(function, limits)
    tasks = enumerate(arguments)
    results: dict[int, Any] = {}
    given = yielded = 0
    exhausted = False
    try:
        for _ in range(workers):
            pool.start()
        while True:
            while not exhausted and given - yielded < workers * LOOKAHEAD_PER_WORKER:
                worker = pool.idle()
                if worker is None:
                    break
                task = next(tasks, None)
                if task is None:
                    exhausted = True
                    break
                pool.give(worker, *task)
                given += 1
            while yielded in results:
                yield results.pop(yielded)
                yielded += 1
            if exhausted and yielded == given:
                return
            if yielded + len(results) < given or pool.idle() is None:
                pool.collect(results)
    finally:
        pool.close()


class _Worker:
    def __init__(self, function: Callable[[Any], Any], limits: TaskLimits):
        context = multiprocessing.get_context("spawn")
        self.connection, other = context.Pipe()
        self.process = context.Process(target=_serve, args=(other, function, limits), daemon=True)
        self.process.start()
        other.close()
        self.ready = False
        self.task: int | None = None
        self.deadline = float("inf")


class _Pool:
    def __init__(self, function: Callable[[Any], Any], limits: TaskLimits):
        self.function = function
        self.limits = limits
        self.workers: list[_Worker] = []
        self.failed_starts = 0

    def start(self) -> None:
        self.workers.append(_Worker(self.function, self.limits))

    def idle(self) -> _Worker | None:
        return next((one for one in self.workers if one.ready and one.task is None), None)

    def give(self, worker: _Worker, task: int, argument: Any) -> None:
        worker.task = task
        worker.deadline = time.monotonic() + self.limits.seconds
        # One that died while idle is noticed by `collect`, at the end of its pipe.
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            worker.connection.send(argument)

    def collect(self, results: dict[int, Any]) -> None:
        """Wait for something to happen and note what did."""
        timeout = min(worker.deadline for worker in self.workers) - time.monotonic()
        connections = [worker.connection for worker in self.workers]
        arrived = wait(connections, None if timeout == float("inf") else max(0.0, timeout))
        for worker in list(self.workers):
            if worker.connection in arrived:
                try:
                    message = worker.connection.recv()
                except (EOFError, ConnectionResetError):
                    self._lost(worker, results)
                    continue
                if worker.task is None:
                    worker.ready = True
                    self.failed_starts = 0
                else:
                    results[worker.task] = message
                    worker.task, worker.deadline = None, float("inf")
            elif worker.task is not None and time.monotonic() > worker.deadline:
                results[worker.task] = Failure("timeout", f"over {self.limits.seconds:g} s")
                self._replace(worker)

    def _lost(self, worker: _Worker, results: dict[int, Any]) -> None:
        worker.process.join(5)
        code = worker.process.exitcode
        how = f"exit code {code}"
        if code is not None and code < 0:
            how = f"signal {signal.Signals(-code).name}"
        if worker.task is not None and code == -signal.SIGXCPU:
            detail = f"over {self.limits.cpu_seconds:g} s of CPU time"
            results[worker.task] = Failure("cpu_limit", detail)
        elif worker.task is not None:
            results[worker.task] = Failure("worker_crashed", f"its process died with {how}")
        elif not worker.ready:
            self.failed_starts += 1
            if self.failed_starts >= STARTS_WITHOUT_A_TASK:
                raise RuntimeError(f"worker processes do not start: they die with {how}")
        self._replace(worker)

    def _replace(self, worker: _Worker) -> None:
        _end(worker)
        self.workers.remove(worker)
        self.start()

    def close(self) -> None:
        for worker in self.workers:
            _end(worker)


def _end(worker: _Worker) -> None:
    worker.process.kill()
    worker.process.join()
    worker.connection.close()


def _serve(connection: Connection, function: Callable[[Any], Any], limits: TaskLimits) -> None:
    # Ctrl-C reaches the whole terminal; the parent decides what it means.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _limit(resource.RLIMIT_AS, limits.memory_bytes)
    connection.send("ready")
    while True:
        try:
            argument = connection.recv()
        except EOFError:
            return
        if limits.cpu_seconds < float("inf"):  # SIGXCPU ends the process at the soft limit.
            _limit(resource.RLIMIT_CPU, math.ceil(time.process_time() + limits.cpu_seconds))
        try:
            result = function(argument)
        except MemoryError:
            result = Failure("memory_limit", f"over {limits.memory_bytes} bytes")
        except Exception as error:  # One file's surprise must not end a run over millions.
            where = traceback.extract_tb(error.__traceback__)[-1]
            text = f"{type(error).__name__}: {error} ({where.filename}:{where.lineno})"
            result = Failure("worker_crashed", text)
        connection.send(result)


def _limit(kind: int, value: int) -> None:
    _, most = resource.getrlimit(kind)
    if most == resource.RLIM_INFINITY or most > value:
        resource.setrlimit(kind, (value, most))


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
    os._exit(1)
