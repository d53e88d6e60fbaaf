"""qwen::PagedAttention and what its caches hold: float16, int8, numbers that are not finite, the layout."""

from __future__ import annotations

import numpy as np
import pytest

from cases.attention import ISAS, Case, copy, make_feeds, run_attention
from qwen_engine import graph_io
from qwen_plugin.reference import (
    pack_keys,
    pack_values,
    paged_attention,
    quantize_tokens,
    unpack_keys,
    unpack_values,
)


@pytest.mark.parametrize("isa", ISAS)
def test_float16_cache_of_every_instruction_set_rounds_alike(isa: str) -> None:
    values = np.concatenate([
        np.float32([0, -0.0, 1, 65519.9, 65520, -70000, 1e9, np.inf, -np.inf]),
        np.float32([2**-14, 2**-24, 2**-25, 1.5 * 2**-25, -(2**-26), 6.1e-5, 5.9e-8, 1e-40]),
        (1 + np.arange(7) * 2.0**-12).astype(np.float32),  # ties between two halves
    ])  # fmt: skip
    feeds = make_feeds(
        Case(heads=1, kv_heads=1, head_dim=24, dtype="float16", past=(0,), new=(1,), rotary_dim=0, norm=False)
    )
    feeds["query"][0] = np.tile(values, 3)
    run_attention(feeds, {"num_heads": 1, "kv_num_heads": 1}, isa)
    with np.errstate(over="ignore"):
        expected = values.astype(np.float16).view(np.uint16)
    block = feeds["block_table"][0, 0]
    np.testing.assert_array_equal(feeds["value_cache"][block, 0, 0].view(np.uint16), expected)
    np.testing.assert_array_equal(feeds["key_cache"][block, 0, 0, :, 0].view(np.uint16), expected)


@pytest.mark.parametrize("isa", ISAS)
def test_float16_cache_is_read_exactly(isa: str) -> None:
    """With one visible key the output is its value: every finite half, subnormal ones included."""
    halves = np.arange(2**16, dtype=np.uint16).view(np.float16)
    halves = halves[np.isfinite(halves)][: 256 * 247].reshape(-1, 1, 256)
    n = len(halves)
    case = Case(
        heads=1, kv_heads=1, head_dim=256, dtype="float16", past=(0,), new=(n,), rotary_dim=0, norm=False, window=1
    )
    feeds = make_feeds(case)
    feeds["query"].reshape(n, 3, 256)[:, 2:] = halves
    output = run_attention(feeds, case.node_attributes, isa)
    np.testing.assert_array_equal(output, halves.reshape(n, 256).astype(np.float32))


@pytest.mark.parametrize("isa", ISAS)
def test_int8_cache_is_read_to_sixteen_bits(isa: str) -> None:
    """The reference rounds keys and values just so, and neither queries nor softmax weights."""
    case = Case(heads=14, head_dim=64, rotary_dim=0, norm=False, dtype="int8", past=(5, 300, 900), new=(1, 1, 1))
    feeds = make_feeds(case)
    tokens = feeds["query"].reshape(3, 18, 64)
    tokens[:, 14:] = np.rint(np.clip(40 * tokens[:, 14:], -127, 127))
    tokens[:, 14:, 0] = 127  # so that a new token's scale is 1 / 64, and no number is between two
    tokens[:, 14:] /= 64
    expected = paged_attention(case.attributes, **copy(feeds))
    # Steps of q and p are 2^-15 of the largest; a score sums 64 products with keys of about 1.
    np.testing.assert_allclose(run_attention(feeds, case.node_attributes, isa), expected, rtol=0, atol=2e-4)


