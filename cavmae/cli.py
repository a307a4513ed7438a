"""The `cavmae` command. A subcommand's module is imported once the command is known, so that
`cavmae --help` is fast and a missing optional package matters only to the commands that need it."""

import importlib
import io
import os
import sys

from cavmae import __version__
from cavmae.command import exit_code

# Module of cavmae, or module:function where it is not `main`; summary.
COMMANDS = {
    "pack": ("cluster.pack", "Pack a folder of videos into shards."),
    "verify": ("dataloaders.tools.verify", "Check a packed set against its index."),
    "inspect": ("dataloaders.tools.inspect", "Print what a packed set holds; a sheet of clips."),
    "pretrain": ("trainer.pretrain", "Pretrain a model on packed shards."),
    "finetune": ("trainer.finetune", "Fine-tune a pretrained model on labelled shards."),
    "reconstruct": ("trainer.evaluation.reconstruct", "What a model reconstructs of clips."),
    "curve": ("trainer.evaluation.curve", "Plot a run's metrics over those of a published log."),
    "report": ("trainer.tracking.run_report", "One page on a run: curves, scores, faults."),
    "export": ("trainer.release.export", "Export a trained model: Hub, graphs."),
    "embed": ("cluster.embed", "Embeddings of a packed set or of files, as Parquet."),
    "classify": ("trainer.inference.classify", "Classes of files, by a fine-tuned model."),
    "search": ("trainer.embeddings.search", "A sound finds videos, a picture finds sounds."),
    "explore": ("trainer.explore.command", "A page to look at a run: find, map, where, mistakes."),
    "train": ("cluster.train", "Pretrain or fine-tune on Ray, restarted after failures."),
    "submit": ("cluster.jobs:submit", "Start `train` as a job of a Ray cluster."),
    "status": ("cluster.jobs:status", "State of jobs and runs."),
    "logs": ("cluster.jobs:logs", "Log of a job or of one of its ranks."),
    "stop": ("cluster.jobs:stop", "Save a checkpoint and stop a job or a run."),
    "queue": ("cluster.experiments.queue", "Run the experiments of a file, and compare them."),
    "sweep": ("cluster.experiments.sweep", "Search fields with Ray Tune; bad trials stop early."),
    "cluster-files": ("cluster.manifests", "Files for Kubernetes, Slurm and clouds."),
    "doctor": ("cluster.local.doctor", "Check whether this machine can train."),
    "demo": ("cluster.local.demo", "Generate videos, pack them, train and evaluate, on a CPU."),
    "demo-full": ("cluster.local.demo_full", "The demo, then every use of the model."),
}
BENCHMARKS = {
    "step": ("benchmarks.step.step", "Time of a training step, with memory and FLOP/s."),
    "ablations": ("benchmarks.step.ablations", "What each choice about a step is worth here."),
    "predict": ("benchmarks.step.predict", "A step on a GPU that is not here, by parts."),
    "train": ("benchmarks.training.train", "The training loop, and a step's time by parts."),
    "kernels": ("benchmarks.kernels.bench", "Kernels against torch and published methods."),
    "data": ("benchmarks.data.loader", "The loader against the published one and raw video."),
    "tiers": ("benchmarks.data.tiers", "Size, cost and quality of each way to store a clip."),
    "faults": ("benchmarks.faults.faults", "Recovery of a run from each real fault."),
    "soak": ("benchmarks.faults.soak", "One run for an hour with a fault every few minutes."),
    "control-plane": ("benchmarks.training.control_plane", "What 1,024 ranks do besides training."),
    "overhead": ("benchmarks.training.overhead", "What Ray and checkpoints add to a step."),
    "shuffle": ("benchmarks.data.shuffle_quality", "Order of samples against a perfect shuffle."),
    "explore": ("benchmarks.explore.page", "How long the page of `cavmae explore` takes."),
    "storage-faults": (
        "benchmarks.data.storage_faults",
        "Loading under kills, from a failing store.",
    ),
    "scaling": ("benchmarks.training.scaling", "A step on 1 to 4,096 GPUs, computed."),
    "golden": ("benchmarks.conformance.golden", "Conformance with a folder of reference numbers."),
    "gpu-check": ("benchmarks.gpu.check", "Check kernels and model on this GPU."),
    "video-check": ("benchmarks.gpu.video", "Decode each codec on this GPU, and compare."),
    "memory": ("benchmarks.training.memory", "Predicted and measured peak memory of a step."),
    "autotune": ("benchmarks.training.autotune", "Find the fastest fields for this machine."),
    "all": ("benchmarks.report.suite", "All benchmarks that fit this machine and a time budget."),
    "compare": ("benchmarks.report.compare", "What became slower from one record to another."),
    "report": ("benchmarks.report.report", "The newest records as a page with plots."),
}
EVALUATIONS = {
    "classify": ("trainer.evaluation.classify", "Labels by a fine-tuned run: mAP, AUC, accuracy."),
    "probe": ("trainer.evaluation.probe", "Labels from frozen features, beside random weights."),
    "retrieve": (
        "trainer.evaluation.retrieve",
        "Retrieval of pictures by sound and the other way.",
    ),
}
GROUPS = {
    "evaluate": (EVALUATIONS, "Score a finished run on a packed set."),
    "bench": (BENCHMARKS, "Run a benchmark and write its record."),
}


