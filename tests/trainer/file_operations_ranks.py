"""Ranks of a tiny run that note each file operation on the run folder, with the step it is in.

Python's audit events have those that name a path and change or list something; what only looks is
replaced. Writes to files that are open already are none: they wait for no server.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any, cast

from cavmae.trainer.config.configs import PretrainConfig, RunConfig
from cavmae.trainer.config.serialize import load_run_config
from cavmae.trainer.distributed.process_group import end_rank
from cavmae.trainer.run import run
from cavmae.trainer.tasks.task import Task
from cavmae.trainer.trainer import Hooks

LOOKING = ("stat", "lstat", "readlink", "access", "statvfs")


class Watched:
    """Notes the operations below a folder."""

    def __init__(self, folder: str) -> None:
        self.folder, self.step = folder, 0
        self.noted: list[tuple[int, str, str]] = []
        sys.addaudithook(self.note)
        for name in LOOKING:
            setattr(os, name, self.noting(name, getattr(os, name)))

    def noting(self, name: str, function: Any) -> Any:
        def noted(*arguments: Any, **options: Any) -> Any:
            self.note(name, arguments)
            return function(*arguments, **options)

        return noted

    def note(self, event: str, arguments: tuple[Any, ...]) -> None:
        for path in arguments:
            if isinstance(path, str | Path) and str(path).startswith(self.folder):
                self.noted.append((self.step, event, str(path)[len(self.folder) :]))


class CountedTask:
    """A task that counts its steps."""

    def __init__(self, task: Task, watched: Watched) -> None:
        self.task, self.watched = task, watched

    def __getattr__(self, name: str) -> Any:
        return getattr(self.task, name)

    def begin_step(self, *arguments: Any) -> None:
        self.watched.step += 1
        self.task.begin_step(*arguments)


def main() -> None:
    """Run the configuration of a file; rank N writes what it noted to `OUTPUT.N`."""
    path, output = json.loads(sys.argv[1]), sys.argv[2]
    config = cast(PretrainConfig, load_run_config(Path(path)))
    watched = Watched(config.run_dir)

    def make_hooks(_: RunConfig) -> Hooks:
        return Hooks(wrap_task=lambda task: cast(Task, CountedTask(task, watched)))

    run(config, make_hooks=make_hooks)
    Path(f"{output}.{os.environ['RANK']}").write_text(json.dumps(watched.noted))
    if os.environ["RANK"] == "0":
        Path(output).write_text("[]")
    end_rank()


main()
