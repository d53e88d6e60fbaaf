"""The paged cache: the pools the graph updates in place, and who owns which of their blocks."""

from __future__ import annotations

import contextlib
import math
import mmap
import sys
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from qwen_engine.errors import EngineError
from qwen_engine.graph_io import TensorSpec
from qwen_engine.manifest import ITEM_BYTES
from qwen_run.runtime.prefix_cache import PrefixCache

# Pools begin on a cache line, so that no vector of a kernel straddles two.
_ALIGNMENT_BYTES = 64

# A pool begins with small pages: with huge ones alone, as NumPy's arrays have, a model of 24 layers takes 48 of them
# for its first token. A long text has huge ones, no more of which are left unused than it fills.
_SMALL_PAGES_BYTES = 2 << 20


class Edit(NamedTuple):
    """What has to happen to block ``target`` in every pool: ``source`` is copied to it; None: zeros are."""

    target: int
    source: int | None


class Pools:
    """Memory of ``num_blocks`` blocks for every paged state. A block id stands for the same block of each.

    Memory is committed by the operating system when a block is first written: a large pool costs nothing until it is
    used.

    Attributes:
        arrays: state name -> array of the state's dtype, (num_blocks, ...).
    """

    def __init__(self, states: Sequence[TensorSpec], num_blocks: int) -> None:
        """Make the pools, of zeros.

        Raises:
            EngineError: the system refuses the memory.
        """
        try:
            self.arrays = {state.name: _zeros(_pool_shape(state, num_blocks), state.dtype) for state in states}
        except MemoryError:
            pool_bytes = num_blocks * block_bytes(states)
            raise EngineError(
                f"no memory for a cache of {pool_bytes / 2**30:.1f} GiB, {num_blocks} blocks; ask for less with "
                "--kv-cache-memory (in Python cache_bytes or num_blocks)"
            ) from None

    def apply(self, edit: Edit) -> None:
        """Do what is to happen to a block."""
        for pool in self.arrays.values():
            pool[edit.target] = 0 if edit.source is None else pool[edit.source]


