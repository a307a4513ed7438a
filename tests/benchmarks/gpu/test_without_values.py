"""A GPU check on a CUDA device that computes nothing: up to its first comparison of values."""

from collections.abc import Iterator

import pytest
import stages_without_values
from kernel_names import kernels_in_the_tree

from cavmae.benchmarks.fake_cuda.process import FakeCuda, fake_cuda

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def device() -> Iterator[FakeCuda]:
    with fake_cuda() as one:
        yield one


def test_comparisons_launch_every_kernel_in_every_size_and_end_where_values_are_compared(
    device: FakeCuda,
) -> None:
    kernels, ends = device.run(stages_without_values.launched_by_comparisons)
    assert kernels == kernels_in_the_tree()
    assert set(ends.values()) == {"DataDependentOutputException"}  # of torch.equal


def test_attention_runs_by_every_backend_and_ends_where_values_are_compared(
    device: FakeCuda,
) -> None:
    key, beyond = device.run(stages_without_values.attention_timed)
    assert key.startswith("decoder ours ")
    assert beyond[:2] == [
        "decoder by ours: differs by 1.0e+00",
        "decoder by flash: differs by 1.0e+00",
    ]
    assert all("differs by 1.0e+00" in one for one in beyond)  # as every value that is read there
