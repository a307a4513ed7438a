"""What a machine can do at most: measured, and as its maker states it."""

import pytest
import torch

from cavmae.benchmarks.harness.machine_peaks import (
    DATASHEETS,
    datasheet,
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


@pytest.mark.parametrize(
    ("gpu", "bf16"),
    [
        ("NVIDIA H100 80GB HBM3", 989.5e12),
        ("NVIDIA H100 PCIe", 756.5e12),
        ("NVIDIA H200", 989.5e12),
        ("NVIDIA H200 NVL", 835.5e12),
        ("NVIDIA B200", 2250e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
    ],
)
def test_a_gpu_is_known_by_its_drivers_name(gpu: str, bf16: float) -> None:
    found = datasheet(gpu)
    assert found is not None
    assert found.bf16 == bf16


@pytest.mark.parametrize("gpu", ["", "NVIDIA GeForce RTX 5090", "AMD Instinct MI300X"])
def test_another_device_has_no_datasheet(gpu: str) -> None:
    assert datasheet(gpu) is None


def test_each_datasheet_is_found_by_its_own_name() -> None:
    assert [datasheet(one.name) for one in DATASHEETS] == list(DATASHEETS)


def test_utilization_is_of_the_measured_rate_and_of_the_datasheet() -> None:
    rates = {"flops_per_second": 800e12, "datasheet": {"bf16": 1000e12, "fp32": 60e12}}
    assert utilization(400e12, rates, "bf16") == {"mfu": 0.5, "mfu_of_datasheet": 0.4}
    alone = rates | {"datasheet": None}
    assert utilization(400e12, alone, "bf16") == {"mfu": 0.5, "mfu_of_datasheet": None}
