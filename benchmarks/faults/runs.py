"""The runs that faults are done to, and what they are compared with.

Every run is one tiny recipe on two CPU ranks. Each has notes of what it trained on
(`observed_rank.py`): that its samples were those of another run is seen, not concluded.
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

from rich.console import Console

from cavmae.atomic_write import write_json
from cavmae.benchmarks.faults.observed_rank import Orders, give_orders
from cavmae.benchmarks.faults.outcome import (
    Expected,
    Row,
    largest_difference,
    outcome,
    step_records,
)
from cavmae.benchmarks.harness.processes import Start, free_port, module_command
from cavmae.dataloaders.config import DataConfig
from cavmae.dataloaders.packing.pack import PackConfig, pack
from cavmae.dataloaders.tools.synthetic import generate
from cavmae.trainer.checkpoint.format import (
    MANIFEST,
    RUN_STATE,
    checkpoint_name,
    manifest_bytes,
    read_manifest,
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
from cavmae.trainer.model.config import ModelConfig

RANKS = 2
CLIPS = 24
GLOBAL_BATCH = 8
INTERVAL = 10
"""Steps between checkpoints."""
HANG_SECONDS = 5.0
"""What the watchdog lets a step take here; 300 by default."""
FIRST_STEPS_SECONDS = 120.0
"""The same for the first three steps of a start, and for the copying for a checkpoint; an hour by
default. A rank that is stopped in them is noticed no sooner."""
ZeroStage = Literal[0, 1, 2, 3]
_TAIL_BYTES = 4096
_UNDISTURBED = "undisturbed"
_WITHOUT_MEMORY_MONITOR = {"RAY_memory_monitor_refresh_ms": "0"}
"""Ray would kill its own processes when others take this machine's memory: no fault of a row."""
MODEL = ModelConfig(
    audio_frames=192,
    mel_bins=32,
    image_size=32,
    width=32,
    modality_depth=1,
    heads=4,
    decoder_width=32,
    decoder_depth=1,
    decoder_heads=4,
)


