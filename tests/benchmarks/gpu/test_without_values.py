"""A GPU check on a CUDA device that computes nothing: up to its first comparison of values."""

from collections.abc import Iterator

import pytest
from fake_gpu import stages
from kernel_names import kernels_in_the_tree

from cavmae.benchmarks.fake_cuda.process import FakeCuda, fake_cuda
from cavmae.benchmarks.kernels.cases import ATTENTION

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def device() -> Iterator[FakeCuda]:
    with fake_cuda() as one:
        yield one


def test_comparisons_launch_every_kernel_in_every_size_and_end_where_values_are_compared(
    device: FakeCuda,
) -> None:
    kernels, ends = device.run(stages.launched_by_comparisons)
    assert kernels == kernels_in_the_tree()
    assert set(ends.values()) == {"DataDependentOutputException"}  # of torch.equal


def test_attention_of_every_shape_is_timed_with_every_backend_of_a_gpu(device: FakeCuda) -> None:
    timed = device.run(stages.attention_timed)
    backends = ["eager", "ours", "sdpa-cudnn", "sdpa-efficient", "sdpa-flash"]
    assert timed == {f"attention_{name}": backends for name in ATTENTION}
