"""Stages of a GPU check that compare: every kernel, and the whole model with reference numbers."""

import dataclasses
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from cavmae.benchmarks.conformance.forward import ForwardCase, SharedModel
from cavmae.benchmarks.conformance.tiny_train import TinyTrain
from cavmae.benchmarks.conformance.tolerances import Deviation, worst
from cavmae.benchmarks.gpu.setting import Check, Found, Skip
from cavmae.benchmarks.kernels.agreement import compared_in_parallel, comparisons
from cavmae.benchmarks.step.training_step import SIZES, Precision, StepSetting, TrainingStep

# Other kernels and libraries than those the limits were observed with.
CUDA_FACTOR = 10.0
BF16_LOSS_LIMIT = 1e-2


def kernels(check: Check) -> Iterator[Found]:
    """Compare every Triton kernel with its torch reference, and two runs of it bit by bit."""
    names = comparisons(check.small)
    for differences, beyond in compared_in_parallel(check.device, names):
        key = f"{len(differences)} comparisons of {len(names)} operations"
        yield Found(key, {"differences": differences}, beyond)


def golden(check: Check) -> Iterator[Found]:
    """Compare short trainings, forward passes and gradients of the published model with its
    numbers, and training in bf16 with training in fp32."""
    folder = Path(check.golden)
    if not TinyTrain.all(folder) and not ForwardCase.all(folder):
        raise Skip(f"{folder} has no tiny_train and no pretrain_forward")
    found = Found("", {"cases": {}, "ended_early": False})
    compared = 0
    for name, case in _cases(folder, check.device):
        compared += case["compared"]
        found.key = f"{compared} numbers of {len(found.details['cases']) + 1} cases"
        found.details["cases"][name] = case
        found.beyond += [f"{name} {line}" for line in case["beyond"]]
        yield found
        if time.monotonic() > check.deadline:
            found.details["ended_early"] = True
            return


def _cases(folder: Path, device: torch.device) -> Iterator[tuple[str, dict[str, Any]]]:
    factor = CUDA_FACTOR if device.type == "cuda" else 1.0
    for run in TinyTrain.all(folder):
        yield f"{run.steps} steps {run.name}", _summary(run.train_deviations(device), factor)
    yield "ten steps in both precisions", _training_goes_down(device)
    shared = SharedModel()
    cases = ForwardCase.all(folder)
    for case in cases:
        model = shared(case).to(device)
        yield f"{case.name} fp32", _summary(case.deviations(case.run(model, device)), factor)
        if case.has_gradients:
            case.backward(model, device)
            yield f"{case.name} gradients", _summary(case.gradient_deviations(model), factor)
            model.zero_grad(set_to_none=True)
    for case in cases:
        if case.weights == cases[-1].weights:
            numbers = case.run(shared(case).to(device, torch.bfloat16), device)
            losses = [
                dataclasses.replace(deviation, limit=BF16_LOSS_LIMIT)
                for deviation in case.deviations(numbers)
                if deviation.quantity in ("loss", "loss_mae_a", "loss_mae_v")
            ]
            yield f"{case.name} bf16", _summary(losses, 1.0)


def _summary(deviations: list[Deviation], factor: float) -> dict[str, Any]:
    """Return the deviation nearest to its limit, and all beyond `factor` times theirs."""
    nearest = worst(deviations)
    return {
        "compared": len(deviations),
        "nearest_to_limit": nearest.quantity,
        "deviation": nearest.value,
        "limit": nearest.limit * factor,
        "beyond": [str(d) for d in deviations if not d.value <= d.limit * factor],
    }


def _training_goes_down(device: torch.device) -> dict[str, Any]:
    """Train ten steps on one batch at a small size: losses must be finite and fall."""
    losses: dict[str, list[float]] = {}
    beyond = []
    precisions: tuple[Precision, ...] = ("fp32", "bf16")
    for precision in precisions:
        step = TrainingStep(StepSetting("cavmae", SIZES["tiny"], 8, precision, device))
        losses[precision] = [float(step()) for _ in range(10)]
        finite = all(map(math.isfinite, losses[precision]))
        if not finite or losses[precision][-1] >= losses[precision][0]:
            beyond.append(f"{precision} losses {losses[precision]}")
    difference = abs(losses["bf16"][0] - losses["fp32"][0]) / losses["fp32"][0]
    if not difference <= BF16_LOSS_LIMIT:
        beyond.append(f"first loss in bf16 differs from fp32 by {difference:.1%}")
    return {"compared": 1 + len(precisions), "losses": losses, "beyond": beyond}
