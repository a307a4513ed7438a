"""Memory of a step on a CPU is that of the step alone, at its most."""

import pytest
import torch

from cavmae.benchmarks.harness.process_memory import reset_peak, resident_bytes
from cavmae.benchmarks.step.memory import step_peak_bytes
from cavmae.benchmarks.step.training_step import SIZES, StepSetting
from cavmae.trainer.cost_model.run_rates import peak_bytes
from cavmae.trainer.model.cavmae import CAVMAE

MEBIBYTE = 2**20


def test_a_peak_stays_until_it_begins_anew() -> None:
    cpu = torch.device("cpu")
    reset_peak()
    before = resident_bytes()
    block = torch.ones(64 * MEBIBYTE)  # 256 MiB, touched
    del block
    assert peak_bytes(cpu) - before > 200 * MEBIBYTE
    reset_peak()
    assert peak_bytes(cpu) - before < 100 * MEBIBYTE


@pytest.mark.slow
def test_a_step_takes_weights_gradients_and_moments_and_more_for_a_larger_batch() -> None:
    config = SIZES["tiny"]
    weights = sum(one.nbytes for one in CAVMAE(config).parameters() if one.requires_grad)
    small, large = (
        step_peak_bytes(StepSetting("cavmae", config, batch, "fp32", torch.device("cpu")))
        for batch in (1, 128)
    )
    assert small > 4 * weights
    assert large > small + 50 * MEBIBYTE
