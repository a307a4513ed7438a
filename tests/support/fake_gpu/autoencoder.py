"""A pretraining model, not compiled, passed forward and backward on the device that computes
nothing."""

import torch

from cavmae.benchmarks.fake_cuda.device import DEVICE
from cavmae.benchmarks.fake_cuda.trace import Trace, traced, without_values
from cavmae.trainer.config.configs import PretrainConfig
from cavmae.trainer.model.masking import random_masks
from cavmae.trainer.tasks.build_model import autoencoder, configure_blocks


def both_passes(config: PretrainConfig) -> Trace:
    """Trace a micro-batch of a run; its contrastive loss is that of `trainer/cost_model`."""
    shape, samples = config.model, config.micro_batch
    with without_values():
        model = autoencoder(config).to(DEVICE, torch.bfloat16)
        configure_blocks(model, config.engine)
        log_mel = torch.empty(samples, shape.audio_frames, shape.mel_bins, device=DEVICE)
        frame = torch.empty(samples, 3, shape.image_size, shape.image_size, device=DEVICE)
    with traced() as trace:
        with trace.phase("forward"):
            positions = torch.zeros(samples, dtype=torch.int64, device=DEVICE)
            masks = random_masks(shape, config.mask, positions, seed=0)
            output = model(log_mel, frame, *masks)
            loss = output.reconstruction_audio + output.reconstruction_video
            loss = loss + (output.audio_embedding * output.video_embedding).sum()
        with trace.phase("backward"):
            loss.backward()
    return trace
