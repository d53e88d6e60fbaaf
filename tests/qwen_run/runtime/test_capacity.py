"""How large the cache becomes, and how long a sequence may be with it, in blocks of 64 tokens."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from qwen_engine.errors import EngineError
from qwen_engine.graph_io import cache_inputs
from qwen_engine.manifest import CacheLayout, FileRecord, Limits
from qwen_run.runtime.capacity import Capacity, choose_capacity

STATES = cache_inputs(layers=(0, 1, 2), kv_heads=2, head_dim=8, block_size=64, dtype="float16")
BLOCK_BYTES = 3 * 2 * (2 * 8 * 64) * 2  # layers, key and value, elements, bytes of a float16
WEIGHTS_BYTES = 4 * BLOCK_BYTES

# the part of a manifest that decides: 100 tokens are two blocks
SIZES: Any = SimpleNamespace(
    states=STATES,
    limits=Limits(max_seq_len=100),
    cache=CacheLayout(block_size=64, dtype="float16", bytes_per_token=BLOCK_BYTES // 64),
    parts={"weights.bin": FileRecord(WEIGHTS_BYTES, "", "")},
)
LONG: Any = SimpleNamespace(**vars(SIZES) | {"limits": Limits(max_seq_len=64_000)})  # 1,000 blocks


@pytest.mark.parametrize(
    ("available", "num_blocks"),
    [
        (None, 2),  # one sequence where the system does not say
        (2 * BLOCK_BYTES, 2),  # it just fits
        (WEIGHTS_BYTES + 2 * 7 * BLOCK_BYTES, 7),  # half of what the weights leave
        (1000 * BLOCK_BYTES, 16),  # eight sequences are enough
    ],
)
def test_default_pool_size(available: int | None, num_blocks: int) -> None:
    assert choose_capacity(SIZES, available) == Capacity(num_blocks, 100)


def test_memory_for_less_than_one_sequence_makes_sequences_shorter() -> None:
    assert choose_capacity(LONG, 999 * BLOCK_BYTES) == Capacity(895, 895 * 64)  # nine tenths beside the weights
    assert choose_capacity(LONG, 14 * BLOCK_BYTES) == Capacity(9, 9 * 64)
    assert choose_capacity(LONG, 10**9, num_blocks=30) == Capacity(30, 30 * 64)
    assert choose_capacity(LONG, 10**9, cache_bytes=5 * BLOCK_BYTES + 1) == Capacity(5, 5 * 64)


def test_a_shorter_sequence_can_be_asked_for() -> None:
    assert choose_capacity(LONG, 14 * BLOCK_BYTES, max_seq_len=130) == Capacity(5, 130)
    assert choose_capacity(LONG, None, max_seq_len=130) == Capacity(3, 130)
    assert choose_capacity(LONG, 0, num_blocks=3, max_seq_len=192) == Capacity(3, 192)
    assert choose_capacity(SIZES, 0, num_blocks=7, max_seq_len=100) == Capacity(7, 100)


def test_what_was_asked_for_and_does_not_fit_is_refused() -> None:
    advice = r"; ask for a smaller --max-seq-len or more --kv-cache-memory"
    for given in ({"num_blocks": 2}, {"cache_bytes": 3 * BLOCK_BYTES - 1}):
        with pytest.raises(
            EngineError, match=rf"130 tokens needs 3 cache blocks, 0.0 MiB, there is memory for 2 blocks.*{advice}"
        ):
            choose_capacity(LONG, 10**9, max_seq_len=130, **given)  # type: ignore[arg-type]
    for available in (0, WEIGHTS_BYTES):
        with pytest.raises(EngineError, match=rf"there is memory for 0 blocks of 64 tokens{advice}"):
            choose_capacity(LONG, available)


@pytest.mark.parametrize("max_seq_len", [0, 1, 101, 2**63])
def test_lengths_the_engine_was_not_built_for_are_refused(max_seq_len: int) -> None:
    with pytest.raises(EngineError, match=r"^max_seq_len is .*, expected 2 to 100, what the engine was built for$"):
        choose_capacity(SIZES, None, max_seq_len=max_seq_len)
