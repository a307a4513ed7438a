"""Ranks of the golden engine test: the published tiny training, through DeepSpeed.

Each rank takes an equal part of the golden batch and its masks; rank 0 reports the deviations.
"""

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from cavmae.benchmarks.conformance.tiny_train import TinyTrain
from cavmae.dataloaders.sampling.step_shares import StepShares
from cavmae.kernels import MaskIds
from cavmae.trainer.config.configs import EngineConfig, LossConfig, OptimizerConfig
from cavmae.trainer.distributed.engine import Engine
from cavmae.trainer.distributed.env import Ranks, limit_threads, ranks_from_environment
from cavmae.trainer.distributed.process_group import end_rank, start_process_group
from cavmae.trainer.losses.contrastive import Pairs, exchanged_loss
from cavmae.trainer.losses.contrastive_groups import step_exchange


def train(run: TinyTrain, zero_stage: Any, ranks: Ranks, device: torch.device) -> dict[str, Any]:
    adam = run.record["adam"]
    engine = Engine(
        run.build(),
        EngineConfig(zero_stage=zero_stage, dtype="fp32"),
        OptimizerConfig(
            learning_rate=run.record["lr"],
            beta1=adam["betas"][0],
            beta2=adam["betas"][1],
            epsilon=adam["eps"],
            weight_decay=adam["weight_decay"],
        ),
        micro_batch=run.batch // ranks.world_size,
        accumulation=1,
        device=device,
    )
    own = torch.arange(run.batch).chunk(ranks.world_size)[ranks.rank]
    log_mel, image = (tensor[own] for tensor in run.inputs())
    weight = run.record["contrast_loss_weight"]
    shares = StepShares(run.batch, ranks.world_size, ranks.world_size, micro_batch=run.batch)
    exchange = step_exchange(shares, run.batch, ranks.rank, device)

    def forward(step: int) -> tuple[torch.Tensor, list[float]]:
        masks = [MaskIds(*(ids[own] for ids in mask)) for mask in run.masks(step)]
        output = engine(log_mel, image, *masks, norm_pix=run.norm_pix)
        pairs = Pairs(output.audio_embedding, output.video_embedding, own)
        contrast = exchanged_loss(pairs, LossConfig(), exchange)
        parts = [output.reconstruction_audio, output.reconstruction_video]
        reconstruction = run.record["mae_loss_weight"] * (parts[0] + parts[1])
        row = torch.stack([*parts, weight * contrast.loss, contrast.accuracy]).detach()
        dist.all_reduce(row)
        audio, video, weighted, accuracy = (row / ranks.world_size).tolist()
        total = run.record["mae_loss_weight"] * (audio + video) + weighted
        return reconstruction + weight * contrast.loss, [total, audio, video, weighted, accuracy]

    history: list[list[float | None]] = []
    for step in range(run.steps):
        loss, row = forward(step)
        engine.backward(loss)
        history.append([*row, float(engine.update(run.record["lr"]).gradient_norm)])
    with torch.no_grad():
        history.append([*forward(run.steps)[1], None])
    state = engine.full_state_dict()
    if ranks.rank:
        return {}
    deviations = run.check_history(history) + run.check_final(state)
    return {"stage": zero_stage, "deviations": [dataclasses.asdict(d) for d in deviations]}


def main() -> None:
    arguments, output = json.loads(sys.argv[1]), Path(sys.argv[2])
    ranks = ranks_from_environment()
    limit_threads(1, ranks)
    device = start_process_group(ranks)
    run = TinyTrain.load(Path(arguments["run"]))
    results = [train(run, stage, ranks, device) for stage in arguments["stages"]]
    if ranks.rank == 0:
        output.write_text(json.dumps(results))
    end_rank()


if __name__ == "__main__":
    main()
