"""What this process may use of the machine: cores and memory, containers' limits included."""

from __future__ import annotations

import os
from pathlib import Path

_CGROUPS = Path("/sys/fs/cgroup")
_CPUS = Path("/sys/devices/system/cpu")
_PROC = Path("/proc")


def physical_cores() -> int:
    """Physical cores this process may run on: no second hyperthread of a core, no more than a container's quota."""
    if not hasattr(os, "sched_getaffinity"):
        return os.cpu_count() or 1
    cpus = os.sched_getaffinity(0)
    cores = {_read(_CPUS / f"cpu{cpu}" / "topology" / "thread_siblings_list") or str(cpu) for cpu in cpus}
    quotas = [int(quota) / int(period) for quota, period in map(str.split, _limits("cpu.max")) if quota != "max"]
    return max(1, int(min([len(cores), *quotas])))


def available_bytes() -> int | None:
    """Memory that can be had without swapping, in bytes; None where the system does not say."""
    meminfo = dict(line.split(":", 1) for line in _read(_PROC / "meminfo").splitlines())
    if "MemAvailable" not in meminfo:
        return None
    limits = [int(limit) for limit in _limits("memory.max") if limit != "max"]
    return min([int(meminfo["MemAvailable"].split()[0]) * 1024, *limits])


def _limits(name: str) -> list[str]:
    """The file ``name`` of this process's control group (version 2) and of every group around it."""
    own = next((line[3:] for line in _read(_PROC / "self" / "cgroup").splitlines() if line.startswith("0::")), "/")
    group = _CGROUPS / own.strip("/")
    groups = [group, *(parent for parent in group.parents if parent.is_relative_to(_CGROUPS))]
    return [text for text in (_read(group / name) for group in groups) if text]


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8").strip()
    except OSError:
        return ""
