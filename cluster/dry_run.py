"""`cavmae train RECIPE --dry-run`: predicted memory, placement and speed of a run, without one."""

import dataclasses
import math

from cavmae.cluster.config import RayPretrainConfig, RayRunConfig
from cavmae.cluster.placement import Placement, placement
from cavmae.console import print_rows
from cavmae.dataloaders.sampling.step_shares import StepShares
from cavmae.trainer.config.resolve import native_dtype, resolve, step_shares
from cavmae.trainer.cost_model.comm_volume import (
    TensorSizes,
    collectives,
    sent_by_purpose,
)
from cavmae.trainer.cost_model.gpus import gpu_ceilings, known_gpu
from cavmae.trainer.cost_model.memory import footprint, model_sizes
from cavmae.trainer.cost_model.memory_advice import advice, largest_micro_batch
from cavmae.trainer.cost_model.rank_time import rank_times, rank_work, step_seconds
from cavmae.trainer.cost_model.step_time import (
    CPU_CORE_FLOPS_PER_SECOND,
    Device,
    Links,
    sample_flops,
    step_time,
)
from cavmae.trainer.fault_tolerance.host_memory import machine_memory
from cavmae.trainer.tasks.build_model import ASSUMED_CLASSES

_NODES_SHOWN = 8
_MEMORY = {
    "clips": "clips, prefetched ones included",
    "decoding": "frames that are being decoded",
    "passes": "then: forward and backward passes",
    "reduction": "  or: reduction of gradients",
    "update": "  or: update of the weights",
    "heap_slack": "heap slack (freed memory that glibc keeps)",
    "allowance": "allowance for libraries",
}
"""How the fields of a footprint are shown; the largest part of a step counts."""


def dry_run(config: RayRunConfig, *, ask_cluster: bool = True) -> int:
    """Print each rank's memory and node, for pretraining also communication and speed; returns the
    exit code.

    Args:
        config: the run.
        ask_cluster: place the ranks on the nodes of the cluster that the configuration names.

    Raises:
        ValueError: the ranks do not divide the batch, or a rank's memory is too small, with flags
            that would fit.
    """
    cluster = config.cluster
    if config.engine.dtype == "auto":
        dtype = native_dtype(gpu=cluster.gpus_per_worker > 0)
        config = dataclasses.replace(config, engine=dataclasses.replace(config.engine, dtype=dtype))
    config = resolve(
        config,
        world_size=cluster.workers,
        samples=config.global_batch,  # the set is not opened
        threads=config.threads_per_rank or cluster.cpus_per_worker,
    )
    gpu = cluster.gpus_per_worker > 0
    limit = int(cluster.memory_gb_per_worker * 1e9)
    if not config.micro_batch:
        shared = machine_memory().available // cluster.workers
        here = int(known_gpu(cluster.gpu).memory_bytes) if gpu else shared
        micro_batch = largest_micro_batch(config, cluster.workers, limit or here, gpu=gpu)
        config = dataclasses.replace(config, micro_batch=micro_batch)
    sizes, shares = model_sizes(config), step_shares(config, cluster.workers)
    needed = footprint(config, sizes, cluster.workers, gpu=gpu)
    rows = [
        (_MEMORY.get(name, name), f"{value / 1e9:.2f}")
        for name, value in dataclasses.asdict(needed).items()
    ]
    rows.append((f"all, at the peak ({needed.peak_part})", f"{needed.total / 1e9:.2f}"))
    where = placement(cluster, ask_cluster=ask_cluster)
    lines = _where(where)
    if isinstance(config, RayPretrainConfig):
        found = collectives(config, sizes.tensors, cluster.workers)
        for name, value in sent_by_purpose(found, cluster.workers).items():
            rows.append((f"sent in a step: {name}", f"{value / 1e9:.3f}"))
        lines.append(_how_fast(config, sizes.tensors, where))
    else:
        lines.append(f"computed for {ASSUMED_CLASSES} classes; its speed: cavmae bench predict")
    title = f"{cluster.workers} ranks, {config.engine.dtype}"
    print_rows(("of each rank", "GB"), rows, title=title)
    print(
        f"{sizes.trainable / 1e6:.1f} M trainable parameters, ZeRO {config.engine.zero_stage}; a "
        f"rank takes {config.micro_batch} samples at once, "
        f"{shares.accumulation} times a step; {config.lanes} lanes{_idle(shares)}"
    )
    for line in lines:
        print(line)
    if limit and needed.total > limit:
        raise ValueError(
            f"a rank takes {needed.total / 1e9:.1f} GB and memory_gb_per_worker is "
            f"{cluster.memory_gb_per_worker:g}; "
            + advice(config, sizes, cluster.workers, limit, gpu=gpu)
        )
    return 0


