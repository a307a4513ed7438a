"""A rank of a training run that notes what it trains on, and can be made to go wrong.

The run is the product's own: `cavmae pretrain` or `cavmae train`, started through this module.
Through the trainer's hooks each rank notes the sample ids of every step before it computes on them,
and follows the orders in files beside the run folder: one gradient that isn't finite, one file of a
checkpoint that is read wrongly, clips in quarantine from the start, a pause in each step.

    python -m cavmae.benchmarks.faults.observed_rank pretrain CONFIG [--field value ...]
"""

import dataclasses
import json
import os
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from cavmae.atomic_write import write_json, write_text
from cavmae.cluster import train
from cavmae.command import exit_code
from cavmae.trainer import pretrain
from cavmae.trainer.config.configs import RunConfig
from cavmae.trainer.config.serialize import load_config

if TYPE_CHECKING:
    from cavmae.dataloaders.batch import AudioVideoBatch
    from cavmae.trainer.distributed.engine import Engine
    from cavmae.trainer.tasks.task import Task
    from cavmae.trainer.trainer import Hooks


@dataclass(frozen=True)
class Orders:
    """What the ranks of a run are to do besides training.

    Attributes:
        quarantine: sample ids to leave out from the start.
        pause_seconds: slept in each step.
    """

    quarantine: tuple[str, ...] = ()
    pause_seconds: float = 0.0


def give_orders(run_dir: Path, orders: Orders) -> None:
    """For all starts of a run from now on."""
    write_json(_orders_file(run_dir), dataclasses.asdict(orders))


def order_nan(run_dir: Path, rank: int, step: int) -> Path:
    """Have one rank of a run compute one gradient that is NaN, once.

    Args:
        run_dir: of the run.
        rank: that computes it.
        step: steps done before the one that goes wrong; the next one where that is over.

    Returns:
        A file that is gone as soon as the order is carried out.
    """
    path = _nan_file(run_dir, rank)
    write_text(path, str(step))
    return path


def order_misread(run_dir: Path, rank: int) -> Path:
    """Have one rank of a run read a file of a checkpoint wrongly, once.

    Returns:
        A file that is gone as soon as the order is carried out.
    """
    path = _misread_file(run_dir, rank)
    path.touch()
    return path


def trained_samples(run_dir: Path) -> dict[int, str]:
    """Sample id by position of the plan, of all ranks; of steps that were run again, the last time.

    A line that a killed rank has not finished belongs to a step that it has not computed.
    """
    samples: dict[int, str] = {}
    for path in sorted(_samples_folder(run_dir).glob("*.jsonl")):
        for line in path.read_text().split("\n")[:-1]:
            noted = json.loads(line)
            samples |= zip(noted["positions"], noted["sample_ids"], strict=True)
    return samples


def main(arguments: list[str]) -> int:
    """Run `pretrain` or `train` with observed ranks; returns its exit code."""
    from cavmae.benchmarks.faults import observed_rank  # Ray's workers find it by this name

    command, *words = arguments
    main = {"pretrain": pretrain.main, "train": train.main}[command]
    return main(words, observed_rank.make_hooks)


def make_hooks(config: RunConfig) -> "Hooks":
    """Make the hooks of a rank that notes its samples and follows its orders."""
    from cavmae.dataloaders.loading.loader import TrainLoader
    from cavmae.trainer.trainer import Hooks

    run_dir = Path(config.run_dir)
    if (order := _misread_file(run_dir, int(os.environ["RANK"]))).exists():
        _misread_once(order)

    def make_loader(*arguments: Any, quarantine: Sequence[Any] = (), **options: Any) -> TrainLoader:
        ordered = _orders(run_dir).quarantine
        return TrainLoader(*arguments, quarantine=[*quarantine, *ordered], **options)

    def wrap_task(task: "Task") -> "Task":
        return cast("Task", _ObservedTask(task, config))

    return Hooks(make_loader=make_loader, wrap_task=wrap_task)


class _ObservedTask:
    """A task that notes its samples in a file before it computes on them."""

    def __init__(self, task: "Task", config: RunConfig) -> None:
        self._task = task
        run_dir, self._rank = Path(config.run_dir), int(os.environ["RANK"])
        folder = _samples_folder(run_dir)
        folder.mkdir(parents=True, exist_ok=True)
        name = f"{time.time_ns()}-rank-{self._rank}.jsonl"  # sorted by time: the last one counts
        self._samples = (folder / name).open("w", buffering=1)
        self._pause_seconds = _orders(run_dir).pause_seconds
        self._nan_file = _nan_file(run_dir, self._rank)
        self._global_batch = config.global_batch

    def __getattr__(self, name: str) -> Any:
        return getattr(self._task, name)

    def begin_step(self, engine: "Engine", batches: "list[AudioVideoBatch]") -> None:
        noted = {
            "positions": [one for batch in batches for one in batch.positions.tolist()],
            "sample_ids": [one for batch in batches for one in batch.sample_ids],
        }
        self._samples.write(json.dumps(noted) + "\n")
        time.sleep(self._pause_seconds)
        step = noted["positions"][0] // self._global_batch
        if self._nan_file.exists() and step >= int(self._nan_file.read_text()):
            self._nan_file.unlink()
            _make_next_gradient_nan(engine)
        self._task.begin_step(engine, batches)


def _misread_once(order: Path) -> None:
    """Flip a bit of the first block that this process reads of a checkpoint."""
    from cavmae.trainer.checkpoint.store import Store

    read_blocks = Store.read_blocks

    def misread(self: Store, name: str, size: int) -> Iterator[bytes]:
        for block in read_blocks(self, name, size):
            if order.exists():
                order.unlink()
                block = bytes([block[0] ^ 1]) + block[1:]
            yield block

    Store.read_blocks = misread


def _make_next_gradient_nan(engine: Any) -> None:
    """Of the first parameter that is trained, in this rank's next backward pass."""
    parameter = next(one for one in engine.module.parameters() if one.requires_grad)

    def spoil(gradient: Any) -> Any:
        handle.remove()
        return gradient * float("nan")

    handle = parameter.register_hook(spoil)


def _samples_folder(run_dir: Path) -> Path:
    return run_dir / "samples"


def _misread_file(run_dir: Path, rank: int) -> Path:
    return run_dir.with_name(f"{run_dir.name}.rank-{rank}.misread")


def _orders_file(run_dir: Path) -> Path:
    return run_dir.with_name(f"{run_dir.name}.orders.json")


def _nan_file(run_dir: Path, rank: int) -> Path:
    return run_dir.with_name(f"{run_dir.name}.rank-{rank}.nan")


def _orders(run_dir: Path) -> Orders:
    path = _orders_file(run_dir)
    return load_config(path, Orders) if path.exists() else Orders()


if __name__ == "__main__":
    sys.exit(exit_code(main, sys.argv[1:]))
