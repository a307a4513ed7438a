"""Elastic training: Ray Train's scaling policy, with a rule of ours.

Running ranks are not killed to add more: they are asked to save a checkpoint and stop first, so
that no step is done twice. Any number of ranks trains the same global batches, in the same order
and with the same contrastive groups (`step_shares.py`).
"""

import sys
from pathlib import Path
from typing import Any

import ray
from ray.train import ScalingConfig
from ray.train.torch import TorchTrainer
from ray.train.v2._internal.execution.scaling_policy import (
    ElasticScalingPolicy,
    NoopDecision,
    ResizeDecision,
    ScalingDecision,
)

from cavmae.trainer.fault_tolerance.preemption import request_stop

MORE_FIT = "more ranks fit"
"""Prefix of the reason for which ranks stop and more of them resume."""


class StoppingScalingPolicy(ElasticScalingPolicy):
    """Scales to as many ranks as fit; runs in Ray Train's controller.

    Args:
        scaling_config: gives the minimum and the maximum of workers.
        run_dir: where the ranks look for a stop request.
        left_out: ids of nodes that are not used.
    """

    def __init__(self, scaling_config: ScalingConfig, run_dir: Path, left_out: list[str]) -> None:
        super().__init__(scaling_config)
        self._run_dir = run_dir
        self._left_out = left_out
        self._reported_group = 0.0
        self._requested = 0

    def _get_num_workers_for_resource_request(self) -> int:
        """Request the room of the nodes that are left out as well: what Ray reserves has them."""
        unused = {node["NodeID"]: node["Resources"] for node in ray.nodes()}
        unused = {node: has for node, has in unused.items() if node in self._left_out}
        return super()._get_num_workers_for_resource_request() + super()._count_possible_workers(
            unused
        )

    def _count_possible_workers(self, reserved_resources: Any) -> int:
        """Return the largest rank count that fits on the nodes that are used."""
        used = {node: has for node, has in reserved_resources.items() if node not in self._left_out}
        return super()._count_possible_workers(used)

    def make_decision_for_running_worker_group(
        self, worker_group_state: Any, worker_group_status: Any
    ) -> ScalingDecision:
        """Never resize a running group; request that it stops where more ranks fit."""
        decision = super().make_decision_for_running_worker_group(
            worker_group_state, worker_group_status
        )
        if worker_group_state.start_time != self._reported_group:
            self._reported_group, self._requested = worker_group_state.start_time, 0
            self._report_idle(worker_group_state.workers)
        now = worker_group_state.num_workers
        if isinstance(decision, ResizeDecision) and decision.num_workers > max(
            now, self._requested
        ):
            self._requested = decision.num_workers
            reason = f"{MORE_FIT}: {decision.num_workers} instead of {now}"
            print(f"{reason}; the ranks save a checkpoint and restart", file=sys.stderr, flush=True)
            request_stop(self._run_dir, reason, outranked=True)
        return NoopDecision()

    def _report_idle(self, workers: list[Any]) -> None:
        """Print the reserved resources that no rank uses."""
        each = self.scaling_config._resources_per_worker_not_none
        kind = "GPU" if each.get("GPU") else "CPU"
        free: dict[str, Any] = {
            node: resources.get(kind, 0.0)
            for node, resources in (self._get_reserved_resources() or {}).items()
        }
        addresses = {node["NodeID"]: node["NodeManagerAddress"] for node in ray.nodes()}
        for worker in workers:
            if worker.metadata.node_id in free:
                free[worker.metadata.node_id] -= each[kind]
        idle = {addresses.get(node, node): int(left) for node, left in free.items() if left >= 1}
        maximum = self.scaling_config.max_workers
        if len(workers) < maximum:
            idle_on = ", ".join(f"{left} {kind}s on {node}" for node, left in idle.items())
            print(
                f"training on {len(workers)} of {maximum} ranks; "
                + (f"idle: {idle_on}" if idle else f"no {kind} is idle"),
                file=sys.stderr,
                flush=True,
            )


class ElasticTorchTrainer(TorchTrainer):
    """A TorchTrainer that scales by `StoppingScalingPolicy`.

    Args:
        run_dir, left_out: passed to the policy.
        options: passed to TorchTrainer.
    """

    def __init__(self, *arguments: Any, run_dir: Path, left_out: list[str], **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._rules = (run_dir, left_out)

    def _initialize_and_run_controller(self, **options: Any) -> Any:
        if self.scaling_config.elasticity_enabled:
            options["scaling_policy"] = StoppingScalingPolicy(self.scaling_config, *self._rules)
        return super()._initialize_and_run_controller(**options)

    def _register_sigint_handler(self, controller: Any) -> None:
        """Leave Ctrl-C to Python: Ray's handler ends this process as done, or the controller
        alone."""
