"""Ranks of the footprint test: what the allocator of a rank says of the parts of a step."""

import gc
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.profiler import ProfilerActivity, profile, record_function

from cavmae.trainer.config.configs import EngineConfig, OptimizerConfig
from cavmae.trainer.distributed.engine import Engine
from cavmae.trainer.distributed.env import limit_threads, ranks_from_environment
from cavmae.trainer.distributed.process_group import end_rank, start_process_group

STEPS = 4
WIDTH = 512
"""Layers above ZeRO-3's threshold, under which it shares nothing out."""


class Layers(nn.Module):
    """Linear layers and next to no activations."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(8))

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            values = torch.tanh(layer(values))
        return values


def live() -> dict[int, torch.UntypedStorage]:
    """Storages of all tensors of this process, gradients included, by address."""
    found: dict[int, torch.UntypedStorage] = {}
    for one in gc.get_objects():
        if type(one) in (torch.Tensor, nn.Parameter):
            for tensor in (one, one.grad):
                if tensor is not None:
                    storage = tensor.untyped_storage()
                    found[storage._cdata] = storage
    return found


class Step:
    """Steps of an engine of `Layers`, with marks around their parts."""

    def __init__(self, engine: Engine, accumulation: int) -> None:
        dtype = torch.bfloat16 if engine.dtype == "bf16" else torch.float32
        self.engine, self.accumulation = engine, accumulation
        self.values = torch.randn(1, WIDTH, dtype=dtype)

    def __call__(self) -> None:
        for number in range(self.accumulation):
            with record_function("part passes"):
                loss = self.engine(self.values).float().mean()
                self.engine.backward(loss)
            if number + 1 < self.accumulation:
                self.engine.accumulate()
        with record_function("part update"):
            self.engine.update(1e-3)
        time.sleep(0.1)  # gloo lets go of a collective's tensors shortly after it is done


def measure(zero_stage: int, dtype: str, accumulation: int, device: torch.device) -> dict[str, int]:
    """Bytes that stay, and most bytes beyond them in each part of a step."""
    gc.collect()
    before = live()  # kept, so that nothing new has the address of something old
    engine = Engine(
        Layers(),
        EngineConfig(zero_stage=zero_stage, dtype=dtype),  # pyright: ignore[reportArgumentType]
        OptimizerConfig(),
        micro_batch=1,
        accumulation=accumulation,
        device=device,
    )
    step = Step(engine, accumulation)
    for _ in range(3):  # stage 3 learns the order of modules in the first ones
        step()
    gc.collect()
    stays = sum(one.nbytes() for address, one in live().items() if address not in before)
    found = [_most(step) for _ in range(STEPS)]
    # gloo's threads may hold a collective's tensors into the next part: not in all of the steps.
    return {"stays": stays} | {part: min(one[part] for one in found) for part in found[0]}


def _most(step: Step) -> dict[str, int]:
    """Most bytes of the allocator in each part of one step, beyond what was there before it."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
    assert profiler.profiler is not None and profiler.profiler.kineto_results is not None
    events: list[Any] = profiler.profiler.kineto_results.events()
    changes = sorted((one.start_ns(), one.nbytes()) for one in events if one.name() == "[memory]")
    marks = sorted(
        (one.start_ns(), one.start_ns() + one.duration_ns(), one.name().removeprefix("part "))
        for one in events
        if one.name().startswith("part ")
    )
    most = {"passes": 0, "update": 0}
    alive, reached = 0, 0
    for _, end, part in marks:
        while reached < len(changes) and changes[reached][0] <= end:
            alive += changes[reached][1]
            most[part] = max(most[part], alive)
            reached += 1
    return most


def main() -> None:
    cases: list[tuple[int, str, int]] = json.loads(sys.argv[1])
    output = Path(sys.argv[2])
    ranks = ranks_from_environment()
    limit_threads(1, ranks)
    device = start_process_group(ranks)
    found = [measure(stage, dtype, times, device) for stage, dtype, times in cases]
    sizes = [one.numel() for one in Layers().parameters()]
    if dist.get_rank() == 0:
        output.write_text(json.dumps({"parameters": sizes, "bytes": found}))
    end_rank()


if __name__ == "__main__":
    main()