def _idle(shares: StepShares) -> str:
    """Say what is lost where the ranks do not divide the batch."""
    share = shares.global_batch / shares.world_size
    if shares.largest == share:
        return ""
    return (
        f"; {shares.world_size} ranks do not divide global_batch {shares.global_batch}: those "
        f"with {shares.largest - 1} samples wait for those with {shares.largest}, "
        f"{1 - share / shares.largest:.1%} of the time of all"
    )


def _where(found: Placement) -> list[str]:
    lines = [f"placement ({found.rests_on}): nodes {len(found.shares)}"]
    lines += [
        f"  {node}: rank {ranks[0]}" + (f" to {ranks[-1]}" if len(ranks) > 1 else "")
        for node, ranks in found.shares[:_NODES_SHOWN]
    ]
    if len(found.shares) > _NODES_SHOWN:
        lines.append(f"  and {len(found.shares) - _NODES_SHOWN} more nodes")
    if found.waiting:
        lines.append(f"  without a node: {found.waiting}; the run would wait for more nodes")
    return lines


def _how_fast(config: RayPretrainConfig, tensors: TensorSizes, where: Placement) -> str:
    """Say how many samples a second are expected, and what that rests on."""
    cluster = config.cluster
    rows = step_shares(config, cluster.workers).largest
    if cluster.gpus_per_worker:
        gpu = known_gpu(cluster.gpu)
        ceilings = gpu_ceilings(gpu, str(config.engine.dtype))
        alone = step_seconds(rank_times(rank_work(config, tensors, cluster.workers), ceilings))
        products = ceilings.flops_per_second
        devices = [Device(alone.low, products.high), Device(alone.high, products.low)]
        links = Links(ranks_per_node=where.most_on_a_node)
        source = (
            f"counted kernels at what {gpu.name} is expected to reach, NVLink 4 and 400 Gb/s a "
        )
        source += "GPU assumed, no waiting for data"
    else:
        rate = cluster.cpus_per_worker * CPU_CORE_FLOPS_PER_SECOND[str(config.engine.dtype)]
        devices = [Device(rows * sample_flops(config, cluster.workers) / rate, rate)]
        links = Links(within_node=math.inf, between_nodes=math.inf)
        source = (
            f"{rate / 1e12:.3g} TFLOP/s a rank (measured: demo on an AMD EPYC), exchange and data "
            "of demo included"
        )
    times = [step_time(config, tensors, cluster.workers, one, links) for one in devices]
    longest = times[-1]
    parts = ", ".join(
        f"{name} {value / longest.total:.1%}"
        for name, value in dataclasses.asdict(longest).items()
        if value >= 0.001 * longest.total
    )
    rates = " to ".join(f"{config.global_batch / one.total:,.4g}" for one in reversed(times))
    steps = " to ".join(f"{one.total:.3g}" for one in times)
    return (
        f"predicted: {rates} samples/s, {steps} s a step (the longest: {parts}). Not measured: "
        f"{source}; docs/performance/scaling.md"
    )
