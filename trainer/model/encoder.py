"""The encoders of CAV-MAE, which pretraining and fine-tuning share.

One encoder for each modality, and a joint one that all streams share. Single-device code,
independent of ranks. The published checkpoints have no level for the encoders in their names, so
the models inherit from this one instead of holding it.
"""

from collections.abc import Collection
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from cavmae.kernels import AttentionBackend, gather_patches
from cavmae.trainer.model.blocks import (
    Attention,
    Block,
    Modality,
    Recompute,
    Stream,
    norm_stream,
    pass_streams,
)
from cavmae.trainer.model.config import ModelConfig
from cavmae.trainer.model.cross_decoder import CrossAttention, CrossBlock
from cavmae.trainer.model.pos_embed import position_table

PATCH = 16
COMPILED_VERSIONS = 64
"""Compiled versions of a block: five token counts, with and without gradients, several batches."""


class PatchEmbed(nn.Module):
    """Linear projection of 16 x 16 patches, stored as the published convolution."""

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(channels, width, kernel_size=PATCH, stride=PATCH)

    def forward(
        self, pixels: torch.Tensor, ids: torch.Tensor, modality: torch.Tensor
    ) -> torch.Tensor:
        """Map (batch, channels, height, width) and ids (batch, kept) to (batch, kept, width).

        The modality vector is added to the bias, where it is free.
        """
        weight = self.proj.weight
        patches = gather_patches(pixels, ids, PATCH, dtype=weight.dtype)
        assert self.proj.bias is not None
        return F.linear(patches, weight.flatten(1), self.proj.bias + modality.flatten())


