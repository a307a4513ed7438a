"""Fine-tuning is a run like pretraining: the same steps whoever takes them, and what is its own."""

import dataclasses
import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import pytest
import torch
import torch.distributed as dist
from launch import ROOT
from starts import Start
from tiny_run import losses, save_untrained, tiny_finetuning, tiny_run

from cavmae.dataloaders.batch import AudioVideoBatch
from cavmae.dataloaders.config import Augmentation
from cavmae.trainer.checkpoint.format import MANIFEST
from cavmae.trainer.checkpoint.weight_average import EpochWeights
from cavmae.trainer.config.configs import (
    ClassifierConfig,
    EngineConfig,
    FinetuneConfig,
    ValidationConfig,
)
from cavmae.trainer.config.serialize import save_config
from cavmae.trainer.distributed.engine import Engine
from cavmae.trainer.distributed.env import Ranks
from cavmae.trainer.tasks.finetune import FinetuneTask
from cavmae.trainer.tasks.labels import LabelSet, label_counts
from cavmae.trainer.tracking.metrics_file import read_metrics

CONFIG = FinetuneConfig(
    global_batch=2, micro_batch=2, lanes=2, classifier=ClassifierConfig(loss="cross_entropy")
)
LABELS = LabelSet(("dog", "bell", "rain", "car"), ("Dog", "Bell", "Rain", "Car"))


class FixedLogits:
    """Answers like an engine, with logits that are given."""

    def __init__(self, logits: torch.Tensor) -> None:
        self.logits = logits

    def __call__(self, log_mel: torch.Tensor, frame: torch.Tensor, mode: str) -> "FixedLogits":
        return self


def batch(**fields: Any) -> AudioVideoBatch:
    return AudioVideoBatch(
        log_mel=torch.zeros(2, 16, 16),
        frames=torch.zeros(2, 1, 3, 16, 16),
        positions=torch.arange(2),
        epochs=torch.zeros(2, dtype=torch.int64),
        sample_ids=("a", "b"),
        frame_seconds=torch.zeros(2, 1),
        audio_seconds=torch.zeros(2, 2),
        **fields,
    )


def test_a_mixed_clip_is_taught_both_of_its_labels_by_their_shares() -> None:
    """The published targets, by hand: 0.1 smoothed over 4 classes, one clip mixed 0.7 to 0.3."""
    mixed = batch(
        labels=(("dog",), ("bell",)),
        mixup_lambda=torch.tensor([1.0, 0.7]),
        mixed_labels=((), ("rain", "car")),
    )
    task = FinetuneTask(CONFIG, LABELS, Ranks(0, 1, 0, 1), torch.device("cpu"))
    logits = torch.tensor([[1.0, 2.0, 3.0, 4.0], [0.0, 1.0, 0.0, -1.0]])
    targets = torch.tensor([[0.9, 0.025, 0.025, 0.025], [0.025, 0.655, 0.295, 0.295]])
    expected = -(targets * logits.log_softmax(1)).sum(1).mean()
    task.begin_step(None, [mixed])  # pyright: ignore[reportArgumentType]
    loss = task.loss(FixedLogits(logits), mixed)  # pyright: ignore[reportArgumentType]
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(task.metrics()["loss"], expected)


def test_epochs_end_where_their_steps_do_and_the_last_with_the_run(tmp_path: Path) -> None:
    kept = EpochWeights(tmp_path, first_epoch=2, steps=10, steps_per_epoch=3.0)
    assert kept._ends == {6: 2, 9: 3, 10: 4}
    assert not EpochWeights(tmp_path, first_epoch=0, steps=10, steps_per_epoch=3.0)
    with pytest.raises(ValueError, match="average_from_epoch is 5 and the run has 4 epochs"):
        EpochWeights(tmp_path, first_epoch=5, steps=10, steps_per_epoch=3.0)
    short = EpochWeights(tmp_path, first_epoch=1, steps=2, steps_per_epoch=0.4)
    assert short._ends == {1: 3, 2: 5}, "several epochs may end in one step"


