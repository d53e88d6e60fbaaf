"""How large the cache becomes, and how long a sequence may be with it, in blocks of 64 tokens."""

from __future__ import annotations

import re
from types import SimpleNamespace
from typing import Any

import pytest

from qwen_engine.errors import EngineError, EngineOptionError
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
    says = (
        "a sequence of 130 tokens needs 3 cache blocks of 64 tokens, 0.0 MiB, there is memory for 2; ask for 1 MiB or "
        "more with --kv-cache-memory (in Python cache_bytes or num_blocks), or for a smaller --max-seq-len"
    )
    for given in ({"num_blocks": 2}, {"cache_bytes": 3 * BLOCK_BYTES - 1}):
        with pytest.raises(EngineOptionError, match=f"^{re.escape(says)}$"):
            choose_capacity(LONG, 10**9, max_seq_len=130, **given)  # type: ignore[arg-type]
    for available in (0, WEIGHTS_BYTES):
        with pytest.raises(EngineError, match=r"for 0; ask for 1 MiB or more with --kv-cache") as refused:
            choose_capacity(LONG, available)
        assert refused.value.exit_code == 1  # nothing was asked for that cannot be


def test_a_cache_that_holds_no_block_is_refused_with_what_one_takes_and_what_all_tokens_take() -> None:
    says = (
        "a cache needs at least 1 block of 64 tokens, 0.0 MiB, there is memory for 0; ask for 1 MiB or more with "
        "--kv-cache-memory (in Python cache_bytes or num_blocks); the 64000 tokens that the engine was built for take "
        "12 MiB"
    )
    with pytest.raises(EngineOptionError, match=f"^{re.escape(says)}$"):
        choose_capacity(LONG, None, cache_bytes=BLOCK_BYTES - 1)


@pytest.mark.parametrize(("max_seq_len", "num_bytes"), [(64_000, 1 << 20), (30_000, 5 << 20), (20_000, 1)])
def test_the_least_memory_that_is_named_is_enough_and_the_least(max_seq_len: int, num_bytes: int) -> None:
    with pytest.raises(EngineOptionError, match=r"ask for \d+ MiB or more with --kv-cache-memory") as refused:
        choose_capacity(LONG, None, cache_bytes=num_bytes, max_seq_len=max_seq_len)
    found = re.search(r"ask for (\d+) MiB", str(refused.value))
    assert found
    least = int(found[1])
    choose_capacity(LONG, None, cache_bytes=least << 20, max_seq_len=max_seq_len)
    with pytest.raises(EngineOptionError):
        choose_capacity(LONG, None, cache_bytes=(least - 1) << 20, max_seq_len=max_seq_len)


@pytest.mark.parametrize("max_seq_len", [0, 1, 101, 2**63])
def test_lengths_the_engine_was_not_built_for_are_refused(max_seq_len: int) -> None:
    with pytest.raises(EngineOptionError, match=r"^max_seq_len is .*, expected 2 to 100, what the engine was built"):
        choose_capacity(SIZES, None, max_seq_len=max_seq_len)
