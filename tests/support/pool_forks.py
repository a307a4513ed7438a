"""A pool's processes as forks of one that has imported what decodes: next to all that a short task
takes are imports, which would be the same each time.

`tests/dataloaders/test_process_pool.py` starts them as they are started for users.
"""

import functools
import os
import subprocess
import sys
import threading
from multiprocessing import forkserver, popen_forkserver
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerProcess
from pathlib import Path

PRELOADED = ("cavmae.dataloaders.loading.quarantine", "cavmae.dataloaders.packing.pack_clip")


class PoolSubprocess:
    """Stands for `subprocess` in `cavmae.dataloaders.process_pool`."""

    DEVNULL = subprocess.DEVNULL

    @staticmethod
    def Popen(
        command: list[str], *, stdin: int, stdout: int, pass_fds: list[int], env: dict[str, str]
    ) -> popen_forkserver.Popen:
        path = command[4:]
        assert (stdin, stdout) == (subprocess.DEVNULL, 2)
        ends = (Connection(os.dup(descriptor)) for descriptor in (*pass_fds, 2))
        _of_thread.server = server()
        try:
            # Not by `start`, after which any thread may take a process's exit code.
            return popen_forkserver.Popen(
                ForkServerProcess(target=_serve_tasks, args=(*ends, path, env))
            )
        finally:
            del _of_thread.server


_of_thread = threading.local()
_default = forkserver.connect_to_new_process


def _connect_to_new_process(descriptors: list[int]) -> tuple[int, int]:
    """Fork the server that the thread wants; for the ranks of `forks.py` the usual one."""
    server = getattr(_of_thread, "server", None)
    return server.connect_to_new_process(descriptors) if server else _default(descriptors)


forkserver.connect_to_new_process = _connect_to_new_process


@functools.cache
def server() -> forkserver.ForkServer:
    """The one of this process, which ends with it; to be started where no other thread runs."""
    import pytest  # which the forks don't need

    started = forkserver.ForkServer()
    started.set_forkserver_preload([__name__, *PRELOADED])
    here = Path(__file__).parent
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join([str(here), str(here.parents[1])]))
        # One thread, so that there is none in the server that a fork would not have.
        patch.setenv("OPENBLAS_NUM_THREADS", "1")
        started.ensure_running()
    return started


def _serve_tasks(
    tasks: Connection, said: Connection, path: list[str], environment: dict[str, str]
) -> None:
    """In the fork, as the program of `cavmae.dataloaders.process_pool` does."""
    os.dup2(said.fileno(), 1)
    os.dup2(said.fileno(), 2)
    os.environ.clear()
    os.environ.update(environment)
    sys.path[:] = path
    from cavmae.dataloaders.process_pool import serve

    serve(tasks.fileno())
