"""A tiny model in the engine, trained on fixed batches: what ranks of several tests run."""

import dataclasses
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from cavmae.dataloaders.batch import AudioVideoBatch
from cavmae.dataloaders.sampling.sample_plan import default_lanes
from cavmae.trainer.config.configs import EngineConfig, LossConfig, OptimizerConfig, PretrainConfig
from cavmae.trainer.config.resolve import step_shares
from cavmae.trainer.cost_model.comm_volume import tensor_sizes
from cavmae.trainer.distributed.engine import Engine, Update
from cavmae.trainer.model.cavmae import CAVMAE
from cavmae.trainer.model.config import ModelConfig
from cavmae.trainer.tasks.pretrain import PretrainTask

MODEL = ModelConfig(
    audio_frames=64,
    mel_bins=32,
    image_size=32,
    width=32,
    modality_depth=2,
    heads=4,
    decoder_width=32,
    decoder_depth=1,
    decoder_heads=4,
)


def batch_of(positions: np.ndarray) -> AudioVideoBatch:
    """Samples that depend on their position alone."""
    log_mel, frames = [], []
    for position in positions:
        generator = np.random.default_rng(int(position))
        log_mel.append(generator.standard_normal((64, 32), dtype=np.float32))
        frames.append(generator.standard_normal((1, 3, 32, 32), dtype=np.float32))
    count = len(positions)
    return AudioVideoBatch(
        log_mel=torch.from_numpy(np.stack(log_mel)),
        frames=torch.from_numpy(np.stack(frames)),
        positions=torch.from_numpy(positions),
        epochs=torch.zeros(count, dtype=torch.int64),
        sample_ids=tuple(map(str, positions)),
        labels=((),) * count,
        frame_seconds=torch.zeros(count, 1),
        audio_seconds=torch.zeros(count, 2),
        mixup_lambda=torch.ones(count),
        mixed_labels=((),) * count,
    )


class Run:
    """A tiny training run: engine, task and the batches of this rank."""

    def __init__(self, case: dict[str, Any], ranks: Any, device: torch.device) -> None:
        self.case, self.ranks = case, ranks
        batch = case.get("global_batch", 16)
        self.config = PretrainConfig(
            global_batch=batch,
            micro_batch=case.get("micro_batch", batch),
            lanes=case.get("lanes", default_lanes(batch, ranks.world_size)),
            model=dataclasses.replace(MODEL, **case.get("model", {})),
            loss=LossConfig(
                contrastive_weight=case.get("contrastive_weight", 1.0),
                contrastive_group=case.get("group", 0),
                bidirectional=case.get("bidirectional", False),
            ),
            engine=EngineConfig(
                zero_stage=case["zero_stage"],
                dtype=case.get("dtype", "fp32"),
                clip_grad_norm=case.get("clip", 0.0),
            ),
            optimizer=OptimizerConfig(learning_rate=1e-3),
        )
        torch.manual_seed(0)
        model = CAVMAE(self.config.model)
        model.freeze_unused(reconstruct=True, contrast=self.config.loss.contrastive_weight > 0)
        model.recompute_blocks(case.get("recompute", "selective"))
        self.tensors = tensor_sizes(model)
        self.task = PretrainTask(self.config, ranks, device)
        self.shares = step_shares(self.config, ranks.world_size)
        self.engine = Engine(
            model,
            self.config.engine,
            self.config.optimizer,
            micro_batch=self.config.micro_batch,
            accumulation=self.shares.accumulation,
            device=device,
        )

    def step(self, step: int, poison: str | None = None) -> dict[str, Any]:
        """One optimizer step and its metrics; `poison` as in `update`."""
        update = self.update(step, poison)
        names, values = zip(*sorted(self.task.metrics().items()), strict=True)
        total = torch.stack(list(values)).double()
        dist.all_reduce(total)
        metrics = dict(zip(names, (total / self.ranks.world_size).tolist(), strict=True))
        return metrics | {"applied": update.applied, "gradient_norm": float(update.gradient_norm)}

    def update(self, step: int, poison: str | None = None) -> Update:
        """One optimizer step; `poison` spoils the loss or the gradient of the last rank."""
        batches = [
            batch_of(step * self.config.global_batch + offsets)
            for offsets in self.shares.micro_batches(self.ranks.rank)
        ]
        self.task.begin_step(self.engine, batches)
        poisoned = self.ranks.rank == self.ranks.world_size - 1
        for index, batch in enumerate(batches):
            loss = self.task.loss(self.engine, batch)
            if poison in ("nan", "inf") and poisoned and index == 0:
                loss = loss * float(poison)
            if poison == "gradient" and poisoned and index == 0:
                loss = loss + _finite_with_nan_gradient(
                    self.engine.module.get_parameter("norm_a.bias")
                )
            self.engine.backward(loss)
            if index + 1 < len(batches):
                self.engine.accumulate()
        return self.engine.update(self.config.optimizer.learning_rate)

    def snapshot(self) -> list[torch.Tensor]:
        """Master weights, this rank's optimizer state, and the weights that forward uses.

        Stage 3 holds the last only while it needs them, so there the masters have to do.
        """
        optimizer = [
            torch.as_tensor(value).clone()
            for state in self.engine._client.state.values()
            for value in state.values()
        ]
        model = [
            parameter.detach().clone()
            for parameter in self.engine.module.parameters()
            if self.engine.zero_stage < 3
        ]
        return [*self.engine.full_state_dict().values(), *optimizer, *model]


def _finite_with_nan_gradient(parameter: torch.Tensor) -> torch.Tensor:
    """Zero, with a gradient of nan: sqrt(0) is fine forward and 0 * inf backward."""
    return ((parameter.sum() * 0).abs().sqrt() * 0).float()
