"""The contrastive loss over groups of the sample plan, whatever ranks and accumulation do.

A loss inside one rank is `local_loss`. Where groups span ranks (`contrastive_groups.py`),
`exchanged_loss` gathers the embeddings of all ranks, and each rank ranks the candidates of its own
clips: its videos rank everybody's audio clips, and its audio clips everybody's videos. The gradient
needs of the others' clips only the logarithms of their sums, one number a clip and direction;
gradients themselves are never exchanged.
"""

from typing import NamedTuple

import torch
import torch.distributed as dist
from torch.autograd.function import once_differentiable

from cavmae.kernels import Backend, ContrastiveResult, contrastive_loss, default_backend
from cavmae.kernels.similarity import Similarity, inverse_norms, query_gradients, statistics
from cavmae.trainer.config.configs import LossConfig
from cavmae.trainer.losses.contrastive_groups import Exchange, OwnGroup


class Pairs(NamedTuple):
    """Attributes: audio, video (batch, width) embeddings; positions (batch,) int64 in the plan."""

    audio: torch.Tensor
    video: torch.Tensor
    positions: torch.Tensor


def concatenate(parts: list[Pairs]) -> Pairs:
    """The pairs of several micro-batches as one."""
    return Pairs(*map(torch.cat, zip(*parts, strict=True)))


def local_loss(pairs: Pairs, config: LossConfig, group_size: int) -> ContrastiveResult:
    """Mean loss over the groups of consecutive positions, all of them in `pairs`."""
    order = torch.argsort(pairs.positions)
    return contrastive_loss(
        pairs.audio[order], pairs.video[order], config.temperature, config.bidirectional, group_size
    )


def exchanged_loss(
    own: Pairs, config: LossConfig, exchange: Exchange, backend: Backend | None = None
) -> ContrastiveResult:
    """Mean loss of this rank's clips; all ranks call it.

    The gradient is that of the sum of all ranks' losses, each weighted by its number of clips over
    this rank's, with respect to this rank's embeddings: a caller multiplies the loss by the clips
    of this rank, or by what is proportional to them.

    Args:
        own: this rank's clips of the exchange, in the order of positions.
        config: temperature and directions.
        exchange: of a step, or of a micro-batch.
        backend: see `cavmae.kernels.backend`.
    """
    loss, accuracy = _ExchangedContrastive.apply(
        own.video,
        own.audio,
        config.temperature,
        config.bidirectional,
        exchange,
        backend or default_backend(own.video.device),
    )
    return ContrastiveResult(loss, accuracy)


def gather_ranks(own: torch.Tensor, rows: int) -> torch.Tensor:
    """Gather up to `rows` rows of each rank to (world_size * rows, ...), by rank; what a rank has
    less is filled up."""
    if len(own) < rows:
        own = torch.cat([own, own.new_zeros(rows - len(own), *own.shape[1:])])
    everyone = own.new_empty(dist.get_world_size(), *own.shape)
    dist.all_gather(list(everyone.unbind(0)), own.contiguous())
    return everyone.flatten(0, 1)


class _ExchangedContrastive(torch.autograd.Function):
    """Sides are `(video, audio)`; direction 0 is that videos rank audio clips."""

    @staticmethod
    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx,
        video: torch.Tensor,
        audio: torch.Tensor,
        temperature: float,
        bidirectional: bool,
        exchange: Exchange,
        backend: Backend,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        ctx.sides = (video.contiguous(), audio.contiguous())
        ctx.gathered = tuple(gather_ranks(side, exchange.rows) for side in ctx.sides)
        ctx.inverses = tuple(inverse_norms(side[None], backend)[0] for side in ctx.sides)
        ctx.inverse_temperature = ctx.inverses[0].new_full((), 1 / temperature)
        ctx.exchange, ctx.backend = exchange, backend
        ctx.directions = (0, 1) if bidirectional else (0,)
        ctx.log_sums = tuple(torch.empty_like(ctx.inverses[0]) for _ in ctx.directions)
        terms = []
        for direction in ctx.directions:
            for group in exchange.groups:
                found = statistics(_similarity(ctx, group, direction), reverse=False)
                ctx.log_sums[direction][group.own] = found.query_log_sum[0]
                terms.append(found.terms[0])
        loss, accuracy = torch.cat(terms, dim=1).mean(1)
        ctx.mark_non_differentiable(accuracy)
        return loss, accuracy

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx, grad_loss: torch.Tensor, _: torch.Tensor
    ) -> tuple[torch.Tensor | None, ...]:
        log_sums = tuple(gather_ranks(own, ctx.exchange.rows) for own in ctx.log_sums)
        factor = grad_loss * ctx.inverse_temperature / (len(ctx.directions) * len(ctx.sides[0]))
        gradients = []
        for side, embeddings in enumerate(ctx.sides):
            gradient = torch.empty_like(embeddings)
            for group in ctx.exchange.groups:
                own_log_sum = others_log_sum = None
                if side in ctx.directions:
                    own_log_sum = ctx.log_sums[side][group.own][None]
                if 1 - side in ctx.directions:
                    others_log_sum = group.select(log_sums[1 - side])[None]
                of_own, _ = query_gradients(
                    _similarity(ctx, group, side), own_log_sum, others_log_sum, factor
                )
                gradient[group.own] = of_own[0]
            gradients.append(gradient)
        return *gradients, None, None, None, None


def _similarity(ctx, group: OwnGroup, side: int) -> Similarity:
    """Compare this rank's clips of a side with the group's clips of the other side."""
    queries = ctx.sides[side][group.own][None]
    candidates = group.select(ctx.gathered[1 - side])[None]
    return Similarity(
        queries,
        candidates,
        ctx.inverses[side][group.own][None],
        inverse_norms(candidates, ctx.backend),
        ctx.inverse_temperature,
        group.first_own,
        ctx.backend,
    )
