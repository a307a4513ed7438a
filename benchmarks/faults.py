"""`cavmae bench faults`: what a run makes of each fault, done to it for real.

Each row trains a tiny model on two CPU ranks, does something to it once a checkpoint is there, and
measures how long it took until the fault was noticed and until there was a step again, how many
steps were repeated, and whether the losses of all steps are, bit for bit, those of a run that
nothing happened to. Equal losses mean equal samples in the equal order: a step's loss is computed
from them.
"""

import argparse
import dataclasses
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
from rich.console import Console
from rich.table import Table

import cavmae
from cavmae.benchmarks.records import write_record
from cavmae.dataloaders.config import DataConfig
from cavmae.dataloaders.pack import PackConfig, pack
from cavmae.dataloaders.synthetic import generate
from cavmae.trainer.checkpoint import (
    MANIFEST,
    checkpoint_name,
    checkpoints,
    step_folders,
    step_of,
)
from cavmae.trainer.checkpoint_store import open_store
from cavmae.trainer.config import (
    CheckpointConfig,
    EngineConfig,
    LossConfig,
    OptimizerConfig,
    PretrainConfig,
    TrackingConfig,
    WatchdogConfig,
)
from cavmae.trainer.model.config import ModelConfig
from cavmae.trainer.run_folder import save_config
from cavmae.trainer.tracking import read_metrics

RANKS = 2
CLIPS = 24
INTERVAL = 10
"""Steps between checkpoints."""
PATIENCE_SECONDS = 300.0
HANG_SECONDS = 5.0
"""What the watchdog lets a step take here; 300 by default."""
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


def parser() -> argparse.ArgumentParser:
    """The command line."""
    arguments = argparse.ArgumentParser(
        prog="cavmae bench faults", description="What a run makes of each fault, for real."
    )
    arguments.add_argument("--steps", type=int, default=100, help="of each run")
    arguments.add_argument(
        "--only", nargs="+", choices=list(FAULTS), default=list(FAULTS), help="some of the faults"
    )
    arguments.add_argument("--work-dir", default="", help="empty: a temporary folder")
    arguments.add_argument("--out", default="benchmarks/results", help="folder of the record")
    return arguments


def main(argv: list[str]) -> int:
    """Measure, print and write the record; 1 where a run did not end as it should."""
    flags = parser().parse_args(argv)
    if flags.steps < 4 * INTERVAL:
        raise ValueError(f"--steps is {flags.steps}; use {4 * INTERVAL} or more")
    work = Path(flags.work_dir or tempfile.mkdtemp(prefix="cavmae-faults-"))
    work.mkdir(parents=True, exist_ok=True)
    try:
        bench = _Bench(work.resolve(), flags.steps)
        rows = {}
        for name in flags.only:
            print(f"{name} ...", file=sys.stderr, flush=True)
            rows[name] = FAULTS[name](bench, name)
    finally:
        if not flags.work_dir:
            shutil.rmtree(work, ignore_errors=True)
    Console(width=140).print(_table(rows))
    device = torch.device("cpu")
    results = {name: dataclasses.asdict(row) for name, row in rows.items()}
    print(f"record: {write_record(flags.out, 'faults', device, vars(flags), results)}")
    return 0 if all(row.as_it_should_be for row in rows.values()) else 1


@dataclass(frozen=True)
class Row:
    """What came of a fault.

    Attributes:
        noticed_seconds: from the fault to the line in the log that names it.
        again_seconds: from the fault to the next step that is new; 0: training went on meanwhile.
        steps_lost: steps done before the fault that had to be done again.
        steps_allowed: most of them: an interval, and what was done while a checkpoint was written.
        largest_difference: of the losses, relative to the undisturbed run's; 0: bit for bit.
        tolerance: of it.
        said: the line of the log.
    """

    noticed_seconds: float
    again_seconds: float
    steps_lost: int
    steps_allowed: int
    largest_difference: float
    tolerance: float
    said: str

    @property
    def as_it_should_be(self) -> bool:
        """Whether no more was lost than an interval, and the run ended as without the fault."""
        return self.largest_difference <= self.tolerance and self.steps_lost <= self.steps_allowed


