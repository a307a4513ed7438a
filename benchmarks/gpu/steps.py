"""Stages of a GPU check that train: the step over batches, the loop, and what fits."""

import json
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from cavmae.benchmarks.gpu.setting import Check, Found, Skip, absent
from cavmae.benchmarks.harness.machine_peaks import measure_rates
from cavmae.benchmarks.harness.process_memory import gpu_peak_bytes, no_memory_left
from cavmae.benchmarks.harness.records import read_record
from cavmae.benchmarks.harness.timing import median_seconds
from cavmae.benchmarks.step.step import MODELS, compare
from cavmae.benchmarks.step.training_step import (
    TEMPERATURE,
    Choices,
    Precision,
    StepSetting,
    TrainingStep,
)
from cavmae.kernels import contrastive_loss

MEASURED_BATCHES = 3
SEARCH_SHARE = 1 / 16
"""The largest batch is searched to within this share of it."""
_PREDICTION_NEEDS = ("deepspeed", "mlflow", "rich", "tyro")
_LOOP_NEEDS = ("deepspeed", "mlflow", "psutil", "rich", "tyro", "webdataset", "av")


def eager(check: Check) -> Iterator[Found]:
    """Measure speed and memory of our bf16 step at the three largest batches that fit."""
    yield from _throughput(check, check.batches, compile=False, count=MEASURED_BATCHES)


def compiled(check: Check) -> Iterator[Found]:
    """Measure the compiled step at the batch that was fastest without, or the next that fits."""
    fastest, most = best(check.earlier.get("eager", {}).get("rows", [])), known_batch(check)
    batches = [batch for batch in check.batches if batch <= most]
    for found in _throughput(check, batches, compile=True, count=1):
        for row in found.details["rows"]:
            if fastest and row["batch"] == fastest["batch"] and "samples_per_second" in row:
                times = row["samples_per_second"] / fastest["samples_per_second"]
                row["times_eager"] = times
                found.key += f", {times:.2f} times eager"
        yield found


def _throughput(
    check: Check, batches: list[int] | tuple[int, ...], *, compile: bool, count: int
) -> Iterator[Found]:
    """Measure our step from the largest batch on, until it was measured at some of them."""
    rates = check.earlier.get("eager", {}).get("machine")
    if rates is None:
        rates = measure_rates(check.device, "bf16", check.config, check.batches[1])
    found = Found("", {"machine": rates, "rows": []})
    for batch in batches:
        row: dict[str, Any] = {"batch": batch, "compile": compile}
        setting = our_step(check, batch, compile)
        row |= compare({"ours": setting}, check.repeats, warm_up=3, rates=rates)["ours"]
        found.details["rows"].append(row)
        fastest = best(found.details["rows"])
        if fastest:
            found.key = (
                f"batch {fastest['batch']}: {fastest['samples_per_second']:.0f} samples/s, "
                f"{fastest['mfu']:.0%} MFU"
            )
        yield found
        measured = sum("samples_per_second" in row for row in found.details["rows"])
        if measured == count or time.monotonic() > check.deadline:
            break
    if not found.key:
        found.beyond.append(f"no batch fits, down to {batches[-1]}")
        yield found


def our_step(check: Check, batch: int, compile: bool) -> StepSetting:
    """Return our step in bf16."""
    choices = Choices(compile=compile)
    return StepSetting("cavmae", check.config, batch, "bf16", check.device, choices)


def best(rows: list[dict[str, Any]]) -> dict[str, Any] | None:
    """Return the fastest row; None where nothing was measured."""
    measured = [row for row in rows if "samples_per_second" in row]
    return max(measured, key=lambda row: row["samples_per_second"], default=None)


def known_batch(check: Check) -> int:
    """Return the fastest batch of the stages before; without any, one that most GPUs hold."""
    fastest = best(check.earlier.get("eager", {}).get("rows", []))
    return fastest["batch"] if fastest else check.batches[2]


