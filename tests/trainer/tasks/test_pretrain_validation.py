"""Scores of validation clips, computed by one rank in this process."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from engine_run import MODEL, batch_of

from cavmae.trainer.config.configs import PretrainConfig
from cavmae.trainer.model.cavmae import CAVMAE
from cavmae.trainer.tasks.pretrain_validation import score


@pytest.fixture
def one_rank(tmp_path: Path) -> Iterator[None]:
    method = f"file://{tmp_path}/meeting"
    dist.init_process_group("gloo", init_method=method, rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("one_rank")
def test_every_removed_patch_is_scored_of_a_model_that_is_trained_on_a_share() -> None:
    torch.manual_seed(0)
    model = CAVMAE(replace(MODEL, decoder="cross")).eval()
    metrics = []
    for share in (1.0, 0.5):
        config = PretrainConfig(model=replace(model.config, decoded_share=share))
        batches = [batch_of(np.arange(first, first + 3)) for first in (0, 3)]
        metrics.append(score(model, batches, config, torch.device("cpu")).metrics)
    assert metrics[0] == metrics[1]
    assert metrics[0]["val_loss_reconstruction_audio"] > 0
