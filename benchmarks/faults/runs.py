"""The runs that faults are done to, and the runs that these are compared with.

Every run trains one tiny model on two CPU ranks and notes the samples that it trains on
(`observed_rank.py`).
"""

import dataclasses
import json
import re
import shutil
import time
import zlib
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from cavmae.atomic_write import write_json
from cavmae.benchmarks.faults.observed_rank import Orders, give_orders
from cavmae.benchmarks.faults.outcome import Expected, outcome
from cavmae.benchmarks.harness.processes import Start, free_port, module_command
from cavmae.benchmarks.harness.synthetic_batches import TINY_MODEL
from cavmae.benchmarks.harness.synthetic_shards import synthetic_shards
from cavmae.dataloaders.config import DataConfig
from cavmae.trainer.checkpoint.format import (
    MANIFEST,
    RUN_STATE,
    attempt_folder,
    checkpoint_name,
    manifest_bytes,
    read_manifest,
    step_of,
)
from cavmae.trainer.checkpoint.store import FileDigest, Store
from cavmae.trainer.config.configs import (
    CheckpointConfig,
    EngineConfig,
    LossConfig,
    OptimizerConfig,
    PretrainConfig,
    ScheduleConfig,
    TrackingConfig,
    WatchdogConfig,
)
from cavmae.trainer.config.serialize import save_config
from cavmae.trainer.run_status import RunStatus, read_status

RANKS = 2
CLIPS = 24
GLOBAL_BATCH = 8
INTERVAL = 10
"""Steps between checkpoints."""
HANG_SECONDS = 5.0
"""Watchdog limit of a step here; 300 by default."""
FIRST_STEPS_SECONDS = 120.0
"""Watchdog limit of the first three steps of an attempt, and of the copy for a checkpoint; an hour
by default. A rank that is stopped in them is noticed no sooner."""
ZeroStage = Literal[0, 1, 2, 3]
_TAIL_BYTES = 4096
_UNDISTURBED = "undisturbed"
_WITHOUT_MEMORY_MONITOR = {"RAY_memory_monitor_refresh_ms": "0"}
"""Ray would kill its processes when others use this machine's memory: no fault of a row."""


