"""What the device that computes nothing notes and refuses, and the process that has it."""

from collections.abc import Iterator

import pytest
from fake_gpu.operations import (
    device_facts,
    end,
    launch,
    mixed_devices,
    products,
    reads,
    round_trip,
)

from cavmae.benchmarks.fake_cuda.gpu import FakeGpu
from cavmae.benchmarks.fake_cuda.process import FakeCuda, compiled_guard, fake_cuda


@pytest.fixture(scope="module")
def gpu() -> Iterator[FakeCuda]:
    with fake_cuda(FakeGpu("NVIDIA A100", (8, 0), multiprocessors=108)) as device:
        yield device


def test_torch_and_triton_see_the_gpu_that_was_asked_for(gpu: FakeCuda) -> None:
    assert gpu.run(device_facts) == ("NVIDIA A100", (8, 0), 80)


def test_reads_and_pageable_copies_are_waits_and_pinned_copies_are_not(gpu: FakeCuda) -> None:
    trace = gpu.run(reads)

    assert [(wait.phase, wait.what) for wait in trace.waits] == [
        ("item", "item"),
        ("bool", "item"),
        ("tolist", "tolist"),
        ("cpu", "copy from the device"),
        ("nonzero", "nonzero"),
        ("pageable", "copy to the device"),
        ("blocking", "copy to the device"),
        ("synchronize", "torch.cuda.synchronize"),
    ]
    assert {wait.where.partition(":")[0] for wait in trace.waits} == {"fake_gpu/operations.py"}
    assert [copy.phase for copy in trace.copies if copy.pinned and copy.non_blocking] == ["pinned"]


def test_whole_numbers_of_the_host_come_back_and_all_else_is_read_as_0(gpu: FakeCuda) -> None:
    assert gpu.run(round_trip) == ([10, 20, 30], 3, 0.0)


def test_products_are_counted_in_operations_and_lists_in_launches(gpu: FakeCuda) -> None:
    trace = gpu.run(products)
    (product,), (*_, update) = trace.of("product"), trace.of("other")

    assert (product.kind, product.flops) == ("product", 2 * 4 * 8 * 16 * 32)
    assert product.bytes == 4 * 4 * (8 * 16 + 16 * 32 + 8 * 32)
    assert update.kernels == 7  # 64 tensors of two lists each


def test_triton_launches_are_noted_with_their_bytes(gpu: FakeCuda) -> None:
    (operation,) = gpu.run(launch, "cuda", (65536,)).of("triton")
    assert (operation.name, operation.bytes) == ("_nothing_kernel", 400)


@pytest.mark.parametrize(
    ("device", "grid", "message"),
    [
        ("cpu", (1,), "tensor on cpu"),
        ("cuda", (0,), r"grid of \(0,\)"),
        ("cuda", (1, 65536), r"grid of \(1, 65536\)"),
    ],
)
def test_launches_that_a_driver_refuses_are_errors(
    gpu: FakeCuda, device: str, grid: tuple[int, ...], message: str
) -> None:
    with pytest.raises(RuntimeError, match=message):
        gpu.run(launch, device, grid)


def test_tensors_of_two_devices_are_an_error_that_says_where(gpu: FakeCuda) -> None:
    with pytest.raises(RuntimeError, match="two devices") as error:
        gpu.run(mixed_devices)
    assert "operations.py" in error.value.__notes__[0]


def test_a_process_that_ends_is_an_error_with_its_code() -> None:
    with fake_cuda() as gpu, pytest.raises(RuntimeError, match="ended with code 7"):
        gpu.run(end, 7)


def test_a_missing_compiler_is_an_error_that_names_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(RuntimeError, match=r"no C\+\+ compiler 'no-such-compiler'.*install g"):
        compiled_guard()
