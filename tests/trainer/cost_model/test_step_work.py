"""The kernels of a step, counted without running it."""

from collections import Counter
from dataclasses import replace
from typing import Any, get_args

import pytest
import torch
from fake_gpu.autoencoder import both_passes
from tiny_run import MODEL

from cavmae.benchmarks.fake_cuda.process import in_fake_cuda
from cavmae.trainer.config.configs import (
    ClassifierConfig,
    EngineConfig,
    FinetuneConfig,
    PretrainConfig,
    RunConfig,
)
from cavmae.trainer.cost_model.comm_volume import TensorSizes
from cavmae.trainer.cost_model.flops import backward_flops, forward_flops
from cavmae.trainer.cost_model.kernel import Kernel
from cavmae.trainer.cost_model.rank_time import rank_work
from cavmae.trainer.cost_model.step_work import micro_batch_work, scaled_work
from cavmae.trainer.model.blocks import Recompute
from cavmae.trainer.model.config import ModelConfig

SAMPLES = 8
TENSORS = TensorSizes(trainable=(1000, 24), frozen=())
KINDS = ("product", "other")
SHALLOW = ModelConfig(modality_depth=1, decoder_depth=2)


def run(model: ModelConfig = MODEL, **engine: Any) -> PretrainConfig:
    settings = {"dtype": "bf16", "activation_checkpointing": "none"} | engine
    return PretrainConfig(
        global_batch=SAMPLES,
        micro_batch=SAMPLES,
        lanes=1,
        model=model,
        engine=EngineConfig(**settings),  # pyright: ignore[reportArgumentType]
    )


def flops(kernels: list[Kernel], during: str) -> int:
    return sum(one.calls * one.flops for one in kernels if one.during == during)


def calls(kernels: list[Kernel], during: str, kind: str) -> int:
    return sum(one.calls for one in kernels if (one.during, one.kind) == (during, kind))


@pytest.fixture(scope="module")
def eager() -> list[Kernel]:
    return micro_batch_work(run(), gpu=True)


@pytest.mark.parametrize(
    "base", [SHALLOW, replace(SHALLOW, decoder="cross", decoded_share=1 / 3)], ids=["self", "cross"]
)
def test_operations_of_the_base_model_are_those_of_the_formulas(base: ModelConfig) -> None:
    found = micro_batch_work(run(base), gpu=True)
    formula = forward_flops(base)
    assert flops(found, "forward") == pytest.approx(SAMPLES * formula.total, rel=2e-3)
    backward = SAMPLES * backward_flops(formula).total
    assert flops(found, "backward") == pytest.approx(backward, rel=2e-3)


def test_a_block_is_four_products_forward_and_eight_backward(eager: list[Kernel]) -> None:
    for part, depth in (
        ("blocks_a", MODEL.modality_depth),
        ("decoder_blocks", MODEL.decoder_depth),
    ):
        own = [one for one in eager if one.part == part]
        assert calls(own, "forward", "product") == 4 * depth
        assert calls(own, "backward", "product") == 8 * depth
        assert calls(own, "forward", "attention") == calls(own, "backward", "attention") == depth


@pytest.mark.parametrize(
    ("how", "changes"),
    [*((how, {}) for how in get_args(Recompute)), ("full", {"decoder": "cross"})],
    ids=[*get_args(Recompute), "full-cross"],
)
def test_the_count_is_that_of_a_traced_gpu(how: Recompute, changes: dict[str, Any]) -> None:
    base = replace(SHALLOW, **changes)
    config = replace(run(base, activation_checkpointing=how), micro_batch=64)
    counted, trace = micro_batch_work(config, gpu=True), in_fake_cuda(both_passes, config)
    for during in ("forward", "backward"):
        products = trace.of("product", phase=during)
        assert calls(counted, during, "product") == len(products)
        own = {kind: [k for k in counted if (k.during, k.kind) == (during, kind)] for kind in KINDS}
        assert sum(k.calls * k.flops for k in own["product"]) == sum(one.flops for one in products)
        moved = sum(k.calls * k.bytes for k in own["other"])
        traced = sum(one.bytes for one in trace.of("triton", "other", phase=during))
        assert moved == pytest.approx(traced, rel=0.1), (during, moved / traced)


def test_bytes_and_operations_are_linear_in_the_batch(eager: list[Kernel]) -> None:
    counts = {
        samples: micro_batch_work(replace(run(), micro_batch=samples), gpu=True)
        for samples in (2, 3)
    }
    found = scaled_work(counts, SAMPLES)
    assert [one.shape for one in found] == [one.shape for one in eager]
    assert [one.flops for one in found] == [one.flops for one in eager]
    moved, expected = (sum(one.bytes for one in kernels) for kernels in (found, eager))
    assert moved == pytest.approx(expected, rel=0.01)  # a small table is read once at most


def test_recomputing_blocks_repeats_products_and_norms_and_activations_do_not(
    eager: list[Kernel],
) -> None:
    selective, full = (
        micro_batch_work(run(activation_checkpointing=how), gpu=True)
        for how in ("selective", "full")
    )
    products = [calls(one, "backward", "product") for one in (eager, selective, full)]
    assert products[0] == products[1] < products[2]
    moved = [sum(k.calls * k.bytes for k in one if k.kind == "other") for one in (eager, selective)]
    assert moved[0] < moved[1]


def test_on_a_gpu_a_function_of_our_kernels_is_one_kernel(eager: list[Kernel]) -> None:
    names = Counter(one.name for one in eager if one.during == "forward")
    assert names["restore_tokens"] == 1
    assert names["masked_reconstruction_loss"] == names["gather_patches"] == 2
    (restored,) = [one for one in eager if (one.name, one.during) == ("restore_tokens", "forward")]
    tokens = MODEL.audio_tokens + MODEL.video_tokens
    written = 2 * SAMPLES * tokens * MODEL.decoder_width
    assert written < restored.bytes < 2.5 * written


def test_groups_that_span_micro_batches_have_a_forward_pass_to_the_embeddings_first() -> None:
    spanning = replace(run(), micro_batch=SAMPLES // 2)
    found = rank_work(spanning, TENSORS, 1)
    assert list(found) == ["embedding", "forward", "backward", "gradients", "update"]
    decoder = {"decoder_embed", "decoder_blocks", "decoder_norm"}
    assert not decoder & {one.part for one in found["embedding"]}
    assert sum(one.calls for one in found["gradients"]) == 2 * len(TENSORS.trainable)
    assert "embedding" not in rank_work(run(), TENSORS, 1)


@pytest.mark.parametrize("mode", ["multimodal", "audioonly", "videoonly"])
def test_fine_tuning_is_counted_too(mode: Any) -> None:
    config: RunConfig = FinetuneConfig(
        global_batch=SAMPLES,
        micro_batch=SAMPLES,
        model=MODEL,
        engine=EngineConfig(dtype="bf16"),
        classifier=ClassifierConfig(mode=mode),
    )
    parts = {one.part for one in micro_batch_work(config, gpu=True)}
    assert ("blocks_a" in parts) == (mode != "videoonly")
    assert ("blocks_v" in parts) == (mode != "audioonly")
    assert torch.is_grad_enabled()
