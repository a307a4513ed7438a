"""`cavmae demo-full`: everything that a pretrained model is for, on a CPU.

Each step is a command, printed as a user would type it, and must beat chance or an untrained model
by the margin in the table. Steps that an earlier call finished are skipped, unless their arguments
or the weights that they use have changed.
"""

import hashlib
import math
import shlex
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import tyro
from rich.console import Console

from cavmae.atomic_write import read_json, write_json
from cavmae.cluster.local.demo import DemoConfig
from cavmae.console import plain_console, print_rows
from cavmae.dataloaders.shards.shard_set import ShardSet
from cavmae.field_checks import CheckedFields

SEARCHES = 8
"""Sounds that are looked up. By chance a sound finds its video among ten of 200 once in 20 times:
half of eight by chance is less likely than 1 in 2,000."""
LARGEST_DEVIATION = 1e-4


@dataclass(frozen=True)
class DemoFullConfig(CheckedFields):
    """Pretrain as `cavmae demo` does, then fine-tune, classify, retrieve, probe, reconstruct,
    embed, search and export, and compare each with chance. About 20 minutes on two CPU cores."""

    folder: str = "runs/demo"
    """Output folder; results of `cavmae demo` in it are reused."""
    clips: int = DemoConfig.clips
    """Videos to train on."""
    unseen_clips: int = DemoConfig.unseen_clips
    """Videos to score on."""
    steps: int = 0
    """Optimizer steps of pretraining; 0: those of the recipe `demo`."""
    finetune_epochs: float = 10.0
    """Epochs of fine-tuning."""


@dataclass
class Demo:
    """State that the steps share.

    Attributes:
        folder: output folder.
        console: console of the user.
        lines: step, score, baseline and verdict (good) of each step.
        seconds: wall time by step, of those that were not done already.
    """

    folder: Path
    console: Console
    lines: list[dict[str, Any]] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)

    def run(
        self,
        name: str,
        words: list[str],
        *,
        weights: Path | None = None,
        out: Path | None = None,
        resumes: bool = False,
    ) -> None:
        """Run a command, unless it has finished with the same words and weights.

        Args:
            name: name of the step.
            words: arguments of `cavmae`.
            weights: weights that the command uses, if any.
            out: file or folder that it creates, deleted before it is created anew; None: the
                command skips finished work by itself.
            resumes: whether the command resumes an interrupted attempt.
        """
        self.console.rule(name, align="left")
        inputs: dict[str, Any] = {"words": words, "weights_sha256": ""}
        if weights is not None:
            with weights.open("rb") as file:
                inputs["weights_sha256"] = hashlib.file_digest(file, "sha256").hexdigest()
        note = self.folder / "notes" / f"{name}.json"
        noted = read_json(note) if note.exists() else {}
        same = noted.get("inputs") == inputs
        if same and noted["finished"] and out is not None:
            self.console.print(f"cavmae {shlex.join(words)}\nalready done: {out}")
            return
        if out is not None and not (same and resumes):
            shutil.rmtree(out) if out.is_dir() else out.unlink(missing_ok=True)
        note.parent.mkdir(parents=True, exist_ok=True)
        write_json(note, {"inputs": inputs, "finished": False})
        self.command(name, words)
        write_json(note, {"inputs": inputs, "finished": True})

    def command(self, name: str, words: list[str]) -> None:
        """Run a command of a step, and add to the step's time."""
        self.console.print(f"cavmae {shlex.join(words)}", style="bold")
        began = time.monotonic()
        _run(words)
        self.seconds[name] = self.seconds.get(name, 0) + time.monotonic() - began

    def judge(self, step: str, score: str, baseline: str, good: bool) -> None:
        """Add a line of the table: the score, what it must beat, and whether it does."""
        self.lines.append({"step": step, "score": score, "baseline": baseline, "good": good})


