"""CAV-MAE: contrastive audio-visual masked autoencoder (Gong et al., ICLR 2023).

The encoders, and a decoder that reconstructs removed patches. Single-device code, independent of
ranks. Parameter names are those of the published checkpoints.
"""

from typing import NamedTuple

import torch
from torch import nn

from cavmae.kernels import MaskIds, gather_tokens, masked_reconstruction_loss, restore_tokens
from cavmae.trainer.model.blocks import Stream, norm_stream
from cavmae.trainer.model.config import ModelConfig
from cavmae.trainer.model.encoder import PATCH, AudioVideoEncoder, blocks, positions


class PretrainOutput(NamedTuple):
    """The output of a pretraining forward pass; None for what was not computed.

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


class CAVMAE(AudioVideoEncoder):
    """The pretraining model.

    The stream of a single modality passes the last joint block only, which is what the published
    pretraining does and matters with `joint_depth` above 1.

    Args:
        config: sizes; the defaults are the published base model.
    """

    def __init__(self, config: ModelConfig) -> None:
        learnable = config.learnable_positions
        super().__init__(config, learnable_positions=learnable, single_stream_depth=1)
        width, decoder_width = config.width, config.decoder_width

        self.decoder_embed = nn.Linear(width, decoder_width)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, decoder_width))
        self.decoder_modality_a = nn.Parameter(torch.zeros(1, 1, decoder_width))
        self.decoder_modality_v = nn.Parameter(torch.zeros(1, 1, decoder_width))
        self.decoder_pos_embed_a = positions(decoder_width, config.audio_grid, learnable=learnable)
        self.decoder_pos_embed_v = positions(decoder_width, config.video_grid, learnable=learnable)
        self.decoder_blocks = blocks(decoder_width, config.decoder_heads, config.decoder_depth)
        self.decoder_norm = nn.LayerNorm(decoder_width)
        self.decoder_pred_a = nn.Linear(decoder_width, PATCH * PATCH)
        self.decoder_pred_v = nn.Linear(decoder_width, PATCH * PATCH * 3)

        self._initialize()
        for token in (self.mask_token, self.decoder_modality_a, self.decoder_modality_v):
            nn.init.normal_(token, std=0.02)

    def freeze_unused(self, *, reconstruct: bool, contrast: bool) -> list[str]:
        """Stop gradients of the parameters that the chosen losses never use.

        An engine would otherwise fill their missing gradients with zeros, and weight decay would
        change them.

        Returns:
            The names of the parameters that no chosen loss uses.
        """
        streams: set[Stream] = set()
        if contrast:
            streams |= {"audio", "video"}
        if reconstruct:
            streams |= {"joint"}

        def is_used(name: str) -> bool:
            if name.startswith(("decoder_", "mask_token")):
                return reconstruct and norm_stream(name) in (None, "joint")
            return self._encoder_uses(name, ("audio", "video"), streams)

        return self._freeze([name for name, _ in self.named_parameters() if not is_used(name)])

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
                audio_embedding=audio_tokens.mean(dim=1, dtype=torch.float32),
                video_embedding=video_tokens.mean(dim=1, dtype=torch.float32),
            )
        if reconstruct:
            latent = self.norm(streams["joint"])
            # Audio patches come before video patches, here and in what is predicted.
            removed = torch.cat(
                [audio_mask.removed, video_mask.removed + self.config.audio_tokens], dim=1
            )
            decoded = self._decode(latent, audio_mask, video_mask, None if predict_all else removed)
            tokens = gather_tokens(decoded, removed) if predict_all else decoded
            predicted_audio, predicted_video = self._predict(tokens, audio_mask.removed.shape[1])
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
                predicted = self._predict(decoded, self.config.audio_tokens)
                output = output._replace(predicted_audio=predicted[0], predicted_video=predicted[1])
        return output

    def predict_patches(
        self, log_mel: torch.Tensor, frame: torch.Tensor, audio_mask: MaskIds, video_mask: MaskIds
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Predict every patch, without losses.

        A mask may keep all of a modality or nothing, for which no loss is defined: audio from the
        frame alone, or the frame from audio.

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

    def _decode(
        self,
        latent: torch.Tensor,
        audio_mask: MaskIds,
        video_mask: MaskIds,
        query_ids: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Decode joint tokens to decoder tokens of every audio, then video patch, before the last
        norm; with `query_ids` (batch, queries) of those patches alone."""
        x = self.decoder_embed(latent)  # (batch, kept, decoder_width)
        kept_audio, kept = audio_mask.keep.shape[1], x.shape[1]
        # The index of each patch's token in `x`; `kept` for removed patches.
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
        *others, last = self.decoder_blocks
        for block in others:
            x = block(x)
        return last(x, query_ids=query_ids)

    def _predict(self, tokens: torch.Tensor, audio: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Predict pixels of the first `audio` tokens (audio patches) and of the others (video)."""
        parts = self.decoder_norm(tokens).split([audio, tokens.shape[1] - audio], dim=1)
        return self.decoder_pred_a(parts[0]), self.decoder_pred_v(parts[1])
