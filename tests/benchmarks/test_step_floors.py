"""Floors come from the operations and bytes that a part can't do without."""

import pytest
import torch
from tiny_run import MODEL

from cavmae.benchmarks.step_floors import Work, part_work
from cavmae.benchmarks.timeline import Label
from cavmae.trainer.flops import training_flops
from cavmae.trainer.model.cavmae import CAVMAE
from cavmae.trainer.model.config import ModelConfig

BATCH = 4


def test_a_floor_is_the_longer_of_operations_and_bytes() -> None:
    assert Work(flops=100, bytes=10).floor_seconds(10.0, 100.0) == 10
    assert Work(flops=100, bytes=1000).floor_seconds(10.0, 10.0) == 100


@pytest.mark.parametrize("config", [MODEL, ModelConfig(modality_depth=1)], ids=["tiny", "wide"])
def test_operations_of_all_parts_are_those_of_a_step(config: ModelConfig) -> None:
    work = part_work(config, BATCH, torch.float32, ranks=1)
    contrast = 3 * 2 * config.width * BATCH**2
    total = sum(one.flops for one in work.values())
    assert total == BATCH * training_flops(config) + contrast


def test_the_optimizer_moves_28_bytes_of_each_weight_shared_by_the_ranks() -> None:
    model = CAVMAE(MODEL)
    model.freeze_unused(reconstruct=True, contrast=True)
    own = {id(one) for one in model.parameters(recurse=False)}  # tokens of no module
    weights = sum(
        one.numel() for one in model.parameters() if one.requires_grad and id(one) not in own
    )
    for ranks in (1, 2):
        work = part_work(MODEL, BATCH, torch.float32, ranks)
        assert work[Label("optimizer")].bytes == 28 * weights // ranks


def test_weights_are_moved_once_whatever_the_batch() -> None:
    one, two, three = (
        part_work(MODEL, batch, torch.float32, ranks=1)[Label("decoder", "forward")].bytes
        for batch in (1, 2, 3)
    )
    assert three - two == two - one
    assert 0 < two - one < one


def test_half_the_bytes_of_a_value_are_half_the_bytes_of_a_block() -> None:
    bytes_of = {
        dtype: part_work(MODEL, BATCH, dtype, ranks=1)[Label("encoders", "backward")].bytes
        for dtype in (torch.float32, torch.bfloat16)
    }
    assert bytes_of[torch.float32] == 2 * bytes_of[torch.bfloat16]
