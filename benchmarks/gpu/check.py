"""`cavmae bench gpu-check`: correctness and speed of model and kernels on the device at hand.

It writes one JSON record in under eight minutes, so that a GPU that is lent for minutes is used
well. Parts that cannot run have the reason. It runs where only torch, triton and numpy are
installed, so its options are those of argparse, not tyro.
"""

import argparse
import dataclasses
import math
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from cavmae.benchmarks.conformance.forward import ForwardCase, SharedModel
from cavmae.benchmarks.conformance.tiny_train import TinyTrain
from cavmae.benchmarks.conformance.tolerances import Deviation, worst
from cavmae.benchmarks.gpu import training
from cavmae.benchmarks.harness.records import write_record
from cavmae.benchmarks.kernels.agreement import disagreements
from cavmae.benchmarks.kernels.bench import KernelsConfig, measure
from cavmae.benchmarks.step.step import MODELS, compare
from cavmae.benchmarks.step.training_step import (
    SIZES,
    Precision,
    StepSetting,
    TrainingStep,
)
from cavmae.kernels.backend import INTERPRETED
from cavmae.trainer.model.cavmae import CAVMAE
from cavmae.trainer.model.config import ModelConfig

# Other kernels and libraries than those the limits were observed with.
CUDA_FACTOR = 10.0
BF16_LOSS_LIMIT = 1e-2
_LOOP_NEEDS = ("deepspeed", "nvidia.dali", "mlflow", "psutil", "rich", "av")
_LOOP_SECONDS, _GRACE_SECONDS = 180.0, 60.0
"""Expected time of the training loop, and how long it may continue after the time in which parts
start."""


class Skip(Exception):
    """A part cannot run here, for the reason in the message."""


@dataclasses.dataclass
class Check:
    """Options and clock that all parts share."""

    device: torch.device
    golden: Path | None
    config: ModelConfig
    batches: list[int]
    repeats: int
    deadline: float
    model: str
    best: tuple[int, bool] | None = None
    """Batch, and whether it is compiled, of the fastest step; None: not measured."""

    @property
    def factor(self) -> float:
        return CUDA_FACTOR if self.device.type == "cuda" else 1.0

    def require_time(self) -> None:
        """Raise Skip once the time of this run is spent."""
        if time.monotonic() > self.deadline:
            raise Skip("the time given by --seconds was spent before")

    def require_gpu(self, what: str) -> None:
        """Raise Skip on a CPU."""
        if self.device.type != "cuda":
            raise Skip(f"{what} is measured on a GPU; this is {self.device}")

    def require_best(self, what: str) -> tuple[int, bool]:
        """Return the fastest batch; raise Skip on a CPU, or where no throughput was measured."""
        self.require_gpu(what)
        if self.best is None:
            raise Skip("no throughput was measured before, so the fastest batch is not known")
        return self.best

    def golden_folder(self) -> Path:
        """Return the folder of reference numbers; raise Skip without one."""
        if self.golden is None:
            raise Skip("no folder of reference numbers was given (--golden DIR)")
        return self.golden


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    arguments = argparse.ArgumentParser(
        prog="cavmae bench gpu-check", description="Check kernels and model on this device."
    )
    arguments.add_argument("--out", default="benchmarks/results", help="folder of the record")
    arguments.add_argument("--golden", type=Path, help="folder of reference numbers")
    arguments.add_argument(
        "--device",
        default="cuda" if torch.cuda.is_available() else "cpu",
        help="`cuda` or `cpu`; a GPU where there is one",
    )
    arguments.add_argument(
        "--model", choices=list(SIZES), default="base", help="sizes of the training steps"
    )
    arguments.add_argument(
        "--batches",
        type=int,
        nargs="+",
        default=[32, 64, 128, 256, 512],
        help="batch sizes of the throughput sweep (GPU only)",
    )
    arguments.add_argument("--repeats", type=int, default=5, help="timed steps at each batch size")
    arguments.add_argument("--seconds", type=float, default=420, help="no part starts after this")
    return arguments


