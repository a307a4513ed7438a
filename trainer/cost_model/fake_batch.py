"""A run's model and loss on tensors without values: they go through it as real ones on a CPU do, in
seconds and without the memory, whatever the size of the model. As on a GPU, attention stores no
scores."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from cavmae.trainer.config.configs import FinetuneConfig, PretrainConfig, RunConfig
from cavmae.trainer.losses.classification import classification_loss
from cavmae.trainer.model.cavmae import CAVMAE
from cavmae.trainer.model.classifier import CAVMAEClassifier
from cavmae.trainer.model.masking import masks_of
from cavmae.trainer.tasks.build_model import build_model


@dataclass(frozen=True)
class FakeBatch:
    """A micro-batch beside the model that takes it.

    Attributes:
        config: of the run.
        model: with weights of `engine.dtype`.
        samples: of the micro-batch.
        log_mel: (samples, audio_frames, mel_bins) float32; None: the run does not read it.
        frame: (samples, 3, image_size, image_size) float32; None likewise.
    """

    config: RunConfig
    model: CAVMAE | CAVMAEClassifier
    samples: int
    log_mel: torch.Tensor | None
    frame: torch.Tensor | None

    def loss(self) -> torch.Tensor:
        """Compute a loss that keeps what the run's own loss keeps."""
        config = self.config
        if isinstance(config, FinetuneConfig):
            logits = self.model(self.log_mel, self.frame, mode=config.classifier.mode).logits
            return classification_loss(logits, torch.empty_like(logits), config.classifier.loss)
        assert isinstance(config, PretrainConfig)
        reconstruct = config.loss.reconstruction_weight > 0
        contrast = config.loss.contrastive_weight > 0
        modalities, positions = config.data.modalities, torch.arange(self.samples)
        masks = masks_of(modalities, config.model, config.mask, positions, seed=0)
        output = self.model(
            self.log_mel,
            self.frame,
            *masks,
            reconstruct=reconstruct,
            contrast=contrast,
            norm_pix=config.loss.norm_pix,
        )
        loss = torch.zeros(())
        if reconstruct:
            loss = sum(output.reconstructions.values(), loss)
        if contrast:
            loss = loss + (output.audio_embedding * output.video_embedding).sum()
        return loss


@contextmanager
def fake_batch(config: RunConfig, samples: int) -> Iterator[FakeBatch]:
    """Yield a micro-batch; what is made within has no values either.

    Args:
        config: of the run; `engine.dtype` is bf16 or fp32. Blocks are not compiled.
        samples: of the micro-batch.
    """
    shape = config.model
    dtype = torch.bfloat16 if config.engine.dtype == "bf16" else torch.float32
    with torch.device("meta"):
        model = build_model(config)
    model.recompute_blocks(config.engine.activation_checkpointing)
    # A state of random numbers, which torch saves for recomputation, has values.
    with FakeTensorMode(allow_non_fake_inputs=True):
        for name, one in list(model.named_parameters()):
            owner, _, leaf = name.rpartition(".")
            weight = nn.Parameter(torch.empty(one.shape, dtype=dtype), one.requires_grad)
            setattr(model.get_submodule(owner), leaf, weight)
        log_mel = frame = None
        if "audio" in config.data.modalities:
            log_mel = torch.empty(samples, shape.audio_frames, shape.mel_bins)
        if "video" in config.data.modalities:
            frame = torch.empty(samples, 3, shape.image_size, shape.image_size)
        yield FakeBatch(config, model, samples, log_mel, frame)
