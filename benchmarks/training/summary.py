"""Summary of the timed steps of a training run: rates, shares, parts beside their floors, bars."""

import statistics
from dataclasses import dataclass
from typing import Any, Literal

import torch

from cavmae.benchmarks.harness.machine_peaks import DTYPES, utilization
from cavmae.benchmarks.harness.power import Energy
from cavmae.benchmarks.harness.records import bar, timing
from cavmae.benchmarks.harness.timeline import Label
from cavmae.benchmarks.step.parts import COMMUNICATION, GRADIENTS, PARTS, REST
from cavmae.benchmarks.step.roofline import part_work
from cavmae.benchmarks.training.timed_loop import DATA, LOOP, OPTIMIZER, Step, step_total
from cavmae.trainer.cost_model.flops import training_flops
from cavmae.trainer.model.config import ModelConfig

Source = Literal["synthetic", "shards"]
SOURCES: tuple[Source, ...] = ("synthetic", "shards")
LOOP_BAR, SHARDS_BAR = 0.03, 0.95
ORDER = (DATA.part, *PARTS, REST, GRADIENTS.part, OPTIMIZER.part, COMMUNICATION.part, LOOP.part)
"""Order of the parts of a step."""


@dataclass(frozen=True)
class Setting:
    """The training that was timed.

    Attributes:
        config: sizes of the model.
        batch: samples of each of `ranks` on this machine.
        zero_stage: of the ranks.
        precision: of weights and activations.
        device: of the ranks; a CPU is shared by them.
        judged: whether the bars apply to a model of these sizes.
    """

    config: ModelConfig
    batch: int
    ranks: int
    zero_stage: int
    precision: Literal["fp32", "bf16"]
    device: torch.device
    judged: bool

    @property
    def sharers(self) -> int:
        """Ranks that share a device's rates."""
        return 1 if self.device.type == "cuda" else self.ranks


def summarize(
    found: dict[Source, dict[str, Any]], setting: Setting, rates: dict[str, Any]
) -> dict[str, Any]:
    """Make the results of a record.

    Args:
        found: by source of the batches, `TimedLoop.results` of the first rank.
        setting: that was trained.
        rates: of the machine, from `measure_rates`.
    """
    results: dict[str, Any] = {"machine": rates}
    for source, one in found.items():
        seconds = [step_total(step) for step in one["steps"]]
        rate = setting.batch / statistics.median(seconds)  # of a rank
        flops_per_second = training_flops(setting.config) * rate
        samples = setting.batch * setting.sharers * len(seconds)
        results[source] = {
            "step": timing(seconds),
            "samples_per_second": rate * setting.ranks,
            "tflops": flops_per_second * setting.ranks / 1e12,
            **utilization(flops_per_second * setting.sharers, rates, setting.precision),
            "shares": _shares(one["steps"]),
            "peak_memory_bytes": one["peak_memory_bytes"],
            "energy": Energy(**one["energy"]).record(samples),
            "parts": _parts(one["part_steps"], setting, rates),
        }
    results["bars"] = _bars(results, setting)
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


def _parts(steps: list[Step], setting: Setting, rates: dict[str, Any]) -> dict[str, Any]:
    """Time the steps by part and kind, beside the work of each part; empty without such steps."""
    work = part_work(
        setting.config,
        setting.batch,
        DTYPES[setting.precision],
        ranks=setting.ranks,
        zero_stage=setting.zero_stage,
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
                    "floor_seconds": setting.sharers
                    * needs.floor_seconds(rates["flops_per_second"], rates["bytes_per_second"]),
                }
            parts.setdefault(part, {})[kind] = entry
    return parts


def _bars(results: dict[str, Any], setting: Setting) -> dict[str, dict[str, Any]]:
    """Compare with the bars; `met` is None if the bar is not judged here."""
    bars: dict[str, dict[str, Any]] = {}
    if synthetic := results.get("synthetic"):
        shares = synthetic["shares"]
        around = shares["loop"] + shares["data_wait"]
        bars["share of the loop: all but model, loss and update"] = bar(
            around, below=LOOP_BAR, judged=setting.judged
        )
        if shards := results.get("shards"):
            ratio = shards["samples_per_second"] / synthetic["samples_per_second"]
            # On a CPU, loader and model share the cores.
            judged = setting.judged and setting.device.type == "cuda"
            bars["samples/s from shards over synthetic"] = bar(
                ratio, at_least=SHARDS_BAR, judged=judged
            )
    return bars
