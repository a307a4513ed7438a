"""CAV-MAE: contrastive audio-visual masked autoencoder (Gong et al., ICLR 2023).

Two modality encoders, a joint encoder that all streams share, a decoder that reconstructs removed
patches. Single-device code: it knows nothing of ranks. Parameter names are those of the published
checkpoints.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from cavmae.kernels import (
    MaskIds,
    gather_patches,
    gather_tokens,
    masked_reconstruction_loss,
    restore_tokens,
)
from cavmae.trainer.model.blocks import Block, Stream
from cavmae.trainer.model.config import ModelConfig
from cavmae.trainer.model.positions import position_table

PATCH = 16


class PretrainOutput(NamedTuple):
    """What a pretraining forward returns; None where it was not asked for.

    A tuple, because the hooks of ZeRO-3 look for tensors in tuples, lists and dicts only.

    Attributes:
        audio_embedding, video_embedding: (batch, width) float32, mean over the kept tokens, not
            normalised.
        reconstruction_audio, reconstruction_video: scalar float32 losses, unweighted.
        predicted_audio: (batch, audio tokens, 256), every patch in original order.
        predicted_video: (batch, video tokens, 768).
        latent: (batch, kept audio + kept video, width) joint tokens after the final norm.
        audio_tokens, video_tokens: (batch, kept, width) contrastive streams after their norm.
    """

    audio_embedding: torch.Tensor | None = None
    video_embedding: torch.Tensor | None = None
    reconstruction_audio: torch.Tensor | None = None
    reconstruction_video: torch.Tensor | None = None
    predicted_audio: torch.Tensor | None = None
    predicted_video: torch.Tensor | None = None
    latent: torch.Tensor | None = None
    audio_tokens: torch.Tensor | None = None
    video_tokens: torch.Tensor | None = None


class PatchEmbed(nn.Module):
    """Linear projection of 16 x 16 patches, stored as the published convolution."""

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(channels, width, kernel_size=PATCH, stride=PATCH)

    def forward(
        self, pixels: torch.Tensor, ids: torch.Tensor, modality: torch.Tensor
    ) -> torch.Tensor:
        """(batch, channels, height, width) and ids (batch, kept) to (batch, kept, width).

        The modality vector is added to the bias, where it costs nothing.
        """
        weight = self.proj.weight
        patches = gather_patches(pixels, ids, PATCH, dtype=weight.dtype)
        assert self.proj.bias is not None
        return F.linear(patches, weight.flatten(1), self.proj.bias + modality.flatten())


class CAVMAE(nn.Module):
    """The pretraining model.

    Args:
        config: sizes; the defaults are the published base model.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        width, decoder_width = config.width, config.decoder_width

        self.patch_embed_a = PatchEmbed(1, width)
        self.patch_embed_v = PatchEmbed(3, width)
        self.modality_a = nn.Parameter(torch.zeros(1, 1, width))
        self.modality_v = nn.Parameter(torch.zeros(1, 1, width))
        self.pos_embed_a = self._positions(width, config.audio_grid)
        self.pos_embed_v = self._positions(width, config.video_grid)
        self.blocks_a = self._blocks(width, config.heads, config.modality_depth)
        self.blocks_v = self._blocks(width, config.heads, config.modality_depth)
        self.blocks_u = self._blocks(width, config.heads, config.joint_depth)
        self.norm_a = nn.LayerNorm(width)
        self.norm_v = nn.LayerNorm(width)
        self.norm = nn.LayerNorm(width)

        self.decoder_embed = nn.Linear(width, decoder_width)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, decoder_width))
        self.decoder_modality_a = nn.Parameter(torch.zeros(1, 1, decoder_width))
        self.decoder_modality_v = nn.Parameter(torch.zeros(1, 1, decoder_width))
        self.decoder_pos_embed_a = self._positions(decoder_width, config.audio_grid)
        self.decoder_pos_embed_v = self._positions(decoder_width, config.video_grid)
        self.decoder_blocks = self._blocks(
            decoder_width, config.decoder_heads, config.decoder_depth
        )
        self.decoder_norm = nn.LayerNorm(decoder_width)
        self.decoder_pred_a = nn.Linear(decoder_width, PATCH * PATCH)
        self.decoder_pred_v = nn.Linear(decoder_width, PATCH * PATCH * 3)

        self._initialize()

    def _positions(self, width: int, grid: tuple[int, int]) -> nn.Parameter:
        return nn.Parameter(
            position_table(width, grid), requires_grad=self.config.learnable_positions
        )

    @staticmethod
    def _blocks(width: int, heads: int, depth: int) -> nn.ModuleList:
        return nn.ModuleList([Block(width, heads) for _ in range(depth)])

    def _initialize(self) -> None:
        """Xavier matrices and normal tokens, as the published code starts."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
            elif isinstance(module, PatchEmbed):
                nn.init.xavier_uniform_(module.proj.weight.data.flatten(1))
        for name in ("modality_a", "modality_v", "mask_token"):
            nn.init.normal_(getattr(self, name), std=0.02)
        for name in ("decoder_modality_a", "decoder_modality_v"):
            nn.init.normal_(getattr(self, name), std=0.02)

    def freeze_unused(self, *, reconstruct: bool, contrast: bool) -> list[str]:
        """Stop gradients of the parameters that the chosen losses never use.

        An engine would otherwise fill their missing gradients with zeros, and weight decay would
        move them.

        Returns:
            The names of the parameters that no chosen loss uses.
        """
        unused = [
            name
            for name, _ in self.named_parameters()
            if not self._is_used(name, reconstruct=reconstruct, contrast=contrast)
        ]
        for name in unused:
            self.get_parameter(name).requires_grad_(False)
        return unused

    def compile_blocks(self) -> None:
        """Compile every transformer block in place at its first use; names stay as they are."""
        for blocks in (self.blocks_a, self.blocks_v, self.blocks_u, self.decoder_blocks):
            for block in blocks:
                block.compile()

    def _is_used(self, name: str, *, reconstruct: bool, contrast: bool) -> bool:
        owner = name.split(".")[0]
        module = name.split(".")[-2] if "." in name else ""
        modality_norm = module in ("norm1_a", "norm2_a", "norm1_v", "norm2_v")
        if owner == "blocks_u":
            if int(name.split(".")[1]) < self.config.joint_depth - 1:
                return reconstruct and not modality_norm
            if modality_norm:
                return contrast
            return reconstruct or module not in ("norm1", "norm2")
        if owner in ("norm_a", "norm_v"):
            return contrast
        if owner == "norm" or owner == "mask_token" or owner.startswith("decoder_"):
            return reconstruct and not modality_norm
        return not modality_norm

    def forward(
        self,
        log_mel: torch.Tensor,
        frame: torch.Tensor,
        audio_mask: MaskIds,
        video_mask: MaskIds,
        *,
        reconstruct: bool = True,
        contrast: bool = True,
        norm_pix: bool = True,
        predict_all: bool = False,
    ) -> PretrainOutput:
        """Encode the kept patches; pool them for the contrastive loss, reconstruct the others.

        Args:
            log_mel: (batch, audio_frames, mel_bins) normalised log-mel.
            frame: (batch, 3, image_size, image_size) normalised image.
            audio_mask, video_mask: which patches the encoders see.
            reconstruct: run the decoder and its loss.
            contrast: run the two single-modality streams of the joint encoder.
            norm_pix: reconstruct patches normalised one by one.
            predict_all: also return the prediction of every patch.

        Raises:
            ValueError: an input whose size is not the model's.
        """
        spectrogram = self._spectrogram(log_mel)  # (batch, 1, mel_bins, audio_frames)
        frame = self._checked_frame(frame)
        audio = self._encode_audio(spectrogram, audio_mask.keep)  # (batch, kept audio, width)
        video = self._encode_video(frame, video_mask.keep)  # (batch, kept video, width)

        streams: dict[Stream, torch.Tensor] = {}
        if contrast:
            streams |= {"audio": audio, "video": video}
        if reconstruct:
            streams |= {"joint": torch.cat([audio, video], dim=1)}
        streams = self._joint_encoder(streams)

        output = PretrainOutput()
        if contrast:
            audio_tokens = self.norm_a(streams["audio"])
            video_tokens = self.norm_v(streams["video"])
            output = output._replace(
                audio_tokens=audio_tokens,
                video_tokens=video_tokens,
                audio_embedding=audio_tokens.float().mean(dim=1),
                video_embedding=video_tokens.float().mean(dim=1),
            )
        if reconstruct:
            latent = self.norm(streams["joint"])
            tokens = self._decode(latent, audio_mask, video_mask)
            # Audio patches come before video patches, here and in what is predicted.
            removed = [audio_mask.removed, video_mask.removed + self.config.audio_tokens]
            predicted_audio, predicted_video = self._predict(
                gather_tokens(tokens, torch.cat(removed, dim=1)), removed[0].shape[1]
            )
            output = output._replace(
                latent=latent,
                reconstruction_audio=masked_reconstruction_loss(
                    predicted_audio, spectrogram, audio_mask.removed, norm_pix
                ),
                reconstruction_video=masked_reconstruction_loss(
                    predicted_video, frame, video_mask.removed, norm_pix
                ),
            )
            if predict_all:
                predicted = self._predict(tokens, self.config.audio_tokens)
                output = output._replace(predicted_audio=predicted[0], predicted_video=predicted[1])
        return output

    def predict_patches(
        self,
        log_mel: torch.Tensor,
        frame: torch.Tensor,
        audio_mask: MaskIds,
        video_mask: MaskIds,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Every patch as the decoder predicts it, without losses.

        A mask may keep all of a modality or nothing, which no loss is defined for: the sound from
        the frame alone, and the other way.

        Args:
            log_mel: (batch, audio_frames, mel_bins) normalised log-mel.
            frame: (batch, 3, image_size, image_size) normalised image.
            audio_mask, video_mask: which patches the encoders see.

        Returns:
            (batch, audio tokens, 256) and (batch, video tokens, 768), original order.

        Raises:
            ValueError: an input whose size is not the model's.
        """
        audio = self._encode_audio(self._spectrogram(log_mel), audio_mask.keep)
        video = self._encode_video(self._checked_frame(frame), video_mask.keep)
        joint = torch.cat([audio, video], dim=1)  # (batch, kept audio + kept video, width)
        latent = self.norm(self._joint_encoder({"joint": joint})["joint"])
        tokens = self._decode(latent, audio_mask, video_mask)
        return self._predict(tokens, self.config.audio_tokens)

    def embed_audio(self, log_mel: torch.Tensor) -> torch.Tensor:
        """(batch, audio_frames, mel_bins) to the unmasked embedding (batch, width), float32."""
        spectrogram = self._spectrogram(log_mel)
        tokens = self._encode_audio(spectrogram, self._all_ids(self.config.audio_tokens, log_mel))
        tokens = self._joint_encoder({"audio": tokens})["audio"]
        return self.norm_a(tokens).float().mean(dim=1)

    def embed_video(self, frame: torch.Tensor) -> torch.Tensor:
        """(batch, 3, image_size, image_size) to the unmasked embedding (batch, width), float32."""
        frame = self._checked_frame(frame)
        tokens = self._encode_video(frame, self._all_ids(self.config.video_tokens, frame))
        tokens = self._joint_encoder({"video": tokens})["video"]
        return self.norm_v(tokens).float().mean(dim=1)

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
        """All streams through the shared blocks.

        The streams of one modality pass the last block only, in one packed pass with the joint
        stream. That matters with `joint_depth` above 1, where it is what the published pretraining
        does.
        """
        *earlier_blocks, last_block = self.blocks_u
        if "joint" in streams:
            joint = streams["joint"]
            for block in earlier_blocks:
                joint = block(joint)
            streams["joint"] = joint
        segments = {stream: tokens.shape[1] for stream, tokens in streams.items()}
        packed = last_block(torch.cat(list(streams.values()), dim=1), segments)
        parts = packed.split(list(segments.values()), dim=1)
        return dict(zip(streams, parts, strict=True))

    def _decode(
        self, latent: torch.Tensor, audio_mask: MaskIds, video_mask: MaskIds
    ) -> torch.Tensor:
        """Joint tokens to decoder tokens of every audio, then video patch, before the last norm."""
        x = self.decoder_embed(latent)  # (batch, kept, decoder_width)
        kept_audio, kept = audio_mask.keep.shape[1], x.shape[1]
        # Where each patch's token is in `x`; `kept` for those that were removed.
        audio, video = audio_mask.restore, video_mask.restore
        kept_video = kept - kept_audio
        places = torch.cat(
            [
                torch.where(audio < kept_audio, audio, kept),
                torch.where(video < kept_video, video + kept_audio, kept),
            ],
            dim=1,
        )
        grids = (self.config.audio_tokens, self.config.video_tokens)
        modalities = (self.decoder_modality_a, self.decoder_modality_v)
        x = restore_tokens(
            x,
            places,
            self.mask_token,
            torch.cat([self.decoder_pos_embed_a, self.decoder_pos_embed_v], dim=1),
            torch.cat(
                [m.expand(-1, count, -1) for m, count in zip(modalities, grids, strict=True)], dim=1
            ),
        )  # (batch, all tokens, decoder_width)
        for block in self.decoder_blocks:
            x = block(x)
        return x

    def _predict(self, tokens: torch.Tensor, audio: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Pixels of the first `audio` tokens, which are audio patches, and of the others."""
        tokens = self.decoder_norm(tokens)
        return self.decoder_pred_a(tokens[:, :audio]), self.decoder_pred_v(tokens[:, audio:])
