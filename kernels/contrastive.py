"""The contrastive loss between the audio and video embeddings of a batch (paper equation 1)."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F


@dataclass
class ContrastiveResult:
    """Attributes: loss, scalar float32; accuracy, scalar float32 share of pairs ranked first."""

    loss: torch.Tensor
    accuracy: torch.Tensor


def contrastive_loss(
    audio: torch.Tensor,
    video: torch.Tensor,
    temperature: float,
    bidirectional: bool,
    group_size: int | None = None,
) -> ContrastiveResult:
    """Softmax cross-entropy of the true pairs among all pairs of a group.

    Each video ranks the audio clips of its group; `bidirectional` averages this with each audio
    clip ranking the videos.

    Args:
        audio: (batch, width) any float dtype; normalised here.
        video: (batch, width).
        temperature: divides the cosine similarities.
        bidirectional: average both directions.
        group_size: consecutive pairs that rank each other; None: the whole batch.

    Raises:
        ValueError: the group size does not divide the batch.
    """
    batch = audio.shape[0]
    group = group_size or batch
    if batch % group:
        raise ValueError(f"group_size is {group}, which does not divide the batch of {batch} pairs")
    audio = F.normalize(audio.float(), dim=-1).unflatten(0, (-1, group))
    video = F.normalize(video.float(), dim=-1).unflatten(0, (-1, group))
    similarity = audio @ video.transpose(1, 2) / temperature  # (groups, audio, video)
    truth = torch.arange(group, device=audio.device)
    logits = [similarity.transpose(1, 2)]  # (groups, video, audio)
    if bidirectional:
        logits.append(similarity)
    losses = [F.cross_entropy(rows.flatten(0, 1), truth.repeat(len(rows))) for rows in logits]
    hits = [(rows.argmax(-1) == truth).float().mean() for rows in logits]
    return ContrastiveResult(torch.stack(losses).mean(), torch.stack(hits).mean())
