"""Ranks that hold different numbers of clips: as many forward passes on each, results of all."""

from collections.abc import Iterable, Iterator

import torch
import torch.distributed as dist

from cavmae.dataloaders.batch import AudioVideoBatch


def in_step(
    batches: Iterable[AudioVideoBatch], device: torch.device
) -> Iterator[tuple[AudioVideoBatch, bool]]:
    """This rank's batches, its last one again (not to be counted) while others have more.

    ZeRO-3 gathers parameters in every forward, so all ranks need equally many of them.
    """
    last: AudioVideoBatch | None = None
    iterator = iter(batches)
    while True:
        batch = next(iterator, None)
        more = torch.tensor(batch is not None, dtype=torch.int32, device=device)
        dist.all_reduce(more, op=dist.ReduceOp.MAX)
        if not more:
            return
        if batch is None and last is None:
            raise ValueError(
                "data.validation has fewer clips than there are ranks; add clips or use fewer ranks"
            )
        if batch is not None:
            last = batch
        assert last is not None
        yield last, batch is not None


def gather_uneven(own: torch.Tensor) -> torch.Tensor:
    """The rows of all ranks, by rank, on every rank.

    Args:
        own: (rows, ...) of this rank; ranks may have different numbers of rows.
    """
    counts = [
        torch.zeros((), dtype=torch.int64, device=own.device) for _ in range(dist.get_world_size())
    ]
    dist.all_gather(counts, torch.tensor(len(own), device=own.device))
    padded = own.new_zeros(int(max(counts)), *own.shape[1:])
    padded[: len(own)] = own
    parts = [torch.empty_like(padded) for _ in counts]
    dist.all_gather(parts, padded)
    return torch.cat([part[: int(count)] for part, count in zip(parts, counts, strict=True)])
