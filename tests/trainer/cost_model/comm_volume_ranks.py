"""Ranks of the wire test: every collective of a training step counted, and the bytes of the kernel.

Run by `launch.run_ranks`. Collectives are seen where they leave Python for c10d, so DeepSpeed's are
among them whichever function it calls; the kernel counts what the sockets of this process sent.
"""

import json
import os
import socket
import struct
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from engine_run import Run
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from cavmae.trainer.cost_model.comm_volume import collectives, sent_bytes
from cavmae.trainer.distributed.collectives import reduce_step
from cavmae.trainer.distributed.env import limit_threads, ranks_from_environment
from cavmae.trainer.distributed.process_group import end_rank, start_process_group

KINDS = {
    "c10d::allreduce_": "all_reduce",
    "c10d::allgather_": "all_gather",
    "c10d::_allgather_base_": "all_gather",
    "c10d::_reduce_scatter_base_": "reduce_scatter",
}
_BYTES_SENT_AT = 200
"""Of `tcpi_bytes_sent` in `struct tcp_info` (linux/tcp.h)."""


class CountedCollectives(TorchDispatchMode):
    """Attributes: payload_bytes, calls, by kind as in `comm_volume.Collective`."""

    def __init__(self) -> None:
        super().__init__()
        self.payload_bytes: Counter[str] = Counter()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            kind = KINDS[func.name()]  # a KeyError is a collective that nobody thought of
            # The whole is an operand of its own, or the first: a list with a part for each rank.
            operands = [sum(one.nbytes for one in _tensors(operand)) for operand in args]
            self.payload_bytes[kind] += max(operands)
            self.calls[kind] += 1
        return func(*args, **(kwargs or {}))


def _tensors(operand: Any) -> list[torch.Tensor]:
    return [one for one in tree_leaves(operand) if isinstance(one, torch.Tensor)]


def socket_bytes() -> int:
    """Bytes that the TCP sockets of this process have sent since they were opened, each once: what
    a loaded machine sends again is left out."""
    total = 0
    for name in os.listdir("/proc/self/fd"):
        try:
            if not os.readlink(f"/proc/self/fd/{name}").startswith("socket:"):
                continue
            with socket.socket(fileno=os.dup(int(name))) as one:
                if one.type == socket.SOCK_STREAM and one.family != socket.AF_UNIX:
                    answer = one.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 256)
                    sent, sent_again = struct.unpack_from("QQ", answer, _BYTES_SENT_AT)
                    total += sent - sent_again
        except FileNotFoundError:  # the folder's own descriptor is closed by now
            continue
    return total


def measure(case: dict[str, Any], ranks: Any, device: torch.device) -> dict[str, Any]:
    run = Run(case, ranks, device)
    for step in range(3):  # stage 3 has its trace after two steps
        run.update(step)
        reduce_step(run.task.metrics(), (False, False), 1.0, device)
    before = socket_bytes()
    with CountedCollectives() as counted:
        run.update(3)
        reduce_step(run.task.metrics(), (False, False), 1.0, device)
    sent = socket_bytes() - before
    said = collectives(run.config, run.tensors, ranks.world_size)
    said_bytes, said_calls = Counter(), Counter()
    for one in said:
        said_bytes[one.kind] += one.payload_bytes
        said_calls[one.kind] += one.calls
    return {
        "layout": run.task.layout,
        "counted": [dict(counted.payload_bytes), dict(counted.calls)],
        "said": [dict(said_bytes), dict(said_calls)],
        "socket_bytes": sent,
        # gloo has no reduce-scatter: it reduces everything everywhere.
        "said_sent_bytes": sum(
            sent_bytes(one, ranks.world_size) * (2 if one.kind == "reduce_scatter" else 1)
            for one in said
        ),
    }


def main() -> None:
    cases, output = json.loads(sys.argv[1]), Path(sys.argv[2])
    ranks = ranks_from_environment()
    limit_threads(1, ranks)
    device = start_process_group(ranks)
    results = [measure(case, ranks, device) for case in cases]
    if ranks.rank == 0:
        output.write_text(json.dumps(results))
    end_rank()


if __name__ == "__main__":
    main()
