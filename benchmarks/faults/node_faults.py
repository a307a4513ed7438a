"""The faults that need several machines: a node that is gone, and one that can't be reached.

A head and two workers in namespaces of this machine (`netns_nodes.py`), one rank on each worker.
The run asks for two ranks, so it waits until the node is back, which is its supervisor's work:
here, ours.
"""

import time
from collections.abc import Callable
from pathlib import Path

from cavmae.benchmarks.faults.netns_nodes import Nodes, unavailable
from cavmae.benchmarks.faults.outcome import Row, Skipped
from cavmae.benchmarks.faults.runs import (
    INTERVAL,
    RANKS,
    Bench,
    last_step,
    new_log,
    observed_command,
    resumed_step,
    wait_for_checkpoint,
    wait_for_failure,
)
from cavmae.benchmarks.harness.processes import Start

_START_AGAIN_SECONDS = "10"
"""How long Ray Train waits for missing nodes until it asks for them again; 60 by default."""


def node_killed(bench: Bench, name: str) -> Row | Skipped:
    """SIGKILL to all processes of a worker's node, Ray's and the rank; the node comes back."""
    return _row(bench, name, lambda nodes: nodes.kill(1), lambda nodes: None)


def node_cut(bench: Bench, name: str) -> Row | Skipped:
    """The cable of a worker's node is pulled; it is back when the loss was noticed."""
    return _row(bench, name, lambda nodes: nodes.cut(1), lambda nodes: nodes.mend(1))


def _row(
    bench: Bench,
    name: str,
    do: Callable[[Nodes], None],
    undo: Callable[[Nodes], None],
) -> Row | Skipped:
    reason = unavailable()
    if reason:
        return Skipped(reason)
    config = bench.config(name)
    logs = Path(config.run_dir).with_name(f"{Path(config.run_dir).name}-nodes")
    logs.mkdir()
    with Nodes(RANKS, logs) as nodes:
        command = observed_command("train", config, f"--address={nodes.address}")
        environment = nodes.environment | {
            "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": _START_AGAIN_SECONDS
        }
        start = Start([(nodes.on_head(command), environment)], new_log(config))
        try:
            wait_for_checkpoint(start, config, 2 * INTERVAL)
            before, fault = last_step(Path(config.run_dir)), time.time()
            do(nodes)
            said = wait_for_failure(start, config, failed=1)
            noticed = time.time()
            undo(nodes)
            nodes.supervise(1)
            start.finish()
            return bench.row(
                config, fault, noticed, said, before=before, resumed=resumed_step(config)
            )
        finally:
            start.kill()
