"""Summary of the timed steps of a training run: rates, shares, parts beside their floors, bars."""

import statistics
from typing import Any, Literal

import torch

from cavmae.benchmarks.harness.machine_peaks import DTYPES, utilization
from cavmae.benchmarks.harness.power import Energy
from cavmae.benchmarks.harness.records import bar, timing
from cavmae.benchmarks.harness.timeline import Label
from cavmae.benchmarks.step.parts import COMMUNICATION, GRADIENTS, PARTS, REST
from cavmae.benchmarks.step.roofline import part_work
from cavmae.benchmarks.training.timed_loop import DATA, LOOP, OPTIMIZER, Step, step_total
from cavmae.trainer.config.configs import PretrainConfig
from cavmae.trainer.cost_model.flops import training_flops

Source = Literal["synthetic", "shards"]
SOURCES: tuple[Source, ...] = ("synthetic", "shards")
LOOP_BAR, SHARDS_BAR = 0.03, 0.95
ORDER = (DATA.part, *PARTS, REST, GRADIENTS.part, OPTIMIZER.part, COMMUNICATION.part, LOOP.part)
"""Order of the parts of a step."""


def summarize(
    found: dict[Source, dict[str, Any]],
    run: PretrainConfig,
    device: torch.device,
    rates: dict[str, Any],
    *,
    judged: bool,
) -> dict[str, Any]:
    """Make the results of a record.

    Args:
        found: by source of the batches, `TimedLoop.results` of the first rank.
        run: that was trained, a micro-batch of each rank in a step.
        device: of the ranks; a CPU is shared by them.
        rates: of the machine, from `measure_rates`.
        judged: whether the bars apply to a model of these sizes.
    """
    batch, ranks = run.micro_batch, run.global_batch // run.micro_batch
    sharers = 1 if device.type == "cuda" else ranks  # of a device's rates
    results: dict[str, Any] = {"machine": rates}
    for source, one in found.items():
        seconds = [step_total(step) for step in one["steps"]]
        rate = batch / statistics.median(seconds)  # of a rank
        flops_per_second = training_flops(run.model) * rate
        samples = batch * sharers * len(seconds)
        results[source] = {
            "step": timing(seconds),
            "samples_per_second": rate * ranks,
            "tflops": flops_per_second * ranks / 1e12,
            **utilization(flops_per_second * sharers, rates, run.engine.dtype),
            "shares": _shares(one["steps"]),
            "peak_memory_bytes": one["peak_memory_bytes"],
            "energy": Energy(**one["energy"]).record(samples),
            "parts": _parts(one["part_steps"], run, sharers, rates),
        }
    results["bars"] = _bars(results, device, judged)
    return results


def _shares(steps: list[Step]) -> dict[str, float]:
    """Compute shares of the time of all steps, as the loop sees them."""
    total = sum(map(step_total, steps))

    def share(label: Label) -> float:
        return sum(step.get(label.part, {}).get(label.kind, 0.0) for step in steps) / total

    return {
        "data_wait": share(DATA),
        "forward": share(Label(REST, "forward")),
        "backward": share(Label(REST, "backward")),
        "optimizer": share(OPTIMIZER),
        "loop": share(LOOP),
    }


def _parts(
    steps: list[Step], run: PretrainConfig, sharers: int, rates: dict[str, Any]
) -> dict[str, Any]:
    """Time the steps by part and kind, beside the work of each part; empty without such steps."""
    work = part_work(
        run.model,
        run.micro_batch,
        DTYPES[run.engine.dtype],
        ranks=run.global_batch // run.micro_batch,
        zero_stage=run.engine.zero_stage,
    )
    parts: dict[str, Any] = {}
    for part in ORDER:
        for kind in ("forward", "backward", "step"):
            seconds = [step.get(part, {}).get(kind, 0.0) for step in steps]
            if not any(seconds):
                continue
            entry = timing(seconds)
            if needs := work.get(Label(part, kind)):
                entry |= {
                    "flops": needs.flops,
                    "bytes": needs.bytes,
                    "floor_seconds": sharers
                    * needs.floor_seconds(rates["flops_per_second"], rates["bytes_per_second"]),
                }
            parts.setdefault(part, {})[kind] = entry
    return parts


def _bars(results: dict[str, Any], device: torch.device, judged: bool) -> dict[str, dict[str, Any]]:
    """Compare with the bars; `met` is None if the bar is not judged here."""
    bars: dict[str, dict[str, Any]] = {}
    if synthetic := results.get("synthetic"):
        shares = synthetic["shares"]
        around = shares["loop"] + shares["data_wait"]
        bars["share of the loop: all but model, loss and update"] = bar(
            around, below=LOOP_BAR, judged=judged
        )
        if shards := results.get("shards"):
            ratio = shards["samples_per_second"] / synthetic["samples_per_second"]
            # On a CPU, loader and model share the cores.
            bars["samples/s from shards over synthetic"] = bar(
                ratio, at_least=SHARDS_BAR, judged=judged and device.type == "cuda"
            )
    return bars
