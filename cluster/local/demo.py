"""`cavmae demo`: the whole pipeline on two CPU cores, from generated videos to retrieval scores on
unseen ones.

It shows that the parts work together and that the model learns a correspondence that was designed
to be learned. The control, `cavmae demo --shuffled-pairs`, trains on clips with the sound of other
clips and must score at chance.
"""

import json
import os
import shlex
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import tyro
from rich.console import Console

from cavmae.atomic_write import read_json, write_json
from cavmae.cluster.config import RAY_KINDS, RayRunConfig
from cavmae.cluster.train import train_on_ray
from cavmae.console import plain_console, print_rows
from cavmae.dataloaders.packing.pack import PackConfig, pack
from cavmae.dataloaders.tools.synthetic import generate
from cavmae.field_checks import CheckedFields, NonNegativeInt, PositiveInt, at_least
from cavmae.trainer.config.configs import PretrainConfig
from cavmae.trainer.config.parse import parse
from cavmae.trainer.config.serialize import load_config
from cavmae.trainer.tracking.sqlite_uri import sqlite_uri

UNSEEN_START_INDEX = 1_000_000
"""A clip is a function of seed and index, so these are none of the training clips."""
DIRECTIONS = ("audio_to_video", "video_to_audio")
_LIMITATIONS = (
    "The videos are generated so that pictures and sounds correspond: this shows that the system "
    "learns correspondences that were designed to be learned, and is no evidence about natural "
    "video. One frame per clip is used, which does not test synchrony. The contrastive weight (1) "
    "and the masking ratio (1/2) differ from the published recipe (0.01 and 3/4), which learns "
    "this more slowly.\n"
)
CONTROL_P_VALUE = 0.001
"""A control below this has learned something that it cannot have learned."""


@dataclass(frozen=True)
class DemoConfig(CheckedFields):
    """Generate videos with sound, pack them, pretrain on two Ray workers under DeepSpeed, and score
    audio-visual retrieval on unseen videos. A few minutes on two CPU cores.

    Videos and shards in the folder are reused; an interrupted training is resumed, and the scores
    of a finished one are only shown.

    Raises:
        ValueError: a number is out of range.
    """

    folder: str = ""
    """Output folder; empty: runs/demo, or runs/demo-shuffled-pairs."""
    clips: Annotated[int, at_least(128)] = 3000
    """Videos to train on."""
    unseen_clips: Annotated[int, at_least(20)] = 200
    """Videos to score on."""
    steps: NonNegativeInt = 0
    """Optimizer steps; 0: those of the recipe `demo`."""
    workers: PositiveInt = 2
    """Ranks, each a process with its share of the cores."""
    seed: int = 1
    """Seed of videos and training. (The generator was designed on clips of seed 0.)"""
    shuffled_pairs: bool = False
    """The control: train on videos with the sound of others. It must score at chance."""
    fresh: bool = False
    """Delete an earlier training in this folder first; videos and shards stay."""


@dataclass
class Demo:
    """State that the phases share.

    Attributes:
        config: the command's fields.
        folder: output folder.
        console: console of the user.
        seconds: wall time by phase, of those that were not done already.
    """

    config: DemoConfig
    folder: Path
    console: Console
    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def phase(self, name: str, text: str) -> Iterator[None]:
        self.console.rule(f"{name}: {text}", align="left")
        began = time.monotonic()
        yield
        self.seconds[name] = time.monotonic() - began

    @property
    def run_dir(self) -> Path:
        return self.folder / "run"

    def shards(self, part: str) -> Path:
        return self.folder / "shards" / part / "video"


def main(arguments: list[str]) -> int:
    """Run the command; returns 0 if the scores are as good as they must be, else 1."""
    config = tyro.cli(DemoConfig, prog="cavmae demo", args=arguments)
    folder = config.folder or ("runs/demo" + "-shuffled-pairs" * config.shuffled_pairs)
    demo = Demo(config, Path(folder), plain_console())
    make_shards(demo)
    scores = train(demo)
    with demo.phase("compare", "with the model before its first step"):
        untrained = untrained_scores(demo)
    return show(demo, scores, untrained)


