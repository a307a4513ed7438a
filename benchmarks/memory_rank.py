"""One rank that trains a few steps on random clips and says how much memory its process took.

    python -m cavmae.benchmarks.memory_rank CONFIG OUTPUT

Resident memory is the kernel's count, whose peak is set back before each step
(`/proc/self/clear_refs`, Linux 4.0 and later).
"""

import dataclasses
import gc
import sys
from pathlib import Path

from cavmae.trainer.config import PretrainConfig
from cavmae.trainer.model.config import ModelConfig
from cavmae.trainer.ranks import limit_threads, ranks_from_environment
from cavmae.trainer.run_folder import load_config, write_json

WARM_UP_STEPS = 2
"""Stage 3 learns the order of modules, and allocators what they keep."""
STEPS = 4
SMALLEST = ModelConfig(
    audio_frames=32,
    mel_bins=32,
    image_size=32,
    width=32,
    modality_depth=1,
    heads=2,
    decoder_width=32,
    decoder_depth=1,
    decoder_heads=2,
)
"""A model that takes next to nothing."""


def resident_bytes(line: str) -> int:
    """Of this process: `VmRSS`, now, or `VmHWM`, the most since it was last set back."""
    status = Path("/proc/self/status").read_text()
    found = next(one for one in status.splitlines() if one.startswith(f"{line}:"))
    return int(found.split()[1]) * 1024


def set_peak_back() -> None:
    """`VmHWM` begins again at what is resident now."""
    Path("/proc/self/clear_refs").write_text("5")


def measure(config: PretrainConfig) -> dict[str, object]:
    """Train and look; every rank calls it.

    Returns:
        `before_bytes`, resident when a model that takes next to nothing has been trained; `peak_bytes`, of each step.
    """
    ranks = ranks_from_environment()
    limit_threads(config.threads_per_rank, ranks)
    import numpy as np
    import torch
    import torch.distributed as dist

    from cavmae.dataloaders.batch import AudioVideoBatch
    from cavmae.dataloaders.plan import rank_positions
    from cavmae.trainer.engine import Engine, start_process_group
    from cavmae.trainer.pretraining import Pretraining

    device = start_process_group(ranks)

    def clips(shape: ModelConfig, positions: np.ndarray) -> AudioVideoBatch:
        count = len(positions)
        return AudioVideoBatch(
            log_mel=torch.randn(count, shape.audio_frames, shape.mel_bins),
            frames=torch.randn(count, 1, 3, shape.image_size, shape.image_size),
            positions=torch.from_numpy(positions),
            epochs=torch.zeros(count, dtype=torch.int64),
            sample_ids=tuple(map(str, positions)),
            labels=((),) * count,
            frame_seconds=torch.zeros(count, 1),
            audio_seconds=torch.zeros(count, 2),
            shares=torch.ones(count),
            mixed_labels=((),) * count,
        )

    def peaks_of(config: PretrainConfig) -> list[int]:
        times = config.global_batch // ranks.world_size // config.micro_batch
        own = rank_positions(0, ranks.rank, ranks.world_size, config.global_batch, config.lanes)
        parts = [clips(config.model, part) for part in np.split(own, times)]
        ahead = [clips(config.model, own[: config.micro_batch])] * config.data.prefetch_batches
        assert len(ahead) == 1  # what a loader would hold ready
        stage = Pretraining(config, ranks, device)
        model, groups = stage.model()
        engine = Engine(
            model,
            config.engine,
            config.optimizer,
            micro_batch=config.micro_batch,
            accumulation=times,
            device=device,
            groups=groups,
        )
        task = stage.task(lambda: None)
        peaks = []
        for _ in range(WARM_UP_STEPS + STEPS):
            dist.barrier()
            set_peak_back()
            task.begin_step(engine, parts)
            for number, part in enumerate(parts):
                engine.backward(task.loss(engine, part))
                if number + 1 < times:
                    engine.count_micro_batch()
            engine.update(1e-5)
            peaks.append(resident_bytes("VmHWM"))
        return peaks[WARM_UP_STEPS:]

    # Code that is run for the first time is read into memory, and libraries make their buffers.
    peaks_of(dataclasses.replace(config, model=SMALLEST))
    gc.collect()
    before = resident_bytes("VmRSS")
    return {"before_bytes": before, "peak_bytes": peaks_of(config)}


def main(arguments: list[str]) -> int:
    """Measure the run of a saved configuration; rank 0 writes what it found."""
    config, output = load_config(arguments[0], PretrainConfig), Path(arguments[1])
    found = measure(config)
    if ranks_from_environment().rank == 0:
        write_json(output, found)
    from cavmae.trainer.engine import end_rank

    end_rank()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
