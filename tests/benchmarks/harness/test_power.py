"""Energy is read where a machine shows it, and is absent with the reason where it doesn't."""

from pathlib import Path

import pytest
import torch

from cavmae.benchmarks.harness import power
from cavmae.benchmarks.harness.power import Energy, power_meter

CPU = torch.device("cpu")


def counter(folder: Path, zone: str, name: str, microjoules: int, most: int = 10**9) -> Path:
    """A zone as Linux lays it out; returns the file with its energy."""
    path = folder / zone
    path.mkdir(parents=True, exist_ok=True)
    (path / "name").write_text(f"{name}\n")
    (path / "max_energy_range_uj").write_text(f"{most}\n")
    (path / "energy_uj").write_text(f"{microjoules}\n")
    return path / "energy_uj"


class Clock:
    """A clock that goes only when it is told to."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 100.0
        monkeypatch.setattr(power.time, "monotonic", lambda: self.now)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


def test_packages_of_a_cpu_are_added_up_and_their_parts_are_not(
    tmp_path: Path, clock: Clock
) -> None:
    packages = [counter(tmp_path, f"intel-rapl:{n}", f"package-{n}", 0) for n in range(2)]
    core = counter(tmp_path, "intel-rapl:0:0", "core", 0)
    meter = power_meter(CPU, tmp_path)
    assert meter.readable
    meter.start()
    for file, joules in zip([*packages, core], (3, 4, 2), strict=True):
        file.write_text(str(joules * 10**6))
    clock.now += 2
    energy = meter.stop()
    assert energy == Energy(joules=7, watts=3.5, source="RAPL, 2 CPU packages")


def test_a_counter_that_began_anew_has_gone_on(tmp_path: Path, clock: Clock) -> None:
    file = counter(tmp_path, "intel-rapl:0", "package-0", 9_500_000, most=9_999_999)
    meter = power_meter(CPU, tmp_path)
    meter.start()
    file.write_text("500000")
    clock.now += 2
    assert meter.stop().joules == 1


def test_no_counters_are_a_reason(tmp_path: Path) -> None:
    meter = power_meter(CPU, tmp_path)
    assert not meter.readable
    meter.start()
    expected = f"no energy counter of a CPU package in {tmp_path}"
    assert meter.stop() == Energy(None, None, expected)


def test_energy_of_each_sample() -> None:
    assert Energy(60.0, 30.0, "x").record(samples=12)["joules_per_sample"] == 5
    assert Energy(None, None, "x").record(samples=12)["joules_per_sample"] is None


@pytest.mark.parametrize(
    ("says", "watts", "joules"),
    [("300.0\n310.0\n[N/A]\n", 305.0, 1220.0), ("No devices were found\n", None, None)],
)
def test_a_gpus_energy_is_the_mean_power_that_its_driver_says_times_the_time(
    says: str,
    watts: float | None,
    joules: float | None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    clock: Clock,
) -> None:
    program = tmp_path / "nvidia-smi"
    program.write_text(
        f"#!/bin/sh\nprintf '{says}'\necho \"$@\" > {tmp_path}/asked\nexec sleep 60\n"
    )
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    meter = power._DriverPower("GPU-1234")
    meter.start()
    while not (tmp_path / "asked").exists() or not (tmp_path / "asked").read_text():
        pass
    clock.now += 4
    energy = meter.stop()
    assert energy.watts == watts
    assert energy.joules == joules
    assert "-i GPU-1234 --query-gpu=power.draw" in (tmp_path / "asked").read_text()
