"""The demo: small but whole, and honest about what it shows."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from launch import ROOT

from cavmae.atomic_write import read_json, write_json
from cavmae.cluster.local import demo_full
from cavmae.cluster.local.demo import DemoConfig, main
from cavmae.command import exit_code


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """Folder and output of a demo of a ninth of the clips and an eighth of the steps."""
    folder = tmp_path_factory.mktemp("demo")
    done = run_demo(folder)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder, done.stdout


def words_of(folder: Path) -> list[str]:
    return ["--folder", str(folder), "--clips", "320", "--unseen-clips", "100", "--steps", "80"]


def run_demo(folder: Path, command: str = "demo", *more: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, "-m", "cavmae", command, *words_of(folder), *more],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=550,
    )


@pytest.mark.slow
@pytest.mark.parametrize("direction", ["audio_to_video", "video_to_audio"])
def test_the_right_clip_is_found_far_more_often_than_by_chance(
    demo: tuple[Path, str], direction: str
) -> None:
    scores = read_json(demo[0] / "run/summary.json")["scores"]
    assert scores[f"val_{direction}_r10_chance"] == pytest.approx(0.1)
    assert scores[f"val_{direction}_r10"] >= 0.25
    assert scores[f"val_{direction}_r10_p_value"] < 1e-3


@pytest.mark.slow
def test_scores_are_shown_with_chance_and_with_what_they_do_not_show(
    demo: tuple[Path, str],
) -> None:
    text = " ".join(demo[1].split())
    for words in ("R@10", "95% CI", "chance", "untrained", "median rank"):
        assert words in text
    assert "no evidence about natural video" in text
    assert "differ from the published recipe" in text


@pytest.mark.slow
def test_everything_that_the_demo_names_exists(demo: tuple[Path, str]) -> None:
    folder, text = demo
    assert (folder / "run/weights.pt").exists()
    assert list((folder / "run/figures").glob("*.png"))
    assert f"sqlite:///{folder / 'mlflow.db'}" in text
    assert (folder / "mlflow.db").exists()


FULL = ("demo-full", "--finetune-epochs", "2")


@pytest.fixture(scope="module")
def full(demo: tuple[Path, str]) -> "subprocess.CompletedProcess[str]":
    """The full demo, which begins with `cavmae demo` on the finished demo."""
    return run_demo(demo[0], *FULL)


@pytest.mark.long
@pytest.mark.slow
def test_a_finished_demo_is_shown_again_without_training(
    demo: tuple[Path, str], full: "subprocess.CompletedProcess[str]"
) -> None:
    assert "Using the videos and shards in" in full.stdout
    assert "Training is already finished" in full.stdout
    table = demo[1][demo[1].index("Retrieval among") : demo[1].index("The videos are generated")]
    assert table in full.stdout


@pytest.mark.long
@pytest.mark.slow
def test_the_full_demo_runs_all_that_a_model_is_for(
    demo: tuple[Path, str], full: "subprocess.CompletedProcess[str]"
) -> None:
    """So short a training meets some margins and not others; every command has to work."""
    lines = {
        line["step"]: line["good"]
        for line in read_json(demo[0] / "results/demo-full.json")["lines"]
    }
    assert list(lines) == [
        *("pretrain", "fine-tune", "classify", "retrieve, video to audio", "linear probe"),
        *("reconstruct", "embed", "export", "search, sound finds video"),
    ]
    assert lines["embed"] and lines["export"]
    missed = [step for step, good in lines.items() if not good]
    assert full.returncode == bool(missed), full.stderr
    assert full.stderr.endswith(f"must be: {', '.join(missed)}\n" if missed else "")
    assert f"cavmae embed {demo[0]}/run" in full.stdout, "a command as a user would type it"


@pytest.mark.long
@pytest.mark.slow
def test_a_full_demo_repeats_what_was_made_of_other_weights(
    demo: tuple[Path, str],
    full: "subprocess.CompletedProcess[str]",
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """One search stands for all of them, to save time."""
    weights = torch.load(demo[0] / "classifier/weights.pt")
    torch.save(weights | {"norm.bias": weights["norm.bias"] + 1}, demo[0] / "classifier/weights.pt")
    start, started = demo_full._run, []

    def start_some(words: list[str]) -> None:
        started.append(words[0])
        if words[0] != "demo" and started.count("search") < 2:
            start(words)

    monkeypatch.setattr(demo_full, "_run", start_some)
    assert demo_full.main([*words_of(demo[0]), *FULL[1:]]) in (0, 1)
    kept = re.findall(r"already done: \S+/(\S+)", capsys.readouterr().out)
    assert kept == [
        *("classifier", "retrieve.json", "probe.json", "reconstructed", "embeddings", "exported")
    ]
    assert started == ["demo", "evaluate", *["search"] * demo_full.SEARCHES]


def test_a_folder_of_other_videos_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    note = {"clips": 3000, "unseen_clips": 200, "seed": 0, "shuffled_pairs": False}
    write_json(tmp_path / "demo.json", note)
    assert exit_code(main, ["--folder", str(tmp_path), "--shuffled-pairs"]) == 1
    error = capsys.readouterr().err
    assert '"shuffled_pairs": true' in error and "another --folder" in error


@pytest.mark.parametrize("fields", [{"clips": 100}, {"unseen_clips": 1}, {"workers": 0}])
def test_a_demo_too_small_to_mean_anything_is_refused(fields: dict[str, int]) -> None:
    (name,) = fields
    with pytest.raises(ValueError, match=f"{name} is|{name} {fields[name]}"):
        DemoConfig(**fields)  # pyright: ignore[reportArgumentType]
