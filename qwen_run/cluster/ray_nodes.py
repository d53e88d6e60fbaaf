"""The machines that Ray knows: joined, counted, and left. No other module of the runtime imports ray."""

from __future__ import annotations

import logging
import os
import signal
import socket
import threading
from collections.abc import Mapping, Sequence
from typing import Any

from qwen_engine.errors import EngineError, first_line

LOCAL = "local"  # the address of a cluster that is this machine alone, and ends with the process
_CLIENT = "ray://"
_log = logging.getLogger(__name__)

_NAMESPACE = "qwen-engine"
_REACH_S = 10.0


def require_ray() -> Any:
    """The module ``ray``.

    Raises:
        EngineError: it is not installed.
    """
    # Ray tells its makers of its use unless it is told not to; what is decided already stays.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        import ray
        import ray.exceptions
    except ImportError as error:
        raise EngineError(
            f"{error.name} is not installed, and --ray needs it; run pip install 'ray[data]>=2.60'"
        ) from error
    return ray


def join(address: str) -> Any:
    """Become a driver of the cluster at ``address``; the module ``ray``.

    Args:
        address: ``auto`` for the cluster that this machine belongs to, ``HOST:PORT`` of a head, ``local`` for a
            cluster of this machine alone.

    Raises:
        EngineError: ray is not installed, or there is no such cluster.
    """
    if address.startswith(_CLIENT):
        raise EngineError(
            f"{address} is an address of Ray Client, which streams no answers; run this on a machine of the cluster "
            "with --ray auto"
        )
    ray = require_ray()
    _check_reachable(address)
    options: dict[str, Any] = {"namespace": _NAMESPACE, "log_to_driver": False, "logging_level": logging.ERROR}
    if address == LOCAL:
        # Without an address of its own Ray asks the routing table which one leads to 8.8.8.8, and falls back to the
        # host's name, which need not be an address of this machine.
        options |= {"include_dashboard": False, "_node_ip_address": "127.0.0.1"}
    try:
        ray.init(address=address, **options)
    except Exception as error:
        raise EngineError(
            f"there is no cluster at {address}: {first_line(error)}; start one with ray start --head, or give "
            f"--ray {LOCAL}"
        ) from error
    # Ray prints what becomes of workers on standard output, where answers may go. A fleet says so itself.
    worker = ray._private.worker
    if hasattr(worker, "print_to_stdstream"):
        worker.print_to_stdstream = _note
    return ray


def keep_signals() -> None:
    """Give SIGTERM back to the handler that Python has for it; nothing outside the main thread.

    Ray puts one of its own before it, which writes a stack to standard error first.
    """
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, signal.getsignal(signal.SIGTERM))


def _note(data: Mapping[str, Any], *_: Any, **__: Any) -> None:
    for line in data.get("lines", ()):
        _log.info("%s", line)


def _check_reachable(address: str) -> None:
    """Refuse a ``HOST:PORT`` at which nobody listens, for whom Ray would wait for minutes.

    Raises:
        EngineError: nobody listens there.
    """
    host, colon, port = address.rpartition(":")
    if not colon:
        return
    if not port.isdecimal() or not host:
        raise EngineError(f"{address} is no address of a cluster, expected auto, {LOCAL} or HOST:PORT")
    try:
        socket.create_connection((host.strip("[]"), int(port)), _REACH_S).close()
    except (OSError, OverflowError) as error:
        raise EngineError(
            f"there is no cluster at {address}: {first_line(error)}; ray start --head tells the address of one"
        ) from error


def cpus_of(nodes: Sequence[Mapping[str, Any]]) -> list[int]:
    """The processors of each living machine, as ``ray.nodes()`` lists them."""
    return [int(node["Resources"].get("CPU", 0)) for node in nodes if node["Alive"]]


def choose_threads(cpus: Sequence[int], num_replicas: int, threads: int | None) -> int:
    """Threads of each of ``num_replicas`` processes: ``threads``, or the most with which all have their processors.

    Args:
        cpus: processors of each machine.

    Raises:
        EngineError: there are too few for so many.

    >>> choose_threads([16, 16], 4, None), choose_threads([16, 4], 3, None), choose_threads([4], 2, 1)
    (8, 5, 1)
    """

    def places(each: int) -> int:
        return sum(count // each for count in cpus)

    chosen = threads or next((each for each in range(max(cpus, default=0), 0, -1) if places(each) >= num_replicas), 1)
    if (found := places(chosen)) < num_replicas:
        raise EngineError(
            f"{num_replicas} replicas of {chosen} CPUs need {num_replicas * chosen} CPUs, the cluster has {sum(cpus)} "
            f"on {len(cpus)} machines, room for {found}; ask for fewer --replicas or --threads, or add machines"
        )
    return chosen


def check_free(needed: int, free: float) -> None:
    """
    Raises:
        EngineError: other programs have the processors.
    """
    if needed > free:
        raise EngineError(
            f"the replicas need {needed} CPUs, {free:g} of the cluster's are free; end what has the others, or ask "
            "for fewer --replicas or --threads"
        )