def make_shards(demo: Demo) -> None:
    """Generate and pack the videos of both sets, unless an earlier call has."""
    config = demo.config
    note = {
        name: getattr(config, name) for name in ("clips", "unseen_clips", "seed", "shuffled_pairs")
    }
    noted = demo.folder / "demo.json"
    if noted.exists():
        if read_json(noted) != note:
            raise ValueError(
                f"{demo.folder} holds a demo of {json.dumps(read_json(noted))}, and this one is "
                f"{json.dumps(note)}; give another --folder"
            )
        demo.console.print(f"Using the videos and shards in {demo.folder}")
        return
    videos, sets = demo.folder / "videos", {"train": config.clips, "unseen": config.unseen_clips}
    with demo.phase("generate", f"{sum(sets.values())} videos with sound, 2 seconds each"):
        for part, count in sets.items():
            generate(
                videos / part,
                count,
                config.seed,
                start_index=0 if part == "train" else UNSEEN_START_INDEX,
                shuffled_pairs=config.shuffled_pairs and part == "train",
            )
    with demo.phase("pack", "into WebDataset shards of MJPEG and FLAC"):
        for part in sets:
            listing, out = str(videos / part / "clips.csv"), str(demo.folder / "shards" / part)
            summary = pack(PackConfig(listing, out, tiers="video"), demo.console)
            if summary.skipped:
                raise ValueError(f"generated videos cannot be packed: {summary.skipped}")
    write_json(noted, note)


def train(demo: Demo) -> dict[str, float]:
    """Pretrain with the recipe `demo` on Ray; returns the final validation scores."""
    if demo.config.fresh:
        shutil.rmtree(demo.run_dir, ignore_errors=True)
    run = training_config(demo)
    saved, summary = demo.run_dir / "config.json", demo.run_dir / "summary.json"
    if saved.exists() and (steps := load_config(saved, PretrainConfig).steps) != run.steps:
        raise ValueError(
            f"{demo.run_dir} was started with {steps} steps and this attempt has {run.steps}; give "
            "the former, or --fresh to retrain"
        )
    if summary.exists():
        demo.console.print(f"Training is already finished (--fresh retrains): {demo.run_dir}")
        return read_json(summary)["scores"]
    ranks = f"{demo.config.workers} Ray workers under DeepSpeed ZeRO {run.engine.zero_stage}"
    with demo.phase("train", f"{run.steps} steps on {ranks}"):
        demo.console.print("(the first time, DeepSpeed compiles an operator for about a minute)")
        return train_on_ray(run).scores


def training_config(demo: Demo) -> RayRunConfig:
    """Return the recipe `demo` with this demo's data, folder and length."""
    config = demo.config
    words = [
        f"--run-dir={demo.run_dir}",
        f"--seed={config.seed}",
        f"--data.train={demo.shards('train')}",
        f"--data.validation={demo.shards('unseen')}",
        f"--validation.clips={config.unseen_clips}",
        f"--workers={config.workers}",
        f"--cpus-per-worker={max(1, len(os.sched_getaffinity(0)) // config.workers)}",
    ]
    steps = [f"--steps={config.steps}"] if config.steps else []
    return parse(["demo", *words, *steps], RAY_KINDS, "cavmae demo")


def untrained_scores(demo: Demo) -> dict[str, float]:
    """Return the retrieval scores of the model before its first step, named as `train` does."""
    import torch

    from cavmae.trainer.evaluation.clip_outputs import embed
    from cavmae.trainer.evaluation.trained_run import open_trained_run
    from cavmae.trainer.metrics.retrieval import retrieval_scores

    run, shards = open_trained_run(demo.run_dir), str(demo.shards("unseen"))
    model = run.untrained_model(torch.device("cpu"))
    clips = demo.config.unseen_clips
    values = embed(model, run.config, shards, clips=clips, batch=run.config.micro_batch).values
    return {
        f"val_{direction}_{name}": value
        for direction, scores in retrieval_scores(values["audio"], values["video"]).items()
        for name, value in scores.as_metrics().items()
    }


