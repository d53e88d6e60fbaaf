"""The memory bandwidth of the machine as a plain read sees it, one end to the other: to hold a kernel against.

One that reads from several pages in turn may be faster on some processors.
"""

from __future__ import annotations

import statistics
import threading
import time

import numpy as np

_PASS_BYTES = 1 << 30  # read before the clock is looked at: far longer than starting a thread takes


class Reader:
    """Memory that ``threads`` threads read from one end to the other, each its own part."""

    def __init__(self, size_bytes: int, threads: int) -> None:
        words = np.ones(max(threads, size_bytes // 8), np.uint64)  # ones: written, so that every page is there
        self._parts = np.array_split(words, threads)
        self._repeats = max(1, -(-_PASS_BYTES // words.nbytes))
        self._bytes = self._repeats * words.nbytes

    def bytes_per_s(self, passes: int = 5) -> float:
        """The median of ``passes`` measurements, one of which reads the memory several times."""
        return statistics.median(self._pass() for _ in range(passes))

    def _pass(self) -> float:
        ready = threading.Barrier(len(self._parts) + 1)

        def read(part: np.ndarray) -> None:
            ready.wait()
            for _ in range(self._repeats):
                np.bitwise_or.reduce(part)  # without the interpreter's lock, at 80 GB/s a thread from a fast cache

        threads = [threading.Thread(target=read, args=(part,)) for part in self._parts]
        for thread in threads:
            thread.start()
        ready.wait()
        started = time.perf_counter()
        for thread in threads:
            thread.join()
        return self._bytes / (time.perf_counter() - started)
