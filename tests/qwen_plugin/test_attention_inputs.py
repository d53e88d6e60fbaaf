"""qwen::PagedAttention with inputs and attributes that cannot be: each is named."""

from __future__ import annotations

import dataclasses
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest

from cases.attention import ELEMENT_TYPES, ISAS, Case, copy, make_feeds, new_session, run_attention
from cases.processes import PATIENCE_S

# Mistakes: each is an error that names what is wrong, and leaves the caches as they were.


def break_feeds(**changes: Any) -> Any:
    """Feeds with some inputs replaced: by an array, by a function of the good one, or (None) left out."""

    def apply(feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        for name, change in changes.items():
            if change is None:
                del feeds[name]
            else:
                feeds[name] = change(feeds[name]) if callable(change) else change
        return feeds

    return apply


def set_element(index: Any, value: int) -> Any:
    def apply(x: np.ndarray) -> np.ndarray:
        x = x.copy()
        x[index] = value
        return x

    return apply


F32 = np.float32
# The good case: past 3, 40 and 70, new 2, 0 and 5 tokens, 2 kv heads of 40, blocks of 32, float32.
BROKEN_INPUTS = [
    ("query is missing", break_feeds(query=None)),
    ("key_cache is missing", break_feeds(key_cache=None)),
    ("value_cache is missing", break_feeds(value_cache=None)),
    ("cumulative_lengths is missing", break_feeds(cumulative_lengths=None)),
    ("past_lengths is missing", break_feeds(past_lengths=None)),
    ("block_table is missing", break_feeds(block_table=None)),
    ("cos_cache is missing", break_feeds(cos_cache=None)),
    ("sin_cache is missing", break_feeds(sin_cache=None)),
    ("q_norm_weight and k_norm_weight", break_feeds(q_norm_weight=None)),
    ("q_norm_weight and k_norm_weight", break_feeds(k_norm_weight=None)),
    ("key is given", break_feeds(key=np.zeros((7, 80), F32))),
    ("value is given", break_feeds(value=np.zeros((7, 80), F32))),
    ("slot_mapping is given", break_feeds(slot_mapping=np.zeros(7, np.int32))),
    ("head_sink is given", break_feeds(head_sink=np.zeros(4, F32))),
    ("attention_metadata is given", break_feeds(attention_metadata=np.zeros(1, np.int32))),
    ("key_scale is given", break_feeds(key_scale=np.zeros((8, 2, 32), F32))),
    ("value_scale is given", break_feeds(value_scale=np.zeros((8, 2, 32), F32))),
    ("query has element type", break_feeds(query=lambda x: x.astype(np.float16))),
    ("key_cache has element type", break_feeds(key_cache=lambda x: x.astype(np.float64))),
    ("value_cache has element type", break_feeds(value_cache=lambda x: x.astype(np.float16))),
    ("cumulative_lengths has element type", break_feeds(cumulative_lengths=lambda x: x.astype(np.int64))),
    ("past_lengths has element type", break_feeds(past_lengths=lambda x: x.astype(np.int64))),
    ("block_table has element type", break_feeds(block_table=lambda x: x.astype(np.int64))),
    ("cos_cache has element type", break_feeds(cos_cache=lambda x: x.astype(np.float16))),
    ("sin_cache has element type", break_feeds(sin_cache=lambda x: x.astype(np.float64))),
    ("q_norm_weight has element type", break_feeds(q_norm_weight=lambda x: x.astype(np.float16))),
    ("k_norm_weight has element type", break_feeds(k_norm_weight=lambda x: x.astype(np.float16))),
    ("query has shape", break_feeds(query=lambda x: x[:, :-1].copy())),
    ("query has shape", break_feeds(query=lambda x: x[None])),
    ("key_cache has shape", break_feeds(key_cache=lambda x: x[..., 0].copy())),
    ("key_cache has shape", break_feeds(key_cache=lambda x: x[:, :1].copy())),
    ("key_cache has shape", break_feeds(key_cache=lambda x: x[..., :16].copy())),
    ("key_cache has shape", break_feeds(key_cache=lambda x: x[:, :, :, :36].copy())),
    ("key_cache has shape", break_feeds(key_cache=lambda x: np.repeat(x, 8, axis=3))),
    ("key_cache has shape", break_feeds(key_cache=lambda x: np.repeat(x, 3, axis=2))),
    ("key_cache has shape", break_feeds(key_cache=lambda x: x[:, :, :0].copy())),
    ("key_cache has shape", break_feeds(key_cache=lambda x: x[:, :, :, :0].copy())),
    ("value_cache has shape", break_feeds(value_cache=lambda x: x[:-1].copy())),
    ("value_cache has shape", break_feeds(value_cache=lambda x: x[:, :, :16].copy())),
    ("value_cache has shape", break_feeds(value_cache=lambda x: x[0])),
    ("cumulative_lengths has shape", break_feeds(cumulative_lengths=lambda x: x[:-1].copy())),
    ("cumulative_lengths has shape", break_feeds(cumulative_lengths=lambda x: x[:, None])),
    ("cumulative_lengths has shape", break_feeds(cumulative_lengths=np.zeros(0, np.int32))),
    ("past_lengths has shape", break_feeds(past_lengths=lambda x: x[None])),
    ("past_lengths has shape", break_feeds(past_lengths=np.array(3, np.int32))),
    ("block_table has shape", break_feeds(block_table=lambda x: x[:2].copy())),
    ("block_table has shape", break_feeds(block_table=lambda x: x.reshape(-1))),
    ("cos_cache has shape", break_feeds(cos_cache=lambda x: np.repeat(x, 2, axis=1))),
    ("cos_cache has shape", break_feeds(cos_cache=lambda x: x[:, :0].copy())),
    ("cos_cache has shape", break_feeds(cos_cache=lambda x: x[0])),
    ("sin_cache has shape", break_feeds(sin_cache=lambda x: x[:-1].copy())),
    ("q_norm_weight has shape", break_feeds(q_norm_weight=lambda x: x[:-1].copy())),
    ("k_norm_weight has shape", break_feeds(k_norm_weight=lambda x: x[None])),
    ("cumulative_lengths[0] is 1, expected 0", break_feeds(cumulative_lengths=set_element(0, 1))),
    ("cumulative_lengths[2] is 1, expected at least the 2", break_feeds(cumulative_lengths=set_element(2, 1))),
    ("cumulative_lengths[1] is -5", break_feeds(cumulative_lengths=set_element(1, -5))),
    ("cumulative_lengths[3] is 8, expected the 7 tokens", break_feeds(cumulative_lengths=set_element(3, 8))),
    ("cumulative_lengths[3] is 6, expected the 7 tokens", break_feeds(cumulative_lengths=set_element(3, 6))),
    ("past_lengths[1] is -1", break_feeds(past_lengths=set_element(1, -1))),
    ("past_lengths[0] is -2147483648", break_feeds(past_lengths=set_element(0, -(2**31)))),
    ("cos_cache has 74 positions", break_feeds(cos_cache=lambda x: x[:74].copy(), sin_cache=lambda x: x[:74].copy())),
    ("cos_cache has 75 positions", break_feeds(past_lengths=set_element(2, 2**31 - 1))),
    ("block_table has room for 64 tokens", break_feeds(block_table=lambda x: x[:, :2].copy())),
    ("block_table has room for 0 tokens", break_feeds(block_table=lambda x: x[:, :0].copy())),
    ("block_table[2, 0] is -1", break_feeds(block_table=set_element((2, 0), -1))),
    ("block_table[2, 1] is 8, expected 0 to 7", break_feeds(block_table=set_element((2, 1), 8))),
    ("block_table[0, 0] is 2147483647", break_feeds(block_table=set_element((0, 0), 2**31 - 1))),
    ("block_table has two places for new tokens", break_feeds(block_table=lambda x: set_element((0, 0), x[2, 2])(x))),
]  # fmt: skip
GOOD = Case(past=(3, 40, 70), new=(2, 0, 5))
BROKEN_INT8_INPUTS = [
    ("key_scale is missing", break_feeds(key_scale=None)),
    ("value_scale is missing", break_feeds(value_scale=None)),
    ("value_cache has element type", break_feeds(value_cache=lambda x: x.astype(np.float16))),
    ("key_scale is given", break_feeds(key_cache=lambda x: x.astype(F32), value_cache=lambda x: x.astype(F32))),
    ("key_scale has element type", break_feeds(key_scale=lambda x: x.astype(np.float16))),
    ("value_scale has element type", break_feeds(value_scale=lambda x: x.astype(np.float64))),
    ("key_scale has shape", break_feeds(key_scale=lambda x: x[:-1].copy())),
    ("value_scale has shape", break_feeds(value_scale=lambda x: x[..., 0].copy())),
    ("value_scale has shape", break_feeds(value_scale=lambda x: x[:, :, :16].copy())),
]


@pytest.mark.parametrize(
    ("dtype", "message", "change"),
    [*(("float32", *row) for row in BROKEN_INPUTS), *(("int8", *row) for row in BROKEN_INT8_INPUTS)],
    ids=range(len(BROKEN_INPUTS) + len(BROKEN_INT8_INPUTS)),
)
def test_a_broken_input_is_named(dtype: str, message: str, change: Any) -> None:
    feeds = change(make_feeds(dataclasses.replace(GOOD, dtype=dtype)))
    before = copy(feeds)
    with pytest.raises(Exception, match="qwen::PagedAttention") as failure:
        run_attention(feeds, GOOD.node_attributes, ISAS[-1])
    assert f"qwen::PagedAttention: {message}" in str(failure.value)
    for name, array in before.items():
        np.testing.assert_array_equal(feeds[name], array, err_msg=name)


def test_what_no_query_needs_is_not_looked_at() -> None:
    """Free blocks behind the window, the table of a sequence without new tokens, unused inputs of the rotation."""
    case = dataclasses.replace(GOOD, window=10)
    feeds = make_feeds(case)
    expected = run_attention(copy(feeds), case.node_attributes, ISAS[-1])
    feeds["block_table"][2, 0], feeds["block_table"][1] = -7, 10**6
    feeds["past_lengths"][1] = 10**6
    np.testing.assert_array_equal(run_attention(feeds, case.node_attributes, ISAS[-1]), expected)


@pytest.mark.parametrize(
    ("attribute", "value"),
    [
        ("num_heads", None),
        ("num_heads", 0),
        ("num_heads", -4),
        ("num_heads", 2**40),
        ("num_heads", 4.0),
        ("kv_num_heads", None),
        ("kv_num_heads", 3),
        ("kv_num_heads", 0),
        ("scale", -1.0),
        ("scale", float("nan")),
        ("scale", float("inf")),
        ("scale", 1),
        ("scale", "big"),
        ("do_rotary", 2),
        ("do_rotary", 1.0),
        ("rotary_interleaved", 1),
        ("rotary_offset", 8),
        ("qk_norm_epsilon", -1e-6),
        ("local_window_size", 0),
        ("local_window_size", -2),
        ("is_causal", 0),
        ("softcap", 30.0),
        ("v_head_size", 16),
    ],
)
def test_a_bad_attribute_is_named_when_the_session_is_created(attribute: str, value: Any) -> None:
    attributes = GOOD.node_attributes | {attribute: value}
    types = {name: (ELEMENT_TYPES[x.dtype], x.ndim) for name, x in make_feeds(GOOD).items()}
    with pytest.raises(Exception, match=f"qwen::PagedAttention: attribute {attribute} is"):
        new_session(types, {k: v for k, v in attributes.items() if v is not None}, ISAS[-1])


def test_an_unknown_instruction_set_is_refused_when_the_session_is_created() -> None:
    types = {name: (ELEMENT_TYPES[x.dtype], x.ndim) for name, x in make_feeds(GOOD).items()}
    with pytest.raises(Exception, match=r"QWEN_PLUGIN_ISA is 'sse9', expected .*neon or plain"):
        new_session(types, GOOD.node_attributes, "sse9")


def test_sessions_can_run_at_the_same_time() -> None:
    case = Case(past=(900,), new=(3,), heads=14, head_dim=64, rotary_dim=64)
    expected = run_attention(make_feeds(case), case.node_attributes, ISAS[-1], threads=2)
    with ThreadPoolExecutor(4) as pool:
        jobs = [pool.submit(run_attention, make_feeds(case), case.node_attributes, ISAS[-1], 2) for _ in range(40)]
        for job in jobs:
            np.testing.assert_array_equal(job.result(PATIENCE_S), expected)
