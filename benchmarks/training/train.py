"""`cavmae bench train`: the real training loop, and what the time of a step goes to.

The product's run with its engine, loop and loader trains a few steps: on clips that are on the
device already, and on packed shards, so that the difference is what the loader costs. Then a few
steps are timed by parts of the model, each beside its floor on this machine.
"""

import argparse
import dataclasses
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from cavmae.benchmarks.harness.machine_peaks import measure_rates
from cavmae.benchmarks.harness.processes import (
    Start,
    deepspeed_command,
    module_command,
    unwind_on_sigterm,
)
from cavmae.benchmarks.harness.records import write_record
from cavmae.benchmarks.step.training_step import SIZES
from cavmae.benchmarks.training.summary import (
    SOURCES,
    Setting,
    Source,
    lines,
    parts_table,
    summarize,
)
from cavmae.benchmarks.training.timed_rank import TimedPlan
from cavmae.dataloaders.packing.pack import PackConfig, pack
from cavmae.dataloaders.tools.synthetic import generate
from cavmae.trainer.config.configs import EngineConfig, PretrainConfig, TrackingConfig
from cavmae.trainer.config.recipes import audioset_base
from cavmae.trainer.config.serialize import read_json, save_config

CLIP_SECONDS, CLIP_SIDE = 10.0, 256
"""Of the clips that are generated: what the base model takes, and what packing keeps of a frame."""
_PATIENCE_SECONDS = 3600.0


def parser() -> argparse.ArgumentParser:
    """The command line."""
    gpu = torch.cuda.is_available()
    arguments = argparse.ArgumentParser(
        prog="cavmae bench train", description="The training loop, and a step's time by parts."
    )
    arguments.add_argument("--model", choices=list(SIZES), default="base", help="sizes")
    arguments.add_argument("--batch", type=int, default=256 if gpu else 8, help="of each rank")
    arguments.add_argument("--ranks", type=int, default=1, help="on this machine")
    arguments.add_argument(
        "--precision",
        choices=["fp32", "bf16"],
        default="bf16" if gpu else "fp32",
        help="of parameters and activations",
    )
    arguments.add_argument(
        "--zero-stage", type=int, choices=[0, 1, 2, 3], default=1, help="of the ranks"
    )
    arguments.add_argument(
        "--compile", action=argparse.BooleanOptionalAction, default=gpu, help="the model's blocks"
    )
    arguments.add_argument(
        "--activation-checkpointing",
        choices=["none", "selective", "full"],
        default=EngineConfig().activation_checkpointing,
        help="what the backward pass computes again",
    )
    arguments.add_argument("--steps", type=int, default=20 if gpu else 5, help="timed ones")
    arguments.add_argument("--part-steps", type=int, default=3, help="timed by parts; 0: none")
    arguments.add_argument("--warm-up", type=int, default=5 if gpu else 1, help="steps before")
    arguments.add_argument(
        "--only", nargs="+", choices=SOURCES, default=SOURCES, help="where batches come from"
    )
    arguments.add_argument("--data", help="folder of a packed tier; generated clips without it")
    arguments.add_argument(
        "--clips", type=int, default=64 if gpu else 16, help="that are generated"
    )
    arguments.add_argument(
        "--readers", type=int, default=PretrainConfig().data.reader_workers, help="of each rank"
    )
    arguments.add_argument("--out", default="benchmarks/results", help="folder of the record")
    return arguments


def main(argv: list[str]) -> int:
    """Measure, print and write the record; returns the exit code."""
    flags = parser().parse_args(argv)
    for name, least in (
        *(("batch", 1), ("ranks", 1), ("steps", 1), ("part_steps", 0), ("warm_up", 1)),
        *(("clips", 1), ("readers", 1)),
    ):
        if getattr(flags, name) < least:
            option = "--" + name.replace("_", "-")
            raise ValueError(f"{option} is {getattr(flags, name)}; use {least} or more")
    unwind_on_sigterm()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    work = Path(tempfile.mkdtemp(prefix="cavmae-train-"))
    try:
        shards = flags.data or str(_packed_clips(work, flags.clips))
        found = {}
        for source in flags.only:
            print(f"{source} ...", file=sys.stderr, flush=True)
            found[source] = _timed_run(
                work / f"run-{source}", source, _config(flags, shards), flags, device
            )
    finally:
        shutil.rmtree(work, ignore_errors=True)
    setting = Setting(
        SIZES[flags.model],
        flags.batch,
        flags.ranks,
        flags.zero_stage,
        flags.precision,
        device,
        judged=flags.model == "base",
    )
    # The ranks have ended: the machine is free, and on a GPU its memory.
    rates = measure_rates(device, flags.precision, setting.config, flags.batch)
    results = summarize(found, setting, rates)
    for line in lines(results):
        print(line)
    Console(width=120).print(parts_table(next(iter(found)), results))
    configuration = vars(flags) | {"sizes": dataclasses.asdict(setting.config)}
    print(f"record: {write_record(flags.out, 'train', device, configuration, results)}")
    return 0


def _packed_clips(work: Path, count: int) -> Path:
    """Shards of generated clips as long and as large as real ones."""
    listing = generate(work / "videos", count, seed=0, size=CLIP_SIDE, seconds=CLIP_SECONDS)
    pack(PackConfig(str(listing), str(work / "shards"), tiers="frames"), Console(quiet=True))
    return work / "shards" / "frames"


def _config(flags: argparse.Namespace, shards: str) -> PretrainConfig:
    """The recipe `audioset_base` at the batch, sizes and engine that were asked for."""
    recipe = audioset_base()
    return dataclasses.replace(
        recipe,
        model=SIZES[flags.model],
        global_batch=flags.batch * flags.ranks,
        micro_batch=flags.batch,
        data=dataclasses.replace(
            recipe.data, train=shards, validation="", reader_workers=flags.readers
        ),
        engine=EngineConfig(
            zero_stage=flags.zero_stage,
            dtype=flags.precision,
            clip_grad_norm=recipe.engine.clip_grad_norm,
            compile=flags.compile,
            activation_checkpointing=flags.activation_checkpointing,
        ),
        # At least one report is among the timed steps.
        tracking=TrackingConfig(every_steps=min(TrackingConfig().every_steps, flags.steps)),
    )


def _timed_run(
    folder: Path,
    source: Source,
    config: PretrainConfig,
    flags: argparse.Namespace,
    device: torch.device,
) -> dict[str, Any]:
    """What the first rank of a run has found."""
    folder.mkdir()
    plan = TimedPlan(
        config=str(folder / "config.json"),
        synthetic=source == "synthetic",
        warm_up=flags.warm_up,
        steps=flags.steps,
        part_steps=flags.part_steps,
        result=str(folder / "result.json"),
    )
    run = dataclasses.replace(config, run_dir=str(folder / "run"), steps=plan.all_steps)
    save_config(run, plan.config)
    save_config(plan, folder / "plan.json")
    words = ("cavmae.benchmarks.training.timed_rank", str(folder / "plan.json"))
    if flags.ranks == 1:
        command = module_command(*words), {}
    else:
        command = deepspeed_command(*words, ranks=flags.ranks, gpus=device.type == "cuda")
    start = Start([command], folder / "log")
    try:
        start.finish(_PATIENCE_SECONDS)
    finally:
        start.kill()
    return read_json(plan.result)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
