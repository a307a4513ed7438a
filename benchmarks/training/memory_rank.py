"""One rank that trains a few steps on random clips and reports the memory of its process.

python -m cavmae.benchmarks.training.memory_rank CONFIG OUTPUT
"""

import dataclasses
import gc
import itertools
import sys
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from cavmae.atomic_write import write_json
from cavmae.benchmarks.harness.synthetic_batches import TINY_MODEL
from cavmae.trainer.config.configs import PretrainConfig
from cavmae.trainer.config.resolve import step_shares
from cavmae.trainer.config.serialize import load_config
from cavmae.trainer.distributed.env import limit_threads, ranks_from_environment

if TYPE_CHECKING:  # torch is imported after the threads are set
    from cavmae.dataloaders.batch import AudioVideoBatch

WARM_UP_STEPS = 2
"""Stage 3 learns the order of modules, and allocators fill their caches."""
STEPS = 5


def measure(config: PretrainConfig) -> dict[str, object]:
    """Train and measure; every rank calls it.

    Returns:
        `before_bytes`, resident after training a tiny model, clips included; `peak_bytes`,
        of each step.
    """
    ranks = ranks_from_environment()
    limit_threads(config.threads_per_rank, ranks)
    import torch.distributed as dist

    from cavmae.benchmarks.harness.process_memory import reset_peak, resident_bytes
    from cavmae.benchmarks.harness.synthetic_batches import SyntheticBatches
    from cavmae.dataloaders.config import ClipShape
    from cavmae.trainer.cost_model.run_rates import peak_bytes
    from cavmae.trainer.distributed.engine import Engine
    from cavmae.trainer.distributed.process_group import start_process_group
    from cavmae.trainer.tasks.build_model import configure_blocks
    from cavmae.trainer.tasks.pretrain import PretrainTask

    device = start_process_group(ranks)
    shares = step_shares(config, ranks.world_size)

    def clips(config: PretrainConfig) -> "list[AudioVideoBatch]":
        shape = config.model
        batches = SyntheticBatches(
            config.data,
            ClipShape(shape.audio_frames, shape.mel_bins, shape.image_size),
            shares=shares,
            rank=ranks.rank,
            device=device,
        )
        return list(itertools.islice(batches, shares.accumulation))

    def peaks(config: PretrainConfig, parts: "list[AudioVideoBatch]") -> list[int]:
        task = PretrainTask(config, ranks, device)
        model, groups = task.build_model()
        configure_blocks(model, config.engine)
        engine = Engine(
            model,
            config.engine,
            config.optimizer,
            micro_batch=config.micro_batch,
            accumulation=shares.accumulation,
            device=device,
            groups=groups,
        )
        found = []
        for _ in range(WARM_UP_STEPS + STEPS):
            dist.barrier()
            reset_peak()
            task.begin_step(engine, parts)
            for number, part in enumerate(parts):
                engine.backward(task.loss(engine, part))
                if number + 1 < len(parts):
                    engine.accumulate()
            engine.update(1e-5)
            found.append(peak_bytes(device))
        return found[WARM_UP_STEPS:]

    # The first steps load code into memory, and libraries allocate their buffers.
    small = dataclasses.replace(config, model=TINY_MODEL)
    peaks(small, clips(small))
    gc.collect()
    parts = clips(config)
    before = resident_bytes()
    return {"before_bytes": before, "peak_bytes": peaks(config, parts)}


def main(arguments: list[str]) -> NoReturn:
    """Measure the run of a saved configuration; rank 0 writes the result. Does not return."""
    config, output = load_config(arguments[0], PretrainConfig), Path(arguments[1])
    found = measure(config)
    if ranks_from_environment().rank == 0:
        write_json(output, found)
    from cavmae.trainer.distributed.process_group import end_rank

    end_rank()


if __name__ == "__main__":
    main(sys.argv[1:])