class Bench:
    """Makes the data, and launches runs on it.

    Args:
        work: folder for data and runs.
        steps: of each run.
        zero_stage: of each run.
    """

    def __init__(self, work: Path, steps: int, zero_stage: ZeroStage) -> None:
        self.work = work
        self.steps = steps
        self.zero_stage: ZeroStage = zero_stage
        self._attempts: list[Start] = []
        if not (work / "shards").exists():
            synthetic_shards(work, CLIPS)

    @cached_property
    def undisturbed(self) -> Expected:
        """Losses and samples of a run without faults, which is trained on first use."""
        # Other runs begin at its checkpoints.
        kept = CheckpointConfig(every_steps=INTERVAL, keep_every=INTERVAL)
        config = self.config(_UNDISTURBED, checkpoint=kept)
        if not Path(config.run_dir).exists():
            self.plain(config).finish()
        return outcome(config, "the undisturbed run")

    def config(self, name: str, **changes: Any) -> PretrainConfig:
        """Configuration of the run of a row."""
        config = PretrainConfig(
            run_dir=str(self.work / re.sub(r"\W+", "-", name)),
            steps=self.steps,
            global_batch=GLOBAL_BATCH,
            micro_batch=4,
            model=TINY_MODEL,
            data=DataConfig(
                train=str(self.work / "shards" / "frames"), reader_workers=1, decode_threads=1
            ),
            loss=LossConfig(contrastive_weight=1.0),
            optimizer=OptimizerConfig(learning_rate=1e-3),
            schedule=ScheduleConfig(name="constant"),
            engine=EngineConfig(zero_stage=self.zero_stage, dtype="fp32"),
            checkpoint=CheckpointConfig(every_steps=INTERVAL),
            tracking=TrackingConfig(every_steps=1),
            watchdog=WatchdogConfig(
                min_seconds=HANG_SECONDS, max_pause_seconds=FIRST_STEPS_SECONDS
            ),
            threads_per_rank=1,
        )
        return dataclasses.replace(config, **changes)

    def plain(self, config: PretrainConfig, ranks: int = RANKS) -> Start:
        """Launch the ranks without a launcher."""
        command = observed_command("pretrain", config)
        shared = {
            "WORLD_SIZE": str(ranks),
            "LOCAL_WORLD_SIZE": str(ranks),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(free_port()),
            "OMP_NUM_THREADS": "1",
        }
        commands = [
            (command, shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)})
            for rank in range(ranks)
        ]
        return self._launch(commands, config)

    def on_ray(self, config: PretrainConfig, *words: str, **variables: str) -> Start:
        """Launch a driver, which places the ranks on a Ray cluster of its own."""
        command = observed_command("train", config, *words)
        return self._launch([(command, _WITHOUT_MEMORY_MONITOR | variables)], config)

    def end_all(self) -> None:
        """Kill what still runs of all attempts, as after a row that failed."""
        for attempt in self._attempts:
            attempt.kill()
        self._attempts.clear()

    def _launch(
        self, commands: list[tuple[list[str], dict[str, str]]], config: PretrainConfig
    ) -> Start:
        self._attempts.append(Start(commands, new_log(config)))
        return self._attempts[-1]

    def skipping_update(self, step: int) -> Expected:
        """Losses and samples of a run without one update: it resumes from the undisturbed run's
        weights and optimizer before that step, at the samples after it.

        Args:
            step: steps done before the skipped update; a multiple of the interval.
        """
        before = self.undisturbed
        config = self.config("skipping one update")
        run_dir = Path(config.run_dir)
        (run_dir / "checkpoints").mkdir(parents=True)
        shutil.copy(self.work / _UNDISTURBED / "config.json", run_dir)
        shutil.copytree(
            self.work / _UNDISTURBED / "checkpoints" / checkpoint_name(step),
            run_dir / "checkpoints" / checkpoint_name(step + 1),
        )
        _set_step(run_dir / "checkpoints", step + 1)
        self.plain(config).finish()
        rest = outcome(config, "the rest of it")
        # The loss of the step itself is computed before the skipped update.
        positions = GLOBAL_BATCH * (step + 1)
        samples = {at: name for at, name in before.samples.items() if at < positions}
        return Expected(
            before.losses[: step + 1] + rest.losses,
            samples | rest.samples,
            f"a run that resumes from step {step} at step {step + 1}",
        )

    def on_ranks(self, ranks: int) -> Expected:
        """Losses and samples of a run on another number of ranks."""
        config = self.config(f"{ranks} ranks")
        self.plain(config, ranks).finish()
        return outcome(config, f"a run on {ranks} ranks")

    def without(self, sample_ids: tuple[str, ...], **changes: Any) -> Expected:
        """Losses and samples of a run with these clips in quarantine from the start.

        Args:
            sample_ids: the clips.
            changes: of the configuration.
        """
        config = self.config(f"without {len(sample_ids)} clips", **changes)
        give_orders(Path(config.run_dir), Orders(quarantine=sample_ids))
        self.plain(config).finish()
        return outcome(config, "a run with the clips in quarantine from the start")


def observed_command(command: str, config: PretrainConfig, *words: str) -> list[str]:
    """Build the command of `cavmae pretrain` or `train` with ranks that note their samples."""
    path = Path(config.run_dir).with_suffix(".json")
    save_config(config, path)
    return module_command("cavmae.benchmarks.faults.observed_rank", command, str(path), *words)


def new_log(config: PretrainConfig) -> Path:
    """Name a file beside the run folder for the log of one attempt."""
    return Path(config.run_dir).with_name(f"{Path(config.run_dir).name}-{time.monotonic_ns()}.log")


def last_step(run_dir: Path) -> int:
    """Return the last step in the metrics, read from their end; 0 before the first one."""
    path = run_dir / "metrics.jsonl"
    if not path.exists():
        return 0
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - _TAIL_BYTES))
        lines = file.read().split(b"\n")[:-1]
    return int(json.loads(lines[-1])["step"]) if lines else 0


def status_of(run_dir: Path) -> RunStatus:
    """Return the status that a run has written; one of no attempt before that."""
    return read_status(run_dir) or RunStatus("waiting")


def resumed_step(run_dir: Path) -> int:
    """Return the step that the newest attempt resumed from."""
    return step_of(status_of(run_dir).resumed_from.rpartition("/")[2])


def _set_step(folder: Path, step: int) -> None:
    """Change the step of a copied checkpoint."""
    store, name = Store(folder), checkpoint_name(step)
    manifest = read_manifest(store, name)
    path = folder / attempt_folder(name, manifest.attempt) / RUN_STATE
    write_json(path, json.loads(path.read_text()) | {"step": step, "position": step * GLOBAL_BATCH})
    data = path.read_bytes()
    manifest.files[RUN_STATE] = FileDigest(len(data), zlib.crc32(data))
    store.put(f"{name}/{MANIFEST}", manifest_bytes(manifest))
