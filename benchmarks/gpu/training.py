"""Training as a part of a GPU check: throughput over batch sizes, the loop, and what fits."""

import json
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from cavmae.benchmarks.harness.machine_peaks import measure_rates
from cavmae.benchmarks.harness.process_memory import gpu_peak_bytes
from cavmae.benchmarks.harness.timing import median_seconds
from cavmae.benchmarks.step.step import compare
from cavmae.benchmarks.step.training_step import TEMPERATURE, Choices, StepSetting, TrainingStep
from cavmae.kernels import contrastive_loss
from cavmae.trainer.model.config import ModelConfig

CONTRASTIVE_BATCH = 65_536
SEARCH_SHARE = 1 / 16
"""The largest batch is searched to within this share of it."""


def throughput(
    config: ModelConfig,
    batches: Sequence[int],
    device: torch.device,
    *,
    repeats: int,
    deadline: float,
) -> dict[str, Any]:
    """Measure speed and memory of our bf16 step over batch sizes, eager and compiled.

    Args:
        config: sizes of the model.
        batches: in rising order; those above one that does not fit are skipped.
        device: a GPU.
        repeats: timed steps of each.
        deadline: `time.monotonic()` after which no further one starts.
    """
    rates = measure_rates(device, "bf16", config, max(batches))
    rows: list[dict[str, Any]] = []
    for compile in (False, True):
        for batch in batches:
            row: dict[str, Any] = {"batch": batch, "compile": compile}
            rows.append(row)
            if time.monotonic() > deadline:
                row["skipped"] = "out of time"
                continue
            setting = our_step(config, batch, device, compile)
            row |= compare({"ours": setting}, repeats, warm_up=3, rates=rates)["ours"]
            torch.cuda.empty_cache()
            if "skipped" in row:
                break
            print(
                f"  batch {batch}{' compiled' if compile else ''}: "
                f"{row['samples_per_second']:.0f} samples/s, {row['tflops']:.0f} TFLOP/s, "
                f"{row['peak_memory_bytes'] / 2**30:.1f} GiB",
                flush=True,
            )
    return {"machine": rates, "rows": rows}


def our_step(config: ModelConfig, batch: int, device: torch.device, compile: bool) -> StepSetting:
    """Return our step in bf16."""
    return StepSetting("cavmae", config, batch, "bf16", device, Choices(compile=compile))


def best(rows: list[dict[str, Any]]) -> tuple[int, bool] | None:
    """Return batch and compilation of the fastest row; None where nothing was measured."""
    measured = [row for row in rows if "samples_per_second" in row]
    if not measured:
        return None
    fastest = max(measured, key=lambda row: row["samples_per_second"])
    return fastest["batch"], fastest["compile"]


def training_loop(model: str, batch: int, compile: bool, within_seconds: float) -> dict[str, Any]:
    """Results of `cavmae bench train`: synthetic batches, then shards through DALI.

    Args:
        model: name of its sizes.
        batch, compile: of the step.
        within_seconds: or it is ended.

    Raises:
        RuntimeError: it failed, with the end of what it said, or it was not done in time.
    """
    # It takes psutil, which a machine that has only torch and triton lacks.
    from cavmae.benchmarks.harness.processes import Start, module_command

    with tempfile.TemporaryDirectory() as folder:
        words = ("bench", "train", "--model", model, "--batch", str(batch), "--out", folder)
        command = module_command("cavmae", *words, "--compile" if compile else "--no-compile")
        # A loop that is ended leaves its clips, which go with this folder.
        with Start([(command, {"TMPDIR": folder})], Path(folder) / "log") as start:
            start.finish(within_seconds)
        (record,) = Path(folder).glob("train-*.json")
        return json.loads(record.read_text())["results"]


def largest_batch(fits: Callable[[int], bool], known: int) -> int:
    """Return the largest batch that fits, to within a share of it.

    Args:
        fits: whether a batch does.
        known: one that does.
    """
    above = 2 * known
    while fits(above):
        known, above = above, 2 * above
    while above - known > max(1, SEARCH_SHARE * known):
        middle = (known + above) // 2
        known, above = (middle, above) if fits(middle) else (known, middle)
    return known


def step_fits(setting: StepSetting) -> bool:
    """Return whether two training steps in bf16 fit into the memory of a GPU; the second one has
    the optimizer's state beside everything else."""
    torch.cuda.empty_cache()  # of an attempt before, whose error still held its tensors then
    try:
        step = TrainingStep(setting)
        for _ in range(2):
            step()
        torch.cuda.synchronize(setting.device)
    except torch.cuda.OutOfMemoryError:
        return False
    print(f"  batch {setting.batch} fits", flush=True)
    return True


def large_contrast(pairs: int, width: int, device: torch.device, repeats: int) -> dict[str, Any]:
    """Measure time and memory of the contrastive loss over many pairs in bf16, with backward."""
    audio, video = (
        F.normalize(torch.randn(pairs, width, device=device), dim=1)
        .to(torch.bfloat16)
        .requires_grad_()
        for _ in range(2)
    )

    def run() -> None:
        loss = contrastive_loss(audio, video, TEMPERATURE, True).loss
        torch.autograd.grad(loss, [audio, video])

    seconds = median_seconds(run, device, repeats)
    found: dict[str, Any] = {"contrastive_pairs": pairs, "contrastive_seconds": seconds}
    if device.type == "cuda":
        found["contrastive_workspace_bytes"] = gpu_peak_bytes(run, device)
    return found
