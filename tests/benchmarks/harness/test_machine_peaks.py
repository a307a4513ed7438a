"""What a machine can do at most: measured, and as its maker states it."""

import torch

from cavmae.benchmarks.harness.machine_peaks import (
    measure_rates,
    utilization,
)
from cavmae.benchmarks.step.training_step import SIZES


def test_the_fastest_product_is_the_matrix_rate() -> None:
    rates = measure_rates(torch.device("cpu"), "fp32", SIZES["tiny"], batch=2)
    measured = [one["flops_per_second"] for one in rates["products"].values()]
    assert len(measured) == 3
    assert rates["flops_per_second"] == max(measured) > 0
    assert rates["bytes_per_second"] > 0
    assert rates["datasheet"] is None


def test_utilization_is_of_the_measured_rate_and_of_the_datasheet() -> None:
    rates = {"flops_per_second": 800e12, "datasheet": {"bf16": 1000e12, "fp32": 60e12}}
    assert utilization(400e12, rates, "bf16") == {"mfu": 0.5, "mfu_of_datasheet": 0.4}
    alone = rates | {"datasheet": None}
    assert utilization(400e12, alone, "bf16") == {"mfu": 0.5, "mfu_of_datasheet": None}