def main(arguments: list[str]) -> int:
    """Run the command; returns 0 if every step beats its baseline by the margin, else 1."""
    config = tyro.cli(DemoFullConfig, prog="cavmae demo-full", args=arguments)
    from cavmae.trainer.tasks.labels import read_labels  # `--help` does without torch

    folder = Path(config.folder)
    demo = Demo(folder, plain_console(soft_wrap=True, highlight=False))
    run, classifier = folder / "run", folder / "classifier"
    train, unseen = (str(folder / "shards" / part / "video") for part in ("train", "unseen"))
    pretrained = run / "weights.pt"

    words = [f"--folder={folder}", f"--steps={config.steps}", f"--clips={config.clips}"]
    demo.run("pretrain", ["demo", *words, f"--unseen-clips={config.unseen_clips}"])
    scores, name = read_json(run / "summary.json")["scores"], "val_audio_to_video_r10"
    _judge_recall(demo, "pretrain", *(scores[name + part] for part in ("", "_low", "_chance")))

    words = ["finetune", "demo_finetune", f"--run-dir={classifier}"]
    words += [f"--initial-weights={pretrained}", f"--epochs={config.finetune_epochs}"]
    words += [f"--data.train={train}", f"--data.validation={unseen}"]
    demo.run("fine-tune", words, weights=pretrained, out=classifier, resumes=True)
    loss = read_json(classifier / "summary.json")["scores"]["val_loss"]
    classes = len(read_labels(classifier / "labels.csv"))
    uniform = math.log(classes)  # cross-entropy of equal probabilities
    baseline = f"uniform guess {uniform:.3f}; half of it"
    demo.judge("fine-tune", f"validation loss {loss:.3f}", baseline, 2 * loss < uniform)

    # Few unseen clips may lack a class.
    words = [str(classifier), unseen, "--frames=10", "--allow-empty-classes"]
    result = _evaluate(demo, "classify", words, classifier / "weights.pt")
    value, low = (result["modes"]["multimodal"][name] for name in ("accuracy", "accuracy_low"))
    score, baseline = _share("accuracy", value, low), f"chance {1 / classes:.1%}; 5 times that"
    demo.judge("classify", score, baseline, low > 5 / classes)

    result = _evaluate(demo, "retrieve", [str(run), unseen], pretrained)["video_to_audio"]
    recall = (result[name] for name in ("r10", "r10_low", "r10_chance"))
    _judge_recall(demo, "retrieve, video to audio", *recall)

    scores = _evaluate(demo, "probe", [str(run), train, unseen], pretrained)["scores"]
    trained, random = scores["pretrained, linear"], scores["random weights, linear"]
    score = _share("accuracy", trained["accuracy"], trained["accuracy_low"])
    baseline = f"random weights {random['accuracy']:.1%}, up to {random['accuracy_high']:.1%}"
    good = trained["accuracy_low"] > random["accuracy_high"]
    demo.judge("linear probe", score, f"{baseline}; intervals apart", good)

    out = folder / "reconstructed"
    words = ["reconstruct", str(run), unseen, str(out), "--clips=16"]
    demo.run("reconstruct", words, weights=pretrained, out=out)
    errors = {  # the model's squared error, and that of the best guess
        kind: (model, min(guesses))
        for kind, means in read_json(out / "reconstructions.json")["mean"].items()
        for model, *guesses in [means.values()]
    }
    parts = [f"{kind} {model:.3f} ({guess:.3f})" for kind, (model, guess) in errors.items()]
    score, baseline = f"squared error: {', '.join(parts)}", "best guess in brackets; 0.9 of it"
    good = all(model < 0.9 * guess for model, guess in errors.values())
    demo.judge("reconstruct", score, baseline, good)

    out, clips = folder / "embeddings", ShardSet(unseen).samples
    words = ["embed", str(run), unseen, f"--out={out}"]
    demo.run("embed", words, weights=pretrained, out=out, resumes=True)
    description = read_json(out / "embeddings.json")
    count = description["rows"] + len(description["skipped"])
    demo.judge("embed", f"{count} clips accounted for", f"{clips} clips; all", count == clips)

    out = folder / "exported"
    words = ["export", str(run), str(out), "--format", "hub", "torch", "onnx"]
    demo.run("export", words, weights=pretrained, out=out)
    names = ("model.safetensors", "audio.pt2", "audio.onnx", "video.pt2", "video.onnx")
    good = all((out / name).exists() for name in names)
    baseline = f"the model's; at most {LARGEST_DEVIATION:g} apart"
    demo.judge("export", "outputs of the graphs compared", baseline, good)

    _search(demo, unseen)
    return _show(demo)


def _run(words: list[str]) -> None:
    """Run a command of the package and show its output.

    Raises:
        ValueError: it failed.
    """
    code = subprocess.run([sys.executable, "-m", "cavmae", *words]).returncode
    if code:
        raise ValueError(f"`cavmae {shlex.join(words)}` ended with {code}; see above")


def _evaluate(demo: Demo, kind: str, words: list[str], weights: Path) -> dict[str, Any]:
    """Run `cavmae evaluate`; returns its result."""
    out = demo.folder / "results" / f"{kind}.json"
    demo.run(kind, ["evaluate", kind, *words, f"--out={out}"], weights=weights, out=out)
    return read_json(out)


def _share(name: str, value: float, low: float) -> str:
    return f"{name} {value:.1%}, 95% interval from {low:.1%}"


def _judge_recall(demo: Demo, step: str, value: float, low: float, chance: float) -> None:
    baseline = f"chance {chance:.1%}; 3 times that"
    demo.judge(step, _share("R@10", value, low), baseline, low > 3 * chance)


def _search(demo: Demo, unseen: str) -> None:
    """Look up the sounds of clips spread over the set: does each find its own video?"""
    demo.console.rule("search", align="left")
    shards, found = ShardSet(unseen), 0
    for number in range(SEARCHES):
        sample = shards.sample_id(*shards.at(number * shards.samples // SEARCHES))
        out = demo.folder / "results" / f"search-{number}.json"
        words = ["search", str(demo.folder / "embeddings"), sample, "--for", "video", "--top", "10"]
        demo.command("search", [*words, f"--out={out}"])
        found += sample in {one["sample_id"] for one in read_json(out)["found"]["video"]}
    score = f"{found} of {SEARCHES} find their own among ten"
    baseline = f"chance {SEARCHES * 10 / shards.samples:.1f}; half of them"
    demo.judge("search, sound finds video", score, baseline, 2 * found >= SEARCHES)


def _show(demo: Demo) -> int:
    """Print and write the table; returns the exit code."""
    rows = [
        (line["step"], line["score"], line["baseline"], "yes" if line["good"] else "NO")
        for line in demo.lines
    ]
    print_rows(
        ("step", "score", "must beat", "beats"), rows, title="Each step and what it must beat"
    )
    for name, value in demo.seconds.items():
        demo.console.print(f"{name}: {value:.0f} s")
    result = {"lines": demo.lines, "seconds": demo.seconds}
    write_json(demo.folder / "results" / "demo-full.json", result)
    failed = [line["step"] for line in demo.lines if not line["good"]]
    if failed:
        print(f"error: not as good as it must be: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0
