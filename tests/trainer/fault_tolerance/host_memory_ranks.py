"""Ranks of a run that each pretend to be a machine with its own memory, and the error of each.

Run by `launch.run_ranks` with the configuration's path and the bytes of each machine.
"""

import json
import os
import socket
import sys
from pathlib import Path

import torch.distributed as dist

from cavmae.cluster.worker import kind_of
from cavmae.trainer.config.configs import PretrainConfig
from cavmae.trainer.config.serialize import load_config
from cavmae.trainer.distributed.process_group import end_rank
from cavmae.trainer.fault_tolerance import oom
from cavmae.trainer.fault_tolerance.host_memory import Memory
from cavmae.trainer.fault_tolerance.oom import OutOfMemory
from cavmae.trainer.run import run


def main() -> None:
    config_path, memory_bytes = json.loads(sys.argv[1])
    rank = int(os.environ["RANK"])
    os.environ |= {"LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
    socket.gethostname = lambda: f"machine-{rank}"
    here = {"MemTotal": memory_bytes[rank]} if memory_bytes[rank] else {}
    oom.machine_memory = lambda root=Path("/"): Memory(*[here["MemTotal"]] * 2)
    error_of: tuple[str, bool] | None = None
    try:
        run(load_config(config_path, PretrainConfig))
    except (OutOfMemory, KeyError) as error:
        error_of = str(error), kind_of(error) == "refused"
    of_all = [None] * dist.get_world_size()
    dist.all_gather_object(of_all, error_of)
    if rank == 0:
        Path(sys.argv[2]).write_text(json.dumps(of_all))
    end_rank()


if __name__ == "__main__":
    main()
