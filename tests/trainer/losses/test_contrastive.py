"""The contrastive loss over ranks equals that of one process."""

from itertools import product
from pathlib import Path
from typing import Any

import pytest
from launch import run_ranks

from cavmae.dataloaders.sampling.step_shares import StepShares
from cavmae.trainer.config.configs import EngineConfig, LossConfig, PretrainConfig
from cavmae.trainer.cost_model.comm_volume import TensorSizes, collectives, sent_by_purpose
from cavmae.trainer.losses.contrastive_groups import contrastive_layout
from cavmae.trainer.model.config import ModelConfig

SCRIPT = Path(__file__).with_name("contrastive_ranks.py")
WORLD_SIZE = 3
# With 12 lanes each of the 3 ranks has 4 of every 12 positions: a group of 24 takes equal parts of
# all ranks, one of 6 four clips of one rank and two of the next, one of 4 lies in one rank.
CASES = [
    {"global_batch": 24, "lanes": 12, "group": group, "bidirectional": both}
    for group, both in product((24, 12, 6, 4), (False, True))
]
# Unequal numbers of clips: 6, 7 and 7.
CASES += [
    {"global_batch": 20, "lanes": 20, "group": group, "bidirectional": both}
    for group, both in product((20, 5), (False, True))
]


def case_name(index: int) -> str:
    case = CASES[index]
    directions = "both" if case["bidirectional"] else "one"
    return f"batch{case['global_batch']}-group{case['group']}-{directions}"


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return run_ranks(SCRIPT, WORLD_SIZE, CASES, tmp_path_factory.mktemp("contrastive"))


@pytest.mark.parametrize("index", range(len(CASES)), ids=case_name)
def test_loss_accuracy_and_gradients_are_those_of_one_process(results, index: int) -> None:
    result = results[index]
    for name in ("loss", "accuracy"):
        ours, theirs = result[name]
        assert ours == pytest.approx(theirs, rel=1e-12, abs=1e-12), name
    assert result["gradient_deviation"] < 1e-12 * result["largest_gradient"]


@pytest.mark.parametrize("index", range(len(CASES)), ids=case_name)
def test_a_rank_receives_as_many_bytes_as_are_said_to_be_sent(results, index: int) -> None:
    case = CASES[index]
    config = PretrainConfig(
        global_batch=case["global_batch"],
        micro_batch=case["global_batch"],
        lanes=case["lanes"],
        model=ModelConfig(width=16, heads=2),
        loss=LossConfig(bidirectional=case["bidirectional"]),
        engine=EngineConfig(dtype="fp32"),
    )
    found = collectives(config, TensorSizes((16,), ()), WORLD_SIZE)
    expected = 2 * sent_by_purpose(found, WORLD_SIZE)["embeddings"]  # the ranks' are float64
    assert results[index]["received_bytes"] == expected


@pytest.mark.parametrize(
    ("group", "micro_batch", "world_size", "layout"),
    [
        (24, 24, 1, "local"),
        (24, 12, 1, "cached"),
        (24, 8, 3, "gathered"),
        (24, 4, 3, "cached"),
        (12, 4, 3, "gathered"),
        (6, 8, 3, "gathered"),
        (4, 8, 3, "local"),
        (4, 8, 5, "gathered"),
        (4, 4, 5, "cached"),
    ],
)
def test_the_layout_follows_from_where_the_groups_lie(
    group: int, micro_batch: int, world_size: int, layout: str
) -> None:
    shares = StepShares(24, 12, world_size, micro_batch)
    assert contrastive_layout(shares, group) == layout
