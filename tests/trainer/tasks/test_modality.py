"""A run of one modality, from its first step to its scores: it takes nothing of the other."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from rich.console import Console
from starts import Start
from tiny_run import losses, save_untrained, save_untrained_classifier, tiny_finetuning, tiny_run

from cavmae import cli
from cavmae.dataloaders.config import DataConfig
from cavmae.dataloaders.constants import Modalities
from cavmae.dataloaders.packing.pack import PackConfig, pack
from cavmae.dataloaders.shards.shard_set import ShardSet
from cavmae.trainer.config.configs import (
    ClassifierConfig,
    FinetuneConfig,
    LossConfig,
    PretrainConfig,
    RunConfig,
)
from cavmae.trainer.cost_model.activations import trace_activations
from cavmae.trainer.evaluation.classify import modes_to_score
from cavmae.trainer.evaluation.clip_outputs import embed
from cavmae.trainer.evaluation.trained_run import open_trained

RECONSTRUCTION = LossConfig(contrastive_weight=0.0)
TIERS = {"audio": "audio", "video": "frames"}


@pytest.fixture(scope="module")
def alone(packed_synthetic: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The clips of `packed_synthetic`, their sound and their pictures alone: tiers by modality."""
    folder = tmp_path_factory.mktemp("alone")
    videos = str(packed_synthetic.parent / "videos" / "clips.csv")
    same: dict[str, Any] = {"clips_per_shard": 8, "workers": 1}
    for modality, tier in TIERS.items():
        config = PackConfig(videos, str(folder / modality), modality, tiers=tier, **same)  # pyright: ignore[reportArgumentType]
        pack(config, Console(quiet=True))
    return {modality: folder / modality / tier for modality, tier in TIERS.items()}


def of_one(config: RunConfig, modality: Modalities, **data: str) -> dict[str, Any]:
    """Changes that make a run of both one of one modality."""
    return {"data": dataclasses.replace(config.data, modality=modality, **data)}


@pytest.mark.parametrize("modality", ["audio", "video"])
def test_a_model_learns_to_reconstruct_one_modality_and_resumes_bit_for_bit(
    packed_synthetic: Path, alone: dict[str, Path], tmp_path: Path, modality: Modalities
) -> None:
    """Of a set that has it alone, and of a set of both: the same losses."""
    tier = str(alone[modality])
    both = tiny_run(packed_synthetic, tmp_path / "both", steps=12, loss=RECONSTRUCTION)
    both = dataclasses.replace(both, **of_one(both, modality))
    one = dataclasses.replace(
        both,
        run_dir=str(tmp_path / "one"),
        **of_one(both, modality, train=tier, validation=tier),
    )
    log = Start(one, 1, tmp_path).finish()
    assert f"masked reconstruction of {modality}" in log
    scores = json.loads((tmp_path / "one" / "summary.json").read_text())["scores"]
    name = f"val_loss_reconstruction_{modality}"
    assert scores == {"val_loss": scores[name], name: scores[name]}
    assert [path.name for path in (tmp_path / "one" / "figures").iterdir()] == [
        "reconstruction-step-000000012.png"
    ]
    if modality == "audio":
        Start(dataclasses.replace(both, steps=10), 1, tmp_path).finish()
    Start(both, 1, tmp_path).finish()
    assert losses(tmp_path / "both") == losses(tmp_path / "one")
    assert losses(tmp_path / "one")[-1] < losses(tmp_path / "one")[0]
    before = open_trained(tmp_path / "one").untrained_model(torch.device("cpu")).state_dict()
    weights = torch.load(tmp_path / "one" / "weights.pt", weights_only=True)
    own, other = ("_a", "_v") if modality == "audio" else ("_v", "_a")
    moved = {key.split(".")[0] for key in weights if not torch.equal(weights[key], before[key])}
    assert not any(owner.endswith(other) for owner in moved)
    assert {f"blocks{own}", f"norm{own}", "blocks_u", f"decoder_pred{own}", "mask_token"} <= moved


