"""The `cavmae` command. A subcommand's module is imported only once the command is known, so that
`cavmae --help` answers at once and a missing optional part is missed only by those who use it."""

import importlib
import sys

from cavmae import __version__
from cavmae.command import exit_code

# Module, or module:function where it is not `main`.
COMMANDS = {
    "pack": ("cavmae.cluster.pack", "Pack a folder of videos into shards."),
    "verify": ("cavmae.dataloaders.tools.verify", "Check a packed set against its index."),
    "inspect": (
        "cavmae.dataloaders.tools.inspect",
        "Print what a packed set holds; a sheet of clips.",
    ),
    "pretrain": ("cavmae.trainer.pretrain", "Pretrain a model on packed shards."),
    "finetune": ("cavmae.trainer.finetune", "Fine-tune a pretrained model on labelled shards."),
    "reconstruct": (
        "cavmae.trainer.evaluation.reconstruct",
        "Pictures and sounds that a run makes of clips.",
    ),
    "curve": (
        "cavmae.trainer.evaluation.curve",
        "Plot a run's metrics over those of a published log.",
    ),
    "export": ("cavmae.trainer.release.export", "Write a trained model for others: Hub, graphs."),
    "embed": ("cavmae.cluster.embed", "Embeddings of a packed set, as Parquet files."),
    "search": ("cavmae.trainer.embeddings.search", "A sound finds videos, a picture finds sounds."),
    "train": ("cavmae.cluster.train", "Pretrain or fine-tune on Ray, restarted after failures."),
    "submit": ("cavmae.cluster.jobs:submit", "Start `train` as a job of a Ray cluster."),
    "status": ("cavmae.cluster.jobs:status", "How jobs and runs are."),
    "logs": ("cavmae.cluster.jobs:logs", "What a job or one of its ranks has said."),
    "stop": ("cavmae.cluster.jobs:stop", "Ask a job or a run to save and leave."),
    "queue": (
        "cavmae.cluster.experiments.queue",
        "Run the experiments of a file, and compare them.",
    ),
    "sweep": (
        "cavmae.cluster.experiments.sweep",
        "Search fields with Ray Tune, giving up what falls behind.",
    ),
    "cluster-files": ("cavmae.cluster.manifests", "Files for Kubernetes, Slurm and clouds."),
    "doctor": ("cavmae.cluster.local.doctor", "Whether this machine can train, and what it lacks."),
    "demo": (
        "cavmae.cluster.local.demo",
        "Generate videos, pack them, train and evaluate, on a CPU.",
    ),
    "demo-full": (
        "cavmae.cluster.local.demo_full",
        "That, and all that the model is for, to an export.",
    ),
}
BENCHMARKS = {
    "step": ("cavmae.benchmarks.step.step", "Time of a training step, with memory and FLOP/s."),
    "choices": ("cavmae.benchmarks.step.ablations", "What each choice about a step is worth here."),
    "train": ("cavmae.benchmarks.training.train", "The training loop, and a step's time by parts."),
    "kernels": ("cavmae.benchmarks.kernels.bench", "Kernels against torch and published methods."),
    "data": (
        "cavmae.benchmarks.data.loader",
        "The loader against the published one and raw video.",
    ),
    "tiers": (
        "cavmae.benchmarks.data.tiers",
        "Size, cost and quality of each way to store a clip.",
    ),
    "faults": ("cavmae.benchmarks.faults.faults", "What a run makes of each fault, done for real."),
    "soak": (
        "cavmae.benchmarks.faults.soak",
        "One run for an hour with a fault every few minutes.",
    ),
    "overhead": ("cavmae.benchmarks.training.overhead", "What Ray and checkpoints add to a step."),
    "shuffle": (
        "cavmae.benchmarks.data.shuffle_quality",
        "The order of samples against a perfect shuffle.",
    ),
    "storage-faults": (
        "cavmae.benchmarks.data.storage_faults",
        "The loader under kills and a failing store.",
    ),
    "scaling": ("cavmae.benchmarks.training.scaling", "A step on 1 to 4,096 GPUs, computed."),
    "gpu-check": ("cavmae.benchmarks.gpu.check", "Check kernels and model on this GPU."),
    "video-check": ("cavmae.benchmarks.gpu.nvdec", "Check video decoding on this GPU (NVDEC)."),
    "memory": (
        "cavmae.benchmarks.training.memory",
        "What a run is said to take, and what it takes.",
    ),
    "autotune": (
        "cavmae.benchmarks.training.autotune",
        "The fields with which a run is fastest here.",
    ),
    "all": ("cavmae.benchmarks.report.suite", "What this machine can measure within a time."),
    "compare": (
        "cavmae.benchmarks.report.compare",
        "What became slower from one record to another.",
    ),
    "report": ("cavmae.benchmarks.report.report", "The newest records as a page with plots."),
}
EVALUATIONS = {
    "classify": (
        "cavmae.trainer.evaluation.classify",
        "Labels by a fine-tuned run: mAP, AUC, accuracy.",
    ),
    "probe": (
        "cavmae.trainer.evaluation.probe",
        "Labels from frozen features, beside random weights.",
    ),
    "retrieve": (
        "cavmae.trainer.evaluation.retrieve",
        "Does a sound find its picture, and the other way?",
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
    # The deepspeed launcher puts this first; LOCAL_RANK in the environment says the same.
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
    return exit_code(getattr(importlib.import_module(module), function or "main"), words[1:])


def _usage(program: str, commands: dict[str, tuple[str, str]], more: dict[str, str]) -> str:
    lines = {name: text for name, (_, text) in commands.items()} | more
    width = max(map(len, lines))
    return "\n".join(
        [f"usage: {program} COMMAND [...]", ""]
        + [f"  {name:<{width}}  {text}" for name, text in lines.items()]
        + ["", f"`{program} COMMAND --help` lists a command's own options."]
    )
