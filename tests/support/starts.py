"""A training run in ranks of its own (see `forks.py`): their log, and signals to them."""

import functools
import os
import signal
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from forks import start_program
from launch import ROOT, free_port, rank_environment

from cavmae.trainer.config.configs import FinetuneConfig, RunConfig
from cavmae.trainer.config.serialize import save_config
from cavmae.trainer.tracking.tracker import create_store


@functools.cache
def _empty_store() -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        create_store(f"sqlite:///{folder}/mlflow.db")
        return Path(folder, "mlflow.db").read_bytes()


def place_store(folder: Path) -> None:
    """An empty MLflow store for the runs in `folder`, which takes longer to make than they do.

    That a run makes its own is seen in `test_launchers.py` and `test_tracker.py`.
    """
    if not (folder / "mlflow.db").exists():
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "mlflow.db").write_bytes(_empty_store())


class Start:
    """One start of a run on some ranks."""

    def __init__(self, config: RunConfig, world_size: int, tmp_path: Path) -> None:
        path = tmp_path / f"config-{time.monotonic_ns()}.json"
        save_config(config, path)
        command = "finetune" if isinstance(config, FinetuneConfig) else "pretrain"
        port = free_port()
        self.log = path.with_suffix(".log")
        self.log.touch()
        place_store(Path(config.run_dir).parent)
        self.processes = [
            start_program(
                f"cavmae.trainer.{command}",
                [str(path)],
                ROOT,
                rank_environment(rank, world_size, port),
                self.log,
            )
            for rank in range(world_size)
        ]

    def finish(self) -> str:
        codes = [process.wait(timeout=300) for process in self.processes]
        text = self.log.read_text()
        assert codes == [0] * len(codes), text[-5000:]
        return text

    def wait_for(self, path: Path) -> None:
        self.wait_until(path.exists, str(path))

    def wait_until(self, happened: Callable[[], bool], what: str) -> None:
        deadline = time.monotonic() + 450
        while not happened():
            assert all(p.poll() is None for p in self.processes), self.log.read_text()[-5000:]
            assert time.monotonic() < deadline, f"{what} did not appear"
            time.sleep(0.01)

    def signal_after(self, sign: signal.Signals, path: Path) -> None:
        """Send a signal to all ranks as soon as `path` is there."""
        self.wait_for(path)
        for process in self.processes:
            os.kill(process.pid, sign)
