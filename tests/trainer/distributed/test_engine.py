"""The engine on real ranks: parity of every stage and split, and non-finite updates left out."""

from pathlib import Path
from typing import Any

import pytest
from launch import run_ranks

STEPS = Path(__file__).with_name("engine_ranks.py")
STAGES = (0, 1, 2, 3)
pytestmark = pytest.mark.slow


def case_name(case: dict[str, Any]) -> str:
    return "-".join(f"{name}{value}" for name, value in case.items() if name != "poison")


def losses(result: dict[str, Any], name: str = "loss") -> list[float]:
    return [step[name] for step in result["history"]]


def largest_relative(ours: list[float], theirs: list[float]) -> float:
    return max(abs(a - b) / abs(b) for a, b in zip(ours, theirs, strict=True))


WIDE = {"width": 384, "decoder_width": 384}
"""Above the size from which ZeRO 3 shares a tensor out, of this model's 32 none is."""
GROUPS_OF_8 = {"group": 8, "bidirectional": True, "clip": 1.0}
CROSS = {"decoder": "cross", "decoder_depth": 2, "decoded_share": 0.5}
ONE_RANK = [
    {"zero_stage": 0},
    {"zero_stage": 0, "group": 4},
    {**GROUPS_OF_8, "zero_stage": 0},
    *({"zero_stage": stage, "micro_batch": 4} for stage in STAGES),
    {"zero_stage": 1, "dtype": "bf16", "clip": 1.0, "micro_batch": 4},
    {"zero_stage": 1, "dtype": "bf16", "clip": 1.0, "micro_batch": 4, "flat_gradients": False},
    {"zero_stage": 0, "group": 4, "micro_batch": 4},  # as the published code trains
    {"zero_stage": 0, "model": WIDE | CROSS, "steps": 4},
    {"zero_stage": 0, "model": WIDE, "steps": 4},
]
TWO_RANKS = [
    *({"zero_stage": stage} for stage in STAGES),
    {"zero_stage": 1, "group": 4},
    {"zero_stage": 1, "recompute": "full"},
    {"zero_stage": 3, "recompute": "full"},
    {**GROUPS_OF_8, "zero_stage": 2},
    *({**GROUPS_OF_8, "zero_stage": stage, "micro_batch": 4} for stage in STAGES),
    {"zero_stage": 3, "model": WIDE, "steps": 4, "micro_batch": 4},
    # Every other position of each rank: a group is in one micro-batch of both.
    {**GROUPS_OF_8, "zero_stage": 1, "micro_batch": 4, "lanes": 2},
    *({"zero_stage": stage, "model": WIDE | CROSS, "steps": 4} for stage in (0, 1, 2)),
    {"zero_stage": 3, "model": WIDE | CROSS, "steps": 4, "micro_batch": 4, "recompute": "full"},
]
THREE_RANKS = [  # of 5, 5 and 6 samples; which rank has how many is the same in all stages
    *({"zero_stage": stage} for stage in (1, 3)),
    {"zero_stage": 1, "group": 4},
    *({**GROUPS_OF_8, "zero_stage": stage, "micro_batch": 2} for stage in (1, 3)),
]


