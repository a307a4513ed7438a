"""This process's rank in a run, and how it reaches the other ranks.

Every launcher (plain python, deepspeed, torchrun, Ray, Slurm) sets the same environment variables:
RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_ADDR, MASTER_PORT. Without them a process
runs alone.
"""

import os
import socket
from dataclasses import dataclass


@dataclass(frozen=True)
class Ranks:
    """Attributes: rank among world_size processes; local_rank among local_world_size on this
    machine."""

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int


def ranks_from_environment() -> Ranks:
    """Read the rank variables, and set them for a process that runs alone.

    Raises:
        ValueError: some rank variables are set and others are missing.
    """
    if "RANK" not in os.environ:
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise ValueError(
                f"WORLD_SIZE is {os.environ['WORLD_SIZE']} but RANK is not set; set RANK, "
                "WORLD_SIZE, MASTER_ADDR and MASTER_PORT for every process, or none of them"
            )
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        os.environ |= {
            "RANK": "0",
            "WORLD_SIZE": "1",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
        }
    missing = [
        name for name in ("WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ
    ]
    if missing:
        raise ValueError(
            f"RANK is {os.environ['RANK']} but {', '.join(missing)} not set; set them for every "
            "process, or unset RANK for a single process"
        )
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    local_rank = int(os.environ.setdefault("LOCAL_RANK", str(rank)))
    local_world_size = int(
        os.environ.get("LOCAL_WORLD_SIZE", os.environ.get("LOCAL_SIZE", world_size))
    )
    return Ranks(rank, world_size, local_rank, local_world_size)


def limit_threads(threads_per_rank: int, ranks: Ranks) -> int:
    """Set the CPU threads of this process; call it before torch is imported.

    Results are bit-equal only for equal thread counts, and launchers set different defaults.

    Args:
        threads_per_rank: threads; 0: the cores of this process divided by the ranks on its machine.

    Returns:
        The number of threads.
    """
    cores = len(os.sched_getaffinity(0))
    threads = threads_per_rank or max(1, cores // ranks.local_world_size)
    os.environ["OMP_NUM_THREADS"] = str(threads)
    import torch  # the only import that has to come after the environment is set

    torch.set_num_threads(threads)
    return threads
