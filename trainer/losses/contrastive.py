"""The contrastive loss over groups of the sample plan, whatever ranks and accumulation do.

A group is `group_size` consecutive positions of the plan. Where the groups lie decides what has to
be exchanged:

- `local`: every group is inside one rank's micro-batch; nothing is.
- `gathered`: every group is inside one micro-batch of all ranks; embeddings are exchanged.
- `cached`: groups span micro-batches. Embeddings of the whole step are computed first without
  gradients, the loss and its gradients with respect to them follow, and each micro-batch's forward
  then gets its own part of those gradients (GradCache, Gao et al. 2021): exact, for one more
  encoder forward.

Each rank ranks the candidates of its own clips: its videos rank everybody's audio clips, and its
audio clips everybody's videos. For the gradient it needs of the others' clips only the logarithms
of their sums, one number a clip and direction; gradients themselves are never exchanged.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch.autograd.function import once_differentiable

from cavmae.dataloaders.sampling.sample_plan import rank_positions
from cavmae.kernels import Backend, ContrastiveResult, contrastive_loss, default_backend
from cavmae.kernels.similarity import (
    Parts,
    Similarity,
    direction_gradient,
    inverse_norms,
    merge,
    project,
    row_blocks,
    statistics,
)
from cavmae.trainer.config.configs import LossConfig
from cavmae.trainer.losses.embedding_exchange import Block, Form, blocks

Layout = Literal["local", "gathered", "cached"]


def contrastive_layout(
    *, group_size: int, global_batch: int, micro_batch: int, lanes: int, world_size: int
) -> Layout:
    """Where the groups of a step lie; a pure function of the batch sizes."""
    _, row_of = _places(global_batch, lanes, world_size)
    micro_of = (row_of // micro_batch).reshape(-1, group_size)
    if (micro_of != micro_of[:, :1]).any():
        return "cached"
    spans = groups_span_ranks(
        group_size=group_size, global_batch=global_batch, lanes=lanes, world_size=world_size
    )
    return "gathered" if spans else "local"


def groups_span_ranks(*, group_size: int, global_batch: int, lanes: int, world_size: int) -> bool:
    """Whether a group has clips of several ranks, so that embeddings are exchanged."""
    rank_of, _ = _places(global_batch, lanes, world_size)
    rank_of = rank_of.reshape(-1, group_size)
    return bool((rank_of != rank_of[:, :1]).any())


def _places(global_batch: int, lanes: int, world_size: int) -> tuple[np.ndarray, np.ndarray]:
    """Rank of each position of a step, and its row among that rank's; both (global_batch,)."""
    rank_of = np.empty(global_batch, dtype=np.int64)
    row_of = np.empty(global_batch, dtype=np.int64)
    for rank in range(world_size):
        positions = rank_positions(0, rank, world_size, global_batch, lanes)
        rank_of[positions] = rank
        row_of[positions] = np.arange(len(positions))
    return rank_of, row_of


@dataclass(frozen=True)
class OwnGroup:
    """A group that has clips of this rank.

    Attributes:
        rows: for each rank, (members,) int64 rows of its clips in the group, on this rank's device.
        rank: this rank.
    """

    rows: tuple[torch.Tensor, ...]
    rank: int

    @property
    def own(self) -> torch.Tensor:
        return self.rows[self.rank]

    def has_members(self, block: Block) -> bool:
        return any(len(self.rows[rank]) for rank in block.ranks)

    def members(self, block: Block, tensor: torch.Tensor) -> torch.Tensor:
        """(members, ...) the group's rows of a block's tensor (ranks, rows, ...)."""
        flat, each = tensor.flatten(0, 1), tensor.shape[1]
        index = [self.rows[rank] + place * each for place, rank in enumerate(block.ranks)]
        if sum(map(len, index)) == len(flat):
            return flat  # all of it, and in order: rows are ascending
        return flat[torch.cat(index)]

    def shift(self, block: Block) -> int:
        """Place of the first own clip's positive in the block; behind its end if it has none."""
        before = [rank for rank in block.ranks if rank < self.rank or self.rank not in block.ranks]
        return sum(len(self.rows[rank]) for rank in before)


def own_groups(
    *,
    group_size: int,
    global_batch: int,
    lanes: int,
    rank: int,
    world_size: int,
    device: torch.device,
) -> list[OwnGroup]:
    """The groups of a step that have clips of this rank, in the order of positions."""
    rank_of, row_of = _places(global_batch, lanes, world_size)
    groups = []
    for ranks, rows in zip(
        rank_of.reshape(-1, group_size), row_of.reshape(-1, group_size), strict=True
    ):
        if (ranks == rank).any():
            members = (np.sort(rows[ranks == other]) for other in range(world_size))
            on_device = tuple(torch.from_numpy(member).to(device) for member in members)
            groups.append(OwnGroup(on_device, rank))
    return groups


@dataclass
class Pairs:
    """Attributes: audio, video (batch, width) embeddings; positions (batch,) int64 in the plan."""

    audio: torch.Tensor
    video: torch.Tensor
    positions: torch.Tensor


def concatenate(parts: list[Pairs]) -> Pairs:
    """The pairs of several micro-batches as one."""
    return Pairs(
        torch.cat([part.audio for part in parts]),
        torch.cat([part.video for part in parts]),
        torch.cat([part.positions for part in parts]),
    )