def _table(rows: dict[str, Row]) -> Table:
    table = Table("fault", "noticed, s", "again, s", "steps lost", "losses", "said")
    for name, row in rows.items():
        equal = "bit for bit"
        if row.largest_difference:
            equal = f"{row.largest_difference:.1e} apart"
        table.add_row(
            name,
            f"{row.noticed_seconds:.1f}",
            f"{row.again_seconds:.1f}" if row.again_seconds else "went on",
            str(row.steps_lost),
            equal if row.as_it_should_be else f"{equal}: NOT AS IT SHOULD BE",
            row.said[:40],
        )
    return table


# -------------------------------------------------------------------------------------- runs


class _Start:
    """One start of a run: two ranks by themselves, or a driver that has Ray place them."""

    def __init__(self, commands: list[tuple[list[str], dict[str, str]]], log: Path) -> None:
        self.log = log
        self._file = log.open("w")
        tree = str(Path(cavmae.__file__).resolve().parents[1])
        self.processes = [
            subprocess.Popen(
                [sys.executable, "-m", *command],
                stdout=self._file,
                stderr=subprocess.STDOUT,
                env=os.environ | {"PYTHONPATH": tree} | environment,
            )
            for command, environment in commands
        ]

    def text(self) -> str:
        return self.log.read_text(errors="replace")

    def ranks(self) -> list[psutil.Process]:
        """Processes of the ranks that Ray has placed."""
        family = psutil.Process(self.processes[0].pid).children(recursive=True)
        return [one for one in family if "RayTrainWorker" in " ".join(one.cmdline())]

    def kill(self) -> None:
        """All of it at once, as a power cut does."""
        family = [
            psutil.Process(process.pid) for process in self.processes if process.poll() is None
        ]
        family += [child for one in family for child in one.children(recursive=True)]
        for process in family:
            try:
                process.kill()
            except psutil.NoSuchProcess:
                continue
        psutil.wait_procs(family, timeout=30)

    def finish(self) -> None:
        """Wait for the end, which must be a good one."""
        for process in self.processes:
            if process.wait(timeout=PATIENCE_SECONDS):
                raise RuntimeError(f"a start failed:\n{self.text()[-4000:]}")

    def wait_for(self, happened: Callable[[], Any], what: str) -> Any:
        """The first true answer of `happened`."""
        deadline = time.monotonic() + PATIENCE_SECONDS
        while True:
            answer = happened()
            if answer:
                return answer
            if time.monotonic() > deadline:
                raise RuntimeError(f"{what} did not happen:\n{self.text()[-4000:]}")
            time.sleep(0.02)


