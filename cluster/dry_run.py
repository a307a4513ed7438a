"""`cavmae train RECIPE --dry-run`: what a run would take, before it is asked for."""

import dataclasses

from rich.console import Console
from rich.table import Table

from cavmae.cluster.config import RayPretrainConfig
from cavmae.dataloaders.plan import default_lanes
from cavmae.trainer.footprint import footprint, model_sizes, what_would_fit, wire_bytes
from cavmae.trainer.resolve import native_dtype, resolve


def dry_run(config: RayPretrainConfig) -> int:
    """Print memory of each rank and bytes on the wire; returns the exit code.

    Raises:
        ValueError: the ranks cannot share the batch, or a rank's memory is too small, with what
            would fit.
    """
    cluster = config.cluster
    if config.engine.dtype == "auto":
        dtype = native_dtype(gpu=cluster.gpus_per_worker > 0)
        config = dataclasses.replace(config, engine=dataclasses.replace(config.engine, dtype=dtype))
    config = resolve(
        config,
        world_size=cluster.workers,
        samples=config.lanes or default_lanes(config.global_batch),  # the set is not looked at
        threads=config.threads_per_rank or cluster.cpus_per_worker,
    )
    sizes = model_sizes(config)
    needed = footprint(config, sizes, cluster.workers)
    times = config.global_batch // cluster.workers // config.micro_batch
    table = Table("of each rank", "GB", title=f"{cluster.workers} ranks, {config.engine.dtype}")
    for name, value in dataclasses.asdict(needed).items():
        table.add_row(name, f"{value / 1e9:.2f}")
    table.add_row("with an allowance for CUDA, NCCL and DALI", f"{needed.total / 1e9:.2f}")
    sent = wire_bytes(config, sizes, cluster.workers)
    for name, value in sent.items():
        table.add_row(f"sent in a step: {name}", f"{value / 1e9:.3f}")
    console = Console(soft_wrap=True, highlight=False)
    console.print(table)
    console.print(
        f"{sizes.trainable / 1e6:.1f} M trainable parameters, ZeRO {config.engine.zero_stage}; a "
        f"rank takes {config.micro_batch} samples at once, {times} times a step; "
        f"{config.lanes} lanes"
    )
    limit = int(cluster.memory_gb_per_worker * 1e9)
    if limit and needed.total > limit:
        changes = list(what_would_fit(config, sizes, cluster.workers, limit))
        raise ValueError(
            f"a rank takes {needed.total / 1e9:.1f} GB and memory_gb_per_worker is "
            f"{cluster.memory_gb_per_worker:g}; "
            + (f"what fits: {' or '.join(changes)}" if changes else "no other split of it fits")
        )
    return 0
