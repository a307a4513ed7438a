"""`cavmae demo`: the whole way on two CPU cores, from videos that it draws itself to scores on
videos that the model never saw.

It shows that everything works together and that the model learns a correspondence that was designed
to be learned. The control, `cavmae demo --shuffled-pairs`, trains on clips with the sound of other
clips and has to end at chance.
"""

import dataclasses
import json
import os
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import tyro
from rich import box
from rich.console import Console
from rich.table import Table

from cavmae.cluster.config import ClusterConfig, RayPretrainConfig
from cavmae.cluster.train import train_on_ray
from cavmae.command import exit_code
from cavmae.dataloaders.packing.pack import PackConfig, pack
from cavmae.dataloaders.tools.synthetic import generate
from cavmae.field_checks import CheckedFields, NonNegativeInt, PositiveInt, at_least
from cavmae.trainer.config.configs import PretrainConfig
from cavmae.trainer.config.recipes import demo as demo_recipe
from cavmae.trainer.config.serialize import load_config, read_json, write_json

UNSEEN_START_INDEX = 1_000_000
"""Clips are a function of seed and index: from here on, none of the training clips."""
RECALLS = {"r1": "R@1", "r5": "R@5", "r10": "R@10"}
DIRECTIONS = {
    "audio_to_video": "sound to picture",
    "video_to_audio": "picture to sound",
}
_HONEST_WORDS = (
    "The videos are drawn so that pictures and sounds correspond: this shows that the system "
    "learns correspondences that were designed to be learned, and is no evidence about natural "
    "video. One frame a clip is used, which does not test synchrony. The contrastive weight (1) "
    "and the share of patches masked (1/2) differ from the published recipe (0.01 and 3/4), which "
    "learns this slower.\n"
)
CONTROL_P_VALUE = 0.001
"""A control this unlikely by chance has learned what it can't have learned."""


@dataclass(frozen=True)
class DemoConfig(CheckedFields):
    """Draw videos with sound, pack them, pretrain on two Ray workers under DeepSpeed, and look for
    the right picture to a sound among videos never seen. About ten minutes on two CPU cores.

    Videos and shards in the folder are used again; a training that was interrupted goes on, and one
    that is finished is only shown.

    Raises:
        ValueError: a number out of its range.
    """

    folder: str = ""
    """Where everything goes; empty: runs/demo, or runs/demo-shuffled-pairs."""
    clips: Annotated[int, at_least(128)] = 3000
    """Videos to train on."""
    unseen_clips: Annotated[int, at_least(20)] = 200
    """Videos to score on."""
    steps: NonNegativeInt = 0
    """Optimizer steps; 0: as many as the recipe `demo` has."""
    workers: PositiveInt = 2
    """Ranks; each is a process with its share of the cores."""
    seed: int = 1
    """Seed of videos and training. (The drawing was designed while looking at clips of seed 0.)"""
    shuffled_pairs: bool = False
    """The control: train on videos that have the sound of others. It must end at chance."""
    fresh: bool = False
    """Remove an earlier training of this folder first (videos and shards stay)."""


