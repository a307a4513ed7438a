"""Ranks of the footprint test: bytes of all tensors that are alive when a step's gradients are."""

import gc
import json
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

from cavmae.trainer.config import EngineConfig, OptimizerConfig
from cavmae.trainer.engine import Engine, end_rank, start_process_group
from cavmae.trainer.ranks import limit_threads, ranks_from_environment

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


def measure(zero_stage: int, dtype: str, accumulation: int, device: torch.device) -> int:
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
    values = torch.randn(1, WIDTH, dtype=torch.bfloat16 if dtype == "bf16" else torch.float32)
    most = 0
    for _ in range(2):
        for number in range(accumulation):
            engine.backward(engine(values).float().mean())
            time.sleep(0.1)  # gloo lets go of a collective's tensors shortly after it is done
            new = (one.nbytes() for address, one in live().items() if address not in before)
            most = max(most, sum(new))
            if number + 1 < accumulation:
                engine.count_micro_batch()
        engine.update(1e-3)
    return most


def main() -> None:
    cases: list[tuple[int, str, int]] = json.loads(sys.argv[1])
    output = Path(sys.argv[2])
    ranks = ranks_from_environment()
    limit_threads(1, ranks)
    device = start_process_group(ranks)
    found = [measure(stage, dtype, times, device) for stage, dtype, times in cases]
    parameters = sum(one.numel() for one in Layers().parameters())
    if dist.get_rank() == 0:
        output.write_text(json.dumps({"parameters": parameters, "bytes": found}))
    end_rank()


if __name__ == "__main__":
    main()
