"""Ranks of the contrastive tests: a step's loss over ranks against one process, and bytes counted.

Run by `launch.run_ranks`; rank 0 reports.
"""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from cavmae.dataloaders.sampling.step_shares import StepShares
from cavmae.kernels import contrastive_loss
from cavmae.trainer.config.configs import LossConfig
from cavmae.trainer.distributed.env import ranks_from_environment
from cavmae.trainer.losses.contrastive import Pairs, exchanged_loss
from cavmae.trainer.losses.contrastive_groups import step_exchange

WIDTH = 16


class ReceivedBytes:
    """Counts what this rank receives through torch.distributed."""

    def __init__(self) -> None:
        self.count = 0
        self._all_gather = dist.all_gather

    def __enter__(self) -> "ReceivedBytes":
        def all_gather(parts: list[torch.Tensor], own: torch.Tensor) -> Any:
            self.count += (len(parts) - 1) * own.nbytes
            return self._all_gather(parts, own)

        dist.all_gather = all_gather
        return self

    def __exit__(self, *_: object) -> None:
        dist.all_gather = self._all_gather


def embeddings(positions: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
    """Audio and video of some positions, in float64 and a function of the position alone."""
    drawn = np.stack([np.random.default_rng(p).standard_normal((2, WIDTH)) for p in positions])
    audio, other = torch.from_numpy(drawn).unbind(1)
    return audio.clone(), 0.3 * audio + other


def run(case: dict[str, Any], rank: int, world_size: int) -> dict[str, Any]:
    batch, lanes, group = case["global_batch"], case["lanes"], case["group"]
    config = LossConfig(bidirectional=case["bidirectional"])
    shares = StepShares(batch, lanes, world_size, micro_batch=batch)
    positions = shares.offsets(rank)
    audio, video = (x.requires_grad_() for x in embeddings(positions))
    exchange = step_exchange(shares, group, rank, torch.device("cpu"))
    with ReceivedBytes() as received:
        result = exchanged_loss(Pairs(audio, video, torch.from_numpy(positions)), config, exchange)
        loss, accuracy = (
            part * shares.weight(len(positions)) for part in (result.loss, result.accuracy)
        )
        gradients = torch.autograd.grad(loss, [audio, video])
    own = [loss.item(), accuracy.item(), *(g.numpy() for g in gradients), positions]
    everyone: list[Any] = [None] * world_size
    dist.all_gather_object(everyone, own)
    if rank:
        return {}

    audio, video = (x.requires_grad_() for x in embeddings(np.arange(batch)))
    whole = contrastive_loss(audio, video, config.temperature, config.bidirectional, group)
    expected = torch.autograd.grad(whole.loss, [audio, video])
    deviation = 0.0
    for _, _, of_audio, of_video, where in everyone:
        for ours, theirs in zip((of_audio, of_video), expected, strict=True):
            # Engines average over ranks what each of them has added.
            deviation = max(deviation, float(abs(ours / world_size - theirs.numpy()[where]).max()))
    return {
        "loss": [sum(one[0] for one in everyone) / world_size, whole.loss.item()],
        "accuracy": [sum(one[1] for one in everyone) / world_size, whole.accuracy.item()],
        "gradient_deviation": deviation,
        "largest_gradient": max(float(g.abs().max()) for g in expected),
        "received_bytes": received.count,
    }


def main() -> None:
    cases, output = json.loads(sys.argv[1]), Path(sys.argv[2])
    ranks = ranks_from_environment()
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    results = [run(case, ranks.rank, ranks.world_size) for case in cases]
    if ranks.rank == 0:
        output.write_text(json.dumps(results))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
