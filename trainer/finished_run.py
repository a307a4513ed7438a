"""A run that has come to its end, as everything that uses its weights opens it."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from cavmae.dataloaders.shards import ShardSet
from cavmae.trainer.config import PretrainConfig
from cavmae.trainer.finetune_config import FinetuneConfig
from cavmae.trainer.labels import LabelSet, read_labels
from cavmae.trainer.model.cavmae import CAVMAE
from cavmae.trainer.model.classifier import CAVMAEClassifier
from cavmae.trainer.model.weights import load_classifier_weights, load_published
from cavmae.trainer.run_folder import git_commit, load_run_config, save_code, write_json


@dataclass(frozen=True)
class FinishedRun:
    """Attributes: folder; config; weights_sha256, of `weights.pt`, in hexadecimal."""

    folder: Path
    config: PretrainConfig
    weights_sha256: str

    def model(self, device: torch.device) -> CAVMAE:
        """The trained model in float32, set to evaluate."""
        model = CAVMAE(self.config.model)
        load_published(model, self.folder / "weights.pt")
        return model.to(device).eval()

    def untrained_model(self, device: torch.device) -> CAVMAE:
        """The same model with the random weights that its run would begin with."""
        torch.manual_seed(self.config.seed)
        return CAVMAE(self.config.model).to(device).eval()


@dataclass(frozen=True)
class FinishedClassifier:
    """Attributes: folder; config; labels; weights_sha256, of `weights.pt`, in hexadecimal."""

    folder: Path
    config: FinetuneConfig
    labels: LabelSet
    weights_sha256: str

    def model(self, device: torch.device) -> CAVMAEClassifier:
        """The trained classifier in float32, set to evaluate."""
        model = CAVMAEClassifier(self.config.model, len(self.labels))
        load_classifier_weights(model, self.folder / "weights.pt")
        return model.to(device).eval()


def write_evaluation(
    run: FinishedRun, out: str, kind: str, shards: ShardSet, result: Mapping[str, Any]
) -> Path:
    """Write a result with what it rests on: weights, clips and code; returns the file.

    Args:
        run: that was scored.
        out: JSON file; empty: in `evaluation` of the run folder.
        kind: of evaluation, for the file's name.
        shards: that it was scored on.
        result: JSON values.
    """
    path = Path(out or run.folder / "evaluation" / f"{kind}-{shards.fingerprint[:8]}.json")
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, {**result, **rests_on(run, shards)})
    return path


def rests_on(run: FinishedRun, shards: ShardSet) -> dict[str, Any]:
    """Weights, clips and code of a result; the code is kept in the run folder."""
    return {
        "shards_fingerprint": shards.fingerprint,
        "weights_sha256": run.weights_sha256,
        "code": save_code(run.folder),
        "git_commit": git_commit(),
    }


def open_finished_run(run_dir: str | Path) -> FinishedRun:
    """Open the folder of a pretraining run.

    Raises:
        ValueError: the folder is no run's, or of another kind, or the run has not finished.
        OSError: a file can't be read.
    """
    run = open_finished(run_dir)
    if isinstance(run, FinishedClassifier):
        raise ValueError(
            f"run_dir is {run_dir}, a fine-tuning run; give the folder of a pretraining run"
        )
    return run


def open_finished(run_dir: str | Path) -> FinishedRun | FinishedClassifier:
    """Open the folder of a run of any kind.

    Raises:
        ValueError: the folder is no run's, or the run has not finished.
        OSError: a file can't be read.
    """
    folder = Path(run_dir)
    if not (folder / "config.json").is_file():
        raise ValueError(f"run_dir is {folder}, which has no config.json; give the folder of a run")
    config = load_run_config(folder / "config.json")
    if not (folder / "weights.pt").is_file():
        raise ValueError(
            f"run_dir is {folder}, whose run has not finished: it has no weights.pt; let it train "
            "to its end (the command that started it goes on)"
        )
    with (folder / "weights.pt").open("rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    if isinstance(config, FinetuneConfig):
        return FinishedClassifier(folder, config, read_labels(folder / "labels.csv"), sha256)
    assert isinstance(config, PretrainConfig)
    return FinishedRun(folder, config, sha256)
