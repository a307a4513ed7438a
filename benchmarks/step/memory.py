"""Peak memory of a training step on a CPU, measured in a separate process.

torch does not count memory on CPUs, and a process that trained another model still holds pages of
it. So each model gets a process, whose peak is reset before the model is built.
"""

import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool

from cavmae.benchmarks.harness.process_memory import reset_peak, resident_bytes
from cavmae.benchmarks.step.training_step import StepSetting, TrainingStep
from cavmae.trainer.cost_model.run_rates import peak_bytes

STEPS = 2
"""The first one makes the optimizer's state, so the second one holds everything."""


def step_peak_bytes(setting: StepSetting) -> int:
    """Measure the peak of resident memory of a training step on the CPU, beyond what the process
    had before: model, optimizer, batch, activations, and what the allocator holds.

    Args:
        setting: of the step; its device is the CPU.

    Raises:
        OSError: the system does not allow a process to reset its peak.
        RuntimeError: the process was killed, most likely out of memory.
    """
    spawned = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=spawned) as pool:
        try:
            return pool.submit(_peak, setting).result()
        except BrokenProcessPool:
            raise RuntimeError(
                f"the process of a {setting.name} step of batch {setting.batch} in "
                f"{setting.precision} was killed, most likely out of memory; use a smaller "
                "--batch, or --no-memory"
            ) from None


def _peak(setting: StepSetting) -> int:
    before = resident_bytes()
    reset_peak()
    step = TrainingStep(setting)
    for _ in range(STEPS):
        step()
    return peak_bytes(setting.device) - before
