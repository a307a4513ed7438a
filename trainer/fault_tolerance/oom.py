"""When memory does not suffice: told before the first step where that can be known, else with what
would fit.

A CPU rank that takes more than there is gets no error but SIGKILL, from the kernel, so it is
compared with the machine's memory first. On a GPU an allocation fails; the run ends with one line
that has the numbers, and leaves a snapshot of what was allocated.
"""

import logging
import socket
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from cavmae.trainer.checkpoint.format import checkpoints
from cavmae.trainer.checkpoint.store import Store
from cavmae.trainer.config.configs import RunConfig
from cavmae.trainer.cost_model.memory import footprint, model_sizes, sizes_at_most
from cavmae.trainer.cost_model.memory_advice import advice
from cavmae.trainer.distributed.collectives import on_all_ranks
from cavmae.trainer.distributed.env import Ranks

log = logging.getLogger(__name__)

_LIMITS = (
    ("memory.max", "memory.current", "inactive_file"),
    ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),  # version 1
)
"""Files of a control group: its limit, what it uses, and how its cache of files is called."""
_CPU_FAILURES = ("can't allocate memory", "std::bad_alloc", "out of memory")


class OutOfMemory(ValueError):
    """A run needs more memory than there is; a repetition can't mend it."""


@dataclass(frozen=True)
class Memory:
    """Bytes of a machine, or of the control group that this process is in.

    Attributes:
        total: that there are.
        available: that nobody uses now.
    """

    total: int
    available: int


def machine_memory(root: Path = Path("/")) -> Memory:
    """As Linux tells it; the files that a control group has in its cache count as free.

    Args:
        root: above `proc` and `sys`.
    """
    lines = (root / "proc/meminfo").read_text().splitlines()
    found = {
        name: int(rest.split()[0]) * 1024 for name, _, rest in (x.partition(":") for x in lines)
    }
    total, available = found["MemTotal"], found["MemAvailable"]
    for folder in _control_groups(root):
        for limit_file, used_file, cached in _LIMITS:
            limit = folder / limit_file
            if not limit.exists() or not (text := limit.read_text().strip()).isdigit():
                continue
            used = int((folder / used_file).read_text()) - _statistic(folder, cached)
            if int(text) < total:
                total = int(text)
            available = min(available, max(0, int(text) - used))
    return Memory(total, available)


def _control_groups(root: Path) -> list[Path]:
    """That of this process and all above it, of either version; a container sees its own on top."""
    folders = []
    own = root / "proc/self/cgroup"
    lines = own.read_text().splitlines() if own.exists() else ["0::/", "0:memory:/"]
    for _, controllers, path in (line.split(":", 2) for line in lines):
        if controllers and "memory" not in controllers.split(","):
            continue
        top = root / "sys/fs/cgroup" / ("memory" if controllers else "")
        place = top / path.strip("/")
        folders += [one for one in (place, *place.parents) if one == top or top in one.parents]
    return folders


def _statistic(folder: Path, name: str) -> int:
    """Bytes of a line of `memory.stat`; 0 where there is none."""
    file = folder / "memory.stat"
    lines = file.read_text().splitlines() if file.exists() else []
    return next((int(line.split()[1]) for line in lines if line.split()[0] == name), 0)


def check_machines(config: RunConfig, ranks: Ranks, store: Store) -> None:
    """Compare a run of CPU ranks with the memory of each of their machines, which the first rank
    there looks at; all ranks call it.

    Args:
        config: resolved.
        ranks: this process's place.
        store: of the run's checkpoints.

    Raises:
        OutOfMemory: `check_memory` raised it for some machine; on all ranks, the same one.
    """

    def check() -> None:
        if ranks.local_rank == 0:
            check_memory(config, ranks, machine_memory(), begun=bool(checkpoints(store)))

    on_all_ranks(check)


def check_memory(config: RunConfig, ranks: Ranks, memory: Memory, *, begun: bool = False) -> None:
    """Compare a run of CPU ranks with the memory of their machine.

    Args:
        config: resolved.
        ranks: those of this machine share its memory.
        memory: of this machine.
        begun: whether the run has checkpoints.

    Raises:
        OutOfMemory: the tensors of this machine's ranks alone are more than there is, with what
            would fit.
    """
    here = ranks.local_world_size
    at_most = footprint(config, sizes_at_most(config), ranks.world_size, gpu=False)
    if here * at_most.total <= memory.available:
        return  # nothing has to be counted, which takes seconds
    sizes = model_sizes(config)
    needed = footprint(config, sizes, ranks.world_size, gpu=False)

    def advised(there: int) -> str:
        """What would fit where this machine's ranks have so many bytes together."""
        limit = there // here
        return advice(config, sizes, ranks.world_size, limit, gpu=False, begun=begun)

    if here * needed.tensors > memory.total:
        raise OutOfMemory(
            f"{here} ranks take {_gigabytes(here * needed.total)} at the peak of a step "
            f"({needed.peak_part}) and machine {socket.gethostname()} has "
            f"{_gigabytes(memory.total)}; {advised(memory.total)}"
        )
    if here * needed.total > memory.available:
        log.warning(
            "%d ranks take %s at the peak of a step (%s) and machine %s has %s free: the kernel "
            "may end them; %s",
            here,
            _gigabytes(here * needed.total),
            needed.peak_part,
            socket.gethostname(),
            _gigabytes(memory.available),
            advised(memory.available),
        )


@contextmanager
def oom_guard(
    config: RunConfig, run_dir: Path, store: Store, ranks: Ranks, device: torch.device
) -> Iterator[None]:
    """What ends for want of memory ends with advice.

    On a GPU `out-of-memory/rank-N.pickle` of the run folder then has what was allocated, with the
    history of allocations where it was in a profiled step (`profiler.py`).

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
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.cuda.memory._dump_snapshot(str(path))
            snapshot = f"; {path} has what was allocated, for https://docs.pytorch.org/memory_viz"
        log.error("rank %d: %s", ranks.rank, error)
        traceback.clear_frames(error.__traceback__)  # lets go of the step's tensors
        try:
            begun = bool(checkpoints(store))
        except OSError:
            begun = True  # advises less
        what_now = _what_now(config, ranks, device, begun=begun)
        raise OutOfMemory(what_now + snapshot) from error


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocation failed, of Python, of torch or inside of a library."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(text in str(error) for text in _CPU_FAILURES)


def _what_now(config: RunConfig, ranks: Ranks, device: torch.device, *, begun: bool) -> str:
    """The run's one line: what it takes, what there is, what would fit."""
    gpu = device.type == "cuda"
    if gpu:
        there = torch.cuda.get_device_properties(device).total_memory
    else:
        there = machine_memory().total // ranks.local_world_size
    began = f"rank {ranks.rank} ran out of {'GPU' if gpu else 'CPU'} memory"
    sizes = model_sizes(config)
    needed = footprint(config, sizes, ranks.world_size, gpu=gpu)
    # It did not fit, whatever was said of it: what is advised has to take clearly less.
    limit = min(there, int(0.9 * needed.total))
    changes = advice(config, sizes, ranks.world_size, limit, gpu=gpu, begun=begun)
    return (
        f"{began}: a step takes {_gigabytes(needed.total)} at its peak ({needed.peak_part}) of "
        f"{_gigabytes(there)}; {changes}"
    )


def _gigabytes(count: int) -> str:
    return f"{count / 1e9:.1f} GB"
