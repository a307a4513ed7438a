"""The time that one rank computes in a step, alone: passes of its micro-batches, and the update."""

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import replace

from cavmae.trainer.config.configs import PretrainConfig, RunConfig
from cavmae.trainer.cost_model.comm_volume import (
    TensorSizes,
    element_bytes,
    embeds_first,
    micro_batches,
)
from cavmae.trainer.cost_model.kernel import ADAM_BYTES, Kernel
from cavmae.trainer.cost_model.kernel_time import Ceilings, Range, Times, kernel_times
from cavmae.trainer.cost_model.step_work import micro_batch_work


def rank_work(
    config: RunConfig,
    tensors: TensorSizes,
    world_size: int,
    count: Callable[..., list[Kernel]] = micro_batch_work,
) -> dict[str, list[Kernel]]:
    """Count the kernels of a step of a rank with a GPU: `embedding` (the first pass of groups that
    span micro-batches), `forward`, `backward`, `gradients` (their accumulation) and `update`.

    Args:
        config: resolved; `engine.dtype` is bf16 or fp32.
        tensors: of its model.
        world_size: ranks.
        count: counts a micro-batch.
    """
    passes = count(config, gpu=True)
    each = {
        during: [one for one in passes if one.during == during]
        for during in ("forward", "backward")
    }
    if isinstance(config, PretrainConfig) and embeds_first(config, world_size):
        each = {"embedding": count(config, gpu=True, embeddings_alone=True)} | each
    each["gradients"] = _accumulation(config, tensors)
    times = micro_batches(config, world_size)
    found = {
        name: [replace(one, calls=times * one.calls) for one in kernels]
        for name, kernels in each.items()
    }
    return found | {"update": _engine_update(config, tensors, world_size)}


def rank_times(work: dict[str, list[Kernel]], ceilings: Ceilings) -> dict[str, Times]:
    """Return the time of each part of `rank_work` on a machine."""
    return {name: kernel_times(kernels, ceilings) for name, kernels in work.items()}


def step_seconds(times: dict[str, Times]) -> Range:
    """Return the time of a step: the host does not wait between its parts."""
    return sum(times.values(), Times()).total


def _accumulation(config: RunConfig, tensors: TensorSizes) -> list[Kernel]:
    """Count DeepSpeed's kernels for the gradients of a micro-batch: each is added, by itself, to a
    buffer, in float32 where weights are bf16."""
    element = element_bytes(config)
    return _each("accumulate", element + 8, tensors.trainable)


def _engine_update(config: RunConfig, tensors: TensorSizes, world_size: int) -> list[Kernel]:
    """Count the kernels of an update: the norm of each gradient, its clipping, Adam in one pass
    over a rank's share, and bf16 weights from it. Stage 1 in bf16 has all gradients in one tensor.

    Source: `deepspeed/runtime/bf16_optimizer.py` and `runtime/utils.py` of DeepSpeed 0.19.
    """
    share = world_size if config.engine.zero_stage else 1
    flat = config.engine.zero_stage == 1 and config.engine.dtype == "bf16"
    gradients = (sum(tensors.trainable),) if flat else tensors.trainable
    work = _each("norm", 4, gradients)
    if config.engine.clip_grad_norm:
        work += _each("clip", 8, gradients)
    work += _each("adam", ADAM_BYTES, (sum(tensors.trainable) // share,))
    if element_bytes(config) == 2:
        work += _each("copy", 6, [size // share for size in gradients])
    return work


def _each(name: str, bytes_each: int, sizes: Iterable[int]) -> list[Kernel]:
    """Return a kernel for each tensor of the update, equal ones as one entry."""
    return [
        Kernel("update", "", "other", name, (), "", 0, bytes_each * size, calls)
        for size, calls in Counter(sizes).items()
    ]
