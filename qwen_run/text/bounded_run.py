"""A function of somebody else's run in a process of its own, which may neither hang nor fill the memory."""

from __future__ import annotations

import contextlib
import faulthandler
import os
import select
import signal
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path

CPU_S = 5  # a template takes a millisecond
WALL_S = 60.0  # also where the machine has other work
MEMORY_BYTES = 256 << 20  # beside what the process has, where nothing else is said
OUTPUT_BYTES = 1 << 20

_FAILED = 1  # exit status where the function raised


class BoundsError(Exception):
    """The function took more time or memory, or gave more text, than it may."""


def run_bounded(function: Callable[[], str], memory_bytes: int = MEMORY_BYTES) -> str | None:
    """What ``function`` returns; None where it raises. Without forks (Windows, macOS) it runs in this process.

    Raises:
        BoundsError: it took more than it may.
    """
    if sys.platform != "linux":
        try:
            return function()
        except Exception:
            return None
    reader, writer = os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # other threads hold no lock that a template needs
        child = os.fork()
    if child == 0:
        os.close(reader)
        _run_and_exit(function, writer, memory_bytes)
    os.close(writer)
    try:
        output = _read_all(reader)
    except BaseException:
        os.kill(child, signal.SIGKILL)
        raise
    finally:
        os.close(reader)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if status == _FAILED:
        return None
    if status:
        raise BoundsError(f"more than {CPU_S} s or {memory_bytes >> 20} MiB")
    return output.decode("utf-8", "surrogatepass")


def _run_and_exit(function: Callable[[], str], writer: int, memory_bytes: int) -> None:
    """In the child: write what ``function`` returns, and end."""
    status = _FAILED
    try:
        faulthandler.disable()
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # native code complains there before it aborts
        _limit_resources(memory_bytes)
        output = function().encode("utf-8", "surrogatepass")[: OUTPUT_BYTES + 1]
        while output:
            output = output[os.write(writer, output) :]
        status = 0
    except MemoryError:
        status = _FAILED + 1
    except BaseException:  # also what a signal raises: nothing of the parent's may run on here
        status = _FAILED
    finally:
        os._exit(status)


def _limit_resources(memory_bytes: int) -> None:
    import resource

    signal.signal(signal.SIGXCPU, signal.SIG_DFL)
    resource.setrlimit(resource.RLIMIT_CPU, (CPU_S, CPU_S + 1))
    with contextlib.suppress(OSError, ValueError):  # a limit that is lower already stays
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0])
        most = pages * resource.getpagesize() + memory_bytes
        resource.setrlimit(resource.RLIMIT_AS, (most, most))


def _read_all(reader: int) -> bytes:
    """What the child writes until it ends."""
    output, ends = b"", time.monotonic() + WALL_S
    while True:
        if not select.select([reader], [], [], max(0.0, ends - time.monotonic()))[0]:
            raise BoundsError(f"more than {WALL_S:.0f} s")
        piece = os.read(reader, 1 << 16)
        if not piece:
            return output
        output += piece
        if len(output) > OUTPUT_BYTES:
            raise BoundsError(f"more than {OUTPUT_BYTES >> 20} MiB of text")
