"""Whole steps on a GPU that is not there, with DeepSpeed: devices, host waits, copies, kernels."""

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from fake_gpu.inference import classified, embedded, reconstructed, validation
from fake_gpu.training import LOGGED_EVERY, STEPS, FakeTraining, train

from cavmae.benchmarks.fake_cuda.process import FakeCuda, fake_cuda
from cavmae.benchmarks.fake_cuda.trace import Trace
from cavmae.trainer.config.configs import (
    ClassifierConfig,
    EngineConfig,
    FinetuneConfig,
    LossConfig,
    PretrainConfig,
    RunConfig,
)

ENGINE = EngineConfig(zero_stage=1, clip_grad_norm=1.0)
PRETRAINING = PretrainConfig(global_batch=16, micro_batch=8, engine=ENGINE)
FINETUNING = FinetuneConfig(global_batch=16, micro_batch=8, engine=ENGINE)
IN_DEEPSPEED = {
    1: {
        ("copy to the device", "mask_nan_or_inf_with_val_inplace"): 1,
        ("item", "is_invalid_grad_norm"): 1,
        ("item", "clip_tensors_by_global_norm"): 1,
    },
    2: {
        ("copy to the device", "mask_nan_or_inf_with_val_inplace"): 1,
        ("item", "has_overflow"): 1,
        ("item", "is_invalid_grad_norm"): 2,
    },
}
"""Host waits of a step by ZeRO stage that no setting avoids, and how often they happen."""
KERNELS = 450
"""Most kernels that a step of the tiny model launches, of one micro-batch, eager, in stage 1."""


def layouts() -> dict[str, tuple[RunConfig, int]]:
    """Runs by what they show, with their ranks."""
    group = replace(PRETRAINING, loss=LossConfig(contrastive_group=8))
    classifiers = {
        mode: (replace(FINETUNING, classifier=ClassifierConfig(mode=mode, loss="cross_entropy")), 1)
        for mode in ("multimodal", "audioonly", "videoonly")
    }
    return {
        "alone": (replace(PRETRAINING, micro_batch=16), 1),
        "groups": (group, 2),
        "gathered": (PRETRAINING, 2),
        "cached": (replace(PRETRAINING, micro_batch=4), 2),
        "stage 2": (replace(PRETRAINING, engine=replace(ENGINE, zero_stage=2)), 2),
        **classifiers,
    }


@pytest.fixture(scope="module")
def gpu() -> Iterator[FakeCuda]:
    with fake_cuda() as device:
        yield device


@pytest.fixture(scope="module", params=layouts())
def layout(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def run(gpu: FakeCuda, layout: str) -> FakeTraining:
    return gpu.run(train, *layouts()[layout])


def waits(trace: Trace, step: int, *, in_deepspeed: bool) -> Counter[tuple[str, str]]:
    """Where the host waits in a step, by operation and place."""
    return Counter(
        (wait.what, wait.function if in_deepspeed else wait.where)
        for wait in trace.waits
        if wait.phase == str(step) and wait.where.startswith("deepspeed") == in_deepspeed
    )


def test_a_step_of_ours_waits_for_the_device_once(run: FakeTraining) -> None:
    for step in range(1, STEPS + 1):
        found = waits(run.trace, step, in_deepspeed=False)
        assert found.total() == 1
        ((what, where),) = found
        assert what == "tolist" and where.startswith("cavmae/trainer/distributed/collectives.py")


def test_deepspeed_waits_where_no_setting_avoids_it(run: FakeTraining, layout: str) -> None:
    known = IN_DEEPSPEED[2 if layout == "stage 2" else 1]
    for step in range(2, STEPS + 1):
        assert waits(run.trace, step, in_deepspeed=True) == known


def test_what_a_step_brings_to_the_device_goes_once_through_pinned_memory(
    run: FakeTraining, layout: str
) -> None:
    config, world_size = layouts()[layout]
    micro_batches = config.global_batch // world_size // config.micro_batch
    for step in range(1, STEPS + 1):
        copies = [copy for copy in run.trace.copies if copy.phase == str(step)]
        ours = [copy for copy in copies if not copy.where.startswith("deepspeed")]
        assert all(copy.to_device and copy.pinned and copy.non_blocking for copy in ours)
        # Positions and, in fine-tuning, targets of each micro-batch; flags and seconds of the step.
        of_micro_batch = 2 if isinstance(config, FinetuneConfig) else 1
        assert len(ours) == of_micro_batch * micro_batches + 1


def test_metrics_and_gradient_norm_are_logged_every_few_steps(run: FakeTraining) -> None:
    assert list(run.logged) == list(range(LOGGED_EVERY, STEPS + 1, LOGGED_EVERY))
    for metrics in run.logged.values():
        assert {"loss", "gradient_norm"} <= metrics.keys()


@pytest.mark.parametrize("layout", ["gathered"], indirect=True)
def test_a_step_launches_no_more_kernels_than_stated(run: FakeTraining) -> None:
    kernels = sum(operation.kernels for operation in run.trace.of(phase="3"))
    assert 0.9 * KERNELS < kernels <= KERNELS


@pytest.mark.parametrize("config", [PRETRAINING, FINETUNING], ids=["pretraining", "fine-tuning"])
def test_validation_stays_on_its_device(gpu: FakeCuda, config: RunConfig) -> None:
    assert "val_loss" in gpu.run(validation, config)


@pytest.mark.parametrize("use", [embedded, classified, reconstructed])
def test_a_trained_model_gets_clips_through_pinned_memory_and_stays_on_its_device(
    gpu: FakeCuda, use: Callable[[Path], Trace], tmp_path: Path
) -> None:
    trace = gpu.run(use, tmp_path)

    assert trace.of("attention", phase="clips")
    brought = [copy for copy in trace.copies if copy.to_device and copy.phase == "clips"]
    assert brought and all(copy.pinned and copy.non_blocking for copy in brought)
