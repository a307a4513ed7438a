"""The fine-tuning model: the encoders of CAV-MAE with a classifier on their pooled tokens.

Parameter names are those of the published fine-tuned checkpoints. Single-device code,
independent of ranks.
"""

from typing import Literal, NamedTuple

import torch
from torch import nn

from cavmae.trainer.model.blocks import Modality, Stream
from cavmae.trainer.model.config import ModelConfig
from cavmae.trainer.model.encoder import AudioVideoEncoder

Mode = Literal["multimodal", "audioonly", "videoonly", "missingaudioonly", "missingvideoonly"]
"""Input modalities (published names): both; one, of a model fine-tuned on it alone; one, of a model
fine-tuned on both, with the other missing."""

# The modalities whose tokens each stream of the joint encoder holds.
STREAMS: dict[Mode, dict[Stream, tuple[Modality, ...]]] = {
    "multimodal": {"joint": ("audio", "video")},
    "audioonly": {"audio": ("audio",)},
    "videoonly": {"video": ("video",)},
    "missingaudioonly": {"joint": ("audio",), "audio": ("audio",)},
    "missingvideoonly": {"joint": ("video",), "video": ("video",)},
}
VIDEO_ONLY = ("patch_embed_v", "modality_v", "pos_embed_v", "blocks_v", "norm_v")
"""Modules that an audio-only model lacks."""


class ClassifierOutput(NamedTuple):
    """The output of a classification; a tuple for the hooks of ZeRO-3.

    Attributes:
        logits: (batch, classes) float32.
        embedding: (batch, width) float32, the pooled tokens that the classifier reads. In the modes
            `audioonly` and `videoonly` these are the features for retrieval, not normalised.
    """

    logits: torch.Tensor
    embedding: torch.Tensor


class CAVMAEClassifier(AudioVideoEncoder):
    """The fine-tuning model (paper section 4.2).

    Every stream passes all joint blocks, and position tables are always trained
    (`config.learnable_positions` is for pretraining), both as in the published fine-tuning.

    Args:
        config: sizes of the encoders; those of the decoder are not used.
        classes: number of labels.
        video: False makes the audio-only model, without the parameters that only video uses.

    Raises:
        ValueError: `classes` below 1.
    """

    def __init__(self, config: ModelConfig, classes: int, *, video: bool = True) -> None:
        if classes < 1:
            raise ValueError(f"classes is {classes}; a classifier needs 1 or more")
        super().__init__(config, learnable_positions=True, single_stream_depth=config.joint_depth)
        self.classes = classes
        self.mlp_head = nn.Sequential(nn.LayerNorm(config.width), nn.Linear(config.width, classes))
        self._initialize()
        self.has_video = video
        if not video:
            for name in VIDEO_ONLY:
                delattr(self, name)

    def forward(
        self, log_mel: torch.Tensor | None, frame: torch.Tensor | None, mode: Mode = "multimodal"
    ) -> ClassifierOutput:
        """Classify a batch by both modalities or by one.

        Args:
            log_mel: (batch, audio_frames, mel_bins) normalised log-mel; not read by video modes.
            frame: (batch, 3, image_size, image_size) normalised image; not read by audio modes.
            mode: which modalities are read. The modes of a missing modality average two pooled
                vectors: that of the present modality's stream, and that of the joint stream.

        Raises:
            ValueError: an input that the mode reads is None or not of the model's size, a mode
                that does not exist, or one that reads video in an audio-only model.
        """
        streams = self._streams_of(mode)
        read = _modalities(streams)
        encoded: dict[Modality, torch.Tensor] = {}
        if "audio" in read:
            encoded["audio"] = self._encode_all_audio(_given(log_mel, "log_mel", mode))
        if "video" in read:
            encoded["video"] = self._encode_all_video(_given(frame, "frame", mode))
        passed = self._joint_encoder(
            {
                stream: torch.cat([encoded[modality] for modality in modalities], dim=1)
                for stream, modalities in streams.items()
            }
        )
        norms = {"joint": "norm", "audio": "norm_a", "video": "norm_v"}
        normalized = [getattr(self, norms[stream])(tokens) for stream, tokens in passed.items()]
        pooled = [tokens.float().mean(dim=1) for tokens in normalized]  # (batch, width) each
        embedding = torch.stack(pooled).mean(dim=0)  # (batch, width)
        logits = self.mlp_head(embedding.to(normalized[0].dtype))  # (batch, classes)
        return ClassifierOutput(logits.float(), embedding)

    def freeze_unused(self, mode: Mode) -> list[str]:
        """Stop gradients of the parameters that fine-tuning in a mode never uses.

        Returns:
            Their names.
        """
        streams = self._streams_of(mode)
        modalities = _modalities(streams)
        return self._freeze(
            [
                name
                for name, _ in self.named_parameters()
                if not name.startswith("mlp_head.")
                and not self._encoder_uses(name, modalities, streams)
            ]
        )

    def parameter_groups(self) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
        """Return the trained parameters of the encoders and those of the new classifier, whose
        learning rate is higher (10 to 100 times in the published runs)."""
        trained = [(name, p) for name, p in self.named_parameters() if p.requires_grad]
        return (
            [p for name, p in trained if not name.startswith("mlp_head.")],
            [p for name, p in trained if name.startswith("mlp_head.")],
        )

    def _streams_of(self, mode: Mode) -> dict[Stream, tuple[Modality, ...]]:
        if mode not in STREAMS:
            raise ValueError(f"mode is {mode!r}; use one of {', '.join(STREAMS)}")
        streams = STREAMS[mode]
        if not self.has_video and "video" in _modalities(streams):
            raise ValueError(
                f"mode is {mode!r}, which reads video, and this is an audio-only model; use mode "
                "'audioonly' or build the classifier with video=True"
            )
        return streams


def _modalities(streams: dict[Stream, tuple[Modality, ...]]) -> set[Modality]:
    return {modality for held in streams.values() for modality in held}


def _given(tensor: torch.Tensor | None, name: str, mode: Mode) -> torch.Tensor:
    if tensor is None:
        raise ValueError(
            f"{name} is None and mode {mode!r} reads it; give it or use a mode that does not"
        )
    return tensor
