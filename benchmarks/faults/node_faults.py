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
from cavmae.benchmarks.faults.runs import (
    INTERVAL,
    RANKS,
    Bench,
    new_log,
    observed_command,
    resumed_step,
)
from cavmae.benchmarks.harness.processes import Start, module_command
from cavmae.cluster.local import drain
from cavmae.trainer.config.configs import PretrainConfig

_REQUEST_SECONDS = "10"
"""How long Ray Train waits for missing nodes before it requests them again; 60 by default."""
_DRAIN_SECONDS = 110
"""That a pod's hook has, in the files of `cavmae cluster-files`."""


def node_killed(bench: Bench, name: str) -> Row | Skipped:
    """Send SIGKILL to all processes of a worker's node, Ray's and the rank; the node comes back."""
    return _row(bench, name, lambda nodes: nodes.kill(1), lambda nodes: None)


def node_cut(bench: Bench, name: str) -> Row | Skipped:
    """Cut the link of a worker's node; restore it when the loss was noticed."""
    return _row(bench, name, lambda nodes: nodes.cut(1), lambda nodes: nodes.mend(1))


def node_drained(bench: Bench, name: str) -> Row | Skipped:
    """Do on a worker's node what Kubernetes does before it ends a pod; a third node is free."""
    reason = unavailable()
    if reason:
        return Skipped(reason)
    with _nodes(bench, name, RANKS + 1) as nodes:
        run = _started(bench, name, nodes)
        with run.attempt:
            run.wait_for_checkpoint(2 * INTERVAL)
            run.fault_is_now()
            worker = next(one for one in range(RANKS + 1) if nodes.has_rank(one))
            hook = module_command(drain.__name__, str(_DRAIN_SECONDS))
            log = Path(run.run_dir).with_name("drain.log")
            with Start([(nodes.on_worker(worker, hook), nodes.environment)], log) as drained:
                run.wait_until_noticed(lambda: run.stop() or run.resume())
                drained.finish(_DRAIN_SECONDS)
                if nodes.has_rank(worker):
                    raise RuntimeError("the drained node has a rank")
            run.attempt.wait_for(run.resume, "a resume")
            return run.row(before=max(run.before, resumed_step(run.run_dir)))


def _row(
    bench: Bench, name: str, do: Callable[[Nodes], None], undo: Callable[[Nodes], None]
) -> Row | Skipped:
    reason = unavailable()
    if reason:
        return Skipped(reason)
    with _nodes(bench, name, RANKS) as nodes:
        run = _started(bench, name, nodes)
        with run.attempt:
            run.wait_for_checkpoint(2 * INTERVAL)
            run.fault_is_now()
            do(nodes)
            run.wait_until_noticed(run.failure)
            undo(nodes)
            nodes.supervise(1)
            return run.row()


def _nodes(bench: Bench, name: str, workers: int) -> Nodes:
    """Nodes whose logs are beside the run folder."""
    run_dir = Path(bench.config(name).run_dir)
    logs = run_dir.with_name(f"{run_dir.name}-nodes")
    logs.mkdir()
    return Nodes(workers, logs)


def _started(bench: Bench, name: str, nodes: Nodes) -> FaultedRun:
    """Start a run on nodes, driven from their head."""

    def launch(config: PretrainConfig) -> Start:
        command = observed_command("train", config, f"--address={nodes.address}")
        waits = {"RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": _REQUEST_SECONDS}
        return Start([(nodes.on_head(command), nodes.environment | waits)], new_log(config))

    return FaultedRun(bench, bench.config(name), launch)
