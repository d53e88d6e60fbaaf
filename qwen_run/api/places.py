"""So many at a time, for tasks of any event loop: :class:`Places`."""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager


class Places:
    """So many requests may be unfinished; who finds no place waits, in its own event loop, first come, first served."""

    def __init__(self, count: int) -> None:
        self._guard = threading.Lock()
        self._num_free = count
        self._waiting: deque[tuple[asyncio.AbstractEventLoop, asyncio.Future[None]]] = deque()

    async def take(self) -> None:
        """Wait for a place and have it."""
        loop = asyncio.get_running_loop()
        with self._guard:
            if self._num_free:
                self._num_free -= 1
                return
            mine = loop.create_future()
            self._waiting.append((loop, mine))
        try:
            await mine
        except BaseException:
            with self._guard:
                was_waiting = (loop, mine) in self._waiting
                if was_waiting:
                    self._waiting.remove((loop, mine))
            if not was_waiting:  # the place has been handed over in the meantime
                self.give_back()
            raise

    @asynccontextmanager
    async def taken(self) -> AsyncIterator[None]:
        """Wait for a place, which the body hands on to a request; one whose body fails is given back."""
        await self.take()
        try:
            yield
        except BaseException:
            self.give_back()
            raise

    def give_back(self) -> None:
        """Hand a place to the first who waits; for any thread."""
        with self._guard:
            while self._waiting:
                loop, future = self._waiting.popleft()
                try:
                    loop.call_soon_threadsafe(_wake, future)
                except RuntimeError:  # that loop is closed, and nobody waits in it
                    continue
                return
            self._num_free += 1


def _wake(future: asyncio.Future[None]) -> None:
    if not future.done():  # else it was cancelled, and its task hands the place on
        future.set_result(None)
