"""How ranks see each other's embeddings: all at once, or a block at a time around a ring.

`gather` holds the embeddings of all ranks: `2 * samples * width` values. `ring` holds three blocks
of one rank each and passes them twice, for the loss and for its gradient; the next block travels
while this one is worked on.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
import torch.distributed as dist

Form = Literal["gather", "ring"]


@dataclass(frozen=True)
class Block:
    """Rows of consecutive ranks.

    Attributes:
        first_rank: whose rows come first.
        tensors: each (ranks, rows, ...), in the order in which they were given.
    """

    first_rank: int
    tensors: tuple[torch.Tensor, ...]

    @property
    def ranks(self) -> range:
        return range(self.first_rank, self.first_rank + len(self.tensors[0]))


def blocks(form: Form, *own: torch.Tensor) -> Iterator[Block]:
    """The rows of all ranks, every rank's once; all ranks call it and use up the iterator.

    Args:
        form: all in one block, or each rank's in a block, this rank's own first.
        own: this rank's tensors, each (rows, ...), equally shaped on all ranks.
    """
    if form == "gather":
        yield Block(0, tuple(_gathered(tensor) for tensor in own))
    else:
        yield from _ring(own)


def _gathered(own: torch.Tensor) -> torch.Tensor:
    """(world_size, *own.shape)."""
    world_size = dist.get_world_size()
    everyone = own.new_empty(world_size, *own.shape)
    dist.all_gather(list(everyone.unbind(0)), own.contiguous())
    return everyone


def _ring(own: tuple[torch.Tensor, ...]) -> Iterator[Block]:
    rank, world_size = dist.get_rank(), dist.get_world_size()
    current = tuple(tensor.contiguous() for tensor in own)
    for step in range(world_size):
        arriving = tuple(torch.empty_like(tensor) for tensor in current)
        transfers = []
        if step + 1 < world_size:
            # What this rank has is sent down and what it wants comes from above.
            down, up = (rank - 1) % world_size, (rank + 1) % world_size
            operations = [
                operation
                for sent, received in zip(current, arriving, strict=True)
                for operation in (
                    dist.P2POp(dist.isend, sent, down),
                    dist.P2POp(dist.irecv, received, up),
                )
            ]
            transfers = dist.batch_isend_irecv(operations)
        yield Block((rank + step) % world_size, tuple(tensor[None] for tensor in current))
        for transfer in transfers:
            transfer.wait()
        current = arriving
