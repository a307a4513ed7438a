"""What a run tells: progress on the terminal, numbers and pictures to the run folder and MLflow.

Every rank has a report; only rank 0's speaks.
"""

import dataclasses
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch

from cavmae.kernels import default_backend
from cavmae.trainer.config.configs import RunConfig
from cavmae.trainer.config.serialize import read_json, write_json
from cavmae.trainer.distributed.env import Ranks
from cavmae.trainer.tracking.progress import Progress
from cavmae.trainer.tracking.tracker import Tracker

if TYPE_CHECKING:
    from cavmae.dataloaders.shards.shard_set import ShardSet

log = logging.getLogger(__name__)


class RunReport:
    """Progress, metrics and pictures of one start of a run.

    Args:
        config: resolved run.
        run_dir: run folder; `run.json` remembers the MLflow run, so that a later start goes on
            with it.
        ranks: this process's place.
        start_step: optimizer steps done before this start.
        steps_per_epoch: optimizer steps of a pass over the training set.
        device: this rank's device.

    Raises:
        ValueError: the MLflow store can't be reached.
    """

    def __init__(
        self,
        config: RunConfig,
        run_dir: Path,
        ranks: Ranks,
        *,
        start_step: int,
        steps_per_epoch: float,
        device: torch.device,
    ) -> None:
        self._config = config
        self._steps_per_epoch = steps_per_epoch
        self._run_dir = run_dir
        self._device = device
        self._ranks = ranks
        self._tracker: Tracker | None = None
        self._progress: Progress | None = None
        self.tracking_uri = self.mlflow_run = ""
        if ranks.rank != 0:
            return
        record = read_json(run_dir / "run.json")
        # A run folder that was moved goes on in the store where it began.
        uri = config.tracking.uri or record.get("tracking_uri", "")
        self._tracker = Tracker(
            dataclasses.replace(config.tracking, uri=uri),
            run_dir,
            dataclasses.asdict(config),
            run_id=record.get("mlflow_run"),
            start_step=start_step,
        )
        self.tracking_uri, self.mlflow_run = self._tracker.uri, self._tracker.run_id
        write_json(
            run_dir / "run.json",
            record | {"mlflow_run": self.mlflow_run, "tracking_uri": self.tracking_uri},
        )
        self._tracker.log_file(run_dir / "config.json")
        self._progress = Progress(config.steps, start_step, 1, enabled=True)

    def opened(self, task: str, train_set: "ShardSet", resumed_from: str | None) -> None:
        """Say once how the run is laid out.

        Args:
            task: what it computes.
            train_set: what it is trained on.
            resumed_from: checkpoint that it goes on from.
        """
        config = self._config
        log.info(
            "%s: %d clips (%s tier), %d steps of %d = %d ranks x %d x %d accumulated, %d lanes, "
            "%s, ZeRO %d, %s on %s, %d threads a rank; kernels: %s",
            config.run_dir,
            train_set.samples,
            train_set.tier,
            config.steps,
            config.global_batch,
            self._ranks.world_size,
            config.micro_batch,
            config.global_batch // self._ranks.world_size // config.micro_batch,
            config.lanes,
            task,
            config.engine.zero_stage,
            config.engine.dtype,
            self._device.type,
            config.threads_per_rank,
            default_backend(self._device),
        )
        if resumed_from:
            log.info("going on from %s", resumed_from)

    def step(self, step: int, metrics: dict[str, float]) -> None:
        """Show and record a step's metrics."""
        if self._tracker is None or self._progress is None:
            return
        self._tracker.log_metrics({**metrics, **self._epoch(step)}, step)
        self._progress.update(
            step,
            metrics["loss"],
            metrics["samples_per_second"],
            metrics["data_wait_share"],
        )

    def scores(self, metrics: dict[str, float], step: int) -> None:
        """Record held-out metrics."""
        if self._tracker is None:
            return
        self._tracker.log_metrics({**metrics, **self._epoch(step)}, step)
        log.info(
            "step %d held out: %s",
            step,
            ", ".join(
                f"{name.removeprefix('val_')} {value:.4g}"
                for name, value in metrics.items()
                if not name.endswith(("_low", "_high", "_chance", "_p_value"))
            ),
        )

    def _epoch(self, step: int) -> dict[str, float]:
        return {"epoch": step / self._steps_per_epoch}

    def picture(self, path: Path) -> None:
        """Record a picture of the run folder."""
        if self._tracker is not None:
            self._tracker.log_picture(path)

    def close(self, status: Literal["FINISHED", "FAILED", "KILLED"]) -> None:
        """End the record of this start."""
        if self._progress is not None:
            self._progress.close()
        if self._tracker is not None:
            if status == "FINISHED":
                self._tracker.log_file(self._run_dir / "summary.json")
            self._tracker.close(status)
