"""The time of kernels at what a machine reaches, and what GPUs are known to reach."""

import dataclasses
from typing import Any

import pytest

from cavmae.trainer.cost_model.gpus import GPUS, find_gpu, gpu_ceilings, known_gpu
from cavmae.trainer.cost_model.kernel import Kernel
from cavmae.trainer.cost_model.kernel_time import Ceilings, Range, kernel_times

PLAIN = Ceilings(
    name="plain",
    source="made up",
    flops_per_second=Range(1e12, 2e12),
    bytes_per_second=Range(1e9, 2e9),
    attention={"forward": Range(0.5e12, 1e12), "backward": Range(0.25e12, 0.5e12)},
)


def product(*shape: int, moved: int = 0, calls: int = 1) -> Kernel:
    batch, rows, columns, inner = shape
    flops = 2 * batch * rows * columns * inner
    return Kernel("forward", "", "product", "mm", shape, "nn", flops, moved, calls)


def other(moved: int, name: str = "add", calls: int = 1) -> Kernel:
    return Kernel("forward", "", "other", name, (), "", 0, moved, calls)


def total(*kernels: Kernel, **changes: Any) -> Range:
    return kernel_times(kernels, dataclasses.replace(PLAIN, **changes)).total


def test_a_kernel_takes_its_operations_or_its_bytes_whichever_is_longer() -> None:
    assert total(product(1, 1000, 1000, 1000)) == Range(1e-3, 2e-3)
    assert total(product(1, 1000, 1000, 1000, moved=10**8)) == Range(0.05, 0.1)
    assert total(other(10**9)) == Range(0.5, 1.0)


def test_kernels_add_up_and_gaps_lie_between_them() -> None:
    found = total(other(10**9, calls=3), product(1, 1000, 1000, 1000), gap_seconds=Range(0.1, 0.2))
    assert found.low == pytest.approx(1.5 + 0.001 + 4 * 0.1)
    assert found.high == pytest.approx(3.0 + 0.002 + 4 * 0.2)


def test_a_host_that_is_slower_than_the_device_sets_the_pace() -> None:
    launches = kernel_times(
        [other(10**6, calls=100)], dataclasses.replace(PLAIN, launch_seconds=Range(1e-4, 1e-2))
    )
    assert launches.total.low == pytest.approx(0.05)
    assert launches.total.high == pytest.approx(1.0)
    assert launches.by_kind()["host"].high == pytest.approx(0.9)


def test_measured_rates_of_operations_and_layouts_count_for_them_alone() -> None:
    rates: dict[str, Any] = {
        "operations": {"gelu": Range(1e8, 1e8)},
        "layouts": {"nn": Range(1e10, 1e10)},
    }
    assert total(other(10**9, "gelu"), **rates) == Range(10.0, 10.0)
    assert total(other(10**9), **rates) == Range(0.5, 1.0)
    assert total(product(1, 1000, 1000, 1000), **rates) == Range(0.2, 0.2)


def test_a_product_with_one_tile_more_than_multiprocessors_takes_nearly_twice_as_long() -> None:
    full, more = (
        total(product(1, 128 * tiles, 128, 512), multiprocessors=100).high for tiles in (100, 101)
    )
    assert more / full == pytest.approx(2.0)


def test_a_long_inner_side_is_cut_so_that_tiles_fill_the_device() -> None:
    alone = product(1, 768, 768, 65_536)
    assert total(alone, multiprocessors=108).high == pytest.approx(total(alone).high)
    short = product(1, 768, 768, 768)
    assert total(short, multiprocessors=108).high == pytest.approx(3 * total(short).high)


def test_attention_of_narrow_heads_is_bound_by_its_exponentials() -> None:
    def seconds(width: int) -> Range:
        shape = (1, 1, 1000, 1000, width)
        flops = 4 * 1000 * 1000 * width
        one = Kernel("forward", "", "attention", "sdpa", shape, "", flops, 0)
        return total(one, exponentials_per_second=1e9)

    assert seconds(32) == Range(1e-3, 1e-3 + 128e6 / 0.5e12)
    assert seconds(1024).low == pytest.approx(4096e6 / 1e12)


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
    found = find_gpu(gpu)
    assert found is not None
    assert found.bf16 == bf16


@pytest.mark.parametrize("gpu", ["", "NVIDIA GeForce RTX 5090", "AMD Instinct MI300X"])
def test_another_device_is_not_known(gpu: str) -> None:
    assert find_gpu(gpu) is None


def test_each_gpu_is_found_by_its_own_name() -> None:
    assert [find_gpu(one.name) for one in GPUS] == list(GPUS)


def test_a_gpu_is_known_by_a_part_of_its_name() -> None:
    names = {given: known_gpu(given).name for given in ("H200", "H100", "A100", "L4", "B200")}
    assert names == {
        "H200": "NVIDIA H200",
        "H100": "NVIDIA H100 80GB HBM3",
        "A100": "NVIDIA A100-SXM4-80GB",
        "L4": "NVIDIA L4",
        "B200": "NVIDIA B200",
    }
    with pytest.raises(ValueError, match=r"gpu is 'H900', whose speed is not known.*H200"):
        known_gpu("H900")


@pytest.mark.parametrize("gpu", GPUS, ids=lambda one: one.name)
def test_no_gpu_is_expected_to_reach_its_data_sheet(gpu: Any) -> None:
    found = gpu_ceilings(gpu, "bf16")
    assert 0.4 * gpu.bf16 < found.flops_per_second.low < found.flops_per_second.high < gpu.bf16
    assert found.bytes_per_second.high < gpu.bytes_per_second
    assert found.attention["backward"].high < found.flops_per_second.high
