"""How a start takes up its run folder: a new run, or one that goes on."""

import dataclasses
from pathlib import Path
from typing import TypeVar

from cavmae.atomic_write import read_json, remove_leftovers, write_json
from cavmae.trainer.checkpoint.format import check_not_left_behind, list_checkpoints
from cavmae.trainer.checkpoint.store import Store, check_writable
from cavmae.trainer.config.configs import RunConfig
from cavmae.trainer.config.resolve import check_same_run, native_dtype
from cavmae.trainer.config.serialize import load_run_config, save_config
from cavmae.trainer.tracking.code_snapshot import git_commit, save_code

Config = TypeVar("Config", bound=RunConfig)


def open_run_dir(config: Config, run_dir: Path, store: Store, device: str) -> Config:
    """Make the folder, or check that this start goes on with the run that is there; one rank calls
    it.

    Args:
        config: resolved.
        run_dir: its folder.
        store: of its checkpoints.
        device: type of the ranks' devices.

    Returns:
        The configuration with the dtype of the run.

    Raises:
        ValueError: the folder or the checkpoints are of another run, or the store is no place to
            write to.
        OSError: one of them can't be written.
    """
    run_dir.mkdir(parents=True, exist_ok=True)
    for folder in (run_dir, run_dir / "epoch-weights"):
        remove_leftovers(folder, older_than_seconds=3600)  # another process may be writing
    saved, run_file = run_dir / "config.json", run_dir / "run.json"
    record = read_json(run_file) if run_file.exists() else {}
    check_writable(store)
    folder = config.checkpoint.folder
    if folder and "://" not in folder:
        folder = str(Path(folder).absolute())
    folder_before = record.get("checkpoint_folder", "")
    if record and folder_before != folder:
        check_not_left_behind(store, folder_before or str(run_dir / "checkpoints"), run_dir)
    before = None
    if list_checkpoints(store):
        if not saved.exists():
            raise ValueError(
                f"checkpoint.folder {store.location()} has checkpoints and run_dir {run_dir} no "
                "config.json: they are of another run; give another folder, or that run's run_dir"
            )
        before = load_run_config(saved)
    if config.engine.dtype == "auto":
        dtype = before.engine.dtype if before else native_dtype(gpu=device == "cuda")
        config = dataclasses.replace(config, engine=dataclasses.replace(config.engine, dtype=dtype))
    if before:
        check_same_run(before, config)
    save_config(config, saved)
    commits = [*record.get("git_commits", []), git_commit()]
    code = [*record.get("code", []), save_code(run_dir)]
    write_json(
        run_file,
        record | {"git_commits": commits, "code": code, "checkpoint_folder": folder},
    )
    return config
