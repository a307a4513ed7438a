"""The operations of the published CAV-MAE training step in plain torch: the baseline for speed.

Our own rendering of the arithmetic; the original (BSD-2-Clause) was consulted, none of it copied.
It does what the published model does where that costs time: every patch is embedded and most are
thrown away afterwards, the shared block runs three times, attention is two matrix products with a
softmax between, the decoder predicts every patch and the loss masks most of them out. DataParallel
is left out. Parameter names are the published ones, so the same weights load here and in
`cavmae.trainer.model`.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from cavmae.trainer.model.config import ModelConfig
from cavmae.trainer.model.pos_embed import position_table

PATCH = 16
TEMPERATURE = 0.05


@dataclass
class PublishedOutput:
    """Results of the published forward pass, and intermediate arrays.

    Attributes:
        loss: weighted sum of the losses; the parts below are unweighted.
        reconstruction_audio, reconstruction_video, contrast, accuracy: scalars.
        latent: (batch, kept audio + kept video, width) joint tokens.
        audio_tokens, video_tokens: (batch, kept, width) contrastive streams.
        predicted_audio, predicted_video: (batch, patches, pixels of a patch).
    """

    loss: torch.Tensor
    reconstruction_audio: torch.Tensor
    reconstruction_video: torch.Tensor
    contrast: torch.Tensor
    accuracy: torch.Tensor
    latent: torch.Tensor
    audio_tokens: torch.Tensor
    video_tokens: torch.Tensor
    predicted_audio: torch.Tensor
    predicted_video: torch.Tensor


class Attention(nn.Module):
    """Self-attention that stores its whole attention matrix."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, tokens, width = x.shape
        head_width = width // self.heads
        qkv = self.qkv(x).view(batch, tokens, 3, self.heads, head_width).permute(2, 0, 3, 1, 4)
        query, key, value = qkv.unbind(0)  # (batch, heads, tokens, head width)
        weights = (query @ key.transpose(2, 3) * head_width**-0.5).softmax(dim=3)
        return self.proj((weights @ value).transpose(1, 2).reshape(batch, tokens, width))


