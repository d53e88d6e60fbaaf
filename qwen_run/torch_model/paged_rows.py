"""The rows of a batch in an engine's cache, for callers who keep them between calls."""

from __future__ import annotations

import threading
import weakref
from collections import deque
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from qwen_engine.errors import EngineError
from qwen_run.runtime.kv_cache import KVCache


class BlockPool:
    """The blocks of an engine that several threads draw from.

    Attributes:
        lock: whoever runs the engine or touches its blocks holds it; the thread that holds it may take it again.
    """

    def __init__(self, cache: KVCache, lock: threading.RLock) -> None:
        self.lock = lock
        self._cache = cache
        # What the garbage collector drops comes back here, at any moment and in any thread: it must not wait.
        self._dropped: deque[list[list[int]]] = deque()

    @property
    def num_free(self) -> int:
        """Blocks that nobody owns."""
        with self.lock:
            self.collect()
            return self._cache.num_free

    @property
    def block_size(self) -> int:
        """Tokens of a block."""
        return self._cache.block_size

    def collect(self) -> None:
        """Take back what was dropped. The caller holds the lock."""
        while self._dropped:
            for blocks in self._dropped.popleft():
                self._cache.free(blocks)

    def take(self, count: int) -> list[int]:
        """``count`` blocks. The caller holds the lock.

        Raises:
            EngineError: fewer are free.
        """
        self.collect()
        blocks = self._cache.allocate(count)
        if blocks is None:
            raise EngineError(
                f"the cache has {self._cache.num_free} of {self._cache.num_blocks} blocks free, expected {count} or "
                "more; feed fewer rows, drop what holds others (past_key_values), or set a larger kvcache_num_blocks"
            )
        return blocks

    def own(self, rows: PagedRows, blocks: list[list[int]]) -> None:
        """Take back ``blocks``, as they are then, when ``rows`` is gone."""
        weakref.finalize(rows, self._dropped.append, blocks).atexit = False

    def share(self, blocks: Sequence[int]) -> None:
        """Add an owner to ``blocks``. The caller holds the lock."""
        self._cache.share(blocks)

    def give_back(self, blocks: Sequence[int]) -> None:
        """Take an owner off ``blocks``, given in order. The caller holds the lock."""
        self._cache.free(blocks)

    def is_shared(self, block: int) -> bool:
        """Whether more than one row owns ``block``."""
        return self._cache.is_shared(block)

    def copy(self, source: int, target: int) -> None:
        """Copy what ``source`` holds to ``target``."""
        self._cache.copy(source, target)


class PagedRows:
    """Rows of tokens in the cache of an engine: which blocks each has, and how many tokens.

    Rows that are repeated share their blocks; a row copies the last one before it writes to it. Blocks go back to
    the pool when a row is cut, when the rows are closed, and when the object is gone.

    Attributes:
        lengths: tokens of each row.
    """

    def __init__(self, pool: BlockPool, rows: int) -> None:
        self.lengths = [0] * rows
        self._pool = pool
        self._blocks: list[list[int]] = [[] for _ in range(rows)]
        pool.own(self, self._blocks)

    def __len__(self) -> int:
        return len(self.lengths)

    def grow(self, counts: Sequence[int]) -> None:
        """Make room for ``counts[i]`` more tokens of row ``i``; all rows have it, or none.

        Raises:
            EngineError: too few blocks are free.
        """
        size = self._pool.block_size
        with self._pool.lock:
            missing = [
                -(-(length + count) // size) - len(blocks)
                for length, count, blocks in zip(self.lengths, counts, self._blocks, strict=True)
            ]
            # a block that is written must be the row's own
            shared = [
                row
                for row, (length, count) in enumerate(zip(self.lengths, counts, strict=True))
                if count and length % size and self._pool.is_shared(self._blocks[row][length // size])
            ]
            new = self._pool.take(sum(missing) + len(shared))
            for row in shared:
                last = self.lengths[row] // size
                old, own = self._blocks[row][last], new.pop()
                self._pool.copy(old, own)
                self._pool.give_back([old])
                self._blocks[row][last] = own
            for row, count in enumerate(missing):
                self._blocks[row] += [new.pop() for _ in range(count)]

    def table(self, rows: Sequence[int]) -> NDArray[np.int32]:
        """The blocks of ``rows``, int32 (rows, most blocks of one), filled up with 0."""
        chosen = [self._blocks[row] for row in rows]
        width = max(map(len, chosen))
        return np.array([blocks + [0] * (width - len(blocks)) for blocks in chosen], np.int32)

    def choose(self, rows: Sequence[int]) -> None:
        """Make the rows ``rows``, in this order, the only ones; one that is named twice is there twice."""
        with self._pool.lock:
            old, lengths = list(self._blocks), self.lengths
            for row in rows:
                self._pool.share(old[row])
            self._blocks[:] = [list(old[row]) for row in rows]
            self.lengths = [lengths[row] for row in rows]
            for blocks in old:
                self._pool.give_back(blocks)

    def cut(self, counts: Sequence[int]) -> None:
        """Forget the last ``counts[i]`` tokens of row ``i``."""
        self.shrink([length - count for length, count in zip(self.lengths, counts, strict=True)])

    def shrink(self, lengths: Sequence[int]) -> None:
        """Keep the first ``lengths[i]`` tokens of row ``i``, and no block beyond them."""
        with self._pool.lock:
            self.lengths = list(lengths)
            for blocks, length in zip(self._blocks, lengths, strict=True):
                kept = -(-length // self._pool.block_size)
                self._pool.give_back(blocks[kept:])
                del blocks[kept:]

    def close(self) -> None:
        """Forget all rows."""
        self.choose([])
