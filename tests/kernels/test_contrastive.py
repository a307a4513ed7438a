"""The contrastive loss against its formula written out."""

import pytest
import torch

from cavmae.kernels import contrastive_loss


def pairs(batch: int = 12, width: int = 8) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    audio = torch.randn(batch, width, generator=generator, dtype=torch.float64)
    return audio, audio + torch.randn(batch, width, generator=generator, dtype=torch.float64)


def written_out(audio: torch.Tensor, video: torch.Tensor) -> torch.Tensor:
    """Each video ranks the audio clips."""
    audio, video = audio / audio.norm(dim=1, keepdim=True), video / video.norm(dim=1, keepdim=True)
    similarity = audio @ video.T / 0.05
    return -(similarity.diagonal() - similarity.exp().sum(0).log()).mean()


def test_one_direction_lets_each_video_rank_the_audio_clips() -> None:
    audio, video = pairs()
    result = contrastive_loss(audio, video, 0.05, bidirectional=False)
    torch.testing.assert_close(result.loss.double(), written_out(audio, video), rtol=1e-5, atol=0)


def test_bidirectional_averages_both_directions() -> None:
    audio, video = pairs()
    result = contrastive_loss(audio, video, 0.05, bidirectional=True)
    expected = (written_out(audio, video) + written_out(video, audio)) / 2
    torch.testing.assert_close(result.loss.double(), expected, rtol=1e-5, atol=0)


def test_groups_are_separate_softmaxes() -> None:
    audio, video = pairs()
    grouped = contrastive_loss(audio, video, 0.05, False, group_size=4)
    parts = [
        contrastive_loss(audio[start : start + 4], video[start : start + 4], 0.05, False)
        for start in (0, 4, 8)
    ]
    torch.testing.assert_close(grouped.loss, torch.stack([part.loss for part in parts]).mean())
    torch.testing.assert_close(
        grouped.accuracy, torch.stack([part.accuracy for part in parts]).mean()
    )


def test_accuracy_counts_the_pairs_that_rank_first() -> None:
    audio = torch.eye(4)
    video = torch.eye(4)[[0, 1, 3, 2]]
    assert contrastive_loss(audio, video, 0.05, True).accuracy.item() == 0.5


def test_a_group_size_that_does_not_divide_is_an_error_with_both_numbers() -> None:
    audio, video = pairs()
    with pytest.raises(ValueError, match=r"group_size is 5.*12 pairs"):
        contrastive_loss(audio, video, 0.05, False, group_size=5)
