"""One rank that reads snapshots of every stage, intact and with code in one of their files.

Run by `launch.run_ranks` with the cases and the folder to use.
"""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from engine_run import Run
from unsafe_pickle import save_malicious

from cavmae.trainer.distributed import state_files
from cavmae.trainer.distributed.env import limit_threads, ranks_from_environment
from cavmae.trainer.distributed.process_group import end_rank, start_process_group


def outcome_of(call: Callable[[], Any]) -> str:
    try:
        call()
    except (ValueError, SystemExit) as error:
        return str(error)
    return "read"


def main() -> None:
    cases, output = json.loads(sys.argv[1]), Path(sys.argv[2])
    ranks = ranks_from_environment()
    limit_threads(1, ranks)
    device = start_process_group(ranks)
    outcomes = []
    for number, case in enumerate(cases):
        folder = output.parent / f"snapshot-{number}"
        run = Run(case, ranks, device)
        run.update(0)
        snapshot = run.engine.snapshot()
        for name, state in snapshot.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            torch.save(state, folder / name)
        words = ["--input_folder", str(folder / "state"), "--output_folder", str(folder / "all")]
        ways = {"loaded": lambda: run.engine.load(folder)}  # noqa: B023
        if case["zero_stage"] > 0:
            ways["converted"] = state_files.main
        words += ["--num_extract_workers=1", "--num_merge_workers=1", "--inject_missing_state"]
        with mock.patch.object(sys, "argv", ["", *words]):
            for way, read in ways.items():
                outcomes.append((way, "intact", outcome_of(read), ""))
            for name, state in snapshot.items():
                marker = save_malicious(folder / name, folder, state)
                for way, read in ways.items():
                    outcomes.append((way, name, outcome_of(read), str(marker)))
                torch.save(state, folder / name)
    output.write_text(json.dumps(outcomes))
    end_rank()


if __name__ == "__main__":
    main()