def main(argv: list[str]) -> int:
    """Run every part, write the record; returns 0 where none failed, else 1."""
    flags = parser().parse_args(argv)
    if flags.golden is not None and not flags.golden.is_dir():
        raise ValueError(f"--golden is {flags.golden}, which is no folder")
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
    check = Check(
        device=torch.device(flags.device),
        golden=flags.golden,
        config=SIZES[flags.model],
        batches=flags.batches,
        repeats=flags.repeats,
        deadline=time.monotonic() + flags.seconds,
        model=flags.model,
    )
    parts: dict[str, Callable[[Check], dict[str, Any]]] = {
        "training": training_goes_down,
        "kernels_agree": kernels_agree,
        "tiny_train": tiny_train_repeats,
        "golden_forward": golden_forward,
        "golden_gradients": golden_gradients,
        "throughput": throughput,
        "train": training_loop,
        "step": step_against_baseline,
        "limits": limits,
        "kernels": kernels_against_others,
    }
    results = {name: _run(name, part, check) for name, part in parts.items()}
    configuration = {key: str(value) for key, value in vars(flags).items()}
    configuration |= {"sizes": asdict(check.config)}
    path = write_record(flags.out, "gpu-check", check.device, configuration, results)
    print(f"record: {path}")
    return 1 if any(result["status"] == "failed" for result in results.values()) else 0


def _run(name: str, part: Callable[[Check], dict[str, Any]], check: Check) -> dict[str, Any]:
    """Run one part: its status, reason, seconds and details; an error fails that part alone."""
    start = time.monotonic()
    reason, details = "", {}
    try:
        check.require_time()
        details = part(check)
        beyond = details.get("beyond", [])
        status, reason = ("failed", "; ".join(beyond[:5])) if beyond else ("passed", "")
    except Skip as skip:
        status, reason = "skipped", str(skip)
    except Exception as error:
        # An error on an unknown device is a result, and the other parts continue.
        traceback.print_exc()
        status, reason = "failed", f"{type(error).__name__}: {error}"
    seconds = time.monotonic() - start
    print(f"{name}: {status} in {seconds:.1f} s{': ' + reason if reason else ''}", flush=True)
    return {"status": status, "reason": reason, "seconds": seconds, "details": details}


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


def _merged(cases: dict[str, dict[str, Any]], asked: int) -> dict[str, Any]:
    beyond = [f"{name} {line}" for name, case in cases.items() for line in case["beyond"]]
    return {"cases": cases, "cases_without_time": asked - len(cases), "beyond": beyond}


def _models(check: Check, cases: Sequence[ForwardCase]) -> Iterator[tuple[ForwardCase, CAVMAE]]:
    """Yield each case with its model on the device, while time is left; equal weights share one."""
    shared = SharedModel()
    for case in cases:
        if time.monotonic() > check.deadline:
            return
        yield case, shared(case).to(check.device)


def golden_forward(check: Check) -> dict[str, Any]:
    """Compare forward passes of the published model, in fp32 and (losses only) in bf16."""
    cases = ForwardCase.all(check.golden_folder())
    if not cases:
        raise Skip(f"{check.golden} has no pretrain_forward/index.json")
    results = {}
    for case, model in _models(check, cases):
        deviations = case.deviations(case.run(model, check.device))
        results[f"{case.name} fp32"] = _summary(deviations, check.factor)
    bf16 = [case for case in cases if case.weights == cases[-1].weights]
    for case, model in _models(check, bf16):
        numbers = case.run(model.to(torch.bfloat16), check.device)
        losses = [
            dataclasses.replace(deviation, limit=BF16_LOSS_LIMIT)
            for deviation in case.deviations(numbers)
            if deviation.quantity in ("loss", "loss_mae_a", "loss_mae_v")
        ]
        results[f"{case.name} bf16"] = _summary(losses, 1.0)
    return _merged(results, len(cases) + len(bf16))


def golden_gradients(check: Check) -> dict[str, Any]:
    """Compare gradients of the published model in fp32."""
    cases = [case for case in ForwardCase.all(check.golden_folder()) if case.has_gradients]
    if not cases:
        raise Skip(f"{check.golden} has no pretrain_forward/*_grad.json")
    results = {}
    for case, model in _models(check, cases):
        case.backward(model, check.device)
        results[case.name] = _summary(case.gradient_deviations(model), check.factor)
        model.zero_grad(set_to_none=True)
    return _merged(results, len(cases))


def tiny_train_repeats(check: Check) -> dict[str, Any]:
    """Compare training of the published model at a small size in fp32."""
    folder = check.golden_folder()
    runs = TinyTrain.all(folder)
    if not runs:
        raise Skip(f"{folder} has no tiny_train/*.json")
    results = {run.name: _summary(run.train_deviations(check.device), check.factor) for run in runs}
    return _merged(results, len(runs))


