"""What this process may use of the machine: cores and memory, containers' limits included."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import NamedTuple

_CGROUPS = Path("/sys/fs/cgroup")
_CPUS = Path("/sys/devices/system/cpu")
_PROC = Path("/proc")


class _MemoryFiles(NamedTuple):
    """The files of a control group that say what memory it may use, and has, in bytes.

    Attributes:
        controller: of version 1; empty for version 2, which has one tree for all.
        reclaimable: line of ``memory.stat`` with the files that nobody has looked at lately, which the system gives up
            when asked.
    """

    controller: str
    limit: str
    used: str
    reclaimable: str


# https://docs.kernel.org/admin-guide/cgroup-v2.html and cgroup-v1/memory.html
_MEMORY_FILES = (
    _MemoryFiles("", "memory.max", "memory.current", "inactive_file"),
    _MemoryFiles("memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
)


def physical_cores() -> int:
    """Physical cores this process may run on: no second hyperthread of a core, no more than a container's quota."""
    if not hasattr(os, "sched_getaffinity"):
        return os.cpu_count() or 1
    cpus = os.sched_getaffinity(0)
    cores = {_read(_CPUS / f"cpu{cpu}" / "topology" / "thread_siblings_list") or str(cpu) for cpu in cpus}
    return max(1, int(min([len(cores), *_cpu_quotas()])))


def available_bytes() -> int | None:
    """Memory that can be had without swapping, in bytes; None where the system does not say."""
    meminfo = dict(line.split(":", 1) for line in _read(_PROC / "meminfo").splitlines())
    if "MemAvailable" not in meminfo:
        return None
    left = [
        limit - (_number(group / files.used) or 0) + _reclaimable_bytes(group, files.reclaimable)
        for files in _MEMORY_FILES
        for group in _groups(files.controller)
        if (limit := _number(group / files.limit)) is not None
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


def _cpu_quotas() -> list[float]:
    """Cores that each control group around this process may use, of those that have a limit."""
    limits = [_read(group / "cpu.max").split() for group in _groups("")]
    limits += [[_read(group / f"cpu.cfs_{name}_us") for name in ("quota", "period")] for group in _groups("cpu")]
    # without a limit the quota is "max" or -1
    return [int(limit[0]) / int(limit[1]) for limit in limits if len(limit) == 2 and all(map(_is_positive, limit))]


def _reclaimable_bytes(group: Path, name: str) -> int:
    lines = _read(group / "memory.stat").splitlines()
    return next((int(line.split()[1]) for line in lines if line.startswith(f"{name} ")), 0)


def _groups(controller: str) -> list[Path]:
    """This process's control group and every group around it: of a ``controller`` of version 1, or of version 2 ("").

    A container sees its own group as the root of what is mounted, while its path may be that on the host: those of its
    parts that are not there say nothing.
    """
    groups: list[Path] = []
    for line in _read(_PROC / "self" / "cgroup").splitlines() or ["0::/"]:
        _, controllers, path = line.split(":", 2)
        if controller in controllers.split(","):
            mounted = {_CGROUPS / controllers, _CGROUPS / controller}
            for root in mounted:
                group = root / path.strip("/")
                groups += [group, *(parent for parent in group.parents if parent.is_relative_to(root))]
    return groups


def _is_positive(text: str) -> bool:
    return text.isdecimal() and int(text) > 0


def _number(path: Path) -> int | None:
    """The number in a file; None where there is none, such as ``max``."""
    text = _read(path)
    return int(text) if text.isdecimal() else None


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8").strip()
    except OSError:
        return ""
