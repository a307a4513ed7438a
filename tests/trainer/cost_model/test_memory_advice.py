"""The advised changes are few, are accepted, and make a run fit."""

import dataclasses
import itertools
from pathlib import Path
from typing import Any

import pytest
from tiny_run import MODEL

from cavmae.trainer.config.configs import EngineConfig, PretrainConfig
from cavmae.trainer.config.parse import parse
from cavmae.trainer.config.resolve import resolve
from cavmae.trainer.config.serialize import save_config
from cavmae.trainer.cost_model import memory_advice
from cavmae.trainer.cost_model.activations import ActivationTimeline, trace_activations
from cavmae.trainer.cost_model.memory import Sizes, footprint, model_sizes
from cavmae.trainer.cost_model.memory_advice import advice, largest_micro_batch

RANKS = 8
NOTHING_FITS = "no change of its batches or engine fits: use more ranks, or a smaller model"
CONFIG = PretrainConfig(
    global_batch=256,
    micro_batch=32,
    lanes=64,
    steps=1,
    threads_per_rank=1,
    model=dataclasses.replace(MODEL, width=128, decoder_width=128),
    engine=EngineConfig(zero_stage=0, dtype="bf16", compile=True),
)


@pytest.fixture(scope="module")
def as_it_is() -> Sizes:
    return model_sizes(CONFIG)


@pytest.fixture(scope="module")
def traced(as_it_is: Sizes) -> dict[str, ActivationTimeline]:
    """The activations of `CONFIG` by what is recomputed."""
    full = with_engine(activation_checkpointing="full")
    return {"selective": as_it_is.activations, "full": trace_activations(full)}


@pytest.fixture
def sizes(
    as_it_is: Sizes, traced: dict[str, ActivationTimeline], monkeypatch: pytest.MonkeyPatch
) -> Sizes:
    """The sizes of `CONFIG`; advice traces nothing anew."""
    monkeypatch.setattr(
        memory_advice,
        "trace_activations",
        lambda config: traced[config.engine.activation_checkpointing],
    )
    return as_it_is


def with_engine(**engine: Any) -> PretrainConfig:
    return dataclasses.replace(CONFIG, engine=dataclasses.replace(CONFIG.engine, **engine))


def total(
    config: PretrainConfig, sizes: Sizes, traced: dict[str, ActivationTimeline], *, gpu: bool = True
) -> int:
    sizes = Sizes(sizes.tensors, traced[config.engine.activation_checkpointing])
    return footprint(config, sizes, RANKS, gpu=gpu).total


def test_the_largest_micro_batch_fits_and_the_next_does_not(sizes: Sizes) -> None:
    sixteen, thirty_two = (
        footprint(dataclasses.replace(CONFIG, micro_batch=count), sizes, RANKS, gpu=True).total
        for count in (16, 32)
    )
    asked = dataclasses.replace(CONFIG, micro_batch=0)
    for limit, expected in ((sixteen, 16), (thirty_two - 1, 16), (thirty_two, 32), (1, 1)):
        assert largest_micro_batch(asked, RANKS, limit, gpu=True) == expected


def test_one_change_is_advised_where_it_is_enough(
    sizes: Sizes, traced: dict[str, ActivationTimeline]
) -> None:
    limit = total(CONFIG, sizes, traced) - 1
    assert advice(CONFIG, sizes, RANKS, limit, gpu=True) == "what fits: --micro-batch 16"
    single = dataclasses.replace(CONFIG, micro_batch=1)
    limit = total(single, sizes, traced) - 1
    assert advice(single, sizes, RANKS, limit, gpu=True) == "what fits: --engine.zero-stage 1"


def test_a_gpu_can_leave_the_optimizer_in_host_memory(
    sizes: Sizes, traced: dict[str, ActivationTimeline]
) -> None:
    full = with_engine(zero_stage=1, activation_checkpointing="full")
    config = dataclasses.replace(full, micro_batch=1)
    sizes = Sizes(sizes.tensors, traced["full"])
    on_gpu, on_cpu = (
        advice(
            config,
            sizes,
            RANKS,
            total(config, sizes, traced, gpu=gpu) - 1,
            gpu=gpu,
            begun=True,
        )
        for gpu in (True, False)
    )
    assert on_gpu == "what fits: --engine.offload-optimizer"
    assert on_cpu == NOTHING_FITS


def test_a_run_with_checkpoints_keeps_its_zero_stage(
    sizes: Sizes, traced: dict[str, ActivationTimeline]
) -> None:
    limit = total(CONFIG, sizes, traced) - 1
    found = advice(CONFIG, sizes, RANKS, limit, gpu=True, begun=True)
    assert found == "what fits: --micro-batch 16"
    single = dataclasses.replace(CONFIG, micro_batch=1)
    limit = total(single, sizes, traced) - 1
    assert advice(single, sizes, RANKS, limit, gpu=True, begun=True) == NOTHING_FITS


def test_what_fits_is_advised_whenever_there_is_such_a_run_and_is_accepted(
    sizes: Sizes, traced: dict[str, ActivationTimeline], tmp_path: Path
) -> None:
    everything = [
        dataclasses.replace(
            with_engine(
                zero_stage=stage,
                compile=stage < 3,
                activation_checkpointing=how,
                offload_optimizer=offload,
            ),
            micro_batch=samples,
        )
        for stage, how, offload, samples in itertools.product(
            (0, 1, 2, 3), traced, (False, True), (1, 2, 4, 8, 16, 32)
        )
        if stage or not offload
    ]
    totals = sorted({total(config, sizes, traced) for config in everything})
    save_config(CONFIG, tmp_path / "config.json")
    most_flags = 0
    for limit in [*totals[:20:4], *totals[20:-1:12]]:
        found = advice(CONFIG, sizes, RANKS, limit, gpu=True)
        assert found.startswith("what fits: "), f"{limit} bytes are enough for some run"
        change = found.removeprefix("what fits: ")
        words = [str(tmp_path / "config.json"), *change.split()]
        asked = parse(words, [PretrainConfig], "test")
        accepted = resolve(asked, world_size=RANKS, samples=256, threads=1)
        assert total(accepted, sizes, traced) <= limit, change
        assert accepted.micro_batch == asked.micro_batch
        most_flags = max(most_flags, change.count("--"))
    assert most_flags > 3
    assert advice(CONFIG, sizes, RANKS, totals[0] - 1, gpu=True) == NOTHING_FITS


def test_a_change_that_the_others_make_needless_is_not_advised(
    sizes: Sizes, traced: dict[str, ActivationTimeline]
) -> None:
    both = dataclasses.replace(with_engine(zero_stage=1), micro_batch=1)
    found = advice(CONFIG, sizes, RANKS, total(both, sizes, traced), gpu=True)
    assert found == "what fits: --micro-batch 1 --engine.zero-stage 1"
    both = dataclasses.replace(with_engine(zero_stage=1), micro_batch=8)
    found = advice(CONFIG, sizes, RANKS, total(both, sizes, traced), gpu=True)
    assert found == "what fits: --micro-batch 4"


def test_less_is_recomputed_where_that_is_enough() -> None:
    model = dataclasses.replace(MODEL, audio_frames=1024, decoder_depth=4)
    config = dataclasses.replace(
        with_engine(activation_checkpointing="none"), micro_batch=1, model=model
    )
    none = model_sizes(config)
    limit = footprint(config, none, RANKS, gpu=True).total - 1
    found = advice(config, none, RANKS, limit, gpu=True, begun=True)
    assert found == "what fits: --engine.activation-checkpointing selective"
