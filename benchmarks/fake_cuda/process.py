"""Runs functions in a process whose torch has the device `cuda`, which computes nothing.

The guard that makes torch believe in the device has to be there before torch is imported and can't
be unloaded, so the process is a new one. It is compiled once for each version of torch.
"""

import ctypes
import hashlib
import importlib.metadata
import importlib.util
import os
import pickle
import shutil
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, ParamSpec, TypeVar

from cavmae.atomic_write import atomic_write
from cavmae.benchmarks.fake_cuda.gpu import H200, FakeGpu

P = ParamSpec("P")
T = TypeVar("T")

_SOURCE = Path(__file__).with_name("guard.cpp")


class FakeCuda:
    """A process with the device; `run` calls functions in it, one after the other.

    Args:
        gpu: the device.

    Raises:
        RuntimeError: there is no C++ compiler, or it can't compile the guard.
    """

    def __init__(self, gpu: FakeGpu = H200) -> None:
        environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
        environment |= {"PYTHONPATH": os.pathsep.join(sys.path), "DS_ACCELERATOR": "cuda"}
        self._process = subprocess.Popen(
            [sys.executable, "-m", __name__, str(compiled_guard())],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment,
        )
        self.run(_install, gpu)

    def run(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Call a function there and return what it returns.

        Args:
            function: of a module that the process can import; like its arguments and its result,
                it is pickled.

        Raises:
            Exception: what the function raised, with its traceback as a note.
            RuntimeError: the process ended.
        """
        requests, results = self._process.stdin, self._process.stdout
        assert requests is not None and results is not None
        try:
            pickle.dump((function, args, kwargs), requests)
            requests.flush()
            result, error, note = pickle.load(results)
        except (BrokenPipeError, EOFError) as ended:
            code = self._process.wait()
            raise RuntimeError(f"the process of the fake device ended with code {code}") from ended
        if error is not None:
            error.add_note(note)
            raise error
        return result

    def close(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.communicate()


@contextmanager
def fake_cuda(gpu: FakeGpu = H200) -> Iterator[FakeCuda]:
    """Hold a process with the device open."""
    device = FakeCuda(gpu)
    try:
        yield device
    finally:
        device.close()


def in_fake_cuda(function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Call a function in a new process with an H200; see `FakeCuda.run`."""
    with fake_cuda() as device:
        return device.run(function, *args, **kwargs)


def compiled_guard() -> Path:
    """Compile the guard for the installed torch, if that was not done before.

    Raises:
        RuntimeError: there is no C++ compiler, or it can't compile the guard.
    """
    spec = importlib.util.find_spec("torch")
    assert spec is not None and spec.submodule_search_locations
    torch = Path(spec.submodule_search_locations[0])
    key = f"{torch} {importlib.metadata.version('torch')} {_SOURCE.read_text()}"
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "cavmae"
    library = cache / f"fake-cuda-{hashlib.sha256(key.encode()).hexdigest()[:16]}.so"
    if library.exists():
        return library
    compiler = os.environ.get("CXX", "g++")
    if shutil.which(compiler) is None:
        raise RuntimeError(
            f"there is no C++ compiler {compiler!r}, which the fake device is built with; install "
            "g++, or name a compiler in CXX"
        )
    cache.mkdir(parents=True, exist_ok=True)
    command = [compiler, "-shared", "-fPIC", "-O0", "-std=c++20", str(_SOURCE)]
    command += [f"-I{torch}/include", f"-I{torch}/include/torch/csrc/api/include"]
    command += [f"-L{torch}/lib", "-lc10", "-ltorch_cpu", f"-Wl,-rpath,{torch}/lib"]
    with atomic_write(library) as unfinished:
        done = subprocess.run([*command, "-o", str(unfinished)], capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{compiler} can't compile {_SOURCE}:\n{done.stderr}")
    return library


def _install(gpu: FakeGpu) -> None:
    from cavmae.benchmarks.fake_cuda.device import install

    install(gpu)


def _serve(requests: BinaryIO, results: BinaryIO) -> None:
    while True:
        try:
            function, args, kwargs = pickle.load(requests)
            answer = pickle.dumps((function(*args, **kwargs), None, ""))
        except EOFError:
            return
        except Exception as error:
            answer = _failure(error)
        results.write(answer)
        results.flush()


def _failure(error: Exception) -> bytes:
    note = traceback.format_exc()
    try:
        return pickle.dumps((None, error, note))
    except Exception:  # some errors hold what can't be pickled
        return pickle.dumps((None, RuntimeError(f"{type(error).__name__}: {error}"), note))


if __name__ == "__main__":
    ctypes.CDLL(sys.argv[1])
    _results = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what functions print is not a result
    _serve(sys.stdin.buffer, _results)
