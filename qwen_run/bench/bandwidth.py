"""The memory bandwidth of the machine, as threads find it that only read: to hold a kernel against."""

from __future__ import annotations

import ctypes
import statistics
import threading
import time
from typing import Any

import numpy as np
from numpy.typing import NDArray

import qwen_plugin
from qwen_engine.errors import EngineError

_PASS_BYTES = 1 << 30  # read before the clock is looked at: far longer than starting a thread takes
_LINE = 64


class Reader:
    """Memory that ``threads`` threads read, each its own part.

    Attributes:
        data: what is read, in whole lines of 64 bytes; the machine's pages of it are there.
    """

    def __init__(self, data: NDArray[Any] | int, threads: int, pass_bytes: int = _PASS_BYTES) -> None:
        """Take or keep the memory, and give each thread its part.

        Args:
            data: contiguous, at an address that is a multiple of 16; or the size in bytes of memory to take.
            pass_bytes: read by a measurement at least, over and over if there are fewer.

        Raises:
            EngineError: the native operators have not been compiled, or before they had this.
        """
        if isinstance(data, int):
            data = np.ones(max(data, threads * _LINE), np.uint8)  # written, so that every page is there
        self.data = data
        lines: int = data.nbytes // _LINE
        self._ends: list[int] = [lines * i // threads for i in range(threads + 1)]
        self._repeats = max(1, -(-pass_bytes // (lines * _LINE)))
        path = qwen_plugin.library_path()
        try:
            self._read: Any = ctypes.CDLL(str(path)).QwenRead  # runs without the interpreter's lock
        except AttributeError:
            raise EngineError(f"{path} is older than this package; compile it: python -m qwen_plugin.compile") from None
        self._read.argtypes = [ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64, ctypes.c_int]
        self._read.restype = None

    def bytes_per_s(self, passes: int = 5) -> float:
        """What the machine gives at most: the faster of the two ways to read, medians of ``passes`` measurements."""
        plain, in_turn = [], []
        for _ in range(passes):
            plain.append(self.measure())
            in_turn.append(self.measure(in_turn=True))
        return max(statistics.median(plain), statistics.median(in_turn))

    def measure(self, in_turn: bool = False) -> float:
        """Bytes a second of one measurement.

        Args:
            in_turn: fetch the next 32 KiB, a line from each of eight pages in turn, while reading: processors that
                wait for more lines at once if they are of several pages read faster so. Else a plain read, one line
                after the other.
        """
        ready = threading.Barrier(len(self._ends))

        def read(first: int, last: int) -> None:
            ready.wait()
            self._read(self.data.ctypes.data + first * _LINE, last - first, self._repeats, in_turn)

        threads = [threading.Thread(target=read, args=ends) for ends in zip(self._ends, self._ends[1:], strict=False)]
        for thread in threads:
            thread.start()
        ready.wait()
        started = time.perf_counter()
        for thread in threads:
            thread.join()
        seconds = time.perf_counter() - started
        return self._repeats * self._ends[-1] * _LINE / seconds
