"""A trained run, as everything that uses its weights opens it."""

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from cavmae.atomic_write import write_json
from cavmae.dataloaders.constants import Modalities
from cavmae.dataloaders.shards.shard_set import ShardSet
from cavmae.trainer.config.configs import FinetuneConfig, PretrainConfig
from cavmae.trainer.config.serialize import load_run_config
from cavmae.trainer.model.cavmae import CAVMAE
from cavmae.trainer.model.classifier import CAVMAEClassifier
from cavmae.trainer.model.weights import load_classifier_weights, load_published
from cavmae.trainer.tasks.labels import LabelSet, read_labels
from cavmae.trainer.tracking.code_snapshot import git_commit, save_code
from cavmae.trainer.trained_on import TrainedOn

_NOT_IN_NAME = ("run_dir", "shards", "test", "out", "batch", "allow_leakage", "json")
"""Options that no score depends on, or that a result's name has already."""
SAME_SET, OTHER_SET = "the one that was trained on", "not the one that was trained on"


@dataclass(frozen=True)
class TrainedRun:
    """A pretrained run. Attributes: folder; config; weights_sha256, hexadecimal of `weights.pt`;
    training, what they were trained on."""

    folder: Path
    config: PretrainConfig
    weights_sha256: str
    training: TrainedOn

    def model(self, device: torch.device) -> CAVMAE:
        """Load the trained model in float32, set to evaluate."""
        model = CAVMAE(self.config.model)
        load_published(model, self.folder / "weights.pt")
        return model.to(device).eval()

    def untrained_model(self, device: torch.device) -> CAVMAE:
        """Build the same model with the random weights that its run would begin with."""
        torch.manual_seed(self.config.seed)
        return CAVMAE(self.config.model).to(device).eval()


@dataclass(frozen=True)
class TrainedClassifier:
    """A fine-tuned run. Attributes: as of `TrainedRun`; labels."""

    folder: Path
    config: FinetuneConfig
    labels: LabelSet
    weights_sha256: str
    training: TrainedOn

    def model(self, device: torch.device) -> CAVMAEClassifier:
        """Load the trained classifier in float32, set to evaluate.

        Raises:
            ValueError: weights of another architecture, of other classes, or without a classifier.
        """
        model = CAVMAEClassifier(self.config.model, len(self.labels))
        weights = self.folder / "weights.pt"
        untrained = load_classifier_weights(model, weights)
        if untrained:
            raise ValueError(
                f"{weights} has no classifier ({', '.join(untrained)}), so it comes from a "
                "pretraining run; put back the weights.pt of the fine-tuning"
            )
        return model.to(device).eval()

    def untrained_model(self, device: torch.device) -> CAVMAEClassifier:
        """Build the same model with random weights."""
        torch.manual_seed(self.config.seed)
        return CAVMAEClassifier(self.config.model, len(self.labels)).to(device).eval()


AnyRun = TrainedRun | TrainedClassifier


def train_sets_now(run: AnyRun) -> dict[str, str]:
    """Compare what lies at each folder of `data.train` now with what the run was trained on;
    URLs are not looked at."""
    trained = {one.fingerprint for one in run.training.sets}
    found = {}
    for folder in run.config.data.train_folders:
        if "://" in folder:
            continue
        try:
            fingerprint = ShardSet(folder).fingerprint
        except (OSError, ValueError):
            found[folder] = "not there, or not readable"
        else:
            found[folder] = SAME_SET if fingerprint in trained else OTHER_SET
    return found if trained else dict.fromkeys(found, "unknown")


def write_evaluation(
    run: AnyRun, config: Any, kind: str, shards: ShardSet, result: Mapping[str, Any]
) -> Path:
    """Write a result with the options, weights, clips and code that it depends on; returns the
    file.

    Args:
        run: that was scored.
        config: the command's fields, among them `out`: a JSON file; empty: in `evaluation` of the
            run folder, with a hash of the other fields in its name.
        kind: of evaluation, for the file's name.
        shards: that it was scored on.
        result: JSON values.
    """
    options = dataclasses.asdict(config)
    named = {name: value for name, value in options.items() if name not in _NOT_IN_NAME}
    digest = hashlib.sha256(json.dumps(named, sort_keys=True).encode()).hexdigest()
    name = f"{kind}-{shards.fingerprint[:8]}-{digest[:6]}.json"
    path = Path(config.out or run.folder / "evaluation" / name)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, {"options": options, **result, **provenance(run, shards)})
    return path


def provenance(run: AnyRun, shards: ShardSet) -> dict[str, Any]:
    """Describe the weights, clips and code of a result; the code is kept in the run folder."""
    return {
        "shards_fingerprint": shards.fingerprint,
        "weights_sha256": run.weights_sha256,
        "trained_on": [dataclasses.asdict(one) for one in run.training.sets],
        "train_sets_now": train_sets_now(run),
        "code": _kept_code(run.folder),
        "git_commit": git_commit(),
    }


def _kept_code(folder: Path) -> str:
    try:
        return save_code(folder)
    except OSError as error:  # somebody else's run; the commit says it too
        return f"not kept: {error}"


def open_trained_run(run_dir: str | Path) -> TrainedRun:
    """Open the folder of a pretraining run.

    Raises:
        ValueError: the folder is no run's, or of another kind, or the run has not finished.
        OSError: a file can't be read.
    """
    run = open_trained(run_dir)
    if isinstance(run, TrainedClassifier):
        raise ValueError(
            f"run_dir is {run_dir}, a fine-tuning run; give the folder of a pretraining run"
        )
    return run


def open_trained_classifier(run_dir: str | Path) -> TrainedClassifier:
    """Open the folder of a fine-tuning run; raises as `open_trained_run` does."""
    run = open_trained(run_dir)
    if isinstance(run, TrainedRun):
        raise ValueError(
            f"run_dir is {run_dir}, a pretraining run, which has no classifier; give a run of "
            "`cavmae finetune` (`cavmae evaluate probe` scores frozen features)"
        )
    return run


def open_trained_pair(run_dir: str | Path) -> AnyRun:
    """Open a run of any kind that has trained encoders of sound and video; raises as
    `open_trained_run` does."""
    run = open_trained(run_dir)
    if run.config.data.modality != "both":
        raise ValueError(
            f"run_dir is {run_dir}, trained on {run.config.data.modality} alone, and sound is "
            "compared with pictures here; give a run of both"
        )
    return run


def embedded_modality(run: AnyRun, shards: ShardSet) -> Modalities:
    """Return what can be embedded of a set: what it has, of what the run was trained on.

    Raises:
        ValueError: there is nothing.
    """
    trained = run.config.data.modality
    if trained == "both":
        return shards.modality
    shards.check_has(trained, f"a run that was not trained on {trained} alone, as {run.folder} was")
    return trained


def open_trained(run_dir: str | Path) -> AnyRun:
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
            "to its end (the command that started it resumes it)"
        )
    with (folder / "weights.pt").open("rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    training = TrainedOn.beside(folder)
    if isinstance(config, FinetuneConfig):
        labels = read_labels(folder / "labels.csv")
        return TrainedClassifier(folder, config, labels, sha256, training)
    assert isinstance(config, PretrainConfig)
    return TrainedRun(folder, config, sha256, training)
