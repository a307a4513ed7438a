"""What to change where a run's memory does not suffice: fields that keep its result as it is."""

import dataclasses
import functools
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from cavmae.trainer.config.configs import EngineConfig, RunConfig
from cavmae.trainer.cost_model.activations import ActivationTimeline, count_passes
from cavmae.trainer.cost_model.memory import Sizes, footprint
from cavmae.trainer.model.blocks import Recompute

_STAGES = (1, 2, 3)
_RECOMPUTED: tuple[Recompute, ...] = ("none", "selective", "full")
"""More from one to the next."""


@dataclass(frozen=True)
class _Change:
    """Of one thing.

    Attributes:
        flags: as a command line has them.
        micro_batch: samples; 0: as they are.
        engine: new values of its fields, by name.
    """

    flags: str
    micro_batch: int = 0
    engine: dict[str, Any] = dataclasses.field(default_factory=dict)


def advice(
    config: RunConfig,
    sizes: Sizes,
    world_size: int,
    limit_bytes: int,
    *,
    gpu: bool,
    begun: bool = False,
) -> str:
    """The end of a line that refuses a run; arguments as of `what_would_fit`."""
    found = list(what_would_fit(config, sizes, world_size, limit_bytes, gpu=gpu, begun=begun))
    if found:
        return f"what fits: {' or '.join(found)}"
    return "no change of its batches or engine fits: use more ranks, or a smaller model"


def what_would_fit(
    config: RunConfig,
    sizes: Sizes,
    world_size: int,
    limit_bytes: int,
    *,
    gpu: bool,
    begun: bool = False,
) -> Iterator[str]:
    """Flags with each of which the run fits, the smallest loss of speed first: single changes, or
    where none is enough, as few of them together as are.

    Args:
        config: resolved.
        sizes: of its model.
        world_size: ranks.
        limit_bytes: that a rank has.
        gpu: whether the ranks have GPUs.
        begun: whether the run has checkpoints, which hold it to its ZeRO stage.
    """

    @functools.cache
    def passes(recompute: Recompute) -> ActivationTimeline:
        engine = dataclasses.replace(config.engine, activation_checkpointing=recompute)
        return count_passes(dataclasses.replace(config, engine=engine))

    def fits(changes: Sequence[_Change]) -> bool:
        changed = _changed(config, changes)
        if changed is None:
            return False
        kept = sizes
        recompute = changed.engine.activation_checkpointing
        if recompute != config.engine.activation_checkpointing:
            kept = Sizes(sizes.tensors, passes(recompute))
        return footprint(changed, kept, world_size, gpu=gpu).total <= limit_bytes

    kinds = _kinds(config, world_size, gpu=gpu, begun=begun)
    for count in range(1, len(kinds) + 1):
        found = False
        for some in itertools.combinations(kinds, count):
            # The last kind costs most: it goes further when the others have gone all the way.
            together = itertools.product(*reversed(some))
            enough = next((changes[::-1] for changes in together if fits(changes)), None)
            if enough is not None:
                found = True
                yield " ".join(change.flags for change in enough)
        if found:
            return


def _kinds(config: RunConfig, world_size: int, *, gpu: bool, begun: bool) -> list[list[_Change]]:
    """Changes of one kind, of which a run takes one; kinds and changes by the speed they cost."""
    per_rank, engine = config.global_batch // world_size, config.engine
    kinds = [
        [
            _Change(f"--micro-batch {samples}", micro_batch=samples)
            for samples in range(config.micro_batch - 1, 0, -1)
            if per_rank % samples == 0
        ]
    ]
    if not begun:
        kinds.append([_sharded(engine, stage) for stage in _STAGES if stage > engine.zero_stage])
    further = _RECOMPUTED[_RECOMPUTED.index(engine.activation_checkpointing) + 1 :]
    kinds.append(
        [
            _Change(
                f"--engine.activation-checkpointing {how}", engine={"activation_checkpointing": how}
            )
            for how in further
        ]
    )
    if gpu and not engine.offload_optimizer:
        kinds.append([_Change("--engine.offload-optimizer", engine={"offload_optimizer": True})])
    return kinds


def _sharded(engine: EngineConfig, stage: int) -> _Change:
    if engine.compile and stage == 3:  # which runs uncompiled
        flags = f"--engine.zero-stage {stage} --engine.no-compile"
        return _Change(flags, engine={"zero_stage": stage, "compile": False})
    return _Change(f"--engine.zero-stage {stage}", engine={"zero_stage": stage})


def _changed(config: RunConfig, changes: Sequence[_Change]) -> RunConfig | None:
    """The run with all of the changes; None where its own checks refuse them together."""
    values: dict[str, Any] = {}
    for change in changes:
        values |= change.engine
    samples = [change.micro_batch for change in changes if change.micro_batch]
    try:
        engine = dataclasses.replace(config.engine, **values)
        micro_batch = samples[0] if samples else config.micro_batch
        return dataclasses.replace(config, engine=engine, micro_batch=micro_batch)
    except ValueError:
        return None
