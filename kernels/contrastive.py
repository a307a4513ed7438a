"""The contrastive loss between the audio and video embeddings of a batch (paper equation 1)."""

from dataclasses import dataclass

import torch
from torch.autograd.function import once_differentiable

from cavmae.kernels.backend import Backend, check_floats, choose_backend
from cavmae.kernels.similarity import (
    LARGEST_WIDTH,
    Similarity,
    embedding_gradients,
    inverse_norms,
    statistics,
)


@dataclass
class ContrastiveResult:
    """Attributes: loss, scalar float32; accuracy, scalar float32 share of pairs ranked first (a
    pair that ties with another candidate is not)."""

    loss: torch.Tensor
    accuracy: torch.Tensor


def contrastive_loss(
    audio: torch.Tensor,
    video: torch.Tensor,
    temperature: float | torch.Tensor,
    bidirectional: bool,
    group_size: int | None = None,
    row_offset: int = 0,
    *,
    backend: Backend | None = None,
) -> ContrastiveResult:
    """Softmax cross-entropy of the true pairs among all pairs of a group.

    `loss = mean over pairs of logsumexp_a(s[v, a]) - s[v, positive]` with
    `s[v, a] = cosine(video v, audio a) / temperature`: each video ranks the audio clips of its
    group. `bidirectional` averages this with each audio clip ranking the videos, from the same
    similarities.

    The similarity matrix is never stored: forward is one matrix product, backward four. Workspace
    is 32 MiB and some vectors.

    Args:
        audio: (batch, width) float, any strides; normalised here, width up to 2,048 in Triton.
        video: (batch, width), same dtype. Where one side is longer, its other embeddings are
            candidates without a positive.
        temperature: divides the cosine similarities; a 0-dimensional tensor may want a gradient.
        bidirectional: average both directions.
        group_size: consecutive pairs that rank each other; None: the whole batch.
        row_offset: place in the longer side of the first embedding of the shorter one's positive.
        backend: see `cavmae.kernels.backend`.

    Raises:
        ValueError: shapes, dtypes or devices that don't fit; a group size that does not divide the
            batch, or unequal sides with groups; a row offset beyond the longer side; a temperature
            that is a number and not above 0 (a tensor, which training may move there, makes the
            loss NaN).
    """
    chosen = choose_backend(backend, audio=audio, video=video)
    _check(audio, video, temperature, row_offset)
    if chosen == "triton":
        check_floats(audio=audio, video=video)
        if audio.shape[1] > LARGEST_WIDTH:
            raise ValueError(
                f"audio has width {audio.shape[1]}; the Triton kernel takes up to {LARGEST_WIDTH}"
            )
    if group_size is not None and (
        group_size < 1 or len(audio) != len(video) or len(audio) % group_size
    ):
        raise ValueError(
            f"group_size is {group_size}, which does not divide the batch of {len(audio)} pairs"
            + ("" if len(audio) == len(video) else f" (video has {len(video)} embeddings)")
        )
    exact = torch.promote_types(audio.dtype, torch.float32)
    if not isinstance(temperature, torch.Tensor):
        temperature = torch.full((), temperature, dtype=exact, device=audio.device)
    loss, accuracy = _Contrastive.apply(
        video.unflatten(0, (-1, group_size or len(video))),
        audio.unflatten(0, (-1, group_size or len(audio))),
        temperature,
        row_offset if len(video) <= len(audio) else -row_offset,
        bidirectional,
        chosen,
    )
    return ContrastiveResult(loss, accuracy)


def _check(
    audio: torch.Tensor, video: torch.Tensor, temperature: float | torch.Tensor, row_offset: int
) -> None:
    for name, x in (("audio", audio), ("video", video)):
        if x.ndim != 2 or 0 in x.shape:
            raise ValueError(f"{name} has shape {tuple(x.shape)}; it has to be (batch, width)")
    if audio.shape[1] != video.shape[1]:
        raise ValueError(f"video has width {video.shape[1]} and audio {audio.shape[1]}")
    if audio.dtype != video.dtype or not audio.is_floating_point():
        raise ValueError(f"video is {video.dtype} and audio {audio.dtype}; use one float dtype")
    if isinstance(temperature, torch.Tensor) and (
        temperature.numel() != 1 or temperature.device != audio.device
    ):
        raise ValueError(
            f"temperature has shape {tuple(temperature.shape)} on {temperature.device}; it has "
            f"to be one number on {audio.device}"
        )
    if not isinstance(temperature, torch.Tensor) and not temperature > 0:
        raise ValueError(f"temperature is {temperature}; use a value above 0")
    spare = abs(len(audio) - len(video))
    if not 0 <= row_offset <= spare:
        raise ValueError(
            f"row_offset is {row_offset}; for {len(audio)} audio and {len(video)} video embeddings "
            f"it goes from 0 to {spare}"
        )


class _Contrastive(torch.autograd.Function):
    """Videos are the queries: they rank in either case."""

    @staticmethod
    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx,
        video: torch.Tensor,
        audio: torch.Tensor,
        temperature: torch.Tensor,
        shift: int,
        bidirectional: bool,
        backend: Backend,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        video, audio = (x if x.stride(2) == 1 else x.contiguous() for x in (video, audio))
        video_inverse, audio_inverse = (inverse_norms(x, backend) for x in (video, audio))
        temperature_now = temperature.detach().to(video_inverse.dtype).reshape(())
        inverse_temperature = temperature_now.reciprocal()
        inverse_temperature = inverse_temperature.masked_fill(~(temperature_now > 0), torch.nan)
        similarity = Similarity(
            video, audio, video_inverse, audio_inverse, inverse_temperature, shift, backend
        )
        found = statistics(similarity, reverse=bidirectional)
        ctx.similarity, ctx.found, ctx.temperature = similarity, found, temperature
        loss, accuracy = found.terms.mean((0, 2))
        ctx.mark_non_differentiable(accuracy)
        return loss, accuracy

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx, grad_loss: torch.Tensor, _: torch.Tensor
    ) -> tuple[torch.Tensor | None, ...]:
        similarity, found = ctx.similarity, ctx.found
        of_video, of_audio = found.query_log_sum, found.candidate_log_sum
        directions, _, pairs = found.terms.shape
        factor = grad_loss * similarity.inverse_temperature / (directions * pairs)
        video, audio, alignment = embedding_gradients(similarity, of_video, of_audio, factor)
        temperature = None
        if ctx.needs_input_grad[2]:
            gradient = -alignment.sum() * similarity.inverse_temperature
            temperature = gradient.to(ctx.temperature.dtype).reshape(ctx.temperature.shape)
        return video, audio, temperature, None, None, None
