"""Out-of-memory handling: refuse runs that cannot fit; otherwise report what would.

A CPU rank that needs more memory than the machine has gets no error but SIGKILL from the kernel, so
its prediction is compared with the machine's memory first. On a GPU an allocation fails; the run
ends with one line that has the numbers, and leaves a memory snapshot.
"""

import logging
import socket
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from cavmae.trainer.checkpoint.format import list_checkpoints
from cavmae.trainer.checkpoint.store import Store
from cavmae.trainer.config.configs import RunConfig
from cavmae.trainer.cost_model.memory import footprint, model_sizes, sizes_at_most
from cavmae.trainer.cost_model.memory_advice import advice
from cavmae.trainer.distributed.collectives import on_all_ranks
from cavmae.trainer.distributed.env import Ranks
from cavmae.trainer.fault_tolerance.host_memory import Memory, machine_memory

log = logging.getLogger(__name__)

_CPU_FAILURES = ("can't allocate memory", "std::bad_alloc", "out of memory")


class OutOfMemory(ValueError):
    """A run needs more memory than there is; a retry does not help."""


def check_machines(config: RunConfig, ranks: Ranks, store: Store) -> None:
    """Compare a run of CPU ranks with the memory of each of their machines, which its first rank
    reads; all ranks call it.

    Args:
        config: resolved.
        ranks: this process's rank.
        store: of the run's checkpoints.

    Raises:
        OutOfMemory: `check_memory` raised it for some machine; the same one on all ranks.
    """

    def check() -> None:
        if ranks.local_rank == 0:
            check_memory(config, ranks, machine_memory(), begun=bool(list_checkpoints(store)))

    on_all_ranks(check)


def check_memory(config: RunConfig, ranks: Ranks, memory: Memory, *, begun: bool = False) -> None:
    """Compare a run of CPU ranks with the memory of their machine.

    Args:
        config: resolved.
        ranks: those of this machine share its memory.
        memory: of this machine.
        begun: whether the run has checkpoints.

    Raises:
        OutOfMemory: the tensors of this machine's ranks alone are more than its memory, with flags
            that would fit.
    """
    here = ranks.local_world_size
    bound = footprint(config, sizes_at_most(config), ranks.world_size, gpu=False)
    if here * bound.total <= memory.available:
        return  # no need to trace the model, which takes seconds
    sizes = model_sizes(config)
    needed = footprint(config, sizes, ranks.world_size, gpu=False)

    def problem(limit: int, consequence: str = "") -> str:
        """Describe that this machine's ranks do not fit in `limit` bytes, with what would."""
        fits = advice(config, sizes, ranks.world_size, limit // here, gpu=False, begun=begun)
        return (
            f"{here} ranks take {_gigabytes(here * needed.total)} at the peak of a step "
            f"({needed.peak_part}) and machine {socket.gethostname()} has {_gigabytes(limit)}"
            f"{consequence}; {fits}"
        )

    if here * needed.tensors > memory.total:
        raise OutOfMemory(problem(memory.total))
    if here * needed.total > memory.available:
        log.warning("%s", problem(memory.available, " free: the kernel may kill them"))


@contextmanager
def oom_guard(
    config: RunConfig, run_dir: Path, store: Store, ranks: Ranks, device: torch.device
) -> Iterator[None]:
    """Turn a failed allocation into an error with advice.

    On a GPU it saves a memory snapshot as `out-of-memory/rank-N.pickle` of the run folder, with the
    history of allocations if the step was a profiled one (`profiler.py`).

    Raises:
        OutOfMemory: an allocation failed, here or in a library.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        snapshot = ""
        if device.type == "cuda":
            path = run_dir / "out-of-memory" / f"rank-{ranks.rank}.pickle"
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                torch.cuda.memory._dump_snapshot(str(path))
                snapshot = (
                    f"; {path} has what was allocated, for https://docs.pytorch.org/memory_viz"
                )
            except OSError as problem:
                log.warning("%s could not be written: %s", path, problem)
        log.error("rank %d: %s", ranks.rank, error)
        traceback.clear_frames(error.__traceback__)  # frees the step's tensors
        try:
            begun = bool(list_checkpoints(store))
        except OSError:
            begun = True  # the ZeRO stage may be fixed
        raise OutOfMemory(_report(config, ranks, device, begun=begun) + snapshot) from error


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an allocation failed, in Python, in torch or in a library."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(text in str(error) for text in _CPU_FAILURES)


def _report(config: RunConfig, ranks: Ranks, device: torch.device, *, begun: bool) -> str:
    """Report in one line what the run takes, what the device has, and what would fit."""
    gpu = device.type == "cuda"
    if gpu:
        memory = torch.cuda.get_device_properties(device).total_memory
    else:
        memory = machine_memory().total // ranks.local_world_size
    sizes = model_sizes(config)
    needed = footprint(config, sizes, ranks.world_size, gpu=gpu)
    # It did not fit, whatever was predicted: what is advised has to take clearly less.
    limit = min(memory, int(0.9 * needed.total))
    fits = advice(config, sizes, ranks.world_size, limit, gpu=gpu, begun=begun)
    return (
        f"rank {ranks.rank} ran out of {'GPU' if gpu else 'CPU'} memory: a step takes "
        f"{_gigabytes(needed.total)} at its peak ({needed.peak_part}) of {_gigabytes(memory)}; "
        f"{fits}"
    )


def _gigabytes(count: int) -> str:
    return f"{count / 1e9:.1f} GB"