@pytest.fixture(scope="module")
def one_rank(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return run_ranks(STEPS, 1, ONE_RANK, tmp_path_factory.mktemp("one"))


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return run_ranks(STEPS, 2, TWO_RANKS, tmp_path_factory.mktemp("two"))


@pytest.fixture(scope="module")
def three_ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return run_ranks(STEPS, 3, THREE_RANKS, tmp_path_factory.mktemp("three"))


def baseline_of(case: dict[str, Any], one_rank: list[dict[str, Any]]) -> dict[str, Any]:
    """One process, one forward, stage 0, with the same model and groups."""
    if "model" in case:
        return next(one for one in one_rank if one["case"].get("model") == case["model"])
    return one_rank[{0: 0, 4: 1, 8: 2}[case.get("group", 0)]]


@pytest.mark.parametrize("index", range(3, 7), ids=lambda i: case_name(ONE_RANK[i]))
def test_accumulation_on_one_rank_equals_one_forward(one_rank, index: int) -> None:
    result = one_rank[index]
    assert result["layout"] == "cached"
    assert largest_relative(losses(result), losses(one_rank[0])) < 1e-5


def test_the_published_groups_are_equal_in_one_forward_and_in_one_each(one_rank) -> None:
    one, split = one_rank[1], one_rank[9]
    assert (one["layout"], split["layout"]) == ("local", "local")
    for name in ("loss", "gradient_norm"):
        assert largest_relative(losses(split, name), losses(one, name)) < 1e-5, name
    assert split["final_norm"] == pytest.approx(one["final_norm"], rel=1e-6)


def test_flat_gradients_sum_measure_and_clip_as_deepspeed_does(one_rank) -> None:
    ours, theirs = one_rank[7:9]
    assert max(losses(theirs, "gradient_norm")) > 1.0, "nothing is clipped"
    for name in ("loss", "gradient_norm"):  # later a rounded norm becomes other bits of bf16
        assert largest_relative(losses(ours, name)[:4], losses(theirs, name)[:4]) < 1e-5, name
    assert ours["final_norm"] == pytest.approx(theirs["final_norm"], rel=1e-5)
    saved = theirs["operations"] - ours["operations"]
    parameters, micro_batches = ours["parameters"], 4
    assert saved >= (micro_batches + 2) * parameters, "a cast each, a norm and a product"


@pytest.mark.parametrize("index", range(len(TWO_RANKS)), ids=lambda i: case_name(TWO_RANKS[i]))
def test_two_ranks_equal_one_process_over_20_steps(one_rank, two_ranks, index: int) -> None:
    assert_equal_to_one_process(two_ranks[index], one_rank)


@pytest.mark.parametrize("index", range(len(THREE_RANKS)), ids=lambda i: case_name(THREE_RANKS[i]))
def test_ranks_with_unequal_shares_equal_one_process_over_20_steps(
    one_rank, three_ranks, index: int
) -> None:
    assert_equal_to_one_process(three_ranks[index], one_rank)


def assert_equal_to_one_process(result: dict[str, Any], one_rank: list[dict[str, Any]]) -> None:
    baseline = baseline_of(result["case"], one_rank)
    for name in ("loss", "loss_contrastive", "contrastive_accuracy", "gradient_norm"):
        # An accuracy of 0 on both sides is equality, so compare absolutely below 1e-12.
        for ours, theirs in zip(losses(result, name), losses(baseline, name), strict=True):
            assert ours == pytest.approx(theirs, rel=1e-5, abs=1e-12), name
    assert result["final_norm"] == pytest.approx(baseline["final_norm"], rel=1e-6)


def test_the_baseline_learns_and_never_skips(one_rank) -> None:
    history = losses(one_rank[0])
    assert history[-1] < 0.8 * history[0]
    assert all(step["applied"] for step in one_rank[0]["history"])


def test_groups_change_the_loss(one_rank) -> None:
    assert abs(losses(one_rank[0])[0] - losses(one_rank[1])[0]) > 0.1


def test_groups_lie_where_the_layout_says(one_rank, two_ranks, three_ranks) -> None:
    assert [result["layout"] for result in one_rank[:3]] == ["local", "local", "local"]
    assert {result["layout"] for result in two_ranks[:4]} == {"gathered"}
    assert two_ranks[4]["layout"] == "local"
    assert {result["layout"] for result in two_ranks[9:13]} == {"cached"}
    assert two_ranks[13]["layout"] == "gathered"
    assert [one["layout"] for one in three_ranks] == [*["gathered"] * 3, "cached", "cached"]


POISONED = [
    {
        "zero_stage": stage,
        "dtype": dtype,
        "steps": 5,
        "micro_batch": 4,
        "poison": {"1": "nan", "2": "inf", "3": "gradient"},
    }
    for stage in STAGES
    for dtype in ("fp32", "bf16")
]


@pytest.fixture(scope="module")
def poisoned(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return run_ranks(STEPS, 2, POISONED, tmp_path_factory.mktemp("poisoned"))


@pytest.mark.parametrize("index", range(len(POISONED)), ids=lambda i: case_name(POISONED[i]))
def test_a_non_finite_loss_or_gradient_on_one_rank_changes_nothing_on_any(
    poisoned, index: int
) -> None:
    result = poisoned[index]
    assert [step["applied"] for step in result["history"]] == [True, False, False, False, True]
    assert result["unchanged"] == [True, True, True]


BF16 = [{"zero_stage": stage, "dtype": "bf16"} for stage in STAGES]


@pytest.mark.long
def test_every_stage_trains_in_bf16_within_half_a_percent_of_fp32(one_rank, tmp_path) -> None:
    for result in run_ranks(STEPS, 2, BF16, tmp_path):
        assert largest_relative(losses(result), losses(one_rank[0])) < 5e-3, result["case"]


def test_ranks_with_a_gpu_lock_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The folder may be in a home that all nodes share."""
    from cavmae.trainer.distributed.process_group import compile_operators

    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "extensions"))
    compile_operators(cuda=True)
    assert not (tmp_path / "extensions").exists()
