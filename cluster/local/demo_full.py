"""`cavmae demo-full`: all that a pretrained model is for, one command after the other, on a CPU.

Each step is a command of its own, printed as a user would type it, and has to be better than chance
or than a model that was not trained, by the margin that the table states. What an earlier call has
finished is kept, unless it was made with other words or of other weights.
"""

import hashlib
import math
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro
from rich import box
from rich.console import Console
from rich.table import Table

from cavmae.cluster.local.demo import DemoConfig
from cavmae.command import exit_code
from cavmae.dataloaders.shards.shard_set import ShardSet
from cavmae.trainer.config.serialize import read_json, write_json

SEARCHES = 8
"""Sounds that are looked up. By chance a sound finds its video among ten of 200 once in 20 times:
half of eight by chance is less likely than 1 in 2,000."""
LARGEST_DEVIATION = 1e-4


@dataclass(frozen=True)
class DemoFullConfig:
    """Pretrain as `cavmae demo` does, then fine-tune, classify, retrieve, probe, reconstruct,
    embed, search and export, and compare each with chance. About 20 minutes on two CPU cores."""

    folder: str = "runs/demo"
    """Where everything goes; what `cavmae demo` left there is used."""
    clips: int = DemoConfig.clips
    """Videos to train on."""
    unseen_clips: int = DemoConfig.unseen_clips
    """Videos to score on."""
    steps: int = 0
    """Optimizer steps of pretraining; 0: as many as the recipe `demo` has."""
    finetune_epochs: float = 10.0
    """ActivationTimeline of fine-tuning over the videos."""


@dataclass(frozen=True)
class Line:
    """One line of the table.

    Attributes:
        step: what was done.
        score: what is judged, and its value.
        baseline: what it is compared with.
        good: whether the margin is met.
    """

    step: str
    score: str
    baseline: str
    good: bool


@dataclass(frozen=True)
class Step:
    """One command.

    Attributes:
        name: of the step.
        words: after `cavmae`.
        weights: what it is made of, if anything.
        out: file or folder that it makes, which is removed where it is made anew; None: the command
            itself keeps what is finished.
        judge: of what it left.
        goes_on: whether the command takes up what an interrupted start of it has left.
    """

    name: str
    words: list[str]
    weights: Path | None
    out: Path | None
    judge: Callable[[], Line]
    goes_on: bool = False

    def made_of(self) -> dict[str, Any]:
        """What its result depends on."""
        sha256 = ""
        if self.weights is not None:
            with self.weights.open("rb") as file:
                sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        return {"words": self.words, "weights_sha256": sha256}


def main(arguments: list[str]) -> int:
    """The command; returns 0 where every step is as much better as it must be, else 1."""
    config = tyro.cli(DemoFullConfig, prog="cavmae demo-full", args=arguments)
    console, folder = Console(soft_wrap=True, highlight=False), Path(config.folder)
    lines, seconds = [], {}
    for step in steps(config, folder):
        console.rule(step.name, align="left")
        console.print(f"cavmae {shlex.join(step.words)}", style="bold")
        note, made_of = folder / "notes" / f"{step.name}.json", step.made_of()
        noted = read_json(note) if note.exists() else {}
        same = noted.get("made_of") == made_of
        if same and noted["finished"] and step.out is not None:
            console.print(f"done by an earlier start: {step.out}")
        else:
            if step.out is not None and not (same and step.goes_on):
                _remove(step.out)
            note.parent.mkdir(parents=True, exist_ok=True)
            write_json(note, {"made_of": made_of, "finished": False})
            began = time.monotonic()
            _start(step.words)
            seconds[step.name] = time.monotonic() - began
            write_json(note, {"made_of": made_of, "finished": True})
        lines.append(step.judge())
    lines.append(_searched(folder, console, seconds))
    return _show(console, folder, lines, seconds)