class Blocks:
    """Who owns which block, and which tokens it holds.

    Sequences with equal beginnings share blocks: a block is free when its last owner has given it back. What it holds
    may still be found by its key until it is given out again.

    What has to happen to the memory of blocks is told in order, before anything that follows is fed: edits of pools
    that lie elsewhere are kept and travel with the next batch.
    """

    def __init__(self, block_size: int, num_blocks: int, block_bytes: int, apply: Callable[[Edit], object]) -> None:
        """All blocks are free, and hold zeros.

        Args:
            block_bytes: of one block over all pools.
            apply: is called with every edit.
        """
        self.block_size = block_size
        self.num_blocks = num_blocks
        self._block_bytes = block_bytes
        self._apply = apply
        self._begin(is_clean=True)

    def _begin(self, is_clean: bool) -> None:
        self._prefixes = PrefixCache()
        self._free = list(range(self.num_blocks - 1, -1, -1))
        self._num_owners = [0] * self.num_blocks
        self._is_clean = [is_clean] * self.num_blocks

    def forget(self) -> None:
        """All blocks are free, nobody knows what they hold: those who had some must not give them back."""
        self._begin(is_clean=False)

    @property
    def num_free(self) -> int:
        """Blocks nobody owns."""
        return len(self._free) + self._prefixes.num_unused

    def blocks_for(self, num_tokens: int) -> int:
        """Blocks that hold ``num_tokens`` tokens of one sequence."""
        return -(-num_tokens // self.block_size)

    def mebibytes_of(self, num_blocks: int) -> int:
        """The least ``--kv-cache-memory`` that holds so many blocks."""
        return least_mebibytes(num_blocks, self._block_bytes)

    def allocate(self, count: int) -> list[int] | None:
        """Give out ``count`` blocks of zeros; None, and nothing is given out, where fewer are free.

        A block that held another sequence is zeroed first: a NaN it hides would poison sums it has no part in.
        Blocks whose tokens may be found are taken last, those least recently used first.
        """
        if count > self.num_free:
            return None
        block_ids = [self._free.pop() if self._free else self._prefixes.evict() for _ in range(count)]
        for block in block_ids:
            if not self._is_clean[block]:
                self._apply(Edit(block, None))
            self._is_clean[block] = False
            self._num_owners[block] = 1
        return block_ids

    def share(self, block_ids: Sequence[int]) -> None:
        """Add an owner to blocks that have one."""
        for block in block_ids:
            assert self._num_owners[block], f"block {block} is shared by nobody"
            self._num_owners[block] += 1

    def free(self, block_ids: Sequence[int]) -> None:
        """Take an owner off the blocks of one sequence, given in order."""
        for block in reversed(block_ids):  # the end of a sequence is given out again before its beginning
            assert self._num_owners[block], f"block {block} is freed twice"
            self._num_owners[block] -= 1
            if not self._num_owners[block] and not self._prefixes.release(block):
                self._free.append(block)

    def is_shared(self, block: int) -> bool:
        """More than one sequence owns ``block``: nobody may write to it."""
        return self._num_owners[block] > 1

    def copy(self, source: int, target: int) -> None:
        """Copy what ``source`` holds to ``target``, in every pool."""
        self._apply(Edit(target, source))

    def publish(self, block: int, key: bytes) -> None:
        """Let ``block`` be found by ``key``: all its tokens are written and stay."""
        self._prefixes.publish(block, key)

    def take_prefix(self, keys: Sequence[bytes]) -> list[int]:
        """The blocks of the first ``keys`` that are all known, as their new owner."""
        block_ids: list[int] = []
        for key in keys:
            block = self._prefixes.find(key)
            if block is None:
                break
            self._prefixes.use(block)
            self._num_owners[block] += 1
            block_ids.append(block)
        return block_ids


class KVCache(Blocks):
    """The blocks of one engine, and their memory: every edit happens at once.

    Attributes:
        pools: state name -> array of the state's dtype, (num_blocks, ...).
    """

    def __init__(self, states: Sequence[TensorSpec], block_size: int, num_blocks: int) -> None:
        """Make the pools.

        Raises:
            EngineError: the system refuses the memory.
        """
        pools = Pools(states, num_blocks)
        super().__init__(block_size, num_blocks, block_bytes(states), pools.apply)
        self.pools = pools.arrays


def block_bytes(states: Sequence[TensorSpec]) -> int:
    """Bytes of one block over all pools."""
    return sum(math.prod(_pool_shape(state, 1)) * ITEM_BYTES[state.dtype] for state in states)


def least_mebibytes(num_blocks: int, bytes_each: int) -> int:
    """The least memory that holds so many blocks of ``bytes_each``, in MiB as ``--kv-cache-memory`` counts it."""
    return max(1, math.ceil(num_blocks * bytes_each / 2**20))


def _pool_shape(state: TensorSpec, num_blocks: int) -> tuple[int, ...]:
    first, *inner = state.shape or (None,)
    fixed = [dimension for dimension in inner if isinstance(dimension, int)]
    if state.kind != "paged_state" or first != "num_blocks" or len(fixed) != len(inner):
        raise EngineError(
            f"state {state.name} is {state.kind} {state.shape}, expected paged_state (num_blocks, sizes); "
            "build the engine again"
        )
    return (num_blocks, *fixed)


def _zeros(shape: tuple[int, ...], dtype: str) -> np.ndarray:
    count = math.prod(shape) * ITEM_BYTES[dtype]
    if sys.platform == "linux":
        try:
            memory = mmap.mmap(-1, count, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        except (OSError, OverflowError) as error:
            raise MemoryError from error
        with contextlib.suppress(OSError):  # of a system without huge pages
            memory.madvise(mmap.MADV_NOHUGEPAGE, 0, min(count, _SMALL_PAGES_BYTES))
            if count > _SMALL_PAGES_BYTES:
                memory.madvise(mmap.MADV_HUGEPAGE, _SMALL_PAGES_BYTES)
        return np.frombuffer(memory, dtype).reshape(shape)
    raw = np.zeros(count + _ALIGNMENT_BYTES, np.uint8)
    start = -raw.ctypes.data % _ALIGNMENT_BYTES
    return raw[start : start + count].view(dtype).reshape(shape)
