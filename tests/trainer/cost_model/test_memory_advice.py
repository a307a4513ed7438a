"""What a run is advised to change is little, is accepted, and makes it fit."""

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
from cavmae.trainer.cost_model.activations import ActivationTimeline, count_passes
from cavmae.trainer.cost_model.memory import Sizes, footprint, model_sizes
from cavmae.trainer.cost_model.memory_advice import advice, what_would_fit

RANKS = 8
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
def counted(as_it_is: Sizes) -> dict[str, ActivationTimeline]:
    """Of `CONFIG`, by what is computed again."""
    full = with_engine(activation_checkpointing="full")
    return {"selective": as_it_is.passes, "full": count_passes(full)}


@pytest.fixture
def sizes(
    as_it_is: Sizes, counted: dict[str, ActivationTimeline], monkeypatch: pytest.MonkeyPatch
) -> Sizes:
    """Of `CONFIG`; what is advised counts nothing anew."""
    monkeypatch.setattr(
        memory_advice,
        "count_passes",
        lambda config: counted[config.engine.activation_checkpointing],
    )
    return as_it_is


def with_engine(**engine: Any) -> PretrainConfig:
    return dataclasses.replace(CONFIG, engine=dataclasses.replace(CONFIG.engine, **engine))


def total(config: PretrainConfig, sizes: Sizes, counted: dict[str, ActivationTimeline]) -> int:
    sizes = Sizes(sizes.tensors, counted[config.engine.activation_checkpointing])
    return footprint(config, sizes, RANKS, gpu=True).total


def test_one_change_is_advised_where_it_is_enough(
    sizes: Sizes, counted: dict[str, ActivationTimeline]
) -> None:
    limit = total(CONFIG, sizes, counted) - 1
    assert list(what_would_fit(CONFIG, sizes, RANKS, limit, gpu=True)) == [
        "--micro-batch 16",
        "--engine.zero-stage 1",
        "--engine.activation-checkpointing full",
    ]


def test_a_gpu_can_leave_the_optimizer_in_host_memory(
    sizes: Sizes, counted: dict[str, ActivationTimeline]
) -> None:
    config = with_engine(zero_stage=1)
    limit = total(config, sizes, counted) - 1
    for gpu in (True, False):
        changes = list(what_would_fit(config, sizes, RANKS, limit, gpu=gpu))
        assert ("--engine.offload-optimizer" in changes) == gpu


def test_a_run_with_checkpoints_is_not_told_to_change_what_they_hold_it_to(
    sizes: Sizes, counted: dict[str, ActivationTimeline]
) -> None:
    limit = total(CONFIG, sizes, counted) - 1
    changes = list(what_would_fit(CONFIG, sizes, RANKS, limit, gpu=True, begun=True))
    assert changes == ["--micro-batch 16", "--engine.activation-checkpointing full"]


def test_what_fits_is_advised_whenever_there_is_such_a_run_and_is_accepted(
    sizes: Sizes, counted: dict[str, ActivationTimeline], tmp_path: Path
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
            (0, 1, 2, 3), counted, (False, True), (1, 2, 4, 8, 16, 32)
        )
        if stage or not offload
    ]
    totals = sorted({total(config, sizes, counted) for config in everything})
    save_config(CONFIG, tmp_path / "config.json")
    most_flags = 0
    for limit in [*totals[:20:4], *totals[20:-1:12]]:
        changes = list(what_would_fit(CONFIG, sizes, RANKS, limit, gpu=True))
        assert changes, f"{limit} bytes are enough for some run"
        for change in changes:
            words = [str(tmp_path / "config.json"), *change.split()]
            asked = parse(words, [PretrainConfig], "test")
            accepted = resolve(asked, world_size=RANKS, samples=256, threads=1)
            assert total(accepted, sizes, counted) <= limit, change
            assert accepted.micro_batch == asked.micro_batch
            most_flags = max(most_flags, change.count("--"))
    assert most_flags > 3
    assert not list(what_would_fit(CONFIG, sizes, RANKS, totals[0] - 1, gpu=True))
    text = advice(CONFIG, sizes, RANKS, totals[0] - 1, gpu=True)
    assert text == "no change of its batches or engine fits: use more ranks, or a smaller model"


def test_what_costs_more_goes_further_when_what_costs_less_has_gone_all_the_way(
    sizes: Sizes, counted: dict[str, ActivationTimeline]
) -> None:
    both = dataclasses.replace(with_engine(zero_stage=2), micro_batch=1)
    limit = total(both, sizes, counted)
    found = list(what_would_fit(CONFIG, sizes, RANKS, limit, gpu=True))
    assert found[0] == "--micro-batch 1 --engine.zero-stage 2"


def test_less_is_computed_again_where_that_is_enough() -> None:
    config = with_engine(activation_checkpointing="none")
    none = model_sizes(config)
    limit = footprint(config, none, RANKS, gpu=True).total - 1
    changes = list(what_would_fit(config, none, RANKS, limit, gpu=True))
    assert "--engine.activation-checkpointing selective" in changes