@pytest.fixture
def alone(tmp_path: Path) -> Iterator[None]:
    """This process as the only rank."""
    method = f"file://{tmp_path}/ranks"
    dist.init_process_group("gloo", init_method=method, rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_weights_of_an_epoch_that_a_power_cut_took_are_named(tmp_path: Path, alone: None) -> None:
    kept = EpochWeights(tmp_path, first_epoch=1, steps=4, steps_per_epoch=2.0)
    torch.save({"w": torch.tensor([1.0])}, tmp_path / "epoch-0001.pt")
    torch.save({"w": torch.tensor([2.0])}, tmp_path / "epoch-0002.pt")
    assert kept.mean()["w"].tolist() == [1.5]
    for damage in (b"", (tmp_path / "epoch-0002.pt").read_bytes()[:-50]):
        (tmp_path / "epoch-0002.pt").write_bytes(damage)
        with pytest.raises(ValueError, match=r"end of epoch 2.*remove the checkpoints from step 4"):
            kept.mean()


class FixedWeights:
    """The part of an engine whose weights are kept."""

    def __init__(self) -> None:
        self.value = 0.0

    def full_state_dict(self) -> dict[str, torch.Tensor]:
        return {"w": torch.tensor([self.value])}


@pytest.mark.parametrize("full", ["mkdir", "torch.save"])
def test_weights_of_epochs_wait_in_memory_until_a_full_disk_has_room(
    tmp_path: Path,
    alone: None,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    full: str,
) -> None:
    """torch.save reports a full disk as `unexpected pos 64 vs 0`."""

    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("unexpected pos 64 vs 0") if full == "torch.save" else OSError("full")

    kept = EpochWeights(tmp_path / "epochs", first_epoch=1, steps=6, steps_per_epoch=2.0)
    engine = FixedWeights()
    with monkeypatch.context() as patch:
        patch.setattr(full if full == "torch.save" else "pathlib.Path.mkdir", fail)
        for step in range(1, 6):
            engine.value = float(step)
            kept.keep(cast(Engine, engine), step)
        with pytest.raises(OSError, match=r"full|epoch-0001.pt could not be written: unexpected"):
            kept.write_waiting()
    assert caplog.text.count("ALARM: the weights at the end of epoch") == 2
    engine.value = 6.0
    kept.keep(cast(Engine, engine), 6)
    kept.write_waiting()
    assert kept.mean()["w"].tolist() == [4.0]


def test_validation_clips_of_one_class_do_not_end_a_run(alone: None) -> None:
    """As where a set is sorted by class and only its first clips are scored."""
    task = FinetuneTask(CONFIG, LABELS, Ranks(0, 1, 0, 1), torch.device("cpu"))
    same = batch(labels=(("dog",), ("dog",)), mixup_lambda=torch.ones(2), mixed_labels=((), ()))
    model = FixedLogits(torch.tensor([[2.0, 0.0, 0.0, 0.0], [2.0, 0.0, 0.0, 0.0]]))
    scored = task.validate(model, [same])  # pyright: ignore[reportArgumentType]
    loss = 4 * [0.0]
    loss[0] = 2.0
    expected = -torch.tensor(loss).log_softmax(0)[0].item()
    assert scored.metrics == {"val_loss": pytest.approx(expected)}


# ------------------------------------------------------------------------------- whole runs


@pytest.fixture(scope="module")
def pretrained(packed_synthetic: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pretrained") / "run"
    save_untrained(packed_synthetic, folder)
    return folder / "weights.pt"


def published_way(
    shards: Path, run_dir: Path, pretrained: Path, val_shards: Path
) -> FinetuneConfig:
    """All that the published recipe has: mixed clips, masks, noise, weights of epochs averaged."""
    config = tiny_finetuning(shards, run_dir, initial_weights=str(pretrained))
    names = tuple(sorted(label_counts([str(shards / "frames"), str(val_shards / "frames")]) or {}))
    labels = run_dir.with_name("labels.csv")
    labels.write_text(LabelSet(names, names).as_csv())
    return dataclasses.replace(
        config,
        classifier=dataclasses.replace(
            config.classifier, labels=str(labels), allow_empty_classes=True
        ),
        average_from_epoch=5,
        data=dataclasses.replace(
            config.data,
            sampling="weighted",
            validation=str(val_shards / "frames"),
            augmentation=Augmentation(frequency_mask=8, time_mask=20, noise=True, mixup_prob=0.5),
        ),
        validation=ValidationConfig(every_steps=10),
    )


@pytest.mark.slow
def test_a_killed_fine_tuning_ends_as_one_that_was_not_whatever_its_ranks(
    packed_synthetic: Path, pretrained: Path, val_shards: Path, tmp_path: Path
) -> None:
    (tmp_path / "one").mkdir()
    straight = published_way(packed_synthetic, tmp_path / "one/run", pretrained, val_shards)
    log = Start(straight, 1, tmp_path / "one").finish()
    assert "classes, multimodal, cross_entropy" in log

    (tmp_path / "two").mkdir()
    config = published_way(packed_synthetic, tmp_path / "two/run", pretrained, val_shards)
    killed = Start(config, 2, tmp_path / "two")
    killed.signal_after(signal.SIGKILL, tmp_path / "two/run/checkpoints/step-000000010" / MANIFEST)
    for process in killed.processes:
        process.wait(timeout=60)
    # With one rank less, so through a universal checkpoint of two groups of parameters.
    assert "resuming from" in Start(config, 1, tmp_path / "two").finish()

    assert len(losses(tmp_path / "one/run")) == 20
    assert losses(tmp_path / "two/run") == pytest.approx(losses(tmp_path / "one/run"), rel=1e-5)
    ours, theirs = (torch.load(tmp_path / name / "run/weights.pt") for name in ("two", "one"))
    assert ours.keys() == theirs.keys()
    for name in ours:
        mine, other = ours[name], theirs[name]
        if name.endswith("attn.qkv.bias"):
            # A key's bias moves all of a query's scores alike, so its gradient is zero but for
            # rounding, which Adam makes a step of like any other.
            mine, other = (bias.unflatten(0, (3, -1))[[0, 2]] for bias in (mine, other))
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-6)
    scores = [
        json.loads((tmp_path / name / "run/summary.json").read_text())["scores"]
        for name in ("two", "one")
    ]
    assert scores[0] == pytest.approx(scores[1], rel=1e-4)
    assert "val_mean_average_precision" in scores[0]
    noted = read_metrics(tmp_path / "one/run/metrics.jsonl")
    (averaged,) = [one["averaged_loss"] for one in noted if "averaged_loss" in one]
    assert averaged == scores[1]["val_loss"], "the summary has the scores of the mean"
    last = [one["val_loss"] for one in noted if "val_loss" in one][-1]
    assert averaged != last, "the last weights have others"

    epochs = [torch.load(path) for path in sorted((tmp_path / "one/run").glob("epoch-weights/*"))]
    assert len(epochs) == 3, "of the epochs 5, 6 and the part of the 7th that 20 steps have"
    for name in theirs:
        mean = torch.stack([epoch[name] for epoch in epochs]).double().mean(0).float()
        torch.testing.assert_close(theirs[name], mean)
    moved = [name for name in theirs if not torch.equal(epochs[0][name], epochs[-1][name])]
    assert moved, "the epochs differ"


@pytest.mark.long
@pytest.mark.slow
def test_a_linear_probe_on_ray_trains_the_head_alone_and_other_work_is_refused(
    packed_synthetic: Path, pretrained: Path, tmp_path: Path
) -> None:
    config = tiny_finetuning(
        packed_synthetic,
        tmp_path / "run",
        initial_weights=str(pretrained),
        steps=6,
        engine=EngineConfig(zero_stage=2, dtype="fp32"),
        classifier=ClassifierConfig(train_encoders=False, head_lr_mult=10.0),
    )
    save_config(config, tmp_path / "config.json")
    done = subprocess.run(
        [sys.executable, "-m", "cavmae.cluster.train", str(tmp_path / "config.json")],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-5000:]
    before, after = torch.load(pretrained), torch.load(tmp_path / "run/weights.pt")
    shared = before.keys() & after.keys()
    assert shared and all(torch.equal(before[name], after[name]) for name in shared)
    assert losses(tmp_path / "run")[-1] < losses(tmp_path / "run")[0]

    other = Start(tiny_run(packed_synthetic, tmp_path / "run"), 1, tmp_path)
    assert [process.wait(timeout=120) for process in other.processes] == [1]
    assert "was started with a FinetuneConfig" in other.log.read_text()
