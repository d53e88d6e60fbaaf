"""What this process may use of the machine: cores and memory, containers' limits included."""

from __future__ import annotations

import os
import sys
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
    limits = [text.split() for group in _groups() if (text := _read(group / "cpu.max"))]
    quotas = [int(quota) / int(period) for quota, period in limits if quota != "max"]
    return max(1, int(min([len(cores), *quotas])))


def available_bytes() -> int | None:
    """Memory that can be had without swapping, in bytes; None where the system does not say."""
    meminfo = dict(line.split(":", 1) for line in _read(_PROC / "meminfo").splitlines())
    if "MemAvailable" not in meminfo:
        return None
    left = [
        int(limit) - (int(_read(group / "memory.current") or 0) - _reclaimable_bytes(group))
        for group in _groups()
        if (limit := _read(group / "memory.max")) not in ("", "max")
    ]
    return max(0, min([int(meminfo["MemAvailable"].split()[0]) * 1024, *left]))


def peak_memory_bytes() -> int:
    """The most resident memory this process has held so far, mapped files included."""
    try:
        status = Path("/proc/self/status").read_text(encoding="utf-8")
        return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM:"))
    except (OSError, StopIteration):
        import resource  # not on Windows

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024


def _reclaimable_bytes(group: Path) -> int:
    """What a control group holds of files that nobody has looked at lately: the system gives that up when asked."""
    lines = _read(group / "memory.stat").splitlines()
    return next((int(line.split()[1]) for line in lines if line.startswith("inactive_file ")), 0)


def _groups() -> list[Path]:
    """This process's control group (version 2) and every group around it."""
    own = next((line[3:] for line in _read(_PROC / "self" / "cgroup").splitlines() if line.startswith("0::")), "/")
    group = _CGROUPS / own.strip("/")
    return [group, *(parent for parent in group.parents if parent.is_relative_to(_CGROUPS))]


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8").strip()
    except OSError:
        return ""
