"""Logging of a run: progress on the terminal, metrics and figures to the run folder and MLflow.

Every rank has a logger; only rank 0's writes anything but the first line.
"""

import dataclasses
import logging
from pathlib import Path
from typing import Literal

import torch

from cavmae.atomic_write import read_json, write_json
from cavmae.dataloaders.shards.shard_set import ShardSet
from cavmae.kernels import default_backend
from cavmae.trainer.config.configs import RunConfig
from cavmae.trainer.config.resolve import step_shares
from cavmae.trainer.distributed.env import Ranks
from cavmae.trainer.tracking.progress import Progress
from cavmae.trainer.tracking.tracker import Tracker

log = logging.getLogger(__name__)


class RunLogger:
    """Logs one attempt of a run.

    Args:
        config: resolved run.
        run_dir: run folder; its `run.json` keeps the MLflow run, which a later attempt resumes.
        ranks: this process's place.
        start_step: optimizer steps done before this attempt.
        steps_per_epoch: optimizer steps of a pass over the training set.
        device: this rank's device.

    Raises:
        ValueError: the MLflow store refuses a new run.
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
        self._run_dir = run_dir
        self._ranks = ranks
        self._steps_per_epoch = steps_per_epoch
        self._device = device
        self._tracker: Tracker | None = None
        if ranks.rank != 0:
            return
        record = read_json(run_dir / "run.json")
        # A run folder that was moved resumes in the store of its first attempt.
        uri = config.tracking.uri or record.get("tracking_uri", "")
        self._tracker = Tracker(
            dataclasses.replace(config.tracking, uri=uri),
            run_dir,
            dataclasses.asdict(config),
            run_id=record.get("mlflow_run"),
            start_step=start_step,
            on_run=self._note_run,
        )
        self._tracker.log_file(run_dir / "config.json")
        self._progress = Progress(config.steps, start_step)

    @property
    def tracking_uri(self) -> str:
        """Where MLflow has the run; empty on ranks above 0."""
        return self._tracker.uri if self._tracker else ""

    @property
    def mlflow_run(self) -> str:
        """The id of the MLflow run; empty on ranks above 0, and while MLflow can't be reached."""
        return self._tracker.run_id if self._tracker else ""

    def _note_run(self, run_id: str, uri: str) -> None:
        path = self._run_dir / "run.json"
        write_json(path, read_json(path) | {"mlflow_run": run_id, "tracking_uri": uri})

    def log_start(
        self, task_description: str, train_set: ShardSet, *, resumed_from: str | None
    ) -> None:
        """Log the layout of the run, and the checkpoint that it resumes from."""
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
            step_shares(config, self._ranks.world_size).accumulation,
            config.lanes,
            task_description,
            config.engine.zero_stage,
            config.engine.dtype,
            self._device.type,
            config.threads_per_rank,
            default_backend(self._device),
        )
        if resumed_from:
            log.info("resuming from %s", resumed_from)

    def log_step(self, step: int, metrics: dict[str, float]) -> None:
        """Log a training step's metrics, among them `loss`, `samples_per_second` and
        `data_wait_share`."""
        if self._tracker is None:
            return
        self._tracker.log_metrics(metrics | self._epoch(step), step)
        self._progress.update(
            step, metrics["loss"], metrics["samples_per_second"], metrics["data_wait_share"]
        )

    def log_scores(self, metrics: dict[str, float], step: int) -> None:
        """Log validation metrics."""
        if self._tracker is None:
            return
        self._tracker.log_metrics(metrics | self._epoch(step), step)
        log.info(
            "step %d validation: %s",
            step,
            ", ".join(
                f"{name.removeprefix('val_')} {value:.4g}"
                for name, value in metrics.items()
                if not name.endswith(("_low", "_high", "_chance", "_p_value"))
            ),
        )

    def log_figure(self, path: Path) -> None:
        """Log a figure of the run folder."""
        if self._tracker is not None:
            self._tracker.log_file(path, "figures")

    def close(self, status: Literal["FINISHED", "FAILED", "KILLED"]) -> None:
        """End the MLflow run of this attempt, and the progress bar."""
        if self._tracker is None:
            return
        self._progress.close()
        if status == "FINISHED":
            self._tracker.log_file(self._run_dir / "summary.json")
        self._tracker.close(status)

    def _epoch(self, step: int) -> dict[str, float]:
        return {"epoch": step / self._steps_per_epoch}
