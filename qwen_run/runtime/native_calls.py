"""Calls of native code that let other threads run: none of them outlives the interpreter.

A daemon thread is not waited for at exit. One that returns from native code after the interpreter's end is ended in the
midst of C++, which aborts the process (SIGABRT). So the exit waits for calls that run, and keeps others from beginning.
"""

from __future__ import annotations

import atexit
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager


class NativeCalls:
    """How many calls run, and whether others may begin."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._num_running = 0
        self._ended_by: int | None = None  # the thread that ends the interpreter

    @contextmanager
    def call(self) -> Iterator[None]:
        """Make a native call within; at exit it does not return in any thread but the one that ends the interpreter."""
        with self._changed:
            while self._ended_by not in (None, threading.get_ident()):
                self._changed.wait()  # for ever: the process ends
            self._num_running += 1
        try:
            yield
        finally:
            with self._changed:
                self._num_running -= 1
                self._changed.notify_all()

    def end(self) -> None:
        """Wait for the calls that run; from here on none begins in another thread."""
        with self._changed:
            self._ended_by = threading.get_ident()
            while self._num_running:
                self._changed.wait()

    def forget(self) -> None:
        """In a forked child: the threads that made calls are not there."""
        self.__init__()  # type: ignore[misc]


NATIVE_CALLS = NativeCalls()
atexit.register(NATIVE_CALLS.end)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=NATIVE_CALLS.forget)
