"""The `cavmae` command. A subcommand's module is imported once the command is known, so that
`cavmae --help` is fast and a missing optional package matters only to the commands that need it."""

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
        "Pictures and sounds that a model reconstructs.",
    ),
    "curve": (
        "cavmae.trainer.evaluation.curve",
        "Plot a run's metrics over those of a published log.",
    ),
    "export": ("cavmae.trainer.release.export", "Export a trained model: Hub, graphs."),
    "embed": ("cavmae.cluster.embed", "Embeddings of a packed set, as Parquet files."),
    "search": ("cavmae.trainer.embeddings.search", "A sound finds videos, a picture finds sounds."),
    "train": ("cavmae.cluster.train", "Pretrain or fine-tune on Ray, restarted after failures."),
    "submit": ("cavmae.cluster.jobs:submit", "Start `train` as a job of a Ray cluster."),
    "status": ("cavmae.cluster.jobs:status", "State of jobs and runs."),
    "logs": ("cavmae.cluster.jobs:logs", "Log of a job or of one of its ranks."),
    "stop": ("cavmae.cluster.jobs:stop", "Save a checkpoint and stop a job or a run."),
    "queue": (
        "cavmae.cluster.experiments.queue",
        "Run the experiments of a file, and compare them.",
    ),
    "sweep": (
        "cavmae.cluster.experiments.sweep",
        "Search fields with Ray Tune; bad trials stop early.",
    ),
    "cluster-files": ("cavmae.cluster.manifests", "Files for Kubernetes, Slurm and clouds."),
    "doctor": ("cavmae.cluster.local.doctor", "Check whether this machine can train."),
    "demo": (
        "cavmae.cluster.local.demo",
        "Generate videos, pack them, train and evaluate, on a CPU.",
    ),
    "demo-full": (
        "cavmae.cluster.local.demo_full",
        "The demo, then every use of the model, to an export.",
    ),
}
BENCHMARKS = {
    "step": ("cavmae.benchmarks.step.step", "Time of a training step, with memory and FLOP/s."),
    "ablations": (
        "cavmae.benchmarks.step.ablations",
        "What each choice about a step is worth on this machine.",
    ),
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
    "faults": ("cavmae.benchmarks.faults.faults", "Recovery of a run from each real fault."),
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
    "golden": (
        "cavmae.benchmarks.conformance.golden",
        "Conformance with a folder of reference numbers.",
    ),
    "gpu-check": ("cavmae.benchmarks.gpu.check", "Check kernels and model on this GPU."),
    "nvdec": ("cavmae.benchmarks.gpu.nvdec", "Check video decoding on this GPU (NVDEC)."),
    "memory": (
        "cavmae.benchmarks.training.memory",
        "Predicted peak memory of a step against the measured one.",
    ),
    "autotune": (
        "cavmae.benchmarks.training.autotune",
        "Find the fields with which a run is fastest on this machine.",
    ),
    "all": (
        "cavmae.benchmarks.report.suite",
        "All benchmarks that fit this machine and a time budget.",
    ),
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
    return exit_code(getattr(importlib.import_module(module), function or "main"), words[1:])


def _usage(program: str, commands: dict[str, tuple[str, str]], more: dict[str, str]) -> str:
    lines = {name: text for name, (_, text) in commands.items()} | more
    width = max(map(len, lines))
    return "\n".join(
        [f"usage: {program} COMMAND [...]", ""]
        + [f"  {name:<{width}}  {text}" for name, text in lines.items()]
        + ["", f"`{program} COMMAND --help` lists a command's own options."]
    )