class AudioVideoEncoder(nn.Module):
    """Encoders of both modalities and the joint encoder.

    Args:
        config: sizes; those of the decoder are not used here.
        learnable_positions: train the position tables.
        single_stream_depth: how many of the last joint blocks the stream of a single modality
            passes; the joint stream passes all.
    """

    def __init__(
        self, config: ModelConfig, *, learnable_positions: bool, single_stream_depth: int
    ) -> None:
        super().__init__()
        self.config = config
        self.first_single_stream_block = config.joint_depth - single_stream_depth
        width = config.width

        self.patch_embed_a = PatchEmbed(1, width)
        self.patch_embed_v = PatchEmbed(3, width)
        self.modality_a = nn.Parameter(torch.zeros(1, 1, width))
        self.modality_v = nn.Parameter(torch.zeros(1, 1, width))
        self.pos_embed_a = positions(width, config.audio_grid, learnable=learnable_positions)
        self.pos_embed_v = positions(width, config.video_grid, learnable=learnable_positions)
        self.blocks_a = blocks(width, config.heads, config.modality_depth)
        self.blocks_v = blocks(width, config.heads, config.modality_depth)
        self.blocks_u = blocks(width, config.heads, config.joint_depth)
        self.norm_a = nn.LayerNorm(width)
        self.norm_v = nn.LayerNorm(width)
        self.norm = nn.LayerNorm(width)

    def _initialize(self) -> None:
        """Initialize Xavier matrices and normal tokens, as the published code does; a model calls
        this after it has added its own layers."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
            elif isinstance(module, PatchEmbed):
                nn.init.xavier_uniform_(module.proj.weight.data.flatten(1))
        for token in (self.modality_a, self.modality_v):
            nn.init.normal_(token, std=0.02)

    def compile_blocks(self) -> None:
        """Compile every transformer block in place at its first use; names stay as they are.

        Blocks of equal sizes share compiled code. Each number of tokens, batch and gradient mode is
        compiled separately; beyond torch's recompile limit blocks would run uncompiled.
        """
        dynamo: Any = torch._dynamo.config
        dynamo.recompile_limit = max(dynamo.recompile_limit, COMPILED_VERSIONS)
        for module in self.modules():
            if isinstance(module, Block | CrossBlock):
                module.compile(dynamic=False)

    def use_attention(self, backend: AttentionBackend | None) -> None:
        """Choose how attention is computed; None: the best backend of the device."""
        for module in self.modules():
            if isinstance(module, Attention | CrossAttention):
                module.backend = backend

    def recompute_blocks(self, how: Recompute) -> None:
        """Set activation checkpointing of every transformer block; see `Block.set_recomputed`."""
        for module in self.modules():
            if isinstance(module, Block | CrossBlock):
                module.set_recomputed(how)

    def embed_audio(self, log_mel: torch.Tensor) -> torch.Tensor:
        """Embed (batch, audio_frames, mel_bins) unmasked: (batch, width), float32."""
        return self.audio_tokens(log_mel).float().mean(dim=1)

    def embed_video(self, frame: torch.Tensor) -> torch.Tensor:
        """Embed (batch, 3, image_size, image_size) unmasked: (batch, width), float32."""
        return self.video_tokens(frame).float().mean(dim=1)

    def audio_tokens(self, log_mel: torch.Tensor) -> torch.Tensor:
        """Encode (batch, audio_frames, mel_bins) unmasked to the audio stream after its norm:
        (batch, audio tokens, width)."""
        return self.norm_a(self._joint_encoder({"audio": self._encode_all_audio(log_mel)})["audio"])

    def video_tokens(self, frame: torch.Tensor) -> torch.Tensor:
        """Encode (batch, 3, image_size, image_size) unmasked to the video stream after its norm:
        (batch, video tokens, width)."""
        return self.norm_v(self._joint_encoder({"video": self._encode_all_video(frame)})["video"])

    def _encode_all_audio(self, log_mel: torch.Tensor) -> torch.Tensor:
        ids = self._all_ids(self.config.audio_tokens, log_mel)
        return self._encode_audio(self._spectrogram(log_mel), ids)

    def _encode_all_video(self, frame: torch.Tensor) -> torch.Tensor:
        ids = self._all_ids(self.config.video_tokens, frame)
        return self._encode_video(self._checked_frame(frame), ids)

    def _spectrogram(self, log_mel: torch.Tensor) -> torch.Tensor:
        expected = (self.config.audio_frames, self.config.mel_bins)
        if log_mel.ndim != 3 or log_mel.shape[1:] != expected:
            raise ValueError(
                f"log_mel has shape {tuple(log_mel.shape)}; the model takes (batch, {expected[0]}, "
                f"{expected[1]}): change the input or model.audio_frames and model.mel_bins"
            )
        # Frequency becomes the height, so that patches run frequency-major as published.
        return log_mel.transpose(1, 2)[:, None]

    def _checked_frame(self, frame: torch.Tensor) -> torch.Tensor:
        side = self.config.image_size
        if frame.ndim != 4 or frame.shape[1:] != (3, side, side):
            raise ValueError(
                f"frame has shape {tuple(frame.shape)}; the model takes (batch, 3, {side}, {side}):"
                " change the input or model.image_size"
            )
        return frame

    @staticmethod
    def _all_ids(tokens: int, like: torch.Tensor) -> torch.Tensor:
        return torch.arange(tokens, device=like.device).expand(like.shape[0], -1)

    def _encode_audio(self, spectrogram: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        tokens = self.patch_embed_a(spectrogram, ids, self.modality_a)  # (batch, kept, width)
        tokens = tokens + self.pos_embed_a[0][ids]
        for block in self.blocks_a:
            tokens = block(tokens)
        return tokens

    def _encode_video(self, frame: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        tokens = self.patch_embed_v(frame, ids, self.modality_v)  # (batch, kept, width)
        tokens = tokens + self.pos_embed_v[0][ids]
        for block in self.blocks_v:
            tokens = block(tokens)
        return tokens

    def _joint_encoder(self, streams: dict[Stream, torch.Tensor]) -> dict[Stream, torch.Tensor]:
        """Pass all streams through the shared blocks, those of a block packed into a sequence."""
        for number, block in enumerate(self.blocks_u):
            passing = self._streams_through(number, streams)
            if passing:
                passed = pass_streams(block, {stream: streams[stream] for stream in passing})
                streams = {**streams, **passed}
        return streams

    def _streams_through(self, number: int, streams: Collection[Stream]) -> list[Stream]:
        """Return which of `streams` pass joint block `number`."""
        single = number >= self.first_single_stream_block
        return [stream for stream in streams if single or stream == "joint"]

    def _freeze(self, unused: list[str]) -> list[str]:
        for name in unused:
            self.get_parameter(name).requires_grad_(False)
        return unused

    def _encoder_uses(
        self, name: str, modalities: Collection[Modality], streams: Collection[Stream]
    ) -> bool:
        """Return whether a pass of `streams`, made of `modalities`, uses an encoder parameter."""
        owner, stream = name.split(".")[0], norm_stream(name)
        if owner == "blocks_u":
            passing = self._streams_through(int(name.split(".")[1]), streams)
            return bool(passing) if stream is None else stream in passing
        if owner.startswith("norm"):
            return stream in streams
        # A modality's own blocks have the norms of all streams too, and use the joint one's.
        modality: Modality = "audio" if owner.endswith("_a") else "video"
        return modality in modalities and stream in (None, "joint")


def positions(width: int, grid: tuple[int, int], *, learnable: bool) -> nn.Parameter:
    """Build a sine-cosine position table (1, tokens, width) as a parameter."""
    return nn.Parameter(position_table(width, grid), requires_grad=learnable)


def blocks(width: int, heads: int, depth: int) -> nn.ModuleList:
    """Build `depth` transformer blocks."""
    return nn.ModuleList([Block(width, heads) for _ in range(depth)])
