"""The demo: small but whole, and honest about what it shows."""

import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch
import tyro
from launch import ROOT

from cavmae import cli
from cavmae.atomic_write import read_json, write_json
from cavmae.cluster.local import demo_full
from cavmae.cluster.local.demo import DIRECTIONS, Demo, DemoConfig, main, next_commands, show
from cavmae.command import exit_code
from cavmae.console import plain_console


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


@pytest.mark.slow
def test_the_last_lines_are_commands_on_what_the_demo_has_made(demo: tuple[Path, str]) -> None:
    folder, text = demo
    for line in text.splitlines()[-3:]:
        program, _, *words = shlex.split(line)
        made = words[: words.index("--out")] if "--out" in words else words
        for word in (program, *(one for one in made if one.startswith("/"))):
            # The second command makes the embeddings that the third one reads.
            assert Path(word).exists() or Path(word) == folder / "embeddings"


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


class Parsed(BaseException):
    """Ends a command once its arguments are understood."""


def test_the_commands_to_go_on_with_exist_and_take_their_arguments(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parse = tyro.cli

    def only_parse(*arguments: Any, **options: Any) -> NoReturn:
        raise Parsed(parse(*arguments, **options))

    monkeypatch.setattr(tyro, "cli", only_parse)
    (shards := tmp_path / "shards" / "unseen" / "video").mkdir(parents=True)
    (shards / "index.json").write_text("{}")  # embed asks whether it is a packed set
    commands = next_commands(tmp_path)
    assert [words[0] for words in commands] == ["explore", "embed", "search"]
    for words in commands:
        with pytest.raises(Parsed):
            cli.main(words)


@pytest.mark.field
def test_the_commands_to_go_on_with_can_be_pasted_from_a_folder_with_odd_characters(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In their full length: not cut, wrapped, coloured or read as markup by the console."""
    (folder := tmp_path / "it's [bold] a $HOME demo" / ("long " * 40)).mkdir(parents=True)
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.chdir(folder)
    recall = {"": 0.9, "_low": 0.8, "_high": 1.0, "_chance": 0.05, "_p_value": 0.0}
    scores = {
        f"val_{direction}_{name}": value
        for direction in DIRECTIONS
        for name, value in {
            **{f"r{k}{part}": value for k in (1, 5, 10) for part, value in recall.items()},
            **{"median_rank": 1.0, "chance_median_rank": 50.5},
        }.items()
    }
    assert show(Demo(DemoConfig(), Path("runs"), plain_console()), scores, scores) == 0
    lines = capsys.readouterr().out.splitlines()[-3:]
    program = str(Path(sys.executable).parent / "cavmae")
    assert [shlex.split(line) for line in lines] == [
        [program, *words] for words in next_commands(folder / "runs")
    ]


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
