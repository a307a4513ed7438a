"""What a model makes of a medium."""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Tokens:
    """Tokens of patches, each with its place.

    Attributes:
        values: (windows, tokens, width) float32, after the last norm; their mean over tokens is the
            embedding.
        places: (windows, tokens, 4) float64. Of audio: start and end in seconds of the medium,
            first mel bin and the one after the last. Of video: left, top, right and bottom of the
            patch, as fractions of the picture's width and height.
    """

    values: torch.Tensor
    places: torch.Tensor


@dataclass(frozen=True)
class Embedding:
    """Embeddings of one medium, not normalised.

    Attributes:
        audio: of the sound, (width,) float32 on the CPU, or (windows, width) if windows were asked
            for; None: no sound.
        video: of the pictures, likewise.
        audio_seconds: (windows, 2), start and end of each window that has sound.
        video_seconds: likewise, of each that has a picture.
        audio_tokens, video_tokens: of the patches, if they were asked for.
    """

    audio: torch.Tensor | None
    video: torch.Tensor | None
    audio_seconds: torch.Tensor
    video_seconds: torch.Tensor
    audio_tokens: Tokens | None = None
    video_tokens: Tokens | None = None


@dataclass(frozen=True)
class Classification:
    """Classes of one medium.

    Attributes:
        labels: display name of each class; numbers where names are unknown.
        scores: probability of each class, (classes,) float32 on the CPU, averaged over windows, or
            (windows, classes) if these were asked for: sigmoids of a model that was trained with
            `bce`, a softmax of one trained with `cross_entropy`.
        logits: (windows, classes) float32.
        seconds: (windows, 2), start and end of each window.
    """

    labels: tuple[str, ...]
    scores: torch.Tensor
    logits: torch.Tensor
    seconds: torch.Tensor

    def top(self, count: int = 5) -> list[tuple[str, float]]:
        """Return the classes with the highest scores (of windows: their mean), best first."""
        scores = self.scores if self.scores.ndim == 1 else self.scores.mean(0)
        best = scores.topk(min(count, len(scores)))
        pairs = zip(best.indices.tolist(), best.values.tolist(), strict=True)
        return [(self.labels[number], score) for number, score in pairs]