def training_goes_down(check: Check) -> dict[str, Any]:
    """Train ten steps on one batch at a small size: losses must be finite and fall."""
    losses: dict[str, list[float]] = {}
    beyond = []
    precisions: tuple[Precision, ...] = ("fp32", "bf16")
    for precision in precisions:
        step = TrainingStep(StepSetting("cavmae", SIZES["tiny"], 8, precision, check.device))
        losses[precision] = [float(step()) for _ in range(10)]
        finite = all(map(math.isfinite, losses[precision]))
        if not finite or losses[precision][-1] >= losses[precision][0]:
            beyond.append(f"{precision} losses {losses[precision]}")
    difference = abs(losses["bf16"][0] - losses["fp32"][0]) / losses["fp32"][0]
    if not difference <= BF16_LOSS_LIMIT:
        beyond.append(f"first loss in bf16 differs from fp32 by {difference:.1%}")
    return {"losses": losses, "beyond": beyond}


def kernels_agree(check: Check) -> dict[str, Any]:
    """Compare every Triton kernel with its torch reference, and two runs of it bit by bit."""
    if check.device.type != "cuda" and not INTERPRETED:
        raise Skip("the kernels run on a GPU, or on a CPU under TRITON_INTERPRET=1")
    found, beyond = disagreements(check.device, 64 if check.device.type == "cuda" else 3)
    return {"differences": found, "beyond": beyond}


def kernels_against_others(check: Check) -> dict[str, Any]:
    """Run `cavmae bench kernels` with fewer repeats; a kernel of ours that fails is a failure."""
    gpu = check.device.type == "cuda"
    config = KernelsConfig(
        "cuda" if gpu else "cpu",
        batch=None if gpu else 1,
        contrastive=() if gpu else (64,),
        repeats=min(3, check.repeats),
        compile=gpu,
    )
    results = measure(config, check.deadline)
    beyond = [
        f"{case} {what}: {why}"
        for case, result in results["cases"].items()
        for what, why in result.get("failed", {}).items()
        if what.startswith("ours ")
    ]
    return results | {"beyond": beyond}


def step_against_baseline(check: Check) -> dict[str, Any]:
    """Time a training step of ours and of the published operations, in turn."""
    batch = check.batches[0] if check.device.type == "cuda" else 2
    precisions: tuple[Precision, ...] = ("fp32", "bf16")
    results = {}
    for precision in precisions:
        check.require_time()
        settings = {
            name: StepSetting(name, check.config, batch, precision, check.device) for name in MODELS
        }
        results[precision] = compare(settings, check.repeats, warm_up=2)
    return {"batch": batch, "precisions": results}


def throughput(check: Check) -> dict[str, Any]:
    """Measure speed and memory of our bf16 step over batch sizes, eager and compiled."""
    check.require_gpu("throughput over batch sizes")
    results = training.throughput(
        check.config, check.batches, check.device, repeats=check.repeats, deadline=check.deadline
    )
    check.best = training.best(results["rows"])
    return results


def training_loop(check: Check) -> dict[str, Any]:
    """Run the real loop at the fastest batch: synthetic batches, and shards through DALI."""
    batch, compile = check.require_best("the training loop at the fastest batch")
    absent = [name for name in _LOOP_NEEDS if _absent(name)]
    if absent:
        raise Skip(f"the training loop needs {', '.join(absent)}; install cavmae whole")
    left = check.deadline + _GRACE_SECONDS - time.monotonic()
    if left < _LOOP_SECONDS:
        raise Skip(f"the training loop takes about {_LOOP_SECONDS:.0f} s: {left:.0f} s are left")
    return training.training_loop(check.model, batch, compile, left)


def _absent(module: str) -> bool:
    try:
        return find_spec(module) is None
    except ModuleNotFoundError:  # the package that it would be in
        return True


def limits(check: Check) -> dict[str, Any]:
    """Find the largest batch in memory, and time a contrastive batch whose matrix would not fit."""
    batch, compile = check.require_best("the largest batch")

    in_time = True

    def fits(candidate: int) -> bool:
        nonlocal in_time
        in_time = in_time and time.monotonic() <= check.deadline
        setting = training.our_step(check.config, candidate, check.device, compile)
        return in_time and training.step_fits(setting)

    contrast = training.large_contrast(
        training.CONTRASTIVE_BATCH, check.config.width, check.device, check.repeats
    )
    largest = training.largest_batch(fits, batch)
    return contrast | {"largest_batch": largest, "search_ended_early": not in_time}
