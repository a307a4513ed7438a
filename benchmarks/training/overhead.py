"""`cavmae bench overhead`: what Ray, and checkpoints beside the steps, add to the time of a step.

The same run of two CPU ranks is started by the plain `deepspeed` launcher, by `cavmae train` on
Ray, and by the launcher with checkpoints, in turn, so that a machine that slows down slows all of
them; each ratio is of starts that followed each other.
"""

import argparse
import dataclasses
import shutil
import statistics
import sys
import tempfile
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from cavmae.benchmarks.harness.processes import (
    Start,
    deepspeed_command,
    module_command,
    unwind_on_sigterm,
)
from cavmae.benchmarks.harness.records import timing, write_record
from cavmae.dataloaders.packing.pack import PackConfig, pack
from cavmae.dataloaders.tools.synthetic import generate
from cavmae.trainer.config.configs import CheckpointConfig, PretrainConfig, TrackingConfig
from cavmae.trainer.config.recipes import demo
from cavmae.trainer.config.serialize import save_config
from cavmae.trainer.tracking.metrics_file import read_metrics

RANKS = 2
CLIPS = 48
WARM_UP_STEPS = 20
INTERVAL = 50
"""Steps between checkpoints where there are any."""
CONTENDERS = ("deepspeed", "ray", "deepspeed with checkpoints")


def parser() -> argparse.ArgumentParser:
    """The command line."""
    arguments = argparse.ArgumentParser(
        prog="cavmae bench overhead", description="What Ray and checkpoints add to a step."
    )
    arguments.add_argument("--steps", type=int, default=180, help="of each start")
    arguments.add_argument("--repeats", type=int, default=3, help="starts of each kind")
    arguments.add_argument("--batch", type=int, default=16, help="samples a step, over both ranks")
    arguments.add_argument("--out", default="benchmarks/results", help="folder of the record")
    return arguments


def main(argv: list[str]) -> int:
    """Measure, print and write the record."""
    flags = parser().parse_args(argv)
    least = WARM_UP_STEPS + INTERVAL + 10
    if flags.steps < least:
        raise ValueError(f"--steps is {flags.steps}; use {least} or more")
    unwind_on_sigterm()
    work = Path(tempfile.mkdtemp(prefix="cavmae-overhead-"))
    seconds: dict[str, list[list[float]]] = {name: [] for name in CONTENDERS}
    try:
        listing = generate(work / "videos", CLIPS, seed=0)
        pack(PackConfig(str(listing), str(work / "shards"), tiers="frames"), Console(quiet=True))
        for repeat in range(flags.repeats):
            # The one that goes first changes, so that none always follows the same.
            for name in CONTENDERS[repeat % 3 :] + CONTENDERS[: repeat % 3]:
                print(f"{name}, {repeat + 1} of {flags.repeats} ...", file=sys.stderr, flush=True)
                config = _config(work, f"{CONTENDERS.index(name)}-{repeat}", name, flags)
                seconds[name].append(_step_seconds(name, config))
    finally:
        shutil.rmtree(work, ignore_errors=True)
    results = summarize(seconds)
    Console(width=120).print(_table(results))
    device = torch.device("cpu")
    print(f"record: {write_record(flags.out, 'overhead', device, vars(flags), results)}")
    return 0


def _config(work: Path, run: str, contender: str, flags: argparse.Namespace) -> PretrainConfig:
    recipe = demo()
    saves = contender.endswith("checkpoints")
    return dataclasses.replace(
        recipe,
        run_dir=str(work / run),
        steps=flags.steps,
        global_batch=flags.batch,
        micro_batch=flags.batch // RANKS,
        data=dataclasses.replace(recipe.data, train=str(work / "shards" / "frames"), validation=""),
        checkpoint=CheckpointConfig(every_steps=INTERVAL if saves else 10 * flags.steps),
        tracking=TrackingConfig(every_steps=1),
        threads_per_rank=1,
    )


def _step_seconds(contender: str, config: PretrainConfig) -> list[float]:
    """Of each step after the warm-up, the last one left out: it waits for its checkpoint."""
    path = Path(config.run_dir).with_suffix(".json")
    save_config(config, path)
    plain = deepspeed_command("cavmae.trainer.pretrain", str(path), ranks=RANKS, gpus=False)
    ray = module_command("cavmae.cluster.train", str(path), "--workers", str(RANKS)), plain[1]
    start = Start([ray if contender == "ray" else plain], path.with_suffix(".log"))
    try:
        start.finish()
    finally:
        start.kill()
    times = [one["unix_seconds"] for one in read_metrics(Path(config.run_dir) / "metrics.jsonl")]
    pairs = zip(times[WARM_UP_STEPS:-2], times[WARM_UP_STEPS + 1 : -1], strict=True)
    return [after - before for before, after in pairs]


def summarize(seconds: dict[str, list[list[float]]]) -> dict[str, dict[str, object]]:
    """Timing of each contender, and by how much its steps are longer than the plain launcher's.

    Args:
        seconds: for each contender and start, of each step. The means of the starts are compared
            one by one, as they followed each other; means, because a checkpoint costs few steps
            much.

    Returns:
        For each contender `timing` of all its steps and, the plain launcher apart, `longer_by`:
        median, minimum and maximum share over the starts.
    """
    results: dict[str, dict[str, object]] = {}
    means = {name: [statistics.fmean(one) for one in starts] for name, starts in seconds.items()}
    for name, starts in seconds.items():
        results[name] = dict(timing([second for one in starts for second in one]))
        results[name]["mean_seconds"] = means[name]
        if name != CONTENDERS[0]:
            shares = [a / b - 1 for a, b in zip(means[name], means[CONTENDERS[0]], strict=True)]
            results[name]["longer_by"] = {
                "median": statistics.median(shares),
                "minimum": min(shares),
                "maximum": max(shares),
            }
    return results


def _table(results: dict[str, dict[str, object]]) -> Table:
    table = Table("start", "mean step, s", "longer by (from, to)")
    for name, result in results.items():
        means, longer = result["mean_seconds"], result.get("longer_by")
        assert isinstance(means, list)
        shown = ""
        if isinstance(longer, dict):
            low, high = longer["minimum"], longer["maximum"]
            shown = f"{longer['median']:+.1%} ({low:+.1%}, {high:+.1%})"
        table.add_row(name, f"{statistics.median(means):.3f}", shown)
    return table
