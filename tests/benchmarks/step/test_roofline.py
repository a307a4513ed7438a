"""Floors come from the operations and bytes that a part can't do without."""

import pytest
import torch
from tiny_run import MODEL

from cavmae.benchmarks.harness.timeline import Label
from cavmae.benchmarks.step.roofline import Work, part_work
from cavmae.trainer.cost_model.flops import training_flops
from cavmae.trainer.model.cavmae import CAVMAE
from cavmae.trainer.model.config import ModelConfig

BATCH = 4


def test_a_floor_is_the_longer_of_operations_and_bytes() -> None:
    assert Work(flops=100, bytes=10).floor_seconds(10.0, 100.0) == 10
    assert Work(flops=100, bytes=1000).floor_seconds(10.0, 10.0) == 100


@pytest.mark.parametrize("config", [MODEL, ModelConfig(modality_depth=1)], ids=["tiny", "wide"])
def test_operations_of_all_parts_are_those_of_a_step(config: ModelConfig) -> None:
    work = part_work(config, BATCH, torch.float32, ranks=1, zero_stage=1)
    contrast = 3 * 2 * config.width * BATCH**2
    total = sum(one.flops for one in work.values())
    assert total == BATCH * training_flops(config) + contrast


@pytest.mark.parametrize(("zero_stage", "sharers"), [(0, 1), (1, 2), (3, 2)])
def test_the_optimizer_moves_28_bytes_of_each_weight_shared_from_zero_1_on(
    zero_stage: int, sharers: int
) -> None:
    model = CAVMAE(MODEL)
    model.freeze_unused(reconstruct=True, contrast=True)
    own = {id(one) for one in model.parameters(recurse=False)}  # tokens of no module
    weights = sum(
        one.numel() for one in model.parameters() if one.requires_grad and id(one) not in own
    )
    work = part_work(MODEL, BATCH, torch.float32, ranks=2, zero_stage=zero_stage)
    assert work[Label("optimizer")].bytes == 28 * weights // sharers


# Of `MODEL` by hand: 6 of 24 audio tokens and 1 of 4 of video are kept, each 32 wide.
BLOCK = 2 * 64 + 96 * 33 + 32 * 33 + 128 * 33 + 32 * 129
WEIGHTS = {
    "embed": 32 * 257 + 32 * 769,
    "encoders": 2 * BLOCK,
    "joint": BLOCK + 4 * 64 + 3 * 64,
    "decoder": 32 * 33 + BLOCK + 64 + 256 * 33 + 768 * 33,
    "losses": 0,
}
KEPT = 7 * 32
PIXELS, REMOVED_PIXELS = 6 * 256 + 768, 18 * 256 + 3 * 768
EMBEDDINGS = 2 * 32


@pytest.mark.parametrize(
    ("part", "forward", "backward"),
    [
        ("embed", PIXELS + KEPT, PIXELS + KEPT),
        ("encoders", 2 * KEPT, 3 * KEPT),
        ("joint", 3 * KEPT, 4 * KEPT),
        ("decoder", KEPT + REMOVED_PIXELS, 2 * KEPT + REMOVED_PIXELS),
        ("losses", 2 * REMOVED_PIXELS + EMBEDDINGS, 3 * REMOVED_PIXELS + 2 * EMBEDDINGS),
    ],
)
def test_a_part_moves_its_weights_and_what_passes_through_it(
    part: str, forward: int, backward: int
) -> None:
    """Backward, the weights and what came in are read again, and gradients of each are written."""
    work = part_work(MODEL, BATCH, torch.float32, ranks=1, zero_stage=1)
    assert work[Label(part, "forward")].bytes == 4 * (WEIGHTS[part] + BATCH * forward)
    assert work[Label(part, "backward")].bytes == 4 * (2 * WEIGHTS[part] + BATCH * backward)


def test_a_mask_is_two_ids_of_8_bytes_for_each_token() -> None:
    work = part_work(MODEL, BATCH, torch.float32, ranks=1, zero_stage=1)
    assert work[Label("mask", "forward")].bytes == BATCH * 2 * 8 * 28


def test_weights_are_moved_once_whatever_the_batch() -> None:
    one, two, three = (
        part_work(MODEL, batch, torch.float32, ranks=1, zero_stage=1)[
            Label("decoder", "forward")
        ].bytes
        for batch in (1, 2, 3)
    )
    assert three - two == two - one
    assert 0 < two - one < one


def test_half_the_bytes_of_a_value_are_half_the_bytes_of_a_block() -> None:
    bytes_of = {
        dtype: part_work(MODEL, BATCH, dtype, ranks=1, zero_stage=1)[
            Label("encoders", "backward")
        ].bytes
        for dtype in (torch.float32, torch.bfloat16)
    }
    assert bytes_of[torch.float32] == 2 * bytes_of[torch.bfloat16]
