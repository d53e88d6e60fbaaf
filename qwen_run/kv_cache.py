"""The paged cache: the pools the graph updates in place, and who owns which of their blocks."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from qwen_engine.errors import EngineError
from qwen_engine.graph_io import TensorSpec
from qwen_engine.manifest import ITEM_BYTES, Manifest

# Pools begin on a cache line, so that no vector of a kernel straddles two.
_ALIGNMENT_BYTES = 64

# Without being told, take at most this many sequences of full length and this part of the memory that is left.
_MOST_SEQUENCES = 8
_MEMORY_PART = 0.5


class KVCache:
    """Pools of ``num_blocks`` blocks for every paged state, and the list of free blocks.

    A block id stands for the same block of every pool. Memory is committed by the operating system when a
    block is first written: a large pool costs nothing until it is used.

    Attributes:
        pools: state name -> array of the state's dtype, (num_blocks, ...).
    """

    def __init__(self, states: Sequence[TensorSpec], block_size: int, num_blocks: int) -> None:
        """Make the pools.

        Raises:
            EngineError: the system refuses the memory.
        """
        self.block_size = block_size
        self.num_blocks = num_blocks
        try:
            self.pools = {state.name: _zeros(_pool_shape(state, num_blocks), state.dtype) for state in states}
        except MemoryError:
            pool_bytes = num_blocks * block_bytes(states)
            raise EngineError(f"no memory for {num_blocks} cache blocks of {pool_bytes / 2**30:.1f} GiB") from None
        self._free = list(range(num_blocks - 1, -1, -1))
        self._is_free = [True] * num_blocks
        self._is_clean = [True] * num_blocks

    @property
    def num_free(self) -> int:
        """Blocks nobody owns."""
        return len(self._free)

    def blocks_for(self, num_tokens: int) -> int:
        """Blocks that hold ``num_tokens`` tokens of one sequence."""
        return math.ceil(num_tokens / self.block_size)

    def allocate(self, count: int) -> list[int] | None:
        """Give out ``count`` blocks of zeros; None, and nothing is given out, where fewer are free.

        A block that held another sequence is zeroed first: a NaN it hides would poison sums it has no part in.
        """
        if count > len(self._free):
            return None
        block_ids = [self._free.pop() for _ in range(count)]
        if dirty := [block for block in block_ids if not self._is_clean[block]]:
            for pool in self.pools.values():
                pool[dirty] = 0
        for block in block_ids:
            self._is_free[block] = self._is_clean[block] = False
        return block_ids

    def free(self, block_ids: Sequence[int]) -> None:
        """Take back blocks that :meth:`allocate` gave out."""
        for block in block_ids:
            assert not self._is_free[block], f"block {block} is freed twice"
            self._is_free[block] = True
        self._free.extend(reversed(block_ids))


def choose_num_blocks(manifest: Manifest, num_blocks: int | None, available_bytes: int | None) -> int:
    """How many blocks to take: ``num_blocks`` where given.

    Else several sequences of full length, as far as half of the memory that the weights leave goes; at least one.

    Args:
        available_bytes: memory the process can have, None if unknown.

    Raises:
        EngineError: the blocks, or the memory there is, do not hold one sequence of full length.
    """
    max_seq_len, block_size = manifest.limits.max_seq_len, manifest.cache.block_size
    one_sequence = math.ceil(max_seq_len / block_size)
    if num_blocks is not None:
        if num_blocks < one_sequence:
            raise EngineError(
                f"{num_blocks} cache blocks hold {num_blocks * block_size} tokens, a sequence can have {max_seq_len}; "
                f"ask for at least {one_sequence} blocks or build the engine with a smaller --max-seq-len"
            )
        return num_blocks
    if available_bytes is None:
        return one_sequence
    bytes_each = block_bytes(manifest.states)
    if one_sequence * bytes_each > available_bytes:
        raise EngineError(
            f"the cache of one sequence of {max_seq_len} tokens takes {one_sequence * bytes_each / 2**30:.2f} GiB, "
            f"{available_bytes / 2**30:.2f} GiB are free; "
            "build the engine with a smaller --max-seq-len or --kv-cache-dtype float16"
        )
    weights_bytes = sum(part.size_bytes for part in manifest.parts.values())
    affordable = int((available_bytes - weights_bytes) * _MEMORY_PART) // max(1, bytes_each)
    return max(one_sequence, min(affordable, _MOST_SEQUENCES * one_sequence))


def block_bytes(states: Sequence[TensorSpec]) -> int:
    """Bytes of one block over all pools."""
    return sum(math.prod(_pool_shape(state, 1)) * ITEM_BYTES[state.dtype] for state in states)


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
    raw = np.zeros(count + _ALIGNMENT_BYTES, np.uint8)
    start = -raw.ctypes.data % _ALIGNMENT_BYTES
    return raw[start : start + count].view(dtype).reshape(shape)
