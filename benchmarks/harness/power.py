"""Energy of a machine during a measurement, where a user may read it.

On a GPU the driver reports its power ten times a second. On a CPU the packages count their energy
(RAPL), which most systems show to root alone, and virtual machines not at all. Energy that can't be
read is None with the reason.
"""

import re
import shutil
import statistics
import subprocess
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

POWERCAP = Path("/sys/class/powercap")
_INTERVAL_MILLISECONDS = 100


@dataclass(frozen=True)
class Energy:
    """Energy of a measurement. Attributes: joules, None where they can't be read; watts, their
    mean; source of the numbers, or why there are none."""

    joules: float | None
    watts: float | None
    source: str

    def record(self, samples: int) -> dict[str, Any]:
        """Return the record's entry, with the energy of each sample trained meanwhile."""
        each = None if self.joules is None else self.joules / samples
        return asdict(self) | {"joules_per_sample": each}


def power_meter(
    device: torch.device, powercap: Path = POWERCAP
) -> "_Unreadable | _PackageCounters | _DriverPower":
    """Return the meter of a device, which measures from `start` to `stop`; one that is not
    `readable` only returns the reason.

    Args:
        device: one GPU, or the CPU with all its packages.
        powercap: Linux's folder of energy counters.
    """
    if device.type == "cuda":
        if shutil.which("nvidia-smi") is None:
            return _Unreadable("nvidia-smi is not on the PATH")
        return _DriverPower(f"GPU-{torch.cuda.get_device_properties(device).uuid}")
    counters = [
        zone
        for zone in sorted(powercap.glob("intel-rapl:*"))
        if (zone / "name").is_file() and (zone / "name").read_text().startswith("package")
    ]
    if not counters:
        return _Unreadable(f"no energy counter of a CPU package in {powercap}")
    try:
        return _PackageCounters(counters)
    except PermissionError as error:
        return _Unreadable(f"{error.filename} may not be read by this user")


class _Unreadable:
    """Reads nothing, and returns the reason."""

    readable = False

    def __init__(self, reason: str) -> None:
        self._reason = reason

    def start(self) -> None: ...

    def stop(self) -> Energy:
        return Energy(None, None, self._reason)


class _PackageCounters:
    """Reads counters of microjoules that wrap around at their range."""

    readable = True

    def __init__(self, zones: list[Path]) -> None:
        self._zones = zones
        self._ranges = [int((zone / "max_energy_range_uj").read_text()) for zone in zones]
        self._before = self._read()

    def _read(self) -> list[int]:
        return [int((zone / "energy_uj").read_text()) for zone in self._zones]

    def start(self) -> None:
        self._before, self._began = self._read(), time.monotonic()

    def stop(self) -> Energy:
        pairs = zip(self._read(), self._before, self._ranges, strict=True)
        joules = sum((after - before) % (most + 1) for after, before, most in pairs) / 1e6
        watts = joules / (time.monotonic() - self._began)
        return Energy(joules, watts, f"RAPL, {len(self._zones)} CPU packages")


class _DriverPower:
    """Multiplies the mean power of `nvidia-smi` by the time."""

    readable = True

    def __init__(self, gpu: str) -> None:
        self._gpu = gpu

    def start(self) -> None:
        self._process: subprocess.Popen[str] = subprocess.Popen(
            [
                *("nvidia-smi", "-i", self._gpu, "--query-gpu=power.draw"),
                *("--format=csv,noheader,nounits", "-lms", str(_INTERVAL_MILLISECONDS)),
            ],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        self._began = time.monotonic()

    def stop(self) -> Energy:
        seconds = time.monotonic() - self._began
        self._process.terminate()
        assert self._process.stdout is not None
        printed = [line for line in map(str.strip, self._process.stdout) if line]
        self._process.wait()
        watts = [float(line) for line in printed if re.fullmatch(r"[\d.]+", line)]
        if not watts:
            return Energy(None, None, f"nvidia-smi gave no power: {printed[:1]}")
        mean = statistics.fmean(watts)
        return Energy(mean * seconds, mean, f"nvidia-smi, {len(watts)} readings")