def local_loss(pairs: Pairs, config: LossConfig, group_size: int) -> ContrastiveResult:
    """Mean loss over the groups of consecutive positions, all of them in `pairs`."""
    order = torch.argsort(pairs.positions)
    return contrastive_loss(
        pairs.audio[order], pairs.video[order], config.temperature, config.bidirectional, group_size
    )


def exchanged_loss(
    own: Pairs, config: LossConfig, groups: list[OwnGroup], backend: Backend | None = None
) -> ContrastiveResult:
    """Mean loss of this rank's clips, whose mean over ranks is the step's; all ranks call it.

    The gradient is that of the sum of all ranks' losses with respect to this rank's embeddings,
    which is what an engine expects that averages parameters' gradients over ranks.

    Args:
        own: this rank's clips of the step, in the order of `rank_positions`.
        config: temperature, directions and form of the exchange.
        groups: from `own_groups`.
        backend: see `cavmae.kernels.backend`.
    """
    loss, accuracy = _ExchangedContrastive.apply(
        own.video,
        own.audio,
        config.temperature,
        config.bidirectional,
        config.exchange,
        groups,
        backend or default_backend(own.video.device),
    )
    return ContrastiveResult(loss, accuracy)


class _ExchangedContrastive(torch.autograd.Function):
    """Sides are `(video, audio)`; direction 0 is that videos rank audio clips."""

    @staticmethod
    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx,
        video: torch.Tensor,
        audio: torch.Tensor,
        temperature: float,
        bidirectional: bool,
        form: Form,
        groups: list[OwnGroup],
        backend: Backend,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        sides = (video.contiguous(), audio.contiguous())
        directions = (0, 1) if bidirectional else (0,)
        inverses = tuple(inverse_norms(side[None], backend)[0] for side in sides)
        inverse_temperature = inverses[0].new_full((), 1 / temperature)
        ctx.sides, ctx.inverses, ctx.inverse_temperature = sides, inverses, inverse_temperature
        ctx.form, ctx.groups, ctx.backend, ctx.directions = form, groups, backend, directions

        found: list[list[list[torch.Tensor]]] = [[[] for _ in groups] for _ in directions]
        held = []
        for block in blocks(form, *sides):
            if form == "gather":
                held.append(block)
            for direction in directions:
                for number, group in enumerate(groups):
                    if not group.has_members(block):
                        continue
                    similarity = _similarity(ctx, block, group, direction)
                    parts = statistics(similarity, reverse=False)
                    found[direction][number].append(parts.query)
        ctx.held = held

        ctx.log_sums = tuple(torch.empty_like(inverses[0]) for _ in directions)
        terms = []
        for direction in directions:
            for number, group in enumerate(groups):
                merged = merge(
                    Parts(torch.cat(found[direction][number], dim=1), None),
                    shift=0,
                    first_query=0,
                    pairs=len(group.own),
                    backend=backend,
                )
                ctx.log_sums[direction][group.own] = merged.query_log_sum[0]
                terms.append(merged.terms[0])
        loss, accuracy = torch.cat(terms, dim=1).mean(1)
        ctx.mark_non_differentiable(accuracy)
        return loss, accuracy

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx, grad_loss: torch.Tensor, _: torch.Tensor
    ) -> tuple[torch.Tensor | None, ...]:
        toward = tuple(
            inverse.new_zeros(side.shape)
            for side, inverse in zip(ctx.sides, ctx.inverses, strict=True)
        )
        for block in _blocks_with_log_sums(ctx):
            for side in (0, 1):
                for group in ctx.groups:
                    if not group.has_members(block):
                        continue
                    own_log_sum = others_log_sum = None
                    if side in ctx.directions:
                        own_log_sum = ctx.log_sums[side][group.own][None]
                    if 1 - side in ctx.directions:
                        others = block.tensors[2 + (1 - side)]
                        others_log_sum = group.members(block, others)[None]
                    similarity = _similarity(ctx, block, group, side)
                    for rows in row_blocks(similarity):
                        toward[side][group.own[rows]] += direction_gradient(
                            similarity, own_log_sum, others_log_sum, rows, slice(0, 1)
                        )[0]
        factor = grad_loss * ctx.inverse_temperature / (len(ctx.directions) * len(toward[0]))
        gradients = []
        for side, inverse, direction in zip(ctx.sides, ctx.inverses, toward, strict=True):
            gradient, alignment = torch.empty_like(side), torch.empty_like(inverse)
            project(
                direction[None],
                side[None],
                inverse[None],
                factor,
                gradient[None],
                alignment[None],
                ctx.backend,
            )
            gradients.append(gradient)
        return *gradients, None, None, None, None, None


def _blocks_with_log_sums(ctx) -> Iterator[Block]:
    """What `blocks` gave in the forward pass, with the log sums of each direction behind."""
    if ctx.form == "ring":
        yield from blocks("ring", *ctx.sides, *ctx.log_sums)
        return
    (held,), (log_sums,) = ctx.held, blocks("gather", *ctx.log_sums)
    yield Block(held.first_rank, held.tensors + log_sums.tensors)


def _similarity(ctx, block: Block, group: OwnGroup, side: int) -> Similarity:
    """This rank's clips of a side against the block's clips of the other side."""
    queries = ctx.sides[side][group.own][None]
    candidates = group.members(block, block.tensors[1 - side])[None]
    return Similarity(
        queries,
        candidates,
        ctx.inverses[side][group.own][None],
        inverse_norms(candidates, ctx.backend),
        ctx.inverse_temperature,
        group.shift(block),
        ctx.backend,
    )