def steps(config: DemoFullConfig, folder: Path) -> list[Step]:
    """The commands in their order, all but the searches."""
    run, classifier = folder / "run", folder / "classifier"
    train, unseen = (str(folder / "shards" / part / "video") for part in ("train", "unseen"))
    results = folder / "results"
    embeddings, exported = folder / "embeddings", folder / "exported"
    pictures = folder / "reconstructed"

    def result(name: str) -> Path:
        return results / f"{name}.json"

    demo = ["demo", "--folder", str(folder), "--steps", str(config.steps)]
    demo += ["--clips", str(config.clips), "--unseen-clips", str(config.unseen_clips)]
    finetune = ["finetune", "demo_finetune", "--run-dir", str(classifier)]
    finetune += ["--initial-weights", str(run / "weights.pt"), "--data.train", train]
    finetune += ["--data.validation", unseen, "--epochs", str(config.finetune_epochs)]
    of_classifier = ["evaluate", "classify", str(classifier), unseen, "--frames", "10"]
    of_classifier += ["--allow-empty-classes"]  # few unseen clips may lack one
    formats = ["--format", "hub", "torch", "onnx"]
    pretrained, finetuned = run / "weights.pt", classifier / "weights.pt"
    retrieve = ["evaluate", "retrieve", str(run), unseen, "--out", str(result("retrieve"))]
    probe = ["evaluate", "probe", str(run), train, unseen, "--out", str(result("probe"))]
    return [
        Step("pretrain", demo, None, None, lambda: _pretrained(run)),
        Step("fine-tune", finetune, pretrained, classifier, lambda: _finetuned(classifier), True),
        Step(
            "classify",
            [*of_classifier, "--out", str(result("classify"))],
            finetuned,
            result("classify"),
            lambda: _classified(result("classify"), classifier),
        ),
        Step(
            "retrieve",
            retrieve,
            pretrained,
            result("retrieve"),
            lambda: _retrieved(result("retrieve")),
        ),
        Step("probe", probe, pretrained, result("probe"), lambda: _probed(result("probe"))),
        Step(
            "reconstruct",
            ["reconstruct", str(run), unseen, str(pictures), "--clips", "16"],
            pretrained,
            pictures,
            lambda: _reconstructed(pictures / "reconstructions.json"),
        ),
        Step(
            "embed",
            ["embed", str(run), unseen, str(embeddings)],
            pretrained,
            embeddings,
            lambda: _embedded(embeddings / "embeddings.json", unseen),
            goes_on=True,
        ),
        Step(
            "export",
            ["export", str(run), str(exported), *formats],
            pretrained,
            exported,
            lambda: _exported(exported),
        ),
    ]


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _start(words: list[str]) -> None:
    """Run a command of the product and show what it says.

    Raises:
        ValueError: it failed.
    """
    code = subprocess.run([sys.executable, "-m", "cavmae", *words]).returncode
    if code:
        raise ValueError(f"`cavmae {shlex.join(words)}` ended with {code}; see above")


def _pretrained(run: Path) -> Line:
    scores = read_json(run / "summary.json")["scores"]
    name = "val_audio_to_video_r10"
    value, low, chance = (scores[name + part] for part in ("", "_low", "_chance"))
    score = f"R@10 {value:.1%}, 95% interval from {low:.1%}"
    return Line("pretrain", score, f"chance {chance:.1%}; 3 times that", low > 3 * chance)


def _finetuned(classifier: Path) -> Line:
    loss = read_json(classifier / "summary.json")["scores"]["val_loss"]
    # Cross-entropy of a guess that gives all classes the same probability.
    chance = math.log(_classes(classifier))
    baseline = f"no knowledge {chance:.3f}; half of it"
    return Line("fine-tune", f"held-out loss {loss:.3f}", baseline, 2 * loss < chance)


def _classes(classifier: Path) -> int:
    from cavmae.trainer.tasks.labels import read_labels  # `--help` does without torch

    return len(read_labels(classifier / "labels.csv"))


def _classified(path: Path, classifier: Path) -> Line:
    scores = read_json(path)["modes"]["multimodal"]
    chance = 1 / _classes(classifier)
    value, low = scores["accuracy"], scores["accuracy_low"]
    score = f"accuracy {value:.1%}, 95% interval from {low:.1%}"
    return Line("classify", score, f"chance {chance:.1%}; 5 times that", low > 5 * chance)


