"""`cavmae bench gpu-check`: the first ten minutes on a GPU; on a CPU, a rehearsal of them.

Stages run one after the other, the most telling first, each in a process of its own that is ended
from outside: neither an error that a CUDA context does not survive nor a hang ends the others. The
record is written anew after each, so that whoever ends this command loses one stage at most. It
runs where only torch, triton and numpy are installed, so its options are those of argparse, not
tyro.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

import cavmae
from cavmae.atomic_write import read_json
from cavmae.benchmarks.gpu import stage
from cavmae.benchmarks.gpu.setting import Check
from cavmae.benchmarks.gpu.stage import ENDED
from cavmae.benchmarks.harness.durations import budget_seconds
from cavmae.benchmarks.harness.records import RESULTS, write_record
from cavmae.benchmarks.harness.timing import default_device


@dataclass(frozen=True)
class Stage:
    """Attributes: function, as module:function of this folder; seconds that it is expected to take
    on a GPU (estimated); what it does."""

    function: str
    seconds: float
    what: str


STAGES = {
    "kernels": Stage("correctness:kernels", 30, "every kernel against its reference"),
    "attention": Stage("operations:attention", 25, "attention by every backend at hand"),
    "eager": Stage("steps:eager", 40, "a training step at three batches"),
    "compiled": Stage("steps:compiled", 60, "the compiled step at the fastest of them"),
    "golden": Stage("correctness:golden", 30, "the model against reference numbers"),
    "loop": Stage("steps:loop", 60, "the training loop on synthetic batches"),
    "decoding": Stage("operations:decoding", 60, "pictures decoded here, against the CPU's"),
    "prediction": Stage("steps:prediction", 30, "the predicted steps beside the measured ones"),
    "speed": Stage("operations:speed", 60, "kernels against torch and published methods"),
    "baseline": Stage("steps:baseline", 30, "a step against the published one"),
    "limits": Stage("steps:limits", 60, "the largest batch, and 65,536 contrastive pairs"),
}
"""The most telling first."""
STAGE_SECONDS = 90.0
"""A stage is ended after this."""
_SPARE_SECONDS = 5.0
"""It starts nothing more this long before."""
_TREE = Path(cavmae.__file__).parents[1]
_EXCERPT = _TREE / "tests" / "golden" / "data"
_ENDING_SECONDS = 10.0
"""A process that the driver holds may never end: nobody waits longer for it."""
_SHOWN_LETTERS = 200


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    lines = [f"  {name:<11} {stage.what}" for name, stage in STAGES.items()]
    arguments = argparse.ArgumentParser(
        prog="cavmae bench gpu-check",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="\n".join(["Check kernels, model and speed on this GPU, in stages:", *lines]),
    )
    arguments.add_argument(
        "--stages", default=",".join(STAGES), help="some of them, as kernels,eager; all by default"
    )
    arguments.add_argument(
        "--budget", default="8m", help="time for all, as 90s or 8m; what no longer fits is skipped"
    )
    arguments.add_argument("--out", default=RESULTS, help="folder of the record")
    arguments.add_argument(
        "--golden",
        type=Path,
        default=_EXCERPT,
        help="folder of reference numbers; the excerpt of this repository by default",
    )
    arguments.add_argument(
        "--device",
        choices=("cpu", "cuda"),
        default=default_device(),
        help="a GPU where there is one",
    )
    arguments.add_argument(
        "--small", action="store_true", help="a tiny model and small sizes, as always on a CPU"
    )
    arguments.add_argument(
        "--cache",
        type=Path,
        default=Path(".cache/gpu-check"),
        help="folder of compiled code, which makes a second run quick",
    )
    return arguments


def main(argv: list[str]) -> int:
    """Run the stages and print a table; returns 1 where one failed or had to be ended, else 0.

    Raises:
        ValueError: a stage, a budget or a folder that does not exist.
    """
    flags = parser().parse_args(argv)
    names = flags.stages.split(",")
    if unknown := [name for name in names if name not in STAGES]:
        raise ValueError(f"--stages names {', '.join(unknown)}; use some of {', '.join(STAGES)}")
    if flags.golden != _EXCERPT and not flags.golden.is_dir():
        raise ValueError(f"--golden is {flags.golden}, which is no folder")
    deadline = time.monotonic() + budget_seconds(flags.budget)
    signal.signal(signal.SIGTERM, lambda number, _frame: sys.exit(128 + number))
    small, device = flags.small or flags.device == "cpu", torch.device(flags.device)
    configuration = {key: str(value) for key, value in vars(flags).items()} | {"small": small}
    results: dict[str, dict[str, Any]] = {}
    record: Path | None = None
    for name in (name for name in STAGES if name in names):
        stage, left = STAGES[name], deadline - time.monotonic()
        if left < stage.seconds:
            reason = f"takes about {stage.seconds:.0f} s: {max(0.0, left):.0f} s are left"
            results[name] = _blank("skipped", reason)
        else:
            seconds = min(STAGE_SECONDS, left)
            check = Check(
                flags.device,
                small,
                str(flags.golden.resolve()),
                time.monotonic() + seconds - _SPARE_SECONDS,
                str(record.resolve()) if record else "",
            )
            print(f"{name}: {stage.what} ...", flush=True)
            words = stage.function, json.dumps(asdict(check))
            results[name] = run_stage(words, seconds, _environment(flags.cache, flags.device))
        record = write_record(
            flags.out, "gpu-check", device, configuration, results, replaces=record
        )
    print(_table(results))
    print(f"record: {record}")
    return 1 if any(one["status"] in ("failed", ENDED) for one in results.values()) else 0


def run_stage(
    words: tuple[str, ...], within_seconds: float, environment: dict[str, str]
) -> dict[str, Any]:
    """Run one stage in a process of its own, and end it and all that it has started.

    Args:
        words: for `cavmae.benchmarks.gpu.stage`, without the file that it writes.
        within_seconds: it is ended after this.
        environment: variables of the process, beside those of this one.

    Returns:
        Its entry of the record, as far as it got: status, reason, key, details, seconds.
    """
    began = time.monotonic()
    with TemporaryDirectory(prefix="cavmae-gpu-check-") as folder:
        found = Path(folder) / "found.json"
        process = subprocess.Popen(
            [sys.executable, "-m", stage.__name__, *words, str(found)],
            cwd=_TREE,
            env=os.environ | environment,
            process_group=0,
        )
        try:
            code = process.wait(within_seconds)
            ending = f"ended with exit code {code}"
        except subprocess.TimeoutExpired:
            ending = f"ended after {within_seconds:.0f} s, with what it had found by then"
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            with suppress(subprocess.TimeoutExpired):
                process.wait(_ENDING_SECONDS)
        entry = read_json(found) if found.exists() else _blank(ENDED, "")
    if entry["status"] == ENDED:
        entry["reason"] = ending
    return entry | {"seconds": time.monotonic() - began}


def _blank(status: str, reason: str) -> dict[str, Any]:
    return {"status": status, "reason": reason, "key": "", "details": {}, "seconds": 0.0}


def _environment(cache: Path, device: str) -> dict[str, str]:
    folders = {"TORCHINDUCTOR_CACHE_DIR": "inductor", "TRITON_CACHE_DIR": "triton"}
    found = {name: str(cache.resolve() / folder) for name, folder in folders.items()}
    # Without a GPU the interpreter runs the kernels where they are asked for.
    return found if device == "cuda" else found | {"TRITON_INTERPRET": "1"}


def _table(results: dict[str, dict[str, Any]]) -> str:
    rows = [("stage", "outcome", "seconds", "key number, or why not")]
    for name, one in results.items():
        said = "; ".join(text for text in (one["key"], one["reason"]) if text)
        rows.append((name, one["status"], f"{one['seconds']:.0f}", said[:_SHOWN_LETTERS]))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    )
