"""Uses of trained models on the device that computes nothing; see `training.py`."""

import dataclasses
import itertools
import tempfile
from pathlib import Path
from typing import Any

import torch

from cavmae.benchmarks.fake_cuda.device import DEVICE
from cavmae.benchmarks.fake_cuda.trace import Trace, traced
from cavmae.dataloaders.batch import AudioVideoBatch
from cavmae.dataloaders.config import ClipShape
from cavmae.dataloaders.sampling.step_shares import StepShares
from cavmae.trainer.config.configs import FinetuneConfig, PretrainConfig, RunConfig
from cavmae.trainer.distributed.env import Ranks
from cavmae.trainer.evaluation.classify import _logits
from cavmae.trainer.evaluation.clip_outputs import embedding, output_batches
from cavmae.trainer.evaluation.reconstruct import ReconstructConfig, _reconstruct_clip
from cavmae.trainer.model.cavmae import CAVMAE
from cavmae.trainer.model.classifier import STREAMS, CAVMAEClassifier
from cavmae.trainer.tasks.finetune import FinetuneTask
from cavmae.trainer.tasks.pretrain import PretrainTask
from fake_gpu.training import LABELS, Batches, join_ranks, tiny

RANKS = Ranks(0, 2, 0, 2)


def validation(config: RunConfig) -> dict[str, float]:
    """Validate a model of a run on a batch, with the other rank; returns the metrics."""
    join_ranks(RANKS)
    with tempfile.TemporaryDirectory() as folder, traced():
        config = tiny(config, Path(folder), RANKS.world_size)
        if isinstance(config, FinetuneConfig):
            task: Any = FinetuneTask(config, LABELS, RANKS, DEVICE)
        else:
            assert isinstance(config, PretrainConfig)
            task = PretrainTask(config, RANKS, DEVICE)
        model, _ = task.build_model()
        batches = [batch.to(DEVICE) for batch in _batches(config, config.micro_batch, 2)]
        return task.validate(model.to(DEVICE).eval(), batches).metrics


def embedded(out: Path) -> Trace:
    """Embed sound and frames, as `cavmae embed` and `cavmae evaluate retrieve` do."""
    config = _config(PretrainConfig())
    with traced() as trace:
        model = CAVMAE(config.model).to(DEVICE).eval()
        loader: Any = _batches(config, 4, 2)
        with trace.phase("clips"):
            made = list(output_batches(embedding(model), loader, DEVICE, torch.float16))
    assert [part.values["frames"].shape for part in made] == [(4, 1, config.model.width)] * 2
    return trace


def classified(out: Path) -> Trace:
    """Classify in every mode, as `cavmae evaluate classify` does."""
    config = _config(FinetuneConfig())
    with traced() as trace:
        model = CAVMAEClassifier(config.model, len(LABELS)).to(DEVICE).eval()
        loader: Any = _batches(config, 4, 1)

        def forward(batch: AudioVideoBatch) -> dict[str, torch.Tensor]:
            return {mode: _logits(model, batch, mode) for mode in STREAMS}

        with trace.phase("clips"):
            (made,) = output_batches(forward, loader, DEVICE)
    assert [values.shape for values in made.values.values()] == [(4, 1, len(LABELS))] * len(STREAMS)
    return trace


def reconstructed(out: Path) -> Trace:
    """Reconstruct a clip, as `cavmae reconstruct` does."""
    config = _config(PretrainConfig())
    with traced() as trace:
        model = CAVMAE(config.model).to(DEVICE).eval()
        (batch,) = _batches(config, 1, 1)
        asked = ReconstructConfig(run_dir="", shards="", out=str(out), sound_iterations=1)
        with torch.no_grad(), trace.phase("clips"):
            _reconstruct_clip(model, batch.to(DEVICE), asked, config, (0.75, 0.75))
    return trace


def _config(config: Any) -> Any:
    return dataclasses.replace(tiny(config, Path(), 1))


def _batches(config: RunConfig, clips: int, count: int) -> list[AudioVideoBatch]:
    model = config.model
    loader = Batches(
        config.data,
        ClipShape(model.audio_frames, model.mel_bins, model.image_size),
        shares=StepShares(clips, clips, world_size=1, micro_batch=clips),
        rank=0,
        device=DEVICE,
    )
    return list(itertools.islice(loader, count))