def _retrieved(path: Path) -> Line:
    scores = read_json(path)["video_to_audio"]
    score = f"R@10 {scores['r10']:.1%}, 95% interval from {scores['r10_low']:.1%}"
    chance = scores["r10_chance"]
    good = scores["r10_low"] > 3 * chance
    return Line("retrieve, picture to sound", score, f"chance {chance:.1%}; 3 times that", good)


def _probed(path: Path) -> Line:
    scores = read_json(path)["scores"]
    trained, random = scores["pretrained, linear"], scores["random weights, linear"]
    score = f"accuracy {trained['accuracy']:.1%}, 95% interval from {trained['accuracy_low']:.1%}"
    baseline = f"random weights {random['accuracy']:.1%}, up to {random['accuracy_high']:.1%}"
    good = trained["accuracy_low"] > random["accuracy_high"]
    return Line("linear probe", score, f"{baseline}; intervals apart", good)


def _reconstructed(path: Path) -> Line:
    mean = read_json(path)["mean"]
    parts, good = [], True
    for kind in ("audio", "video"):
        model, *guesses = mean[kind].values()
        parts.append(f"{kind} {model:.3f} ({min(guesses):.3f})")
        good &= model < 0.9 * min(guesses)
    return Line(
        "reconstruct",
        f"squared error: {', '.join(parts)}",
        "best guess in brackets; 0.9 of it",
        good,
    )


def _embedded(path: Path, shards: str) -> Line:
    noted, clips = read_json(path), ShardSet(shards).samples
    there = noted["rows"] + len(noted["skipped"])
    return Line("embed", f"{there} clips accounted for", f"{clips} clips; all", there == clips)


def _exported(folder: Path) -> Line:
    names = ("model.safetensors", "audio.pt2", "audio.onnx", "video.pt2", "video.onnx")
    there = all((folder / name).exists() for name in names)
    return Line(
        "export",
        "outputs of the graphs compared",
        f"the model's; at most {LARGEST_DEVIATION:g} apart",
        there,
    )


def _searched(folder: Path, console: Console, seconds: dict[str, float]) -> Line:
    """Look up the sounds of clips spread over the set: does each find its own video?"""
    shards = ShardSet(str(folder / "shards" / "unseen" / "video"))
    console.rule("search", align="left")
    began = time.monotonic()
    results = folder / "results"
    found = 0
    for number in range(SEARCHES):
        sample = shards.sample_id(*shards.at(number * shards.samples // SEARCHES))
        out = results / f"search-{number}.json"
        words = ["search", str(folder / "embeddings"), sample]
        words += ["--for", "video", "--top", "10", "--out", str(out)]
        console.print(f"cavmae {shlex.join(words)}", style="bold")
        _start(words)
        found += sample in {one["sample_id"] for one in read_json(out)["found"]["video"]}
    seconds["search"] = time.monotonic() - began
    chance = SEARCHES * 10 / shards.samples
    return Line(
        "search, sound finds video",
        f"{found} of {SEARCHES} find their own among ten",
        f"chance {chance:.1f}; half of them",
        2 * found >= SEARCHES,
    )


def _show(console: Console, folder: Path, lines: list[Line], seconds: dict[str, float]) -> int:
    table = Table(box=box.SIMPLE_HEAD, title="\nEach step beside what it must beat")
    for column in ("step", "score", "must beat", ""):
        table.add_column(column)
    for line in lines:
        table.add_row(line.step, line.score, line.baseline, "yes" if line.good else "NO")
    console.print(table)
    for name, value in seconds.items():
        console.print(f"{name}: {value:.0f} s")
    write_json(
        folder / "results" / "demo-full.json",
        {"lines": [vars(line) for line in lines], "seconds": seconds},
    )
    failed = [line.step for line in lines if not line.good]
    if failed:
        print(f"error: not as good as it must be: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(exit_code(main, sys.argv[1:]))