@dataclass
class Demo:
    """What the phases share.

    Attributes:
        config: what was asked for.
        folder: where everything is.
        console: where people look.
        seconds: wall time by phase; a phase that found its work done is left out.
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
    """The command; returns 0 where the scores are what they must be, else 1."""
    config = tyro.cli(DemoConfig, prog="cavmae demo", args=arguments)
    folder = config.folder or ("runs/demo" + "-shuffled-pairs" * config.shuffled_pairs)
    demo = Demo(config, Path(folder), Console())
    make_shards(demo)
    scores = train(demo)
    with demo.phase("compare", "with the model before its first step"):
        untrained = untrained_scores(demo)
    return show(demo, scores, untrained)


def make_shards(demo: Demo) -> None:
    """Draw and pack the videos of both sets; what an earlier call has finished is kept."""
    config = demo.config
    note = {
        name: getattr(config, name) for name in ("clips", "unseen_clips", "seed", "shuffled_pairs")
    }
    noted = demo.folder / "demo.json"
    if noted.exists() and read_json(noted) != note:
        raise ValueError(
            f"{demo.folder} holds a demo of {json.dumps(read_json(noted))}, and this one is "
            f"{json.dumps(note)}; give another --folder"
        )
    if noted.exists():
        demo.console.print(f"Videos and shards of an earlier start are used: {demo.folder}")
        return
    total = config.clips + config.unseen_clips
    with demo.phase("draw", f"{total} videos with sound, 2 seconds each"):
        for part, count, start in (
            ("train", config.clips, 0),
            ("unseen", config.unseen_clips, UNSEEN_START_INDEX),
        ):
            generate(
                demo.folder / "videos" / part,
                count,
                config.seed,
                start_index=start,
                shuffled_pairs=config.shuffled_pairs and part == "train",
            )
    with demo.phase("pack", "into WebDataset shards of key-frame VP9 and FLAC"):
        for part in ("train", "unseen"):
            summary = pack(
                PackConfig(
                    videos=str(demo.folder / "videos" / part / "clips.csv"),
                    out=str(demo.folder / "shards" / part),
                    tiers="video",
                ),
                demo.console,
            )
            if summary.skipped:
                raise ValueError(f"videos just drawn can't be packed: {summary.skipped}")
    write_json(noted, note)


def train(demo: Demo) -> dict[str, float]:
    """Pretrain with the recipe `demo` on Ray; returns the held-out scores at the end."""
    config = demo.config
    if config.fresh:
        shutil.rmtree(demo.run_dir, ignore_errors=True)
    wanted = training_config(demo)
    saved, summary = demo.run_dir / "config.json", demo.run_dir / "summary.json"
    if saved.exists() and load_config(saved, PretrainConfig).steps != wanted.steps:
        raise ValueError(
            f"{demo.run_dir} was begun with {load_config(saved, PretrainConfig).steps} steps and "
            f"this start has {wanted.steps}; give the former, or --fresh to train anew"
        )
    if summary.exists():
        demo.console.print(f"Finished by an earlier start (--fresh trains anew): {demo.run_dir}")
        return read_json(summary)["scores"]
    ranks = f"{config.workers} Ray workers under DeepSpeed ZeRO {wanted.engine.zero_stage}"
    with demo.phase("train", f"{wanted.steps} steps on {ranks}"):
        demo.console.print("(the first time, DeepSpeed compiles an operator, for about a minute)")
        return train_on_ray(wanted).scores


def training_config(demo: Demo) -> RayPretrainConfig:
    """The recipe `demo` with this demo's data, place and length."""
    config, recipe = demo.config, demo_recipe()
    cores = len(os.sched_getaffinity(0))
    fields = {entry.name: getattr(recipe, entry.name) for entry in dataclasses.fields(recipe)}
    return RayPretrainConfig(
        **fields
        | {
            "run_dir": str(demo.run_dir),
            "seed": config.seed,
            "steps": config.steps or recipe.steps,
            "data": dataclasses.replace(
                recipe.data,
                train=str(demo.shards("train")),
                validation=str(demo.shards("unseen")),
            ),
            "validation": dataclasses.replace(recipe.validation, clips=config.unseen_clips),
        },
        cluster=ClusterConfig(
            workers=config.workers, cpus_per_worker=max(1, cores // config.workers)
        ),
    )


def untrained_scores(demo: Demo) -> dict[str, float]:
    """Retrieval scores of the model before its first step, named as `train` names them."""
    import torch

    from cavmae.dataloaders.batch import ClipShape
    from cavmae.dataloaders.loading.loader import ValidationLoader
    from cavmae.trainer.metrics.retrieval import retrieval_scores
    from cavmae.trainer.model.cavmae import CAVMAE

    config = training_config(demo)
    torch.manual_seed(config.seed)
    model = CAVMAE(config.model).eval()
    loader = ValidationLoader(
        config.data,
        ClipShape(config.model.audio_frames, config.model.mel_bins, config.model.image_size),
        folder=config.data.validation,
        batch=config.micro_batch,
        rank=0,
        world_size=1,
        device=torch.device("cpu"),
        limit=config.validation.clips,
    )
    try:
        with torch.no_grad():
            audio, video = zip(
                *(
                    (model.embed_audio(batch.log_mel), model.embed_video(batch.frames[:, 0]))
                    for batch in loader
                ),
                strict=True,
            )
    finally:
        loader.close()
    return {
        f"val_{direction}_{name}": value
        for direction, scores in retrieval_scores(torch.cat(audio), torch.cat(video)).items()
        for name, value in scores.as_metrics().items()
    }


def show(demo: Demo, scores: dict[str, float], untrained: dict[str, float]) -> int:
    """Print scores, what they mean and where everything is; returns the exit code."""
    config, console = demo.config, demo.console
    console.print(scores_table(scores, untrained, config.unseen_clips))
    console.print(_HONEST_WORDS, highlight=False)
    # The program's full path: the environment of `make demo` is not on the user's PATH.
    mlflow = Path(sys.executable).parent / "mlflow"
    database = (demo.folder / "mlflow.db").resolve()
    where = {
        "run folder": demo.run_dir,
        "weights": demo.run_dir / "weights.pt",
        "pictures": demo.run_dir / "pictures",
        "videos": demo.folder / "videos" / "unseen",
        "all curves": f"{mlflow} ui --backend-store-uri sqlite:///{database} --host 127.0.0.1",
    }
    if demo.seconds:
        phases = ", ".join(f"{name} {seconds:.0f} s" for name, seconds in demo.seconds.items())
        where["time"] = f"{phases}; {sum(demo.seconds.values()):.0f} s in all"
    for name, place in where.items():
        console.print(f"{name:<12}{place}", soft_wrap=True, highlight=False)

    rows = [f"val_{direction}_r10" for direction in DIRECTIONS]
    if config.shuffled_pairs:
        if min(scores[f"{row}_p_value"] for row in rows) < CONTROL_P_VALUE:
            print("error: the control is above chance: something leaks", file=sys.stderr)
            return 1
        console.print("\nThe control is at chance, as it must be.")
        return 0
    if any(scores[f"{row}_low"] <= scores[f"{row}_chance"] for row in rows):
        print(
            "error: R@10 is not clearly above chance (its interval reaches down to it): the model "
            "has not learned, or not for long enough",
            file=sys.stderr,
        )
        return 1
    console.print("\nR@10 is above chance both ways, with its whole interval.")
    return 0


def scores_table(scores: dict[str, float], untrained: dict[str, float], clips: int) -> Table:
    """Retrieval both ways, beside chance and the model before training."""
    table = Table(
        title=f"\nRetrieval among {clips} unseen clips",
        title_justify="left",
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
    )
    table.add_column("", no_wrap=True)
    for column in ("trained", "95% CI", "chance", "x chance", "p", "untrained"):
        table.add_column(column, justify="right", no_wrap=True)
    for direction, title in DIRECTIONS.items():
        prefix = f"val_{direction}_"
        table.add_row(f"[bold]{title}")
        for name, recall in RECALLS.items():
            value, low, high, chance, p_value = (
                scores[prefix + name + part]
                for part in ("", "_low", "_high", "_chance", "_p_value")
            )
            table.add_row(
                recall,
                f"{value:.1%}",
                f"{100 * low:.0f} to {high:.0%}",
                f"{chance:.1%}",
                f"{value / chance:.1f}",
                "< 1e-9" if p_value < 1e-9 else f"{p_value:.2g}",
                f"{untrained[prefix + name]:.1%}",
            )
        median = prefix + "median_rank"
        table.add_row(
            "median rank",
            f"{scores[median]:g}",
            "",
            f"{scores[prefix + 'chance_median_rank']:g}",
            "",
            "",
            f"{untrained[median]:g}",
        )
    return table


if __name__ == "__main__":
    sys.exit(exit_code(main, sys.argv[1:]))