def main(arguments: list[str] | None = None) -> int:
    """Run one subcommand.

    Args:
        arguments: Words after `cavmae`; the process's own where None.

    Returns:
        Exit code: 0 done, 1 failed, 2 wrong usage, 130 interrupted.
    """
    words = sys.argv[1:] if arguments is None else arguments
    if isinstance(sys.stdout, io.TextIOWrapper):  # a name of a file may be no text
        sys.stdout.reconfigure(errors="backslashreplace")
    # The deepspeed launcher puts this first; LOCAL_RANK in the environment has the same value.
    words = [word for word in words if not word.startswith("--local_rank=")]
    if not words or words[0] in ("-h", "--help"):
        print(_usage("cavmae", COMMANDS, {name: text for name, (_, text) in GROUPS.items()}))
        return 0 if words else 2
    if words[0] == "--version":
        print(f"cavmae {__version__}")
        return 0
    if words[0] not in GROUPS:
        return _dispatch("cavmae", COMMANDS, words)
    program, (commands, _) = f"cavmae {words[0]}", GROUPS[words[0]]
    if len(words) == 1 or words[1] in ("-h", "--help"):
        print(_usage(program, commands, {}))
        return 0 if len(words) > 1 else 2
    return _dispatch(program, commands, words[1:])


def _dispatch(program: str, commands: dict[str, tuple[str, str]], words: list[str]) -> int:
    if words[0] not in commands:
        print(
            f"error: `{program} {words[0]}` is not a command; see `{program} --help`",
            file=sys.stderr,
        )
        return 2
    module, _, function = commands[words[0]][0].partition(":")
    command = getattr(importlib.import_module(f"cavmae.{module}"), function or "main")
    try:
        return exit_code(command, words[1:])
    except SystemExit:
        for word in words[1:]:
            if word.startswith("-") and os.path.lexists(word):
                print(
                    f"error: {word} was read as an option; the file of that name is ./{word}",
                    file=sys.stderr,
                )
        raise


def _usage(program: str, commands: dict[str, tuple[str, str]], more: dict[str, str]) -> str:
    lines = {name: text for name, (_, text) in commands.items()} | more
    width = max(map(len, lines))
    return "\n".join(
        [f"usage: {program} COMMAND [...]", ""]
        + [f"  {name:<{width}}  {text}" for name, text in lines.items()]
        + ["", f"`{program} COMMAND --help` lists a command's own options."]
    )
