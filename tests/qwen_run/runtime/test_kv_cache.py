"""The block pool: who owns what, what a block holds when given out, how large the pool is."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qwen_engine.errors import EngineError
from qwen_engine.graph_io import TensorSpec, cache_inputs
from qwen_run.runtime.kv_cache import Blocks, Edit, KVCache, Pools, block_bytes
from qwen_run.runtime.prefix_cache import extend_keys

STATES = cache_inputs(layers=(0, 1, 2), kv_heads=2, head_dim=8, block_size=64, dtype="float16")
BLOCK_BYTES = 3 * 2 * (2 * 8 * 64) * 2  # layers, key and value, elements, bytes of a float16


def make_cache(num_blocks: int = 5) -> KVCache:
    return KVCache(STATES, block_size=64, num_blocks=num_blocks)


def test_pools_follow_the_list_of_states() -> None:
    pools = make_cache().pools
    assert list(pools) == [state.name for state in STATES]
    assert pools["key_cache.1"].shape == (5, 2, 2, 8, 32)
    assert pools["value_cache.2"].shape == (5, 2, 64, 8)
    assert all(pool.dtype == np.float16 and pool.ctypes.data % 64 == 0 for pool in pools.values())
    assert block_bytes(STATES) == BLOCK_BYTES


@pytest.mark.skipif(not Path("/sys/kernel/mm/transparent_hugepage").is_dir(), reason="there are no huge pages")
def test_pools_begin_with_small_pages() -> None:
    pool = next(iter(make_cache(4096).pools.values()))
    assert pool.nbytes > 3 << 20
    for offset, expected in ((0, "nh"), (2 << 20, "hg"), (3 << 20, "hg")):
        assert expected in advice_at(pool.ctypes.data + offset)


def advice_at(address: int) -> list[str]:
    """The flags of the memory there, as Linux abbreviates them."""
    inside = False
    for line in Path("/proc/self/smaps").read_text("utf-8").splitlines():
        name, *rest = line.split()
        if name == "VmFlags:" and inside:
            return rest
        if "-" in name and not name.endswith(":"):
            first, last = (int(end, 16) for end in name.split("-"))
            inside = first <= address < last
    raise AssertionError(f"no memory at {address:#x}")


@pytest.mark.parametrize("num_blocks", [1 << 37, 1 << 60])
def test_memory_that_the_system_refuses(num_blocks: int) -> None:
    with pytest.raises(EngineError, match=r"no memory for a cache of \d+\.0 GiB.*--kv-cache-memory"):
        make_cache(num_blocks)


def test_blocks_for() -> None:
    cache = make_cache()
    assert [cache.blocks_for(count) for count in (0, 1, 64, 65, 128, 129)] == [0, 1, 1, 2, 2, 3]


def test_allocate_all_or_nothing() -> None:
    cache = make_cache(5)
    first = cache.allocate(3)
    assert first is not None
    assert cache.allocate(3) is None
    assert cache.num_free == 2
    second = cache.allocate(2)
    assert second is not None
    assert sorted(first + second) == [0, 1, 2, 3, 4]
    assert cache.allocate(0) == []


def test_a_used_block_is_zeroed_before_it_is_given_out_again() -> None:
    cache = make_cache(2)
    block_ids = cache.allocate(2)
    assert block_ids is not None
    for pool in cache.pools.values():
        pool[...] = np.nan
    cache.free([block_ids[0]])
    again = cache.allocate(1)
    assert again == [block_ids[0]]
    for pool in cache.pools.values():
        assert not pool[again].any()
        assert np.isnan(pool[block_ids[1]]).all()  # and the neighbour's is left alone


def test_freed_blocks_come_before_untouched_ones() -> None:
    """A large pool commits no more memory than the most that was ever in use."""
    cache = make_cache(1000)
    for _ in range(50):
        block_ids = cache.allocate(3)
        assert block_ids is not None
        assert max(block_ids) < 3
        cache.free(block_ids)


def test_double_free_is_our_bug() -> None:
    cache = make_cache()
    block_ids = cache.allocate(1)
    assert block_ids is not None
    cache.free(block_ids)
    with pytest.raises(AssertionError, match="freed twice"):
        cache.free(block_ids)


@given(st.lists(st.integers(0, 7), max_size=60))
def test_no_block_has_two_owners(steps: list[int]) -> None:
    cache, owned = make_cache(9), []
    for step in steps:
        if step % 2 and owned:
            cache.free(owned.pop(step % len(owned)))
        elif (block_ids := cache.allocate(step // 2)) is not None:
            owned.append(block_ids)
        held = [block for block_ids in owned for block in block_ids]
        assert len(held) == len(set(held)) == cache.num_blocks - cache.num_free
        assert all(0 <= block < cache.num_blocks for block in held)


def test_a_shared_block_is_free_when_its_last_owner_gives_it_back() -> None:
    cache = make_cache(2)
    block_ids = cache.allocate(2)
    assert block_ids is not None
    assert not cache.is_shared(block_ids[0])
    cache.share(block_ids[:1])
    assert cache.is_shared(block_ids[0])
    cache.free(block_ids)
    assert cache.num_free == 1
    cache.free(block_ids[:1])
    assert cache.num_free == 2


def test_a_copy_is_of_every_pool() -> None:
    cache = make_cache(3)
    source, target = cache.allocate(2) or []
    for number, pool in enumerate(cache.pools.values()):
        pool[source] = number
    cache.copy(source, target)
    for number, pool in enumerate(cache.pools.values()):
        assert (pool[target] == number).all()


def fill_and_free(cache: KVCache, *keys: bytes) -> list[int]:
    """Publish a sequence of full blocks and give it back."""
    block_ids = cache.allocate(len(keys))
    assert block_ids is not None
    for block, key in zip(block_ids, keys, strict=True):
        cache.publish(block, key)
    cache.free(block_ids)
    return block_ids


def test_a_prefix_is_found_until_its_blocks_are_needed() -> None:
    cache = make_cache(3)
    block_ids = fill_and_free(cache, b"a", b"ab", b"abc")
    assert cache.num_free == 3
    assert cache.take_prefix([b"a", b"ab", b"abd"]) == block_ids[:2]
    assert cache.num_free == 1
    cache.free(block_ids[:2])
    assert cache.allocate(1) == [block_ids[2]]  # used longest ago
    assert cache.take_prefix([b"a", b"ab", b"abc"]) == block_ids[:2]
    assert cache.take_prefix([b"ab"]) == block_ids[1:2]  # by two owners
    assert cache.is_shared(block_ids[1])


def test_the_end_of_a_prefix_goes_first() -> None:
    cache = make_cache(3)
    block_ids = fill_and_free(cache, b"a", b"ab", b"abc")
    assert cache.allocate(2) == [block_ids[2], block_ids[1]]
    assert cache.take_prefix([b"a", b"ab"]) == block_ids[:1]


def test_blocks_that_hold_nothing_known_are_given_out_first() -> None:
    cache = make_cache(4)
    block_ids = fill_and_free(cache, b"a", b"ab")
    others = cache.allocate(2)
    assert others is not None
    assert not set(others) & set(block_ids)


def test_of_two_blocks_with_the_same_tokens_one_is_found() -> None:
    cache = make_cache(4)
    first, second = cache.allocate(1), cache.allocate(1)
    assert first is not None
    assert second is not None
    cache.publish(first[0], b"a")
    cache.publish(second[0], b"a")
    assert cache.take_prefix([b"a"]) == first
    cache.free(second)
    assert cache.take_prefix([b"a"]) == first


def test_a_block_found_by_its_tokens_is_zeroed_for_others() -> None:
    cache = make_cache(1)
    (block,) = fill_and_free(cache, b"a")
    for pool in cache.pools.values():
        pool[block] = np.nan
    assert cache.take_prefix([b"a"]) == [block]
    assert all(np.isnan(pool[block]).all() for pool in cache.pools.values())
    cache.free([block])
    assert cache.allocate(1) == [block]
    assert not any(pool[block].any() for pool in cache.pools.values())
    assert cache.take_prefix([b"a"]) == []


def test_keys_depend_on_everything_before() -> None:
    def keys(*token_ids: int) -> list[bytes]:
        found: list[bytes] = []
        extend_keys(found, list(token_ids), 2, len(token_ids) // 2)
        return found

    whole = keys(1, 2, 3, 4, 5)
    assert len(whole) == len(set(whole)) == 2
    assert keys(1, 2, 3, 9)[0] == whole[0] != keys(2, 2, 3, 4)[0]
    assert len({keys(1, 2, 3, 4)[1], keys(0, 2, 3, 4)[1], keys(1, 2, 4, 3)[1], keys(3, 4, 3, 4)[1]}) == 4
    grown = whole[:1]
    extend_keys(grown, [1, 2, 3, 4], 2, 2)
    assert grown == whole


@pytest.mark.parametrize("shape", [("num_blocks", "heads"), (7, 2), ("T", 2), ()])
def test_a_state_of_another_form_is_refused(shape: tuple[int | str, ...]) -> None:
    with pytest.raises(EngineError, match="state odd is paged_state"):
        KVCache([TensorSpec("odd", "paged_state", "float32", shape)], block_size=32, num_blocks=2)


ACTIONS = st.lists(st.tuples(st.sampled_from(["take", "free", "copy", "publish", "find", "write"]), st.integers(0, 99)))


@given(ACTIONS, st.integers(1, 7))
def test_pools_elsewhere_are_edited_as_those_here(actions: list[tuple[str, int]], applied_every: int) -> None:
    """Accounting whose edits travel with batches gives out the same blocks, and leaves the same bytes in them."""
    states = cache_inputs(layers=(0,), kv_heads=1, head_dim=4, block_size=32, dtype="float16")
    here, pools, noted = KVCache(states, 32, 6), Pools(states, 6), list[Edit]()
    apart = Blocks(32, 6, block_bytes(states), noted.append)
    owned: list[int] = []
    for step, (action, n) in enumerate(actions):
        if action == "take":
            found = here.allocate(n % 3)
            assert apart.allocate(n % 3) == found
            owned += found or []
        elif action == "find":
            keys = [b"%d" % (n % 5), b"%d" % (n % 7)]
            taken = here.take_prefix(keys)
            assert apart.take_prefix(keys) == taken
            owned += taken
        elif owned:
            block = owned[n % len(owned)]
            if action == "free":
                owned.remove(block)
                here.free([block])
                apart.free([block])
            elif action == "publish":
                here.publish(block, b"%d" % (n % 5))
                apart.publish(block, b"%d" % (n % 5))
            elif action == "copy":
                here.copy(owned[0], block)
                apart.copy(owned[0], block)
        if action == "write" or step % applied_every == 0:  # a batch: what was noted comes before it
            for edit in noted:
                pools.apply(edit)
            noted.clear()
            for block in set(owned):
                for memory in (here.pools, pools.arrays):
                    for pool in memory.values():
                        pool[block] = n + block
        assert apart.num_free == here.num_free
    for edit in noted:
        pools.apply(edit)
    for name, pool in here.pools.items():
        assert np.array_equal(pool, pools.arrays[name])


def test_what_is_forgotten_is_free_and_given_out_as_zeros() -> None:
    """Pools whose owners are gone hold what nobody knows."""
    cache = make_cache(3)
    fill_and_free(cache, b"a")
    assert cache.allocate(2) is not None
    for pool in cache.pools.values():
        pool[...] = np.nan
    cache.forget()
    assert cache.num_free == 3
    assert cache.take_prefix([b"a"]) == []
    assert sorted(cache.allocate(3) or []) == [0, 1, 2]
    assert not any(pool.any() for pool in cache.pools.values())
