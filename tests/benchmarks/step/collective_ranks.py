"""Ranks of the communication test: one joins every collective late, the other is timed.

Run by `launch.run_ranks`. The late one sleeps where collectives leave Python for c10d, whichever
function they came from, so what the other one spends beside its own work is waiting.
"""

import json
import sys
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from cavmae.benchmarks.harness.timeline import Label, Timeline
from cavmae.benchmarks.step.parts import COMMUNICATION, observe_collectives
from cavmae.trainer.config.configs import EngineConfig, OptimizerConfig
from cavmae.trainer.distributed.collectives import reduce_step
from cavmae.trainer.distributed.engine import Engine
from cavmae.trainer.distributed.env import limit_threads, ranks_from_environment
from cavmae.trainer.distributed.process_group import end_rank, start_process_group
from cavmae.trainer.losses.contrastive import gather_ranks

WORK = Label("work")
STEPS = 3
WIDTH = 400
"""Of layers that are large enough for stage 3 to share them out."""


class LateToCollectives(TorchDispatchMode):
    """Joins each collective after a time.

    Args:
        seconds: that time.
    """

    def __init__(self, seconds: float) -> None:
        super().__init__()
        self._seconds = seconds

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            time.sleep(self._seconds)
        return func(*args, **(kwargs or {}))


def new_engine(zero_stage: Any, device: torch.device) -> Engine:
    torch.manual_seed(0)
    return Engine(
        nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)),
        EngineConfig(zero_stage=zero_stage, dtype="fp32", clip_grad_norm=1.0),
        OptimizerConfig(),
        micro_batch=2,
        accumulation=1,
        device=device,
    )


def step(engine: Engine, device: torch.device) -> None:
    """Run all collectives of a step."""
    own = gather_ranks(torch.ones(1, WIDTH, device=device), rows=1)
    engine.backward(engine(own).square().mean())
    engine.update(1e-3)
    reduce_step({"loss": torch.zeros(1)}, (False, False), 1.0, device)
    dist.all_gather_object([None, None], "a reason")
    dist.barrier()


def main() -> None:
    (seconds,), output = json.loads(sys.argv[1]), Path(sys.argv[2])
    ranks = ranks_from_environment()
    limit_threads(1, ranks)
    device = start_process_group(ranks)
    engines = [new_engine(stage, device) for stage in (0, 1, 2, 3)]
    for engine in engines:
        for _ in range(3):  # stage 3 has its trace after two steps
            step(engine, device)
    line = Timeline(device, WORK)
    if ranks.rank == 0:
        observe_collectives(line)
    with LateToCollectives(seconds) if ranks.rank == 1 else nullcontext():
        for engine in engines:
            for _ in range(STEPS):
                line.begin_step(WORK)
                step(engine, device)
    line.begin_step(WORK)
    if ranks.rank == 0:
        found = [[one[WORK], one.get(COMMUNICATION, 0.0)] for one in line.seconds()]
        stages = [found[first : first + STEPS] for first in range(0, len(found), STEPS)]
        output.write_text(json.dumps(stages))
    end_rank()


if __name__ == "__main__":
    main()
