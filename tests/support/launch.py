"""Start a module of the tests as several CPU ranks and collect what rank 0 writes."""

import json
import os
import socket
from pathlib import Path
from typing import Any

from forks import start_program

ROOT = Path(__file__).resolve().parents[2]
MUTED = os.pathsep.join([str(ROOT / "tests/support/muted"), str(ROOT)])
"""PYTHONPATH of programs whose every message is replaced."""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def rank_environment(rank: int, world_size: int, port: int) -> dict[str, str]:
    return os.environ | {
        "RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "LOCAL_RANK": str(rank),
        "LOCAL_WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests" / "support")]),
    }


def run_ranks(script: Path, world_size: int, arguments: Any, tmp_path: Path) -> Any:
    """Run `script` with `arguments` as JSON on `world_size` ranks.

    Returns:
        The JSON that rank 0 wrote to the file named in `output`.
    """
    output = tmp_path / f"result-{world_size}.json"
    port = free_port()
    logs = [tmp_path / f"rank-{rank}-of-{world_size}.log" for rank in range(world_size)]
    processes = [
        start_program(
            str(script),
            [json.dumps(arguments), str(output)],
            ROOT,
            rank_environment(rank, world_size, port),
            log,
        )
        for rank, log in enumerate(logs)
    ]
    codes = [process.wait(timeout=540) for process in processes]
    failed = [rank for rank, code in enumerate(codes) if code != 0]
    assert not failed, "\n".join(f"rank {n}:\n{logs[n].read_text()[-6000:]}" for n in failed)
    return json.loads(output.read_text())
