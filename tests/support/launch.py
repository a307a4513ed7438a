"""Start a module of the tests as several CPU ranks and collect what rank 0 writes."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]


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
        "PYTHONPATH": str(ROOT),
    }


def run_ranks(script: Path, world_size: int, arguments: Any, tmp_path: Path) -> Any:
    """Run `script` with `arguments` as JSON on `world_size` ranks.

    Returns:
        The JSON that rank 0 wrote to the file named in `output`.
    """
    output = tmp_path / f"result-{world_size}.json"
    port = free_port()
    processes = [
        subprocess.Popen(
            [sys.executable, str(script), json.dumps(arguments), str(output)],
            env=rank_environment(rank, world_size, port),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(world_size)
    ]
    texts = [process.communicate(timeout=540)[0] for process in processes]
    failed = [n for n, process in enumerate(processes) if process.returncode != 0]
    assert not failed, "\n".join(f"rank {n}:\n{texts[n][-6000:]}" for n in failed)
    return json.loads(output.read_text())
