"""CAV-MAE: contrastive audio-visual masked autoencoder (Gong et al., ICLR 2023).

The encoders, and a decoder that reconstructs removed patches. Single-device code, independent of
ranks. Parameter names are those of the published checkpoints.
"""

from collections.abc import Collection
from typing import NamedTuple

import torch
from torch import nn

from cavmae.kernels import MaskIds, gather_tokens, masked_reconstruction_loss, restore_tokens
from cavmae.trainer.model.blocks import Block, Modality, Stream, norm_stream
from cavmae.trainer.model.config import ModelConfig
from cavmae.trainer.model.cross_decoder import CrossBlock
from cavmae.trainer.model.encoder import PATCH, AudioVideoEncoder, positions


class PretrainOutput(NamedTuple):
    """The output of a pretraining forward pass; None for what was not computed.

    A tuple, because the hooks of ZeRO-3 look for tensors in tuples, lists and dicts only.

    Attributes:
        audio_embedding, video_embedding: (batch, width) float32, mean over the kept tokens, not
            normalised.
        reconstruction_audio, reconstruction_video: scalar float32 losses, unweighted.
        predicted_audio: (batch, audio tokens, 256), every patch in original order.
        predicted_video: (batch, video tokens, 768).
        latent: (batch, kept audio + kept video, width) joint tokens after the final norm; of one
            modality, its tokens after its norm.
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

    @property
    def reconstructions(self) -> dict[Modality, torch.Tensor]:
        """The reconstruction losses that were computed."""
        losses: dict[Modality, torch.Tensor | None] = {
            "audio": self.reconstruction_audio,
            "video": self.reconstruction_video,
        }
        return {name: loss for name, loss in losses.items() if loss is not None}


class CAVMAE(AudioVideoEncoder):
    """The pretraining model.

    The stream of a single modality passes the last joint block only, which is what the published
    pretraining does and matters with `joint_depth` above 1. A model that is given one modality
    reconstructs it from this stream, the one that its embedding and its classifier are made of.

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
        self.decoder_blocks = nn.ModuleList(
            (Block if config.decoder == "self" else CrossBlock)(decoder_width, config.decoder_heads)
            for _ in range(config.decoder_depth)
        )
        self.decoder_norm = nn.LayerNorm(decoder_width)
        self.decoder_pred_a = nn.Linear(decoder_width, PATCH * PATCH)
        self.decoder_pred_v = nn.Linear(decoder_width, PATCH * PATCH * 3)

        self._initialize()
        for token in (self.mask_token, self.decoder_modality_a, self.decoder_modality_v):
            nn.init.normal_(token, std=0.02)

    def freeze_unused(
        self,
        *,
        reconstruct: bool,
        contrast: bool,
        modalities: Collection[Modality] = ("audio", "video"),
    ) -> list[str]:
        """Stop gradients of the parameters that the chosen losses never use.

        An engine would otherwise fill their missing gradients with zeros, and weight decay would
        change them.

        Args:
            reconstruct, contrast: the losses.
            modalities: that the model is given.

        Returns:
            The names of the parameters that no chosen loss uses.
        """
        streams: set[Stream] = set()
        if contrast:
            streams |= set(modalities)
        if reconstruct:
            streams |= {_whole_stream(modalities)}

        def is_used(name: str) -> bool:
            if name.startswith(("decoder_", "mask_token")):
                of = {"_a": "audio", "_v": "video"}.get(name.split(".")[0][-2:])
                read = of is None or of in modalities
                return reconstruct and read and norm_stream(name) in (None, "joint")
            return self._encoder_uses(name, modalities, streams)

        return self._freeze([name for name, _ in self.named_parameters() if not is_used(name)])

    def forward(
        self,
        log_mel: torch.Tensor | None,
        frame: torch.Tensor | None,
        audio_mask: MaskIds | None,
        video_mask: MaskIds | None,
        *,
        reconstruct: bool = True,
        contrast: bool = True,
        norm_pix: bool = True,
        predict_all: bool = False,
    ) -> PretrainOutput:
        """Encode the kept patches; pool them for the contrastive loss, reconstruct the others.

        Nothing is computed of a modality that is None, mask included.

        Args:
            log_mel: (batch, audio_frames, mel_bins) normalised log-mel.
            frame: (batch, 3, image_size, image_size) normalised image.
            audio_mask, video_mask: which patches the encoders see.
            reconstruct: run the decoder and its loss.
            contrast: run the two single-modality streams of the joint encoder.
            norm_pix: reconstruct patches normalised one by one.
            predict_all: also return the prediction of every patch.

        Raises:
            ValueError: an input whose size is not the model's, or none.
        """
        # Audio comes before video, here and in everything below.
        pixels: dict[Modality, torch.Tensor] = {}
        masks: dict[Modality, MaskIds] = {}
        encoded: dict[Modality, torch.Tensor] = {}
        if log_mel is not None and audio_mask is not None:
            pixels["audio"] = self._spectrogram(log_mel)  # (batch, 1, mel_bins, audio_frames)
            masks["audio"] = audio_mask
            encoded["audio"] = self._encode_audio(pixels["audio"], audio_mask.keep)
        if frame is not None and video_mask is not None:
            pixels["video"] = self._checked_frame(frame)
            masks["video"] = video_mask
            encoded["video"] = self._encode_video(pixels["video"], video_mask.keep)
        if not encoded:
            raise ValueError("log_mel and frame, or their masks, are None; give one with its mask")

        whole = _whole_stream(encoded)
        streams: dict[Stream, torch.Tensor] = {}
        if contrast:
            streams |= encoded
        if reconstruct:
            streams |= {whole: torch.cat(list(encoded.values()), dim=1)}
        streams = self._joint_encoder(streams)

        norms = {"joint": self.norm, "audio": self.norm_a, "video": self.norm_v}
        output = PretrainOutput()
        if contrast:
            normed = {modality: norms[modality](streams[modality]) for modality in encoded}
            pooled = {name: x.mean(dim=1, dtype=torch.float32) for name, x in normed.items()}
            output = output._replace(
                audio_tokens=normed.get("audio"),
                video_tokens=normed.get("video"),
                audio_embedding=pooled.get("audio"),
                video_embedding=pooled.get("video"),
            )
        if reconstruct:
            latent = norms[whole](streams[whole])
            decoded = self._decode(latent, masks, every=predict_all)
            tokens = gather_tokens(decoded, self._removed(masks)) if predict_all else decoded
            predicted = self._predict(
                tokens, {name: mask.removed.shape[1] for name, mask in masks.items()}
            )
            losses = {
                name: masked_reconstruction_loss(
                    predicted[name], pixels[name], mask.removed, norm_pix
                )
                for name, mask in masks.items()
            }
            output = output._replace(
                latent=latent,
                reconstruction_audio=losses.get("audio"),
                reconstruction_video=losses.get("video"),
            )
            if predict_all:
                every = self._predict(decoded, {name: self._patches(name) for name in masks})
                output = output._replace(
                    predicted_audio=every.get("audio"), predicted_video=every.get("video")
                )
        return output

    def predict_patches(
        self, log_mel: torch.Tensor, frame: torch.Tensor, audio_mask: MaskIds, video_mask: MaskIds
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Predict every patch, without losses.

        A mask may keep all of a modality or nothing, for which no loss is defined: audio from the
        frame alone, or the frame from audio. A cross-attention decoder is asked for kept patches as
        for removed ones, by the mask token.

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
        tokens = self._decode(latent, {"audio": audio_mask, "video": video_mask}, every=True)
        counts: dict[Modality, int] = {
            "audio": self.config.audio_tokens,
            "video": self.config.video_tokens,
        }
        predicted = self._predict(tokens, counts)
        return predicted["audio"], predicted["video"]

    def _patches(self, modality: Modality) -> int:
        return self.config.audio_tokens if modality == "audio" else self.config.video_tokens

    def _removed(self, masks: dict[Modality, MaskIds]) -> torch.Tensor:
        """Return the numbers of the removed patches among those of all masks, (batch, removed)."""
        parts: list[torch.Tensor] = []
        before = 0
        for modality, mask in masks.items():
            parts.append(mask.removed + before if before else mask.removed)
            before += self._patches(modality)
        return torch.cat(parts, dim=1)

    def _decode(
        self, latent: torch.Tensor, masks: dict[Modality, MaskIds], *, every: bool
    ) -> torch.Tensor:
        """Decode latent tokens to decoder tokens of the removed audio, then video patches, before
        the last norm; with `every` of all patches in their order."""
        x = self.decoder_embed(latent)  # (batch, kept, decoder_width)
        if self.config.decoder == "cross":
            queries = self._queries(masks, every=every)  # (batch, removed or all, decoder_width)
            for block in self.decoder_blocks:
                queries = block(queries, x)
            return queries
        # The index of each patch's token in `x`; the number of kept ones for removed patches.
        places: list[torch.Tensor] = []
        before = 0
        for mask in masks.values():
            kept, patch = mask.keep.shape[1], mask.restore
            places.append(
                torch.where(patch < kept, patch + before if before else patch, x.shape[1])
            )
            before += kept
        tables, vectors = self._decoder_tables()
        x = restore_tokens(
            x,
            torch.cat(places, dim=1),
            self.mask_token,
            torch.cat([tables[name] for name in masks], dim=1),
            torch.cat([vectors[name].expand(-1, self._patches(name), -1) for name in masks], dim=1),
        )  # (batch, all tokens, decoder_width)
        *others, last = self.decoder_blocks
        for block in others:
            x = block(x)
        return last(x, query_ids=None if every else self._removed(masks))

    def _queries(self, masks: dict[Modality, MaskIds], *, every: bool) -> torch.Tensor:
        """Return what a cross-attention decoder is asked for, (batch, removed or all patches,
        decoder_width)."""
        tables, vectors = self._decoder_tables()
        parts = []
        for name, mask in masks.items():
            ids = self._all_ids(self._patches(name), mask.removed) if every else mask.removed
            parts.append(tables[name][0][ids] + (self.mask_token + vectors[name]))
        return torch.cat(parts, dim=1)

    def _decoder_tables(self) -> tuple[dict[Modality, nn.Parameter], dict[Modality, nn.Parameter]]:
        """Return the decoder's positions and vectors of each modality."""
        return (
            {"audio": self.decoder_pos_embed_a, "video": self.decoder_pos_embed_v},
            {"audio": self.decoder_modality_a, "video": self.decoder_modality_v},
        )

    def _predict(
        self, tokens: torch.Tensor, counts: dict[Modality, int]
    ) -> dict[Modality, torch.Tensor]:
        """Predict the pixels of tokens, of which so many are each modality's, in that order."""
        parts = self.decoder_norm(tokens).split(list(counts.values()), dim=1)
        heads = {"audio": self.decoder_pred_a, "video": self.decoder_pred_v}
        return {name: heads[name](part) for name, part in zip(counts, parts, strict=True)}


def _whole_stream(modalities: Collection[Modality]) -> Stream:
    """Return the stream that holds all tokens of a model that is given some modalities."""
    (first, *others) = modalities
    return "joint" if others else first
