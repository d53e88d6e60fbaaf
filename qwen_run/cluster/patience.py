"""How long is waited for a replica: :class:`Patience`."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from dataclasses import dataclass
from typing import TypeVar

Result = TypeVar("Result")


@dataclass(frozen=True)
class Patience:
    """Seconds after which a replica counts as gone.

    Attributes:
        open_s: it has not answered once; it reads its weights in that time.
        silence_s: it says nothing at all; a living one says something every second.
        stall_s: it has requests and its engine has not run.
        probe_s: it was not asked for anything; it then has to answer a request of one token within ``stall_s``.
    """

    open_s: float = 1800.0
    silence_s: float = 10.0
    stall_s: float = 60.0
    probe_s: float = 30.0


async def within(work: Awaitable[Result], seconds: float) -> Result:
    """What ``work`` gives.

    The time passes in two halves: a process that was stopped and goes on sees its first half pass at once, and nobody
    else is to be blamed for that.

    Raises:
        TimeoutError: it gives nothing in ``seconds``.
    """
    task = asyncio.ensure_future(work)
    try:
        for _ in range(2):
            done, _ = await asyncio.wait({task}, timeout=seconds / 2)
            if done:
                return task.result()
    finally:
        task.cancel()
    raise TimeoutError