def test_a_classifier_of_sound_alone_is_trained_and_scored_on_sounds(
    packed_synthetic: Path, alone: dict[str, Path], tmp_path: Path
) -> None:
    config = tiny_finetuning(
        packed_synthetic,
        tmp_path / "run",
        steps=4,
        data=DataConfig(
            train=str(alone["audio"]), validation=str(alone["audio"]), reader_workers=1
        ),
        classifier=ClassifierConfig(mode="audioonly", loss="cross_entropy"),
    )
    Start(config, 1, tmp_path).finish()
    scores = json.loads((tmp_path / "run" / "summary.json").read_text())["scores"]
    assert 0 <= scores["val_accuracy"] <= 1


# ----------------------------------------------------------------------------------- configuration


def test_contrast_of_one_modality_is_refused() -> None:
    with pytest.raises(ValueError, match=r"which needs pairs .* set loss.contrastive_weight to 0"):
        PretrainConfig(data=DataConfig(modality="audio"))


def test_the_mode_of_a_classifier_decides_what_is_read(tmp_path: Path) -> None:
    for mode, modality in (("multimodal", "both"), ("audioonly", "audio"), ("videoonly", "video")):
        config = FinetuneConfig(classifier=ClassifierConfig(mode=mode))  # pyright: ignore[reportArgumentType]
        assert config.data.modality == modality
    with pytest.raises(ValueError, match=r"set data\.modality to video"):
        FinetuneConfig(
            data=DataConfig(modality="audio"), classifier=ClassifierConfig(mode="videoonly")
        )


def test_memory_is_predicted_of_the_modality_that_is_computed() -> None:
    run = tiny_run(Path("set"), Path("run"), loss=RECONSTRUCTION)
    peaks = {}
    for modality in ("both", "audio", "video"):
        config = dataclasses.replace(run, **of_one(run, modality))  # pyright: ignore[reportArgumentType]
        peaks[modality] = trace_activations(config).peak(8, gradients_stay=True)
    assert 0 < max(peaks["audio"], peaks["video"]) < peaks["both"]


# ------------------------------------------------------------------------------------- trained runs