class Bench:
    """The data, the runs and the undisturbed one among them.

    Args:
        work: folder for all of it.
        steps: of each run.
        zero_stage: of each run.
    """

    def __init__(self, work: Path, steps: int, zero_stage: ZeroStage) -> None:
        self.work = work
        self.steps = steps
        self.zero_stage: ZeroStage = zero_stage
        self._starts: list[Start] = []
        if not (work / "shards").exists():
            listing = generate(work / "videos", CLIPS, seed=0, seconds=2.0)
            pack(PackConfig(str(listing), str(work / "shards"), tiers="frames"), _quiet())

    @cached_property
    def undisturbed(self) -> Expected:
        """What a run comes to that nothing happens to; it is made when it is first asked for."""
        # Its checkpoints are where other runs begin.
        kept = CheckpointConfig(every_steps=INTERVAL, keep_every=INTERVAL)
        config = self.config(_UNDISTURBED, checkpoint=kept)
        if not Path(config.run_dir).exists():
            self.plain(config).finish()
        return outcome(config, "the undisturbed run")

    def config(self, name: str, **changes: Any) -> PretrainConfig:
        """The run of a row."""
        config = PretrainConfig(
            run_dir=str(self.work / re.sub(r"\W+", "-", name)),
            steps=self.steps,
            global_batch=GLOBAL_BATCH,
            micro_batch=4,
            model=MODEL,
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
                minimum_seconds=HANG_SECONDS, max_pause_seconds=FIRST_STEPS_SECONDS
            ),
            threads_per_rank=1,
        )
        return dataclasses.replace(config, **changes)

    def plain(self, config: PretrainConfig, ranks: int = RANKS) -> Start:
        """The ranks by themselves, each told its place."""
        port = free_port()
        command = observed_command("pretrain", config)
        places = [
            {
                "RANK": str(rank),
                "WORLD_SIZE": str(ranks),
                "LOCAL_RANK": str(rank),
                "LOCAL_WORLD_SIZE": str(ranks),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port),
                "OMP_NUM_THREADS": "1",
            }
            for rank in range(ranks)
        ]
        return self._started(Start([(command, place) for place in places], new_log(config)))

    def on_ray(self, config: PretrainConfig, *words: str) -> Start:
        """A driver that has a Ray cluster of its own place the ranks."""
        command = observed_command("train", config, *words)
        return self._started(Start([(command, _WITHOUT_MEMORY_MONITOR)], new_log(config)))

    def end_all(self) -> None:
        """End what still runs of all starts, as after a row that failed."""
        for start in self._starts:
            start.kill()
        self._starts.clear()

    def _started(self, start: Start) -> Start:
        self._starts.append(start)
        return start

    def leaving_out(self, step: int) -> Expected:
        """What a run comes to in which one update is never made: it goes on from the undisturbed
        run's weights and optimizer before that step, at the samples after it.

        Args:
            step: steps done before the one that is left out; a multiple of the interval.
        """
        before = self.undisturbed
        config = self.config("leaving out one update")
        run_dir = Path(config.run_dir)
        (run_dir / "checkpoints").mkdir(parents=True)
        shutil.copy(self.work / _UNDISTURBED / "config.json", run_dir)
        shutil.copytree(
            self.work / _UNDISTURBED / "checkpoints" / checkpoint_name(step),
            run_dir / "checkpoints" / checkpoint_name(step + 1),
        )
        _move_on(run_dir / "checkpoints", step + 1)
        self.plain(config).finish()
        rest = outcome(config, "the rest of it")
        # The loss of the step itself is computed before the update that is left out.
        positions = GLOBAL_BATCH * (step + 1)
        samples = {at: name for at, name in before.samples.items() if at < positions}
        return Expected(
            before.losses[: step + 1] + rest.losses,
            samples | rest.samples,
            f"a run that goes on from step {step} at step {step + 1}",
        )

    def without(self, sample_ids: tuple[str, ...]) -> Expected:
        """What a run comes to that has these clips in quarantine from the start."""
        config = self.config("without some clips")
        give_orders(Path(config.run_dir), Orders(quarantine=sample_ids))
        self.plain(config).finish()
        return outcome(config, "a run with the clips in quarantine from the start")

    def row(
        self,
        config: PretrainConfig,
        fault: float,
        noticed: float,
        said: str,
        *,
        before: int = 0,
        resumed: int | None,
        while_writing: int = 0,
        tolerance: float = 0.0,
        expected: Expected | None = None,
    ) -> Row:
        """Of a run that has ended.

        Args:
            fault, noticed: Unix seconds.
            before: steps done when the fault came.
            resumed: step that was gone on from; None: training went on.
            while_writing: steps done while a checkpoint was being written.
            expected: what the run is compared with; None: the undisturbed run.

        Raises:
            RuntimeError: the run has not as many steps as the other one.
        """
        run_dir = Path(config.run_dir)
        expected = expected or self.undisturbed
        found = outcome(config, run_dir.name)
        again = 0.0
        if resumed is not None:
            new = [one for one in step_records(run_dir) if one["step"] > resumed]
            again = min(one["unix_seconds"] for one in new if one["unix_seconds"] > fault) - fault
        return Row(
            noticed_seconds=max(0.0, noticed - fault),
            again_seconds=again,
            steps_lost=0 if resumed is None else before - resumed,
            steps_allowed=INTERVAL + while_writing,
            samples_equal=found.samples == expected.samples,
            largest_difference=largest_difference(found, expected),
            tolerance=tolerance,
            compared_with=expected.run,
            said=said.replace(f"{self.work}/", ""),
        )


def observed_command(command: str, config: PretrainConfig, *words: str) -> list[str]:
    """`cavmae pretrain` or `cavmae train` of a run, with ranks that note what they train on."""
    path = Path(config.run_dir).with_suffix(".json")
    save_config(config, path)
    return module_command("cavmae.benchmarks.faults.observed_rank", command, str(path), *words)


def new_log(config: PretrainConfig) -> Path:
    """A file beside the run folder for one start."""
    return Path(config.run_dir).with_name(f"{Path(config.run_dir).name}-{time.monotonic_ns()}.log")


def last_step(run_dir: Path) -> int:
    """Steps that were logged, read from the end of the metrics; 0 before the first one."""
    path = run_dir / "metrics.jsonl"
    if not path.exists():
        return 0
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - _TAIL_BYTES))
        lines = file.read().split(b"\n")[:-1]
    return int(json.loads(lines[-1])["step"]) if lines else 0


def resumed_step(start: Start) -> int:
    """Step that a start went on from, the last time that it did."""
    return int(re.findall(r"resuming from \S*step-(\d+)", start.text())[-1])


def wait_for_checkpoint(start: Start, config: PretrainConfig, step: int) -> None:
    """Until the checkpoint of a step is there."""
    path = Path(config.run_dir) / "checkpoints" / checkpoint_name(step) / MANIFEST
    start.wait_for(path.exists, f"checkpoint {step}")


def _move_on(folder: Path, step: int) -> None:
    """Have a copied checkpoint say that it is of another step."""
    store, name = Store(folder), checkpoint_name(step)
    files = read_manifest(store, name)
    path = folder / name / RUN_STATE
    write_json(path, json.loads(path.read_text()) | {"step": step, "position": step * GLOBAL_BATCH})
    data = path.read_bytes()
    files[RUN_STATE] = FileDigest(len(data), zlib.crc32(data))
    store.put(f"{name}/{MANIFEST}", manifest_bytes(files))


def _quiet() -> Console:
    return Console(quiet=True)
