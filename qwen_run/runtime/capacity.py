"""How large the cache of keys and values is, and how long a sequence may be with it."""

from __future__ import annotations

import dataclasses
import math
import warnings

from qwen_engine.errors import EngineError, EngineOptionError, shown
from qwen_engine.manifest import MIN_SEQ_LEN, Limits, Manifest
from qwen_run.runtime.kv_cache import block_bytes, least_mebibytes

# Without being told, take at most this many sequences of full length and this part of the memory that is left.
_MOST_SEQUENCES = 8
_MEMORY_PART = 0.5

# Where that memory does not hold one sequence of full length, take this part of it for a shorter one.
_TIGHT_MEMORY_PART = 0.9

# dtype of the cache -> advice where a smaller one helps
_SMALLER_DTYPE = {
    "float32": "; an engine built with --kv-cache-dtype float16 has room for twice as many",
    "float16": "; an engine built with --kv-cache-dtype int8 has room for twice as many",
}


@dataclasses.dataclass(frozen=True)
class Capacity:
    """Blocks of the pool, and the most tokens of one sequence, all of which fit into the pool."""

    num_blocks: int
    max_seq_len: int


def choose_capacity(
    manifest: Manifest,
    available_bytes: int | None,
    *,
    num_blocks: int | None = None,
    cache_bytes: int | None = None,
    max_seq_len: int | None = None,
) -> Capacity:
    """A pool of ``num_blocks`` where given, else of ``cache_bytes`` where given, else of a part of the free memory.

    A sequence may have ``max_seq_len`` tokens where given, else what the engine was built for, or what the pool holds
    where that is less.

    Args:
        available_bytes: memory the process can have, None if unknown.

    Raises:
        EngineOptionError: the engine was not built for ``max_seq_len``, or ``num_blocks`` or ``cache_bytes`` do not
            hold so many tokens or a single block.
        EngineError: the free memory does not.
    """
    built = manifest.limits.max_seq_len
    if max_seq_len is not None and not MIN_SEQ_LEN <= max_seq_len <= built:
        raise EngineOptionError(
            f"max_seq_len is {shown(max_seq_len)}, expected {MIN_SEQ_LEN} to {built}, what the engine was built for"
        )
    wanted = built if max_seq_len is None else max_seq_len
    block_size, bytes_each = manifest.cache.block_size, block_bytes(manifest.states)
    one_sequence = math.ceil(wanted / block_size)
    told = num_blocks is not None or cache_bytes is not None
    if num_blocks is None:
        num_blocks = _pool_size(manifest, one_sequence, bytes_each, available_bytes, cache_bytes)
    if num_blocks >= one_sequence:
        return Capacity(num_blocks, wanted)
    if max_seq_len is not None or num_blocks < 1:
        raise (EngineOptionError if told else EngineError)(
            _too_small(max_seq_len, built, block_size, bytes_each, num_blocks)
        )
    return Capacity(num_blocks, num_blocks * block_size)


def _too_small(max_seq_len: int | None, built: int, block_size: int, bytes_each: int, num_blocks: int) -> str:
    """What to say of a pool that does not hold ``max_seq_len`` tokens, or, if that is None, not even a block."""
    needed = math.ceil((max_seq_len or 1) / block_size)
    if max_seq_len is None:
        what = "a cache needs at least 1 block"
        whole = least_mebibytes(math.ceil(built / block_size), bytes_each)
        more = f"; the {built} tokens that the engine was built for take {whole} MiB"
    else:
        what = f"a sequence of {max_seq_len} tokens needs {needed} cache blocks"
        more = ", or for a smaller --max-seq-len"
    return (
        f"{what} of {block_size} tokens, {needed * bytes_each / 2**20:,.1f} MiB, there is memory for {num_blocks}; "
        f"ask for {least_mebibytes(needed, bytes_each)} MiB or more with --kv-cache-memory "
        f"(in Python cache_bytes or num_blocks){more}"
    )


def _pool_size(
    manifest: Manifest, one_sequence: int, bytes_each: int, available_bytes: int | None, cache_bytes: int | None
) -> int:
    """Blocks that ``cache_bytes`` hold, else several sequences as far as half of the memory beside the weights goes."""
    if not bytes_each:  # a model without attention: blocks are numbers alone
        return _MOST_SEQUENCES * one_sequence
    if cache_bytes is not None:
        return cache_bytes // bytes_each
    if available_bytes is None:
        return one_sequence
    left_bytes = max(0, available_bytes - sum(part.size_bytes for part in manifest.parts.values()))
    if one_sequence * bytes_each > available_bytes:
        return int(left_bytes * _TIGHT_MEMORY_PART) // bytes_each
    return max(one_sequence, min(int(left_bytes * _MEMORY_PART) // bytes_each, _MOST_SEQUENCES * one_sequence))


def with_limit(manifest: Manifest, max_seq_len: int) -> Manifest:
    """``manifest`` of an engine whose sequences may have ``max_seq_len`` tokens."""
    return dataclasses.replace(manifest, limits=Limits(max_seq_len))


def warn_of_shorter(manifest: Manifest, capacity: Capacity) -> None:
    """Say up to how many tokens a request may have, fewer than the engine of ``manifest`` was built for."""
    built, bytes_each = manifest.limits.max_seq_len, block_bytes(manifest.states)
    pool_bytes = capacity.num_blocks * bytes_each
    full_bytes = math.ceil(built / manifest.cache.block_size) * bytes_each
    warnings.warn(
        f"a request may have up to {capacity.max_seq_len} tokens, which is what a cache of {pool_bytes / 2**20:,.0f} "
        f"MiB holds; the {built} that the engine was built for take {full_bytes / 2**20:,.0f} MiB"
        + _SMALLER_DTYPE.get(manifest.cache.dtype, ""),
        stacklevel=3,
    )
