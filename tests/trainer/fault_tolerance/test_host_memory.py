"""The memory of a machine is what its control groups leave of it."""

from pathlib import Path

import pytest

from cavmae.trainer.fault_tolerance.host_memory import Memory, machine_memory


def test_the_memory_is_that_of_the_control_group(tmp_path: Path) -> None:
    for folder in ("proc", "sys/fs/cgroup/memory"):
        (tmp_path / folder).mkdir(parents=True)
    meminfo = "MemTotal: 8000 kB\nMemFree: 1000 kB\nMemAvailable: 6000 kB\n"
    (tmp_path / "proc/meminfo").write_text(meminfo)
    assert machine_memory(tmp_path) == Memory(8_192_000, 6_144_000)
    group = tmp_path / "sys/fs/cgroup"
    (group / "memory/memory.limit_in_bytes").write_text("9223372036854771712\n")
    (group / "memory/memory.usage_in_bytes").write_text("4096\n")
    assert machine_memory(tmp_path) == Memory(8_192_000, 6_144_000)
    (group / "memory.max").write_text("max\n")
    assert machine_memory(tmp_path) == Memory(8_192_000, 6_144_000)
    (group / "memory.max").write_text("4000000\n")
    (group / "memory.current").write_text("1000000\n")
    assert machine_memory(tmp_path) == Memory(4_000_000, 3_000_000)


def test_files_in_the_cache_of_a_control_group_count_as_free(tmp_path: Path) -> None:
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/meminfo").write_text("MemTotal: 9000 kB\nMemAvailable: 8000 kB\n")
    group = tmp_path / "sys/fs/cgroup"
    group.mkdir(parents=True)
    for name, text in (
        ("memory.max", "4000000\n"),
        ("memory.current", "3900000\n"),
        ("memory.stat", "anon 900000\ninactive_file 3000000\n"),
    ):
        (group / name).write_text(text)
    assert machine_memory(tmp_path) == Memory(4_000_000, 3_100_000)


@pytest.mark.parametrize(
    ("place", "line", "limit", "used"),
    [
        ("slice/job", "0::/slice/job/step", "memory.max", "memory.current"),
        (
            "memory/slurm",
            "7:memory:/slurm/step",
            "memory.limit_in_bytes",
            "memory.usage_in_bytes",
        ),
    ],
    ids=["version 2", "version 1"],
)
def test_a_limit_of_this_process_or_above_it_counts(
    tmp_path: Path, place: str, line: str, limit: str, used: str
) -> None:
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/meminfo").write_text("MemTotal: 9000 kB\nMemAvailable: 8000 kB\n")
    (tmp_path / "proc/self/cgroup").write_text(f"3:cpu,cpuacct:/elsewhere\n{line}\n")
    group = tmp_path / "sys/fs/cgroup" / place
    group.mkdir(parents=True)
    (group / limit).write_text("2000000\n")
    (group / used).write_text("500000\n")
    assert machine_memory(tmp_path) == Memory(2_000_000, 1_500_000)


def test_this_machine_has_memory() -> None:
    memory = machine_memory()
    assert 0 < memory.available <= memory.total