class _Bench:
    """The data, the runs and their baseline."""

    def __init__(self, work: Path, steps: int) -> None:
        self.work = work
        self.steps = steps
        if not (work / "shards").exists():
            listing = generate(work / "videos", CLIPS, seed=0, seconds=2.0)
            pack(PackConfig(str(listing), str(work / "shards"), tiers="frames"), _quiet())
        straight = self.config("straight")
        if not (work / "straight").exists():
            self.plain(straight).finish()
        self.losses = _losses(Path(straight.run_dir))

    def config(self, name: str, **changes: Any) -> PretrainConfig:
        """The run of a row."""
        config = PretrainConfig(
            run_dir=str(self.work / re.sub(r"\W+", "-", name)),
            steps=self.steps,
            global_batch=8,
            micro_batch=4,
            model=MODEL,
            data=DataConfig(
                train=str(self.work / "shards" / "frames"), reader_workers=1, decode_threads=1
            ),
            loss=LossConfig(contrastive_weight=1.0),
            optimizer=OptimizerConfig(learning_rate=1e-3),
            engine=EngineConfig(zero_stage=1, dtype="fp32"),
            checkpoint=CheckpointConfig(every_steps=INTERVAL),
            tracking=TrackingConfig(every_steps=1),
            watchdog=WatchdogConfig(minimum_seconds=HANG_SECONDS),
            threads_per_rank=1,
        )
        return dataclasses.replace(config, **changes)

    def plain(self, config: PretrainConfig, ranks: int = RANKS) -> _Start:
        """The ranks, each told its place."""
        port = _free_port()
        command = ["cavmae.trainer.pretrain", self._saved(config)]
        places = [
            {
                "RANK": str(rank),
                "WORLD_SIZE": str(ranks),
                "LOCAL_RANK": str(rank),
                "LOCAL_WORLD_SIZE": str(ranks),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port),
            }
            for rank in range(ranks)
        ]
        return _Start([(command, place) for place in places], self._log(config))

    def on_ray(self, config: PretrainConfig) -> _Start:
        """The same on a Ray cluster of their own."""
        command = ["cavmae.cluster.train", self._saved(config)]
        return _Start([(command, {})], self._log(config))

    def _saved(self, config: PretrainConfig) -> str:
        path = Path(config.run_dir).with_suffix(".json")
        save_config(config, path)
        return str(path)

    def _log(self, config: PretrainConfig) -> Path:
        return Path(config.run_dir).with_name(
            f"{Path(config.run_dir).name}-{time.monotonic_ns()}.log"
        )

    def row(
        self,
        config: PretrainConfig,
        fault: float,
        noticed: float,
        said: str,
        *,
        before: int,
        resumed: int | None,
        while_writing: int = 0,
        tolerance: float = 0.0,
    ) -> Row:
        """Of a run that has ended.

        Args:
            fault, noticed: Unix seconds.
            before: steps done when the fault came.
            resumed: step that was gone on from; None: training went on.
            while_writing: steps done while a checkpoint was being written.
        """
        run_dir = Path(config.run_dir)
        losses = _losses(run_dir)
        if len(losses) != len(self.losses):
            raise RuntimeError(f"{run_dir} has {len(losses)} steps of {len(self.losses)}")
        pairs = zip(losses, self.losses, strict=True)
        again = 0.0
        if resumed is not None:
            new = [one for one in _records(run_dir) if one["step"] > resumed]
            again = min(one["unix_seconds"] for one in new if one["unix_seconds"] > fault) - fault
        return Row(
            noticed_seconds=max(0.0, noticed - fault),
            again_seconds=again,
            steps_lost=0 if resumed is None else before - resumed,
            steps_allowed=INTERVAL + while_writing,
            largest_difference=max(abs(ours / theirs - 1) for ours, theirs in pairs),
            tolerance=tolerance,
            said=said,
        )


def _quiet() -> Console:
    return Console(quiet=True)


def _records(run_dir: Path) -> list[dict[str, float]]:
    path = run_dir / "metrics.jsonl"
    return [one for one in read_metrics(path) if "loss" in one] if path.exists() else []


def _losses(run_dir: Path) -> list[float]:
    """Of every step, as it was computed last."""
    by_step = {one["step"]: one["loss"] for one in _records(run_dir)}
    return [loss for _, loss in sorted(by_step.items())]


def _last_step(run_dir: Path) -> int:
    return max((int(one["step"]) for one in _records(run_dir)), default=0)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _line(start: _Start, pattern: str) -> str:
    """The line of the log in which something stands."""
    found = re.search(f"^.*{pattern}.*$", start.text(), re.MULTILINE)
    return found[0].strip() if found else ""


def _resumed(start: _Start) -> int:
    """Step that a start went on from."""
    found = re.findall(r"going on from \S*step-(\d+)", start.text())
    return int(found[-1])


def _checkpoint_at(start: _Start, config: PretrainConfig, step: int) -> None:
    path = Path(config.run_dir) / "checkpoints" / checkpoint_name(step) / MANIFEST
    start.wait_for(path.exists, f"checkpoint {step}")


