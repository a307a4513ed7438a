"""A trace of some steps of a run by torch's profiler: what the CPU and the GPU did.

Every rank writes its own, which shows who waits for whom. Only the steps of `profile` are recorded;
on a GPU, the history of allocations for the snapshot of an out-of-memory error covers these steps
alone as well.
"""

import gzip
import logging
import os
import shutil
import tempfile
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile, schedule

from cavmae.atomic_write import atomic_write
from cavmae.trainer.config.configs import ProfileConfig

log = logging.getLogger(__name__)

OPERATORS_SHOWN = 8
_HISTORY_ENTRIES = 100_000
"""Allocations and frees that are kept; each costs microseconds."""


class StepProfile:
    """Traces the steps that `config` names, counted from the first of this attempt.

    Args:
        config: which steps; none by default.
        folder: where the traces are written.
        rank: this process's rank.
        start_step: optimizer steps done before this attempt.
        device: this rank's device.
    """

    def __init__(
        self,
        config: ProfileConfig,
        folder: Path,
        *,
        rank: int,
        start_step: int,
        device: torch.device,
    ) -> None:
        self._config, self._device = config, device
        first = start_step + config.after_steps
        self._path = folder / f"step-{first:09d}-rank-{rank}.json.gz"
        self._profiler: profile | None = None
        self._steps_done = 0  # in this attempt
        self._written = False
        if config.steps:
            # Kineto, torch's recorder, would print when it starts and stops.
            os.environ.setdefault("KINETO_LOG_LEVEL", "6")
            activities = [ProfilerActivity.CPU]
            if device.type == "cuda":
                activities.append(ProfilerActivity.CUDA)
            self._profiler = profile(
                activities=activities,
                # The step before the first is traced and discarded: tracing has to warm up too.
                schedule=schedule(
                    wait=config.after_steps - 1, warmup=1, active=config.steps, repeat=1
                ),
                on_trace_ready=self._write,
                profile_memory=True,
            )
            self._profiler.start()

    @property
    def ends(self) -> bool:
        """Whether the current step is the last traced one: `step` will write the trace, which may
        take longer than a step."""
        last = self._config.after_steps + self._config.steps
        return self._profiler is not None and self._steps_done + 1 == last

    def step(self) -> None:
        """Count a step that is done."""
        if self._profiler is None:
            return
        self._profiler.step()
        self._steps_done += 1
        if self._steps_done == self._config.after_steps and self._device.type == "cuda":
            torch.cuda.memory._record_memory_history(max_entries=_HISTORY_ENTRIES)
        if self._written:
            self._profiler = None
            if self._device.type == "cuda":
                torch.cuda.memory._record_memory_history(enabled=None)

    def close(self) -> None:
        """Write the part of a trace that was not finished.

        The history of allocations stays: a run may end in a profiled step because it is out of
        memory, and its snapshot is written later.
        """
        if self._profiler is None:
            return
        self._profiler.stop()
        if not self._written:
            log.warning(
                "profile.after_steps is %d, which this attempt did not reach: no trace",
                self._config.after_steps,
            )
        self._profiler = None

    def _write(self, profiler: profile) -> None:
        self._written = True
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory() as folder, atomic_write(self._path) as temporary:
                trace = Path(folder) / "trace.json"
                profiler.export_chrome_trace(str(trace))
                with trace.open("rb") as source, gzip.open(temporary, "wb") as target:
                    shutil.copyfileobj(source, target)
        except (OSError, RuntimeError) as error:  # the other ranks wait, and the run is worth more
            log.warning("the trace %s could not be written: %s", self._path, error)
            return
        log.info(
            "trace of steps: %s, and one for each rank; open it at https://ui.perfetto.dev, which "
            "uploads nothing",
            self._path,
        )
        log.info("operators that took most time:\n%s", _operators(profiler, self._device))


def _operators(profiler: profile, device: torch.device) -> str:
    """List the operators with the most self time on the device, a line each."""
    name = "self_device_time_total" if device.type == "cuda" else "self_cpu_time_total"
    found = [one for one in profiler.key_averages() if not one.key.startswith("ProfilerStep")]
    total = sum(getattr(one, name) for one in found) or 1.0
    found.sort(key=lambda one: getattr(one, name), reverse=True)
    return "\n".join(
        f"  {getattr(one, name) / total:6.1%} {getattr(one, name) / 1e3:10.1f} ms "
        f"{one.count:7d} times  {one.key}"
        for one in found[:OPERATORS_SHOWN]
    )
