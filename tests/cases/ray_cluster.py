"""Programs of a network namespace of their own, so that no two clusters of Ray on one machine meet; with loopback up.

Imported as a module by the program in the namespace, too: what is below ``# inside`` is for it.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import signal
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from cases import ROOT, TESTS
from cases.processes import PATIENCE_S, start

_NEW_NETWORK, _NEW_USER = 0x40000000, 0x10000000  # of <linux/sched.h>
_GET_FLAGS, _SET_FLAGS, _UP = 0x8913, 0x8914, 0x1  # of <linux/sockios.h>
_ENTER = "from cases.ray_cluster import enter; enter(); "
# Ray writes no token and reports nothing; what it would ask of the machine's name is answered by loopback.
ENVIRONMENT = {"RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0", "OMP_NUM_THREADS": "1"}


def missing() -> str | None:
    """Why there is no cluster here; None where there is one."""
    if find_spec("ray") is None:
        return "ray is not installed"
    found = subprocess.run(
        [sys.executable, "-c", _ENTER], env=_environment(), capture_output=True, text=True, timeout=PATIENCE_S
    )
    return None if found.returncode == 0 else f"no network namespace: {found.stderr.strip().splitlines()[-1]}"


def run_inside(code: str, *arguments: object, patience: float = 1, **options: Any) -> str:
    """What ``code`` prints, in a namespace of its own that ends with it; whatever it has started is ended too.

    Raises:
        AssertionError: it has failed, or has not ended in ``patience`` times ``PATIENCE_S``.
    """
    command = [sys.executable, "-c", _ENTER + code, *map(str, arguments)]
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=_environment(),
        start_new_session=True,
        **{"cwd": ROOT} | options,
    )
    try:
        out, errors = process.communicate(timeout=patience * PATIENCE_S)
    finally:
        _end_session(process.pid)
    assert process.returncode == 0, f"{out}\n{errors}"
    return out


def _environment() -> dict[str, str]:
    return {**os.environ, **ENVIRONMENT, "PYTHONPATH": f"{ROOT}{os.pathsep}{TESTS}"}


def _end_session(leader: int) -> None:
    for pid in processes(lambda _: True):
        try:
            if os.getsid(pid) == leader:
                os.kill(pid, signal.SIGKILL)
        except (ProcessLookupError, PermissionError):
            continue


def processes(wanted: Callable[[str], bool]) -> list[int]:
    """Processes of this network namespace whose command line is wanted."""
    mine, found = os.readlink("/proc/self/ns/net"), []
    for path in Path("/proc").glob("[0-9]*"):
        try:
            command = (path / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            if wanted(command) and os.readlink(path / "ns/net") == mine:
                found.append(int(path.name))
        except OSError:  # it has ended, or is another user's
            continue
    return sorted(found)


# inside


def enter() -> None:
    """Be in a network namespace of this process's own, whose loopback is up.

    Raises:
        OSError: the system does not allow it.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    flags = _NEW_NETWORK if os.geteuid() == 0 else _NEW_NETWORK | _NEW_USER
    if libc.unshare(flags):
        raise OSError(ctypes.get_errno(), f"unshare: {os.strerror(ctypes.get_errno())}")
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as control:
        request = fcntl.ioctl(control, _GET_FLAGS, struct.pack("16sH14x", b"lo", 0))
        flags_of_lo = struct.unpack("16sH14x", request)[1] | _UP
        fcntl.ioctl(control, _SET_FLAGS, struct.pack("16sH14x", b"lo", flags_of_lo))


def replica_processes() -> list[int]:
    """The processes of replicas in this namespace."""
    return processes(lambda command: command.startswith("ray::_ReplicaActor"))


@contextmanager
def serving(engine: str, num_replicas: int, *options: str) -> Iterator[str]:
    """A ``qwen-serve`` on a cluster of its own, ready; its address. It ends by a signal, as a user ends it."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    command = [sys.executable, "-m", "qwen_serve.cli", engine, "--ray", "local", "--replicas", str(num_replicas)]
    process = start([*command, "--port", str(port), "--no-access-log", *options], 100 * PATIENCE_S)
    try:
        url = f"http://127.0.0.1:{port}"
        wait_for(lambda: status(url) == 200 or process.poll() is not None)
        assert process.poll() is None, "the server has ended"
        yield url
        process.terminate()
        assert process.wait(PATIENCE_S) == 0
    finally:
        process.kill()


def status(url: str) -> int | None:
    """What ``/ready`` says."""
    import httpx2

    try:
        return int(httpx2.get(f"{url}/ready", timeout=60).status_code)
    except httpx2.TransportError:
        return None


def wait_for(happened: Callable[[], Any], patience: float = 0.5) -> None:
    """
    Raises:
        AssertionError: it has not happened in time.
    """
    ends = time.monotonic() + patience * PATIENCE_S
    while not happened():
        assert time.monotonic() < ends, "it never happened"
        time.sleep(0.05)