@pytest.mark.parametrize("isa", ISAS)
def test_int8_cache_rounds_as_the_reference(isa: str) -> None:
    heads = np.random.default_rng(3).standard_normal((7, 24), dtype=np.float32)
    heads[0] = 0
    heads[1] = 1e-40  # 127 / 1e-40 is infinite
    heads[2] *= 1e37
    heads[3, :5] = 127, 0.5, 1.5, -2.5, -126.5  # ties
    case = Case(heads=1, kv_heads=1, head_dim=24, dtype="int8", past=(0,), new=(7,), rotary_dim=0, norm=False)
    feeds = make_feeds(case)
    feeds["query"] = np.tile(heads, 3)
    run_attention(feeds, {"num_heads": 1, "kv_num_heads": 1}, isa)
    expected, scales = quantize_tokens(heads)
    block = feeds["block_table"][0, 0]
    for kind, unpack in (("key", unpack_keys), ("value", unpack_values)):
        np.testing.assert_array_equal(unpack(feeds[f"{kind}_cache"])[block, 0, :7], expected)
        np.testing.assert_array_equal(feeds[f"{kind}_scale"][block, 0, :7], scales)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("number", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("kind", ["key", "value"])
def test_a_number_that_is_not_finite_stays_so_in_an_int8_cache(isa: str, number: float, kind: str) -> None:
    """In every row that sees it and nowhere else."""
    feeds = make_feeds(case := Case(past=(0, 0), new=(3, 3), dtype="int8", norm=False))
    feeds["query"].reshape(6, 8, 40)[4, 5 if kind == "key" else 7, 39] = number
    broken = np.isnan(run_attention(feeds, case.node_attributes, isa).reshape(6, 4, 40)).all(axis=-1)
    assert np.argwhere(broken).tolist() == [[4, 2], [4, 3], [5, 2], [5, 3]]


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("number", [np.nan, np.inf, -np.inf, 1e5])  # 1e5 is infinite in float16
def test_a_value_that_is_not_finite_stays_so_in_a_float16_cache(isa: str, number: float) -> None:
    """In its channels of every row that sees it, and nowhere else: with a window, some come before and some after."""
    feeds = make_feeds(case := Case(past=(0, 72), new=(3, 40), dtype="float16", norm=False, window=9))
    broken_feeds = copy(feeds)
    broken_feeds["query"].reshape(43, 8, 40)[3 + 20, 7, [3, 38]] = number
    output = run_attention(feeds, case.node_attributes, isa).reshape(43, 2, 2, 40)
    broken = run_attention(broken_feeds, case.node_attributes, isa).reshape(43, 2, 2, 40)
    expected = np.ones(broken.shape, bool)
    expected[23 : 23 + 9, 1, :, 3] = expected[23 : 23 + 9, 1, :, 38] = False
    np.testing.assert_array_equal(np.isfinite(broken), expected)
    np.testing.assert_array_equal(broken[expected], output[expected])


@pytest.mark.parametrize("isa", ISAS)
def test_a_key_that_is_not_a_number_stays_so_in_a_float16_cache(isa: str) -> None:
    feeds = make_feeds(case := Case(past=(0, 70), new=(3, 40), dtype="float16", norm=False, window=9))
    feeds["query"].reshape(43, 8, 40)[3 + 20, 5, 38] = np.nan
    broken = np.isnan(run_attention(feeds, case.node_attributes, isa).reshape(43, 2, 2, 40)).all(axis=(-1, -2))
    assert np.argwhere(broken).tolist() == [[row, 1] for row in range(23, 32)]


@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize("bits", [0x7FC00000, 0x7FFFE000, 0x7FFFFFFF, 0xFFFFFFFF])  # rounding may carry into the sign
@pytest.mark.parametrize("dtype", ["float32", "float16", "int8"])
def test_nan_score_reaches_the_output(dtype: str, bits: int, norm: bool) -> None:
    """A broken activation is to be seen, in its own row and nowhere else."""
    feeds = make_feeds(case := Case(past=(0, 0), new=(3, 3), dtype=dtype, norm=norm))
    feeds["query"].view(np.uint32)[4, 0] = bits
    for isa in ISAS:
        broken = np.isnan(run_attention(copy(feeds), case.node_attributes, isa).reshape(6, 4, 40)).all(axis=-1)
        assert np.argwhere(broken).tolist() == [[4, 0]]


def test_key_layout_is_the_contracts() -> None:
    keys = np.arange(2 * 64 * 8, dtype=np.float32).reshape(2, 64, 8)
    packed = pack_keys(keys)
    expected = next(s for s in graph_io.cache_inputs([0], 2, 8, 64, "float32") if s.name.startswith("key"))
    assert packed.shape == expected.shape[1:]
    assert packed[1, 1, 5, 3] == keys[1, 32 + 3, 5]
    np.testing.assert_array_equal(unpack_keys(packed), keys)


def test_int8_layout_is_the_contracts() -> None:
    tokens = np.arange(2 * 64 * 8).reshape(2, 64, 8).astype(np.int8)
    shapes = {s.name.split(".")[0]: s.shape[1:] for s in graph_io.cache_inputs([0], 2, 8, 64, "int8")}
    keys, values = pack_keys(tokens), pack_values(tokens)
    assert (keys.shape, values.shape) == (shapes["key_cache"], shapes["value_cache"])
    assert keys[1, 1].reshape(2, 32, 4)[1, 3, 2] == tokens[1, 32 + 3, 4 + 2]
    assert values[1].reshape(16, 8, 4)[5, 7, 2] == tokens[1, 4 * 5 + 2, 7]
    np.testing.assert_array_equal(unpack_keys(keys), tokens)
    np.testing.assert_array_equal(unpack_values(values), tokens)