@pytest.fixture(scope="module")
def sound_run(packed_synthetic: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of sound alone, with random weights."""
    folder = tmp_path_factory.mktemp("sound") / "run"
    run = tiny_run(packed_synthetic, folder)
    save_untrained(packed_synthetic, folder, loss=RECONSTRUCTION, **of_one(run, "audio"))
    return folder


def error_of(capsys: pytest.CaptureFixture[str], *words: object) -> str:
    assert cli.main([str(word) for word in words]) == 1
    return capsys.readouterr().err.strip().splitlines()[-1]


@pytest.mark.parametrize("tier", ["audio", "both"])
def test_sounds_are_embedded_of_sets_with_and_without_pictures(
    sound_run: Path, packed_synthetic: Path, alone: dict[str, Path], tmp_path: Path, tier: str
) -> None:
    shards = alone["audio"] if tier == "audio" else packed_synthetic / "frames"
    assert cli.main(["embed", str(sound_run), str(shards), "--out", str(tmp_path / "out")]) == 0
    files = sorted((tmp_path / "out").glob("*.parquet"))
    table = pa.concat_tables([pq.read_table(file) for file in files])
    assert not {"video_embedding", "frame_seconds"} & set(table.schema.names)
    run = open_trained(sound_run)
    whole = str(packed_synthetic / "frames")
    expected = embed(run.model(torch.device("cpu")), run.config, whole, clips=0, batch=8)
    found = np.array(table["audio_embedding"].to_pylist(), dtype=np.float32)
    np.testing.assert_allclose(found, expected.values["audio"].numpy(), rtol=1e-5, atol=1e-6)
    assert set(table["seconds"].to_pylist()) == {2.048}
    description = json.loads((tmp_path / "out" / "embeddings.json").read_text())
    assert description["modality"] == "audio"


def test_what_needs_both_says_why_it_can_not_be_done(
    sound_run: Path,
    packed_synthetic: Path,
    alone: dict[str, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    both = packed_synthetic / "frames"
    save_untrained(packed_synthetic, tmp_path / "run")
    evaluate = ("evaluate", "retrieve")
    assert "trained on audio alone" in error_of(capsys, *evaluate, sound_run, both)
    assert "has no pictures" in error_of(capsys, *evaluate, tmp_path / "run", alone["audio"])
    probe = ("evaluate", "probe")
    assert "pass --features audio" in error_of(capsys, *probe, sound_run, both, alone["audio"])
    lacking = (tmp_path / "run", alone["video"], alone["video"], "--features", "audio")
    assert "pass --features video" in error_of(capsys, *probe, *lacking)
    assert "has no sound" in error_of(
        capsys, "embed", sound_run, alone["video"], "--out", tmp_path / "x"
    )
    words = ("reconstruct", sound_run, alone["audio"], tmp_path / "figures")
    assert "trained on audio alone" in error_of(capsys, *words)
    assert cli.main(["embed", str(sound_run), str(both), "--out", str(tmp_path / "e")]) == 0
    assert "which has audio_embedding alone" in error_of(capsys, "search", tmp_path / "e", "x")


def test_a_probe_of_sound_learns_from_sounds(
    sound_run: Path, packed_synthetic: Path, alone: dict[str, Path], tmp_path: Path
) -> None:
    def probe(tier: Path) -> dict[str, Any]:
        out = tmp_path / f"{tier.name}.json"
        words = ["--features=audio", "--allow-leakage", f"--out={out}"]
        assert cli.main(["evaluate", "probe", str(sound_run), str(tier), str(tier), *words]) == 0
        return json.loads(out.read_text())["scores"]

    assert probe(alone["audio"]) == probe(packed_synthetic / "frames")


def test_a_classifier_of_both_is_scored_in_the_modes_that_a_set_can_serve(
    packed_synthetic: Path, alone: dict[str, Path], tmp_path: Path
) -> None:
    run = save_untrained_classifier(packed_synthetic, tmp_path / "run")
    sets = {name: ShardSet(tier) for name, tier in alone.items()}
    assert modes_to_score("", run, sets["audio"]) == ("audioonly", "missingaudioonly")
    assert modes_to_score("missingvideoonly", run, sets["video"]) == ("missingvideoonly",)
    with pytest.raises(ValueError, match="pass --modes audioonly,missingaudioonly"):
        modes_to_score("multimodal", run, sets["audio"])
    of_video = FinetuneConfig(classifier=ClassifierConfig(mode="videoonly"))
    for asked in ("", "videoonly"):
        with pytest.raises(ValueError, match=r"has no pictures.* or a run that takes audio"):
            modes_to_score(asked, of_video, sets["audio"])
    words = ["--resamples=0", "--allow-leakage", "--allow-empty-classes"]
    words.append(f"--out={tmp_path / 'result.json'}")
    command = ["evaluate", "classify", str(tmp_path / "run")]
    assert cli.main([*command, str(alone["audio"]), *words]) == 0
    heard = json.loads((tmp_path / "result.json").read_text())["modes"]
    assert cli.main([*command, str(packed_synthetic / "frames"), *words]) == 0
    modes = json.loads((tmp_path / "result.json").read_text())["modes"]
    assert heard == {mode: modes[mode] for mode in ("audioonly", "missingaudioonly")}


def test_clips_of_sets_of_other_modalities_are_not_known_to_be_others(sound_run: Path) -> None:
    training = open_trained(sound_run).training
    assert training.leakage("both") == "none"
    assert training.leakage("audio").startswith("unknown of ")