class Mlp(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, 4 * width)
        self.fc2 = nn.Linear(4 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class Block(nn.Module):
    """Pre-norm block with three sets of norms, chosen by stream: "", "_a" or "_v"."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        for norm in ("norm1", "norm2"):
            for stream in ("", "_a", "_v"):
                self.add_module(norm + stream, nn.LayerNorm(width))
        self.attn = Attention(width, heads)
        self.mlp = Mlp(width)

    def forward(self, x: torch.Tensor, stream: str = "") -> torch.Tensor:
        x = x + self.attn(self.get_submodule(f"norm1{stream}")(x))
        return x + self.mlp(self.get_submodule(f"norm2{stream}")(x))


class PatchEmbed(nn.Module):
    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(channels, width, kernel_size=PATCH, stride=PATCH)

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        return self.proj(pixels).flatten(2).transpose(1, 2)  # (batch, patches, width)


class PublishedCAVMAE(nn.Module):
    """The published pretraining model on one device."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        width, decoder_width = config.width, config.decoder_width

        def positions(channels: int, grid: tuple[int, int]) -> nn.Parameter:
            return nn.Parameter(
                position_table(channels, grid), requires_grad=config.learnable_positions
            )

        def token(channels: int) -> nn.Parameter:
            return nn.Parameter(0.02 * torch.randn(1, 1, channels))

        def blocks(channels: int, heads: int, depth: int) -> nn.ModuleList:
            return nn.ModuleList(Block(channels, heads) for _ in range(depth))

        self.patch_embed_a = PatchEmbed(1, width)
        self.patch_embed_v = PatchEmbed(3, width)
        self.modality_a, self.modality_v = token(width), token(width)
        self.pos_embed_a = positions(width, config.audio_grid)
        self.pos_embed_v = positions(width, config.video_grid)
        self.blocks_a = blocks(width, config.heads, config.modality_depth)
        self.blocks_v = blocks(width, config.heads, config.modality_depth)
        self.blocks_u = blocks(width, config.heads, config.joint_depth)
        self.norm_a, self.norm_v, self.norm = (nn.LayerNorm(width) for _ in range(3))
        self.decoder_embed = nn.Linear(width, decoder_width)
        self.mask_token = token(decoder_width)
        self.decoder_modality_a, self.decoder_modality_v = (token(decoder_width) for _ in range(2))
        self.decoder_pos_embed_a = positions(decoder_width, config.audio_grid)
        self.decoder_pos_embed_v = positions(decoder_width, config.video_grid)
        self.decoder_blocks = blocks(decoder_width, config.decoder_heads, config.decoder_depth)
        self.decoder_norm = nn.LayerNorm(decoder_width)
        self.decoder_pred_a = nn.Linear(decoder_width, PATCH * PATCH)
        self.decoder_pred_v = nn.Linear(decoder_width, PATCH * PATCH * 3)

    def forward(
        self,
        log_mel: torch.Tensor,
        image: torch.Tensor,
        *,
        audio_ratio: float = 0.75,
        video_ratio: float = 0.75,
        reconstruction_weight: float = 1.0,
        contrastive_weight: float = 0.01,
        norm_pix: bool = True,
        shuffles: tuple[torch.Tensor, torch.Tensor] | None = None,
    ) -> PublishedOutput:
        """The published loss with both of its parts.

        Args:
            log_mel: (batch, audio_frames, mel_bins).
            image: (batch, 3, side, side).
            shuffles: int64 permutations of audio and video patches, (batch, patches) each; None
                draws them, as training does.
        """
        spectrogram = log_mel.unsqueeze(1).transpose(2, 3)  # (batch, 1, mel_bins, audio_frames)
        audio = self.patch_embed_a(spectrogram) + self.pos_embed_a + self.modality_a
        video = self.patch_embed_v(image) + self.pos_embed_v + self.modality_v
        shuffle_a, shuffle_v = shuffles or (_draw(audio), _draw(video))
        audio, mask_a, restore_a = _keep(audio, shuffle_a, audio_ratio)
        video, mask_v, restore_v = _keep(video, shuffle_v, video_ratio)
        for block in self.blocks_a:
            audio = block(audio)
        for block in self.blocks_v:
            video = block(video)

        latent = torch.cat([audio, video], dim=1)
        for block in self.blocks_u:
            latent = block(latent)
        latent = self.norm(latent)
        # With several shared blocks, the published streams of one modality pass the last one only.
        audio_tokens = self.norm_a(self.blocks_u[-1](audio, "_a"))
        video_tokens = self.norm_v(self.blocks_u[-1](video, "_v"))

        predicted_a, predicted_v = self._decode(latent, audio.shape[1], restore_a, restore_v)
        loss_a = _masked_loss(predicted_a, spectrogram, mask_a, norm_pix)
        loss_v = _masked_loss(predicted_v, image, mask_v, norm_pix)
        contrast, accuracy = _contrast(audio_tokens.mean(dim=1), video_tokens.mean(dim=1))
        return PublishedOutput(
            reconstruction_weight * (loss_a + loss_v) + contrastive_weight * contrast,
            loss_a,
            loss_v,
            contrast,
            accuracy,
            latent,
            audio_tokens,
            video_tokens,
            predicted_a,
            predicted_v,
        )

    def _decode(
        self,
        latent: torch.Tensor,
        kept_audio: int,
        restore_a: torch.Tensor,
        restore_v: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Predictions of every patch of both modalities."""
        x = self.decoder_embed(latent)
        audio = self._with_mask_tokens(x[:, :kept_audio], restore_a)
        video = self._with_mask_tokens(x[:, kept_audio:], restore_v)
        x = torch.cat([audio, video], dim=1)
        x = x + torch.cat([self.decoder_pos_embed_a, self.decoder_pos_embed_v], dim=1)
        patches = audio.shape[1]
        x = torch.cat(
            [x[:, :patches] + self.decoder_modality_a, x[:, patches:] + self.decoder_modality_v],
            dim=1,
        )
        for block in self.decoder_blocks:
            x = block(x)
        x = self.decoder_norm(x)
        return self.decoder_pred_a(x[:, :patches]), self.decoder_pred_v(x[:, patches:])

    def _with_mask_tokens(self, kept: torch.Tensor, restore: torch.Tensor) -> torch.Tensor:
        batch, count, width = kept.shape
        removed = self.mask_token.repeat(batch, restore.shape[1] - count, 1).to(kept.dtype)
        full = torch.cat([kept, removed], dim=1)
        return full.gather(1, restore.unsqueeze(2).repeat(1, 1, width))


def _draw(tokens: torch.Tensor) -> torch.Tensor:
    """(batch, tokens) a random permutation per sample."""
    return torch.rand(tokens.shape[:2], device=tokens.device).argsort(dim=1)


def _keep(
    tokens: torch.Tensor, shuffle: torch.Tensor, ratio: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The kept tokens, a (batch, tokens) mask with 1 where removed, and the inverse shuffle."""
    batch, count, width = tokens.shape
    kept = int(count * (1 - ratio))
    restore = shuffle.argsort(dim=1)
    mask = torch.ones(batch, count, device=tokens.device)
    mask[:, :kept] = 0
    mask = mask.gather(1, restore)
    index = shuffle[:, :kept].unsqueeze(2).repeat(1, 1, width)
    return tokens.gather(1, index), mask, restore


def _masked_loss(
    predicted: torch.Tensor, pixels: torch.Tensor, mask: torch.Tensor, norm_pix: bool
) -> torch.Tensor:
    """Mean squared error of every patch, averaged over the removed ones."""
    batch, channels, height, width = pixels.shape
    rows, columns = height // PATCH, width // PATCH
    target = pixels.reshape(batch, channels, rows, PATCH, columns, PATCH)
    target = target.permute(0, 2, 4, 3, 5, 1).reshape(batch, rows * columns, -1)
    if norm_pix:
        mean, variance = target.mean(dim=2, keepdim=True), target.var(dim=2, keepdim=True)
        target = (target - mean) / (variance + 1e-6).sqrt()
    per_patch = (predicted - target).square().mean(dim=2)
    return (per_patch * mask).sum() / mask.sum()


def _contrast(audio: torch.Tensor, video: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Each video ranks the audio clips: loss and share of pairs ranked first."""
    similarity = F.normalize(audio, dim=1) @ F.normalize(video, dim=1).T / TEMPERATURE
    loss = -similarity.log_softmax(dim=0).diagonal().mean()
    truth = torch.arange(len(similarity), device=similarity.device)
    return loss, (similarity.softmax(dim=0).argmax(dim=0) == truth).float().mean()
