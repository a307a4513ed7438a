"""Ranks of the golden engine test: the published tiny fine-tuning, through DeepSpeed.

Each rank takes an equal part of the golden batch; rank 0 reports the deviations.
"""

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from cavmae.benchmarks.conformance.cases import read_json
from cavmae.benchmarks.conformance.finetune import LOSSES, FinetuneTraining
from cavmae.trainer.config.configs import EngineConfig, OptimizerConfig
from cavmae.trainer.distributed.engine import Engine, ParamGroup
from cavmae.trainer.distributed.env import Ranks, limit_threads, ranks_from_environment
from cavmae.trainer.distributed.process_group import end_rank, start_process_group
from cavmae.trainer.losses.classification import classification_loss


def train(
    run: FinetuneTraining, zero_stage: Any, ranks: Ranks, device: torch.device
) -> dict[str, Any]:
    record, model = run.record, run.build()
    encoders, head = model.parameter_groups()
    engine = Engine(
        model,
        EngineConfig(zero_stage=zero_stage, dtype="fp32"),
        OptimizerConfig(learning_rate=record["lr"]),
        micro_batch=record["batch"] // ranks.world_size,
        accumulation=1,
        device=device,
        groups=[ParamGroup(encoders, 1.0), ParamGroup(head, record["head_lr"])],
    )
    own = torch.arange(record["batch"]).chunk(ranks.world_size)[ranks.rank]
    log_mel, image = (tensor[own] for tensor in run.inputs(model))
    targets = run.targets(model)[own]

    def forward() -> torch.Tensor:
        logits = engine(log_mel, image, mode=run.mode).logits
        return classification_loss(logits, targets, LOSSES[record["loss"]])

    def noted(loss: torch.Tensor) -> float:
        mean = loss.detach().clone()
        dist.all_reduce(mean)
        return mean.item() / ranks.world_size

    history = []
    for _ in range(record["steps"]):
        loss = forward()
        history.append(noted(loss))
        engine.backward(loss)
        engine.update(record["lr"])
    with torch.no_grad():
        history.append(noted(forward()))
    state = engine.full_state_dict()
    if ranks.rank:
        return {}
    deviations = run.deviations(history, state)
    return {"stage": zero_stage, "deviations": [dataclasses.asdict(d) for d in deviations]}


def main() -> None:
    arguments, output = json.loads(sys.argv[1]), Path(sys.argv[2])
    ranks = ranks_from_environment()
    limit_threads(1, ranks)
    device = start_process_group(ranks)
    run = FinetuneTraining(read_json(Path(arguments["run"])))
    results = [train(run, stage, ranks, device) for stage in arguments["stages"]]
    if ranks.rank == 0:
        output.write_text(json.dumps(results))
    end_rank()


if __name__ == "__main__":
    main()