# ------------------------------------------------------------------------------------ faults


def _rank_fault(sign: signal.Signals) -> Callable[[_Bench, str], Row]:
    """A signal to one of two ranks under Ray, which starts both again."""

    def row(bench: _Bench, name: str) -> Row:
        config = bench.config(name)
        start = bench.on_ray(config)
        try:
            _checkpoint_at(start, config, 2 * INTERVAL)
            before, fault = _last_step(Path(config.run_dir)), time.time()
            start.ranks()[-1].send_signal(sign)
            said = start.wait_for(lambda: _line(start, "rank . failed"), "the failure")
            noticed = time.time()
            start.finish()
            return bench.row(config, fault, noticed, said, before=before, resumed=_resumed(start))
        finally:
            start.kill()

    return row


def _head_killed(bench: _Bench, name: str) -> Row:
    """Driver, Ray and ranks are gone at once; the same command is given again."""
    config = bench.config(name)
    start = bench.on_ray(config)
    try:
        _checkpoint_at(start, config, 2 * INTERVAL)
        before, fault = _last_step(Path(config.run_dir)), time.time()
        start.kill()
        start = bench.on_ray(config)
        start.finish()
        return bench.row(
            config, fault, fault, "given again by hand", before=before, resumed=_resumed(start)
        )
    finally:
        start.kill()


def _terminated(bench: _Bench, name: str) -> Row:
    """SIGTERM to all ranks, as a scheduler sends it; the same command is given again."""
    config = bench.config(name)
    start = bench.plain(config)
    _checkpoint_at(start, config, 2 * INTERVAL)
    fault = time.time()
    for process in start.processes:
        process.send_signal(signal.SIGTERM)
    said = start.wait_for(lambda: _line(start, "SIGTERM: saving"), "the notice")
    noticed = time.time()
    start.finish()
    before = _last_step(Path(config.run_dir))
    start = bench.plain(config)
    start.finish()
    return bench.row(config, fault, noticed, said, before=before, resumed=_resumed(start))


def _damaged(damage: Callable[[Path], None]) -> Callable[[_Bench, str], Row]:
    """All ranks are killed and something happens to the newest checkpoint; started again."""

    def row(bench: _Bench, name: str) -> Row:
        config = bench.config(name)
        start = bench.plain(config)
        _checkpoint_at(start, config, 2 * INTERVAL)
        start.kill()
        before, fault = _last_step(Path(config.run_dir)), time.time()
        folder = Path(config.run_dir) / "checkpoints"
        newest = checkpoints(open_store(folder))[-1]
        damage(next((folder / newest).glob("state/*optim_states.pt")))
        start = bench.plain(config)
        said = start.wait_for(lambda: _line(start, "is not whole"), "the notice")
        noticed = time.time()
        start.finish()
        resumed = _resumed(start)
        if resumed >= step_of(newest):
            raise RuntimeError(f"the damaged checkpoint {newest} was used")
        # The damaged interval is lost with its checkpoint; counted from there on.
        before = min(before, step_of(newest))
        return bench.row(config, fault, noticed, said, before=before, resumed=resumed)

    return row


def _cut_short(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1000])


def _flip_a_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def _killed_while_writing(bench: _Bench, name: str) -> Row:
    """A rank's file is a pipe that nobody reads, so the write never ends; then all are killed."""
    config = bench.config(name)
    start = bench.plain(config)
    _checkpoint_at(start, config, INTERVAL)
    pipe = _file_of(config, 3 * INTERVAL)
    os.mkfifo(pipe)
    run_dir = Path(config.run_dir)
    start.wait_for(lambda: _last_step(run_dir) > 3 * INTERVAL, "the step after")
    before, fault = _last_step(run_dir), time.time()
    start.kill()
    start = bench.plain(config)
    start.finish()
    store = open_store(run_dir / "checkpoints")
    left = set(step_folders(store)) - set(checkpoints(store))
    if left:
        raise RuntimeError(f"{left} is left")
    return bench.row(
        config,
        fault,
        fault,
        "started again by hand",
        before=before,
        resumed=_resumed(start),
        while_writing=before - 3 * INTERVAL,
    )


