"""Memory of this rank's GPU, and of its machine or the control group that limits it."""

from dataclasses import dataclass
from pathlib import Path

import torch

from cavmae.trainer.distributed.env import Ranks

_LIMITS = (
    ("memory.max", "memory.current", "inactive_file"),
    ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),  # version 1
)
"""Files of a control group: its limit and its usage, and the statistic of its page cache."""


@dataclass(frozen=True)
class Memory:
    """Bytes of a machine, or of the control group that this process is in.

    Attributes:
        total: installed, or the limit.
        available: of these, not in use.
    """

    total: int
    available: int


def rank_memory(ranks: Ranks, device: torch.device) -> int:
    """Return the bytes that this rank can take: its GPU's, or its share of what the machine has
    free. A GPU counts whole: a rank of the attempt before may not have ended yet.

    Args:
        ranks: this process's rank; those of a machine share its memory.
        device: this rank's device.
    """
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return machine_memory().available // ranks.local_world_size


def machine_memory(root: Path = Path("/")) -> Memory:
    """Read the memory of this machine; pages that a control group has cached count as available.

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
            total = min(total, int(text))
            available = min(available, max(0, int(text) - used))
    return Memory(total, available)


def _control_groups(root: Path) -> list[Path]:
    """List the group of this process and its parents, of either version; a container sees its own
    group as the root."""
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
    """Return the bytes of a line of `memory.stat`; 0 without one."""
    file = folder / "memory.stat"
    lines = file.read_text().splitlines() if file.exists() else []
    return next((int(line.split()[1]) for line in lines if line.split()[0] == name), 0)