def show(demo: Demo, scores: dict[str, float], untrained: dict[str, float]) -> int:
    """Print scores, what they mean and where the results are; returns the exit code."""
    config, console = demo.config, demo.console
    title = f"Retrieval among {config.unseen_clips} unseen clips"
    print_rows(_COLUMNS, score_rows(scores, untrained), title=title)
    console.print(_LIMITATIONS, highlight=False)
    # Full paths: the environment of `make demo` is not on the user's PATH.
    programs = Path(sys.executable).parent
    mlflow = shlex.quote(str(programs / "mlflow"))
    store = shlex.quote(sqlite_uri((demo.folder / "mlflow.db").resolve()))
    where = {
        "run folder": demo.run_dir,
        "weights": demo.run_dir / "weights.pt",
        "figures": demo.run_dir / "figures",
        "videos": demo.folder / "videos" / "unseen",
        "all curves": f"{mlflow} ui --backend-store-uri {store} --host 127.0.0.1",
    }
    if demo.seconds:
        phases = ", ".join(f"{name} {seconds:.0f} s" for name, seconds in demo.seconds.items())
        where["time"] = f"{phases}; {sum(demo.seconds.values()):.0f} s in all"
    for name, place in where.items():
        console.print(f"{name:<12}{place}", soft_wrap=True, highlight=False)

    rows = [f"val_{direction}_r10" for direction in DIRECTIONS]
    error, verdict = "", "R@10 is above chance both ways, with its whole confidence interval."
    if config.shuffled_pairs:
        verdict = "The control is at chance, as it must be."
        if min(scores[f"{row}_p_value"] for row in rows) < CONTROL_P_VALUE:
            error = "the control is above chance: there is a leak"
    elif any(scores[f"{row}_low"] <= scores[f"{row}_chance"] for row in rows):
        error = (
            "R@10 is not clearly above chance, which its confidence interval includes: the model "
            "has not learned, or not for long enough"
        )
    if error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    console.print(f"\n{verdict}")
    if not config.shuffled_pairs:
        console.print("\nLook at what it learned, then search its clips by a sound:")
        for words in next_commands(demo.folder.resolve()):
            line = shlex.join([str(programs / "cavmae"), *words])
            console.print(line, soft_wrap=True, highlight=False)
    return 0


def next_commands(folder: Path) -> list[list[str]]:
    """Return the arguments of `cavmae` to go on with after a demo in `folder`."""
    run, shards, embeddings = (
        f"{folder}/run",
        f"{folder}/shards/unseen/video",
        f"{folder}/embeddings",
    )
    sound = f"{folder}/videos/unseen/{UNSEEN_START_INDEX}.mp4"
    return [
        ["explore", run, shards],
        ["embed", run, shards, "--out", embeddings],
        ["search", embeddings, sound, "--for", "video", "--out", f"{folder}/found.html"],
    ]


_COLUMNS = ("", "", "trained", "95% CI", "chance", "x chance", "p", "untrained")


def score_rows(scores: dict[str, float], untrained: dict[str, float]) -> Iterator[tuple[str, ...]]:
    """Yield rows of retrieval both ways, beside chance and the model before training."""
    for direction in DIRECTIONS:
        name = direction.replace("_", " ")
        for k in (1, 5, 10):
            key = f"val_{direction}_r{k}"
            value, chance, p = (scores[key + part] for part in ("", "_chance", "_p_value"))
            yield (
                name,
                f"R@{k}",
                f"{value:.1%}",
                f"{100 * scores[f'{key}_low']:.0f} to {scores[f'{key}_high']:.0%}",
                f"{chance:.1%}",
                f"{value / chance:.1f}",
                "< 1e-9" if p < 1e-9 else f"{p:.2g}",
                f"{untrained[key]:.1%}",
            )
        key = f"val_{direction}_median_rank"
        chance = scores[f"val_{direction}_chance_median_rank"]
        values = (f"{scores[key]:g}", "", f"{chance:g}", "", "", f"{untrained[key]:g}")
        yield name, "median rank", *values
