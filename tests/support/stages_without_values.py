"""Stages of a GPU check on the CUDA device that computes nothing: called in its process."""

import torch

from cavmae.benchmarks.fake_cuda.trace import traced
from cavmae.benchmarks.gpu.correctness import golden
from cavmae.benchmarks.gpu.operations import attention
from cavmae.benchmarks.gpu.setting import Check
from cavmae.benchmarks.gpu.steps import eager
from cavmae.benchmarks.kernels.agreement import compared, comparisons

STAGES = {"attention": attention, "eager": eager, "golden": golden}


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


def ran(name: str, golden_folder: str) -> tuple[str, list[str], str]:
    """Run a stage; returns its key, what is beyond a limit, and the error at which it ended."""
    check = Check("cuda", True, golden_folder, float("inf"), "")
    with traced():
        try:
            *_, found = STAGES[name](check)
        except RuntimeError as error:
            return "", [], str(error)
    return found.key, found.beyond, ""
