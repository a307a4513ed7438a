"""`cavmae bench kernels`: our operations against torch, torch.compile and published methods.

All contenders of an operation are timed in turn in one run, and stand beside what the machine can
do at most, measured in the same run: a large copy and a large matrix product. On a GPU ours are the
Triton kernels, on a CPU the torch references, which is what runs there.
"""

import math
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import torch

from cavmae.benchmarks.harness.machine_peaks import DTYPES
from cavmae.benchmarks.harness.measurements import PASSES
from cavmae.benchmarks.harness.plots import plot_beside
from cavmae.benchmarks.harness.records import RecordedConfig, bar, write_record
from cavmae.benchmarks.harness.timing import Device, ceilings, default_device
from cavmae.benchmarks.kernels.cases import cases
from cavmae.benchmarks.kernels.timing import measured
from cavmae.field_checks import PositiveInt, at_least
from cavmae.kernels import default_backend


@dataclass(frozen=True)
class KernelsConfig(RecordedConfig):
    """Time kernels against torch, torch.compile and published methods."""

    device: Device = field(default_factory=default_device)
    """Where the operations run."""
    batch: Annotated[int | None, at_least(1)] = None
    """Samples; None: 512 on a GPU, 8 on a CPU."""
    dtype: Literal["fp32", "bf16", "fp16"] | None = None
    """Of tokens and embeddings; None: bf16 on a GPU, fp32 on a CPU."""
    contrastive: tuple[int, ...] = ()
    """Batches of the contrastive loss; empty: 512 4096 32768 on a GPU, 512 on a CPU."""
    repeats: PositiveInt = 10
    """Timed runs of each contender."""
    compile: bool = field(default_factory=torch.cuda.is_available)
    """Time torch.compile as well."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if min(self.contrastive, default=1) < 1:
            raise ValueError(f"contrastive is {min(self.contrastive)}; use 1 or more")


def main(arguments: list[str]) -> int:
    """Time everything, print and write the record and the plot; returns the exit code."""
    import tyro  # which a machine lacks that has torch and triton alone, as it lacks rich

    from cavmae.benchmarks.report.console import show

    config = tyro.cli(KernelsConfig, prog="cavmae bench kernels", args=arguments)
    *_, results = measure(config)
    configuration = asdict(config) | results.pop("sizes")
    path = write_record(config.out, "kernels", torch.device(config.device), configuration, results)
    show(path)
    _plot(results, path)
    return 0


def measure(config: KernelsConfig, deadline: float = math.inf) -> Iterator[dict[str, Any]]:
    """Measure the ceilings and all cases, and judge the bars; yields the results after each case.

    Args:
        config: what to measure.
        deadline: `time.monotonic()` after which no further case starts.
    """
    device, compile = torch.device(config.device), config.compile
    gpu = device.type == "cuda"
    batch = config.batch or (512 if gpu else 8)
    dtype = config.dtype or ("bf16" if gpu else "fp32")
    contrastive = config.contrastive or ((512, 4096, 32768) if gpu else (512,))
    ceiling = ceilings(device, DTYPES[dtype])
    found: dict[str, Any] = {}
    sizes = {"batch": batch, "dtype": dtype, "contrastive": contrastive, "compile": compile}
    for case in cases(device, batch, DTYPES[dtype], contrastive):
        if time.monotonic() > deadline:
            found[case.name] = {"skipped": "out of time"}
        else:
            print(f"{case.name} ...", file=sys.stderr, flush=True)
            found[case.name] = measured(case, device, config.repeats, compile, ceiling)
        yield {
            "sizes": sizes,
            "backend": default_backend(device),
            "ceilings": ceiling,
            "cases": found,
            "bars": bars(found, device),
        }


def bars(found: dict[str, Any], device: torch.device) -> dict[str, dict[str, Any]]:
    """Compare results with their bars, which are judged on a GPU."""
    judged: dict[str, dict[str, Any]] = {}

    def judge(what: str, name: str, kind: str, *entry: str, **limit: float) -> None:
        value: Any = found
        for key in (name, kind, *entry):
            value = value and value.get(key)  # None where it was not measured
        title = f"{name} {PASSES[kind]}: {what}"
        judged[title] = bar(value, **limit, judged=device.type == "cuda")

    copy, times = ("ours", "share_of_copy"), ("times_ours", "median")
    for name in ("gather_tokens", "restore_tokens", "reconstruction_audio", "reconstruction_video"):
        for kind in PASSES:
            judge("share of copy", name, kind, *copy, at_least=0.85)
    for name in ("patch_embedding_audio", "patch_embedding_video"):
        judge("times eager", name, "both", "eager", *times, at_least=3)
    large = "contrastive_32768"
    # Tiles of 128 x 128 do 64 operations a byte of the second-level cache, which on an H100 gives
    # 5.5 to 7 TB/s (read, not measured here): 45% to 57% of the products.
    judge("share of product", large, "forward", "ours", "share_of_product", at_least=0.45)
    judge("times tiled", large, "both", "tiled", *times, at_least=2)
    workspace = ("ours", "workspace_share_of_matrix")
    judge("workspace over matrix", large, "both", *workspace, below=0.01)
    for name in ("contrastive_4096", large):
        for kind in PASSES:
            judge("times eager", name, kind, "eager", *times, at_least=1)
    for kind in PASSES:
        judge("times compiled", "contrastive_512", kind, "compiled", *times, at_least=1)
    return judged


def _plot(results: dict[str, Any], record: Path) -> None:
    """Draw times relative to ours, and our share of the ceilings."""
    passes = {
        f"{name}\n{title}": case[kind]
        for name, case in results["cases"].items()
        for kind, title in PASSES.items()
        if "ours" in case.get(kind, {})
    }
    others = dict.fromkeys(name for row in passes.values() for name in row if name != "ours")
    with plot_beside(record, 13, 1.5 + 0.45 * len(passes)) as figure:
        ratios, shares = figure.subplots(1, 2, sharey=True)
        height = 0.8 / max(1, len(others))
        for number, contender in enumerate(others):
            rows = [place for place, row in enumerate(passes.values()) if contender in row]
            values = [row[contender]["times_ours"]["median"] for row in passes.values()
                      if contender in row]  # fmt: skip
            offset = (number - (len(others) - 1) / 2) * height
            ratios.barh([row + offset for row in rows], values, height=height, label=contender)
        ratios.axvline(1, color="black", linewidth=0.8)
        ratios.set_xscale("log")
        ratios.set_yticks(range(len(passes)), list(passes), fontsize=7)
        ratios.invert_yaxis()
        ratios.set_xlabel("times as long as ours")
        ratios.legend(fontsize=8)
        for key, label in (("share_of_copy", "of a copy"), ("share_of_product", "of a product")):
            rows = [place for place, row in enumerate(passes.values()) if row["ours"][key]]
            values = [row["ours"][key] for row in passes.values() if row["ours"][key]]
            offset = -0.2 if key == "share_of_copy" else 0.2
            shares.barh([row + offset for row in rows], values, height=0.4, label=label)
        shares.axvline(1, color="black", linewidth=0.8)
        shares.set_xlabel(f"share of the measured ceiling, ours ({results['backend']})")
        shares.legend(fontsize=8)
