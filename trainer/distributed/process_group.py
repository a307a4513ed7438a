"""A rank's process: the environment that DeepSpeed is imported in, joining the other ranks, and
leaving them."""

import atexit
import contextlib
import fcntl
import hashlib
import logging
import os
import sys
import sysconfig
import warnings
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any, NoReturn

import torch
import torch.distributed as dist

from cavmae.trainer.distributed.env import Ranks

# DeepSpeed chooses its accelerator when it is imported, and asks for one where there is no GPU.
if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ.setdefault("DS_LOG_LEVEL", "warning")
# DeepSpeed rebuilds its operators whenever the paths of torch or DeepSpeed change, so each
# environment has a folder of its own.
_cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "cavmae"
_environment = f"{sys.prefix} torch {torch.__version__} deepspeed {version('deepspeed')}"
os.environ.setdefault(
    "TORCH_EXTENSIONS_DIR",
    str(_cache / f"torch_extensions-{hashlib.sha256(_environment.encode()).hexdigest()[:16]}"),
)
# Compile with this environment's ninja, activated or not: another version would rebuild everything.
os.environ["PATH"] = os.pathsep.join([sysconfig.get_path("scripts"), os.environ.get("PATH", "")])

# DeepSpeed's autotuner, which is never called here, would import MLflow on every rank.
if _no_mlflow := "mlflow" not in sys.modules:
    sys.modules["mlflow"] = None  # pyright: ignore[reportArgumentType]
try:
    import deepspeed
finally:
    if _no_mlflow:
        del sys.modules["mlflow"]

from deepspeed.accelerator import get_accelerator  # noqa: E402
from deepspeed.utils import logger as deepspeed_logger  # noqa: E402

deepspeed_logger.setLevel(logging.WARNING)
# DeepSpeed still calls these.
warnings.filterwarnings(
    "ignore", r".*(all_gather_into|reduce_scatter)_tensor. is deprecated", FutureWarning
)


def start_process_group(ranks: Ranks) -> torch.device:
    """Join the other ranks and return this rank's device.

    DeepSpeed's CPU operator is compiled once per machine and torch version: the first rank to
    arrive builds it while the others wait.
    """
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", ranks.local_rank) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    compile_operators(cuda=cuda)
    with quiet_deepspeed():
        deepspeed.init_distributed(dist_backend="nccl" if cuda else "gloo", verbose=False)
    return device


def compile_operators(*, cuda: bool) -> Path:
    """Compile the operator that CPU ranks need to join each other, unless it is built already.

    Joining would compile it too, but in all ranks at the same time.

    Args:
        cuda: whether the ranks have GPUs, which need nothing compiled.

    Returns:
        The folder that holds the compiled operators.
    """
    if not cuda:
        with _extension_lock():
            accelerator: Any = get_accelerator()
            accelerator.create_op_builder("ShareMemCommBuilder").load(verbose=False)
    return Path(os.environ["TORCH_EXTENSIONS_DIR"])


def end_rank() -> NoReturn:
    """Leave the other ranks and exit this process, whose work is done.

    gloo's threads release a collective's tensors shortly after it is done, and outlive the process
    group, which DeepSpeed refers to until the end. A thread that does so while the interpreter
    shuts down aborts the process ("terminate called without an active exception"), and the launcher
    takes a finished run for a failed one. So the exit handlers run here, and the process exits
    without shutting the interpreter down.
    """
    dist.destroy_process_group()
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError):  # a full disk
            stream.flush()
    os._exit(0)


@contextlib.contextmanager
def quiet_deepspeed() -> Iterator[None]:
    """Silence what DeepSpeed prints when all is well: memory tables, operator names, and a warning
    about the optimizer that we choose on purpose. Its failures are exceptions."""
    deepspeed_logger.setLevel(logging.ERROR)
    try:
        with open(os.devnull, "w") as null, contextlib.redirect_stdout(null):
            yield
    finally:
        deepspeed_logger.setLevel(logging.WARNING)


@contextlib.contextmanager
def _extension_lock() -> Iterator[None]:
    """Let one process build at a time, and remove the lock file that a killed build left behind.

    The kernel releases this lock with its owner; torch's own lock file would stay forever.
    """
    folder = Path(os.environ["TORCH_EXTENSIONS_DIR"])
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "cavmae.lock", "w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        for stale in folder.glob("*/lock"):
            stale.unlink()
        yield
