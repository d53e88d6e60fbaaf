"""Processes that tests start. None of them can make a test wait for ever."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import threading
import time
from collections.abc import Coroutine, Sequence
from pathlib import Path
from typing import Any, TypeVar

from cases import ROOT, TESTS

Result = TypeVar("Result")

# Longest wait for a process, a thread or an event loop: what takes longer hangs. A loaded machine needs its share.
PATIENCE_S = 300.0


def run_python(code: str, *arguments: object, **options: Any) -> subprocess.CompletedProcess[str]:
    """What a fresh interpreter did with ``code``, which finds the packages and ``cases`` from any folder.

    Args:
        options: as :func:`subprocess.run` has them; ``env`` is added to the environment.
    """
    environment = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{TESTS}"} | options.pop("env", {})
    if not {"stdout", "stderr"} & options.keys():
        options["capture_output"] = True
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.run(command, text=True, timeout=PATIENCE_S, env=environment, **{"cwd": ROOT} | options)


def start_python(code: str, *arguments: object, **options: Any) -> subprocess.Popen[str]:
    """A fresh interpreter that runs ``code``. It is killed after ``PATIENCE_S``, which ends every read from it."""
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "cwd": ROOT} | options
    return start([sys.executable, "-c", code, *map(str, arguments)], **options)


def start(command: Sequence[str], patience_s: float = PATIENCE_S, **options: Any) -> subprocess.Popen[str]:
    """A process that runs ``command``, and is killed after ``patience_s``; ``options`` are those of Popen."""
    process: subprocess.Popen[str] = subprocess.Popen(command, **options)
    killer = threading.Timer(patience_s, process.kill)
    killer.daemon = True
    killer.start()
    return process


def run_async(coroutine: Coroutine[Any, Any, Result]) -> Result:
    """As :func:`asyncio.run`; what waits for longer than ``PATIENCE_S`` is cancelled and raises TimeoutError."""
    return asyncio.run(asyncio.wait_for(coroutine, PATIENCE_S))


def is_running(pid: int) -> bool:
    """Whether there is such a process; one that has ended and was not waited for is none."""
    try:
        return Path(f"/proc/{pid}/stat").read_text("utf-8").rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def wait_until_gone(*pids: int) -> None:
    """Wait until none of these processes runs."""
    ends = time.monotonic() + PATIENCE_S
    while any(map(is_running, pids)):
        assert time.monotonic() < ends, f"one of {pids} is left"
        time.sleep(0.05)
