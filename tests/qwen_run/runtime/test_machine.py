"""Cores and memory of a machine made of files."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from qwen_run.runtime import machine

GIB = 2**30


@pytest.fixture
def system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Four cores of two hyperthreads, 8 GiB available, a process in the control group /pod/container."""
    for cpu in range(8):
        write(tmp_path / "cpus" / f"cpu{cpu}" / "topology" / "thread_siblings_list", f"{cpu % 4},{cpu % 4 + 4}\n")
    write(tmp_path / "proc" / "meminfo", f"MemTotal: 99 kB\nMemAvailable:    {8 * GIB // 1024} kB\n")
    write(tmp_path / "proc" / "self" / "cgroup", "1:cpu:/elsewhere\n0::/pod/container\n")
    for name, path in ("_CPUS", "cpus"), ("_PROC", "proc"), ("_CGROUPS", "cgroup"):
        monkeypatch.setattr(machine, name, tmp_path / path)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)), raising=False)
    return tmp_path


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def test_hyperthreads_are_not_cores(system: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert machine.physical_cores() == 4
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 4})
    assert machine.physical_cores() == 2


def test_without_topology_every_cpu_is_a_core(system: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "_CPUS", system / "nothing")
    assert machine.physical_cores() == 8


@pytest.mark.parametrize(
    ("group", "quota", "expected"),
    [
        ("pod/container", "300000 100000", 3),
        ("pod", "250000 100000", 2),
        (".", "50000 100000", 1),
        ("pod", "max 100000", 4),
        ("elsewhere", "100000 100000", 4),
    ],
)
def test_cpu_quota_of_the_group_and_those_around_it(system: Path, group: str, quota: str, expected: int) -> None:
    write(system / "cgroup" / group / "cpu.max", quota)
    assert machine.physical_cores() == expected


@pytest.mark.parametrize(("limit", "expected"), [(str(3 * GIB), 3 * GIB), (str(90 * GIB), 8 * GIB), ("max", 8 * GIB)])
def test_memory_limit(system: Path, limit: str, expected: int) -> None:
    assert machine.available_bytes() == 8 * GIB
    write(system / "cgroup" / "pod" / "memory.max", limit)
    assert machine.available_bytes() == expected


def test_memory_that_a_container_has_used_up(system: Path) -> None:
    write(system / "cgroup" / "pod" / "memory.max", str(3 * GIB))
    write(system / "cgroup" / "pod" / "memory.current", str(2 * GIB))
    assert machine.available_bytes() == 1 * GIB
    write(system / "cgroup" / "pod" / "memory.stat", f"anon 5\ninactive_file {GIB}\n")
    assert machine.available_bytes() == 2 * GIB


V1_GROUPS = """12:memory:/docker/0123
4:cpu,cpuacct:/docker/0123
1:name=systemd:/docker/0123
0::/system.slice/containerd.service
"""


@pytest.mark.parametrize("inside", ["", "docker/0123", "docker"])  # what a container sees, or a process on the host
def test_limits_of_control_groups_of_version_1(system: Path, inside: str) -> None:
    write(system / "proc" / "self" / "cgroup", V1_GROUPS)
    assert (machine.physical_cores(), machine.available_bytes()) == (4, 8 * GIB)
    cpu, memory = system / "cgroup" / "cpu,cpuacct" / inside, system / "cgroup" / "memory" / inside
    write(cpu / "cpu.cfs_quota_us", "250000\n")
    write(cpu / "cpu.cfs_period_us", "100000\n")
    write(memory / "memory.limit_in_bytes", f"{3 * GIB}\n")
    write(memory / "memory.usage_in_bytes", f"{2 * GIB}\n")
    assert (machine.physical_cores(), machine.available_bytes()) == (2, 1 * GIB)
    write(memory / "memory.stat", f"inactive_file 5\ntotal_inactive_file {GIB}\n")
    assert machine.available_bytes() == 2 * GIB


def test_groups_of_version_1_without_a_limit(system: Path) -> None:
    write(system / "proc" / "self" / "cgroup", V1_GROUPS)
    write(system / "cgroup" / "cpu" / "cpu.cfs_quota_us", "-1\n")
    write(system / "cgroup" / "cpu" / "cpu.cfs_period_us", "100000\n")
    write(system / "cgroup" / "memory" / "memory.limit_in_bytes", "9223372036854771712\n")
    write(system / "cgroup" / "memory" / "memory.usage_in_bytes", f"{GIB}\n")
    assert (machine.physical_cores(), machine.available_bytes()) == (4, 8 * GIB)


def test_a_system_that_says_nothing(system: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "_PROC", system / "nothing")
    assert machine.available_bytes() is None
    monkeypatch.delattr(os, "sched_getaffinity")
    assert machine.physical_cores() == os.cpu_count()
