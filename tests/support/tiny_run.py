"""A training run that costs next to nothing, started in any way, and its losses."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import torch

from cavmae.benchmarks.harness.synthetic_batches import TINY_MODEL as MODEL
from cavmae.dataloaders.config import DataConfig
from cavmae.dataloaders.tools.synthetic import CLASSES
from cavmae.trainer.config.configs import (
    CheckpointConfig,
    ClassifierConfig,
    EngineConfig,
    FinetuneConfig,
    LossConfig,
    OptimizerConfig,
    PretrainConfig,
    TrackingConfig,
)
from cavmae.trainer.config.serialize import save_config
from cavmae.trainer.model.cavmae import CAVMAE
from cavmae.trainer.model.classifier import CAVMAEClassifier
from cavmae.trainer.tasks.labels import LabelSet
from cavmae.trainer.trained_on import training_of


def tiny_run(shards: Path, run_dir: Path, **changes: Any) -> PretrainConfig:
    """20 steps of 8 clips; `shards` is the packed set of `packed_synthetic`."""
    config = PretrainConfig(
        run_dir=str(run_dir),
        steps=20,
        global_batch=8,
        micro_batch=4,
        model=MODEL,
        data=DataConfig(train=str(shards / "frames"), reader_workers=1, decode_threads=1),
        loss=LossConfig(contrastive_weight=1.0),
        optimizer=OptimizerConfig(learning_rate=1e-3),
        engine=EngineConfig(zero_stage=1, dtype="fp32"),
        checkpoint=CheckpointConfig(every_steps=10),
        tracking=TrackingConfig(every_steps=1),
        threads_per_rank=1,
    )
    return dataclasses.replace(config, **changes)


def tiny_finetuning(shards: Path, run_dir: Path, **changes: Any) -> FinetuneConfig:
    """20 steps of 8 clips of the packed set of `packed_synthetic`; an epoch is 3 steps."""
    run = tiny_run(shards, run_dir)
    config = FinetuneConfig(
        **{
            field.name: getattr(run, field.name)
            for field in dataclasses.fields(FinetuneConfig)
            if field.name != "classifier"
        },
        classifier=ClassifierConfig(loss="cross_entropy", head_lr_mult=10.0),
    )
    return dataclasses.replace(config, **changes)


def save_untrained(shards: Path, run_dir: Path, **changes: Any) -> PretrainConfig:
    """A run folder as a finished run leaves it, with random weights."""
    run = tiny_run(shards, run_dir, **changes)
    run_dir.mkdir()
    save_config(run, run_dir / "config.json")
    training_of(run).save(run_dir)
    torch.manual_seed(0)
    torch.save(CAVMAE(run.model).state_dict(), run_dir / "weights.pt")
    return run


def save_untrained_classifier(shards: Path, run_dir: Path, **changes: Any) -> FinetuneConfig:
    """The same of a fine-tuning run, with all classes of the synthetic clips."""
    run = tiny_finetuning(shards, run_dir, **changes)
    run_dir.mkdir()
    save_config(run, run_dir / "config.json")
    training_of(run).save(run_dir)
    (run_dir / "labels.csv").write_text(LabelSet(CLASSES, CLASSES).as_csv())
    torch.manual_seed(0)
    torch.save(CAVMAEClassifier(run.model, len(CLASSES)).state_dict(), run_dir / "weights.pt")
    return run


def losses(run_dir: Path) -> list[float]:
    """The loss of every step; a step that was run again counts once."""
    records = map(json.loads, (run_dir / "metrics.jsonl").read_text().splitlines())
    by_step = {record["step"]: record["loss"] for record in records if "loss" in record}
    return [loss for _, loss in sorted(by_step.items())]
