"""One thread at a time, in the order in which they asked: :class:`Turns`."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager

from qwen_engine.errors import EngineError


class Turns:
    """A lock that is handed to those who wait for it, first come, first served.

    A plain lock goes to whoever asks next, mostly the thread that has just released it: while one thread steps from
    token to token, another could wait for a whole answer.
    """

    def __init__(self) -> None:
        self._state = threading.Lock()  # guards the two below, and is never held for long
        self._owner: int | None = None
        self._waiting: deque[tuple[int, threading.Lock]] = deque()

    @contextmanager
    def turn(self) -> Iterator[None]:
        """Wait for a turn and hold it; whatever interrupts the thread, the turn passes on.

        Raises:
            EngineError: this thread has the turn already.
        """
        me = threading.get_ident()
        if self._owner == me:
            raise EngineError("the LLM is at work in this thread already; call it when its step is over")
        try:
            self._take(me)
            yield
        finally:
            self._leave(me)

    @contextmanager
    def turn_if_free(self) -> Iterator[bool]:
        """Hold a turn if it is nobody's, else go on without; says which."""
        me, is_mine = threading.get_ident(), False
        try:
            with self._state:
                if self._owner is None:
                    self._owner, is_mine = me, True
            yield is_mine
        finally:
            if is_mine:
                self._leave(me)

    def _take(self, me: int) -> None:
        with self._state:
            if self._owner is None:
                self._owner = me
                return
            mine = threading.Lock()
            mine.acquire()
            self._waiting.append((me, mine))
        mine.acquire()  # until the turn is handed over

    def _leave(self, me: int) -> None:
        with self._state:
            if self._owner == me:
                self._owner = None
                if self._waiting:
                    self._owner, successor = self._waiting.popleft()
                    successor.release()
            else:  # interrupted while it waited
                self._waiting = deque(entry for entry in self._waiting if entry[0] != me)
