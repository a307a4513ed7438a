"""Stages of a GPU check on the CUDA device that computes nothing: called in its process."""

import torch

from cavmae.benchmarks.fake_cuda.trace import traced
from cavmae.benchmarks.gpu.operations import attention
from cavmae.benchmarks.gpu.setting import Check
from cavmae.benchmarks.kernels.agreement import compared, comparisons


def launched_by_comparisons() -> tuple[set[str], dict[str, str]]:
    """The kernels that all comparisons launch, and the error at which each comparison ends."""
    ends = {}
    with traced() as trace:
        for name in comparisons(small=False):
            try:
                compared(torch.device("cuda"), name)
            except Exception as error:
                ends[name] = type(error).__name__
    return {operation.name for operation in trace.of("triton")}, ends


def attention_timed() -> dict[str, list[str]]:
    """The backends whose forward and backward pass of attention was timed, by shape."""
    with traced():
        *_, found = attention(Check("cuda", True, "", float("inf"), ""))
    return {name: sorted(case["both"]) for name, case in found.details["cases"].items()}
