"""The faults that need several machines: a node that is gone, and one that can't be reached.

A head and two workers in namespaces of this machine (`netns_nodes.py`), one rank on each worker.
The run needs two ranks, so it waits until the node is back, as its supervisor brings it: here, this
module.
"""

from collections.abc import Callable
from pathlib import Path

from cavmae.benchmarks.faults.faulted_run import FaultedRun
from cavmae.benchmarks.faults.netns_nodes import Nodes, unavailable
from cavmae.benchmarks.faults.outcome import Row, Skipped
from cavmae.benchmarks.faults.runs import INTERVAL, RANKS, Bench, new_log, observed_command
from cavmae.benchmarks.harness.processes import Start
from cavmae.trainer.config.configs import PretrainConfig

_REQUEST_SECONDS = "10"
"""How long Ray Train waits for missing nodes before it requests them again; 60 by default."""


def node_killed(bench: Bench, name: str) -> Row | Skipped:
    """Send SIGKILL to all processes of a worker's node, Ray's and the rank; the node comes back."""
    return _row(bench, name, lambda nodes: nodes.kill(1), lambda nodes: None)


def node_cut(bench: Bench, name: str) -> Row | Skipped:
    """Cut the link of a worker's node; restore it when the loss was noticed."""
    return _row(bench, name, lambda nodes: nodes.cut(1), lambda nodes: nodes.mend(1))


def _row(
    bench: Bench, name: str, do: Callable[[Nodes], None], undo: Callable[[Nodes], None]
) -> Row | Skipped:
    reason = unavailable()
    if reason:
        return Skipped(reason)
    config = bench.config(name)
    logs = Path(config.run_dir).with_name(f"{Path(config.run_dir).name}-nodes")
    logs.mkdir()
    with Nodes(RANKS, logs) as nodes:

        def launch(config: PretrainConfig) -> Start:
            command = observed_command("train", config, f"--address={nodes.address}")
            waits = {"RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": _REQUEST_SECONDS}
            return Start([(nodes.on_head(command), nodes.environment | waits)], new_log(config))

        run = FaultedRun(bench, config, launch)
        with run.attempt:
            run.wait_for_checkpoint(2 * INTERVAL)
            run.fault_is_now()
            do(nodes)
            run.wait_until_noticed(run.failure)
            undo(nodes)
            nodes.supervise(1)
            return run.row()
