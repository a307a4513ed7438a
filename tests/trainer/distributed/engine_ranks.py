"""Ranks of the engine tests: train a tiny model on fixed batches and report what happened.

Run by `launch.run_ranks`; several cases share one start-up, which costs more than they do.
"""

import dataclasses
import json
import math
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from engine_run import Run
from torch.utils._python_dispatch import TorchDispatchMode

from cavmae.trainer.distributed import engine
from cavmae.trainer.distributed.env import limit_threads, ranks_from_environment
from cavmae.trainer.distributed.process_group import end_rank, start_process_group


class Operations(TorchDispatchMode):
    """Counts torch's operations that launch a kernel of a GPU; views launch none."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += not func.is_view
        return func(*args, **(kwargs or {}))


def train(case: dict[str, Any], ranks: Any, device: torch.device) -> dict[str, Any]:
    flat = (
        engine._use_flat_gradients if case.get("flat_gradients", True) else lambda optimizer: None
    )
    with mock.patch.object(engine, "_use_flat_gradients", flat):
        run = Run(case, ranks, device)
    steps = case.get("steps", 20)
    poison = case.get("poison", {})
    history, states = [], []
    for step in range(steps):
        before = run.snapshot() if str(step) in poison else []
        history.append(run.step(step, poison.get(str(step))))
        if before:
            after = run.snapshot()
            same = [torch.equal(old, new) for old, new in zip(before, after, strict=True)]
            states.append(all(same))
    with Operations() as last:
        run.update(steps)
    final = run.engine.full_state_dict()
    norm = math.sqrt(sum(value.double().square().sum().item() for value in final.values()))
    return {
        "history": history,
        "unchanged": states,
        "final_norm": norm,
        "layout": run.task.layout,
        "operations": last.count,
        "parameters": len(run.tensors.trainable),
        "case": case,
        "config": dataclasses.asdict(run.config.engine),
    }


def main() -> None:
    cases, output = json.loads(sys.argv[1]), Path(sys.argv[2])
    ranks = ranks_from_environment()
    limit_threads(1, ranks)
    device = start_process_group(ranks)
    results = [train(case, ranks, device) for case in cases]
    if ranks.rank == 0:
        output.write_text(json.dumps(results))
    end_rank()


if __name__ == "__main__":
    main()