def _file_of(config: PretrainConfig, step: int) -> Path:
    """Where the second rank will write its part of a checkpoint."""
    folder = Path(config.run_dir) / "checkpoints" / checkpoint_name(step) / "state"
    folder.mkdir(parents=True)
    return folder / "zero_pp_rank_1_mp_rank_00_optim_states.pt"


def _disk_full(bench: _Bench, name: str) -> Row:
    """A rank's file goes to /dev/full, which answers as a full disk does."""
    config = bench.config(name)
    start = bench.plain(config)
    _checkpoint_at(start, config, INTERVAL)
    _file_of(config, 3 * INTERVAL).symlink_to("/dev/full")
    run_dir = Path(config.run_dir)
    start.wait_for(lambda: _last_step(run_dir) >= 3 * INTERVAL, f"step {3 * INTERVAL}")
    fault = time.time()
    said = start.wait_for(lambda: _line(start, "ALARM"), "the alarm")
    noticed = time.time()
    start.finish()
    return bench.row(config, fault, noticed, said, before=0, resumed=None)


def _mlflow_stopped(bench: _Bench, name: str) -> Row:
    """The tracking server is killed while the run sends it metrics."""
    port = _free_port()
    store = bench.work / "mlflow-server"
    store.mkdir()
    command = ["mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    backend = ["--backend-store-uri", f"sqlite:///{store}/m.db", "--artifacts-destination"]
    server = _Start([([*command, *backend, str(store)], {})], store / "server.log")
    try:
        server.wait_for(lambda: _answers(port), "the tracking server's start")
        tracking = TrackingConfig(uri=f"http://127.0.0.1:{port}", every_steps=1)
        config = bench.config(name, tracking=tracking)
        start = bench.plain(config)
        _checkpoint_at(start, config, 2 * INTERVAL)
        fault = time.time()
        server.kill()
        said = start.wait_for(lambda: _line(start, "did not take a record"), "the notice")
        noticed = time.time()
        start.finish()
        return bench.row(config, fault, noticed, said, before=0, resumed=None)
    finally:
        server.kill()


def _answers(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def _other_ranks(bench: _Bench, name: str) -> Row:
    """2, then 1, then 2 ranks, each from the other's checkpoint."""
    half = bench.steps // (2 * INTERVAL) * INTERVAL
    config = bench.config(name)
    starts = ((2, half - INTERVAL), (1, half), (2, bench.steps))
    fault, start = 0.0, None
    for ranks, steps in starts:
        start = bench.plain(dataclasses.replace(config, steps=steps), ranks)
        start.finish()
        fault = fault or time.time()
    assert start is not None
    said = f"went on with 1 and again with 2 ranks, from step {_resumed(start)}"
    return bench.row(
        config, fault, fault, said, before=half - INTERVAL, resumed=half - INTERVAL, tolerance=1e-5
    )


FAULTS: dict[str, Callable[[_Bench, str], Row]] = {
    "a rank is killed (SIGKILL)": _rank_fault(signal.SIGKILL),
    "a rank is stopped (SIGSTOP)": _rank_fault(signal.SIGSTOP),
    "head, driver and ranks are killed": _head_killed,
    "all ranks are told to go (SIGTERM)": _terminated,
    "killed while a checkpoint is written": _killed_while_writing,
    "the newest checkpoint is cut short": _damaged(_cut_short),
    "a bit of the newest checkpoint flips": _damaged(_flip_a_bit),
    "the disk is full": _disk_full,
    "the tracking server dies": _mlflow_stopped,
    "2, then 1, then 2 ranks": _other_ranks,
}