def prediction(check: Check) -> Iterator[Found]:
    """Measure what this machine reaches in the kernels of the steps before, and compare what
    `cavmae bench predict` makes of it with the steps. Where that command cannot run, it has all it
    needs in the record: `--against`."""
    fastest = [best(check.earlier.get(name, {}).get("rows", [])) for name in ("eager", "compiled")]
    if not any(fastest):
        raise Skip("no step was measured before")
    # It counts the kernels of a step, and times them one by one.
    from cavmae.benchmarks.step.ceilings import measure_ceilings

    found = Found("", {"steps": [], "against": []})
    for row in filter(None, fastest):
        setting = our_step(check, row["batch"], row["compile"])
        result = {
            "precision": setting.precision,
            "batch": setting.batch,
            "cavmae": row,
            "ceilings": measure_ceilings(setting),
        }
        configuration = {
            "sizes": asdict(setting.config),
            "compile": setting.choices.compile,
            "recompute": setting.choices.recompute,
        }
        found.details["steps"].append(
            {"configuration": configuration, "results": {setting.precision: result}}
        )
        yield found
    if missing := absent(_PREDICTION_NEEDS):
        raise Skip(f"the ceilings are measured; the prediction needs {', '.join(missing)}")
    from cavmae.benchmarks.step.predict import compare as compare_prediction

    record = read_record(check.record)
    for one in found.details["steps"]:
        found.details["against"] += compare_prediction(replace(record, **one))
    found.key = ", ".join(
        f"{'compiled' if row['compile'] else 'eager'} {row['step']['ratio']:.2f} of measured "
        f"({row['ceilings']})"
        for row in found.details["against"]
    )
    yield found


def baseline(check: Check) -> Iterator[Found]:
    """Time a training step of ours and of the published operations, in turn."""
    batch = 2 if check.small else 32
    precisions: tuple[Precision, ...] = ("fp32", "bf16")
    found = Found("", {"batch": batch, "precisions": {}})
    for precision in precisions:
        settings = {
            name: StepSetting(name, check.config, batch, precision, check.device) for name in MODELS
        }
        result = compare(settings, check.repeats, warm_up=2)
        found.details["precisions"][precision] = result
        if "speedup" in result:
            found.key = f"{result['speedup']['median']:.2f} times as fast, {precision}"
        yield found


def loop(check: Check) -> Iterator[Found]:
    """Run `cavmae bench train` on synthetic batches at the fastest batch: the engine, the loop, and
    a step by parts."""
    if missing := absent(_LOOP_NEEDS):
        raise Skip(f"the training loop needs {', '.join(missing)}; install cavmae whole")
    # It takes psutil, which a machine that has only torch and triton lacks.
    from cavmae.benchmarks.harness.processes import Start, module_command

    few = ("--steps", "2", "--warm-up", "1", "--part-steps", "2") if check.small else ()
    with tempfile.TemporaryDirectory() as folder:
        # Compiling would take most of the time, and the compiled step has a stage.
        words = ("bench", "train", "--only", "synthetic", "--no-compile", "--clips", "2", *few)
        words += ("--model", check.model, "--batch", str(known_batch(check)), "--out", folder)
        # A loop that is ended leaves its clips, which go with this folder.
        command = module_command("cavmae", *words), {"TMPDIR": folder}
        with Start([command], Path(folder) / "log") as start:
            start.finish(check.deadline - time.monotonic())
        (record,) = Path(folder).glob("train-*.json")
        results = json.loads(record.read_text())["results"]
    measured = results["synthetic"]
    yield Found(
        f"{measured['samples_per_second']:.0f} samples/s, "
        f"{measured['shares']['loop'] + measured['shares']['data_wait']:.1%} overhead",
        results,
    )


def limits(check: Check) -> Iterator[Found]:
    """Time a contrastive batch whose matrix would not fit, and find the largest batch in memory."""
    pairs = 256 if check.small else 65_536
    found = Found("", large_contrast(pairs, check.config.width, check.device, check.repeats))
    found.key = f"{pairs} pairs in {found.details['contrastive_seconds'] * 1e3:.0f} ms"
    yield found
    if check.device.type != "cuda":
        return
    most = 4 * check.batches[0]

    def fits(batch: int) -> bool:
        in_time = time.monotonic() <= check.deadline
        found.details["search_ended_early"] = not in_time
        return in_time and batch <= most and step_fits(our_step(check, batch, compile=False))

    found.details["largest_batch"] = largest_batch(fits, known_batch(check))
    found.key += f", batch {found.details['largest_batch']} fits"
    yield found


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
    except RuntimeError as error:
        if not no_memory_left(error):
            raise
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
