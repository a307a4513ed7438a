"""What ranks are said to send each other is what real ones do, to the byte."""

from pathlib import Path
from typing import Any

import pytest
from launch import run_ranks

from cavmae.trainer.config.configs import EngineConfig, LossConfig, PretrainConfig
from cavmae.trainer.cost_model.comm_volume import (
    Collective,
    TensorSizes,
    collectives,
    sent_by_purpose,
)

SCRIPT = Path(__file__).with_name("comm_volume_ranks.py")
# Layers on both sides of stage 3's threshold, and sizes that 8 ranks don't divide.
MODEL = {"width": 192, "modality_depth": 1, "decoder_width": 36}


def case(stage: int, dtype: str = "fp32", **fields: Any) -> dict[str, Any]:
    return {"zero_stage": stage, "dtype": dtype, "model": MODEL, **fields}


CASES: dict[int, list[dict[str, Any]]] = {
    2: [
        *(
            case(stage, dtype, micro_batch=4)
            for stage in (0, 1, 2, 3)
            for dtype in ("fp32", "bf16")
        ),
        case(1),
        case(3),
        case(1, bidirectional=True, micro_batch=4),
        case(2, contrastive_weight=0.0),
        case(3, micro_batch=4, model=MODEL | {"decoder": "cross", "decoded_share": 0.5}),
    ],
    4: [
        *(case(stage, "bf16", micro_batch=2, group=8) for stage in (0, 1, 2)),
        case(3, micro_batch=2, group=2),
        case(3, "bf16"),
    ],
    8: [case(1, "bf16", bidirectional=True), case(3)],
}
SIZES = TensorSizes(trainable=(768 * 3072,) * 80 + (768,) * 300, frozen=(768,) * 240)


def config_of(stage: int, dtype: str = "bf16", **fields: Any) -> PretrainConfig:
    """Of 8 ranks with two micro-batches each."""
    return PretrainConfig(
        **{"global_batch": 64, "micro_batch": 4, "lanes": 64, **fields},
        engine=EngineConfig(zero_stage=stage, dtype=dtype),  # pyright: ignore[reportArgumentType]
    )


def sent(config: PretrainConfig, world_size: int = 8) -> dict[Any, int]:
    return sent_by_purpose(collectives(config, SIZES, world_size), world_size)


@pytest.fixture(scope="module", params=list(CASES), ids="{}-ranks".format)
def measured(request: Any, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    found = run_ranks(SCRIPT, request.param, CASES[request.param], tmp_path_factory.mktemp("wire"))
    return [one | result for one, result in zip(CASES[request.param], found, strict=True)]


@pytest.mark.slow
def test_payloads_and_calls_are_those_of_a_real_step(measured: list[dict[str, Any]]) -> None:
    for result in measured:
        assert result["said"] == result["counted"], result


@pytest.mark.slow
def test_ranks_send_the_bytes_of_a_ring(measured: list[dict[str, Any]]) -> None:
    for result in measured:
        headers = result["socket_bytes"] / result["said_sent_bytes"] - 1
        assert 0 < headers < 0.02, result


def test_stages_differ_from_the_paper_where_deepspeed_does() -> None:
    once = 2 * sum(SIZES.trainable) * 7 // 8
    by_stage = [sent(config_of(stage)) for stage in (0, 1, 2, 3)]
    assert by_stage[0]["gradients"] == by_stage[1]["gradients"] == 2 * once
    assert by_stage[2]["gradients"] == 4 * once, "each of two micro-batches is reduced"
    assert by_stage[3]["gradients"] == 2 * once, "and scattered in stage 3"
    assert (by_stage[0]["weights"], by_stage[1]["weights"]) == (0, once)


def test_stage_3_gathers_three_times_where_groups_span_micro_batches() -> None:
    whole = config_of(3, loss=LossConfig(contrastive_weight=0.0))
    spanning = config_of(3)
    small = 2 * 768 * (300 + 240) * 7 // 8
    once = sent(whole)["weights"] - small
    assert sent(spanning)["weights"] - small == pytest.approx(3 * once)


def test_embeddings_are_sent_once_and_their_gradients_never() -> None:
    config = config_of(1, micro_batch=8)
    log_sums = 7 * 8 * 4
    assert sent(config)["embeddings"] == 7 * 8 * 2 * 768 * 2 + log_sums


def test_groups_inside_a_rank_send_no_embeddings() -> None:
    config = config_of(1, micro_batch=8, loss=LossConfig(contrastive_group=8))
    assert sent(config)["embeddings"] == 0


def test_one_rank_sends_nothing() -> None:
    assert collectives(config_of(3), SIZES, 1) == ()


def test_a_large_model_is_reduced_in_several_buckets() -> None:
    large = TensorSizes(trainable=(100_000_000,) * 12, frozen=())
    (gradients, *_) = collectives(config_of(0), large, 8)
    assert gradients == Collective("gradients", "all_reduce", 2 * 1_200_000_000, 3)
