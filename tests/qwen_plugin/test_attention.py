"""qwen::PagedAttention: equal to its NumPy reference, and bit for bit independent of everything but the keys seen."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper

from cases.plugin_session import ISAS as SUPPORTED
from cases.plugin_session import make_model, make_session
from cases.processes import PATIENCE_S
from qwen_engine import graph_io
from qwen_plugin.reference import (
    PagedAttentionAttributes,
    pack_keys,
    pack_values,
    paged_attention,
    quantize_tokens,
    tokens_of_keys,
    tokens_of_values,
    unpack_keys,
    unpack_values,
)

INPUTS = (
    "query", "key", "value", "key_cache", "value_cache", "cumulative_lengths", "past_lengths", "block_table",
    "cos_cache", "sin_cache", "slot_mapping", "head_sink", "q_norm_weight", "k_norm_weight", "key_scale", "value_scale",
    "attention_metadata",
)  # fmt: skip
ELEMENT_TYPES = {
    np.dtype(np.float32): TensorProto.FLOAT,
    np.dtype(np.float16): TensorProto.FLOAT16,
    np.dtype(np.float64): TensorProto.DOUBLE,
    np.dtype(np.int8): TensorProto.INT8,
    np.dtype(np.int32): TensorProto.INT32,
    np.dtype(np.int64): TensorProto.INT64,
}
ISAS = [isa for isa in SUPPORTED if isa != "avxvnni"]  # it computes as avx2 does


def one_node_model(types: dict[str, tuple[int, int]], attributes: dict[str, Any]) -> bytes:
    """``types``: for every input given, its element type and rank."""
    names = list(INPUTS)
    while names[-1] not in types:
        names.pop()
    node = helper.make_node(
        "PagedAttention", [n if n in types else "" for n in names], ["output"], domain="qwen", **attributes
    )
    return make_model(
        [node],
        [
            helper.make_tensor_value_info(name, kind, [f"{name}{i}" for i in range(rank)])
            for name, (kind, rank) in types.items()
        ],
        [helper.make_tensor_value_info("output", TensorProto.FLOAT, None)],
    )


def new_session(types: dict[str, tuple[int, int]], attributes: dict[str, Any], isa: str, threads: int = 1) -> Any:
    return make_session(one_node_model(types, attributes), isa, threads)


@cache
def cached_session(
    types: tuple[tuple[str, tuple[int, int]], ...], attributes: tuple[Any, ...], isa: str, n: int
) -> Any:
    return new_session(dict(types), dict(attributes), isa, n)


def run_attention(feeds: dict[str, np.ndarray], attributes: dict[str, Any], isa: str, threads: int = 1) -> np.ndarray:
    """One run of the operator; the caches among ``feeds`` are changed in place."""
    types = tuple((name, (ELEMENT_TYPES[x.dtype], x.ndim)) for name, x in feeds.items())
    session = cached_session(types, tuple(sorted(attributes.items())), isa, threads)
    values = {name: ort.OrtValue.ortvalue_from_numpy(x) for name, x in feeds.items()}
    return session.run_with_ort_values(["output"], values)[0].numpy()


@dataclass(frozen=True)
class Case:
    """A batch of sequences, each of some past and some new tokens, and everything the operator can vary in."""

    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 40
    block_size: int = 32
    dtype: str = "float32"
    past: tuple[int, ...] = (0, 37, 300)
    new: tuple[int, ...] = (45, 1, 7)
    rotary_dim: int = 40
    norm: bool = True
    window: int = -1
    scale: float | None = None
    seed: int = 0

    @property
    def attributes(self) -> PagedAttentionAttributes:
        return PagedAttentionAttributes(
            num_heads=self.heads,
            kv_num_heads=self.kv_heads,
            scale=self.scale,
            do_rotary=int(self.rotary_dim > 0),
            qk_norm_epsilon=1e-5,
            local_window_size=self.window,
        )

    @property
    def node_attributes(self) -> dict[str, Any]:
        return {k: v for k, v in dataclasses.asdict(self.attributes).items() if v is not None}


@dataclass
class Cache:
    """A pool in which every sequence has its blocks, shuffled; slots that no sequence uses hold NaN (or any int8)."""

    case: Case
    rng: np.random.Generator

    def __post_init__(self) -> None:
        case = self.case
        needed = [-(-(p + n) // case.block_size) for p, n in zip(case.past, case.new, strict=True)]
        blocks = sum(needed) + 2
        ids = self.rng.permutation(blocks)
        self.table = np.full((len(needed), max(needed, default=0) + 1), -1, np.int32)
        for s, n in enumerate(needed):
            self.table[s, :n], ids = ids[:n], ids[n:]
        shapes = {
            "key_cache": (blocks, case.kv_heads, case.block_size // 32, case.head_dim, 32),
            "value_cache": (blocks, case.kv_heads, case.block_size, case.head_dim),
        }
        self.feeds: dict[str, np.ndarray]
        if case.dtype == "int8":
            scales = np.full((blocks, case.kv_heads, case.block_size), np.nan, np.float32)
            self.feeds = {n: self.rng.integers(-128, 128, shape, np.int8) for n, shape in shapes.items()}
            self.feeds |= {"key_scale": scales, "value_scale": scales.copy()}
        else:
            self.feeds = {n: np.full(shape, np.nan, case.dtype) for n, shape in shapes.items()}

    def fill(self, sequence: int, keys: np.ndarray, values: np.ndarray) -> None:
        """Past keys and values (past, kv_heads, head_dim) of one sequence."""
        positions = np.arange(len(keys))
        blocks, slots = self.table[sequence, positions // self.case.block_size], positions % self.case.block_size
        for kind, tokens_of, x in (("key", tokens_of_keys, keys), ("value", tokens_of_values, values)):
            if self.case.dtype == "int8":
                x, self.feeds[f"{kind}_scale"][blocks, :, slots] = quantize_tokens(x)
            tokens = tokens_of(self.feeds[f"{kind}_cache"])
            tile = tokens.shape[3]
            tokens[blocks, :, slots // tile, slots % tile] = x.reshape(*x.shape[:2], *tokens.shape[4:])


def make_feeds(case: Case) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(case.seed)
    draw = lambda *shape: rng.standard_normal(shape, dtype=np.float32)  # noqa: E731
    pool = Cache(case, rng)
    for s, past in enumerate(case.past):
        pool.fill(s, *draw(2, past, case.kv_heads, case.head_dim))
    feeds = {
        "query": 1.5 * draw(sum(case.new), (case.heads + 2 * case.kv_heads) * case.head_dim),
        "cumulative_lengths": np.cumsum((0, *case.new), dtype=np.int32),
        "past_lengths": np.array(case.past, np.int32),
        "block_table": pool.table,
    }
    if case.rotary_dim:
        positions = max((p + n for p, n in zip(case.past, case.new, strict=True)), default=0)
        angles = rng.uniform(0, 2 * np.pi, (positions, case.rotary_dim // 2)).astype(np.float32)
        feeds |= {"cos_cache": np.cos(angles), "sin_cache": np.sin(angles)}
    if case.norm:
        feeds |= {"q_norm_weight": 1 + 0.3 * draw(case.head_dim), "k_norm_weight": 1 + 0.3 * draw(case.head_dim)}
    return feeds | pool.feeds


def copy(feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {name: x.copy() for name, x in feeds.items()}


def check_against_reference(case: Case, isa: str, threads: int = 1) -> None:
    feeds = make_feeds(case)
    expected_feeds = copy(feeds)
    expected = paged_attention(case.attributes, **expected_feeds)
    found = run_attention(feeds, case.node_attributes, isa, threads)
    assert found.dtype == np.float32
    assert found.shape == expected.shape
    # Scores reach 20, where one unit in the last place of float32 is 2e-6, and exp makes that a relative error of
    # the weight; a float16 key may round the other way than the reference's (1 in 2^11), and so may an int8 one (1 in
    # 127 of the largest), which happens to a few numbers in a million.
    tolerance = {"float32": 1e-5, "float16": 2e-3, "int8": 1e-2}[case.dtype]
    np.testing.assert_allclose(found, expected, rtol=0, atol=tolerance)
    cache_tolerance = {"float32": 2e-6, "float16": 1e-3, "int8": 1}[case.dtype]
    for name in ("key_cache", "value_cache"):
        same, expected_cache = feeds[name].astype(np.float32), expected_feeds[name].astype(np.float32)
        np.testing.assert_allclose(
            same, expected_cache, rtol=cache_tolerance * (case.dtype != "int8"), atol=cache_tolerance
        )
    for name in feeds.keys() & {"key_scale", "value_scale"}:
        np.testing.assert_allclose(feeds[name], expected_feeds[name], rtol=2e-6)


CASES = [
    Case(),
    Case(head_dim=8, rotary_dim=8, kv_heads=4),
    Case(head_dim=64, rotary_dim=64, heads=14, dtype="float16"),
    Case(head_dim=80, rotary_dim=20, block_size=128, heads=3, kv_heads=3),
    Case(head_dim=128, rotary_dim=128, block_size=64, heads=7, kv_heads=1, norm=False),
    Case(head_dim=256, rotary_dim=64, heads=2, kv_heads=1, dtype="float16", norm=False),
    Case(head_dim=8, rotary_dim=8, kv_heads=4, dtype="float16"),
    Case(head_dim=72, rotary_dim=8, heads=48, past=(0,), new=(310,), dtype="float16"),  # the largest items
    Case(head_dim=128, rotary_dim=64, heads=9, kv_heads=1, dtype="float16", window=70, past=(300,), new=(1,)),
    Case(window=20, heads=6),
    Case(window=1),
    Case(window=260, block_size=512, past=(0, 600), new=(290, 3), dtype="float16"),
    Case(rotary_dim=0, scale=0.05),
    Case(past=(0, 5, 31, 32, 255, 256), new=(1, 0, 1, 2, 1, 1)),
    Case(past=(700,), new=(300,), heads=2),
    Case(past=(), new=()),
    Case(past=(3, 9), new=(0, 0)),
    Case(past=(1500,), new=(1,), heads=14, head_dim=64, rotary_dim=64),
    Case(dtype="int8"),
    Case(head_dim=64, rotary_dim=64, heads=14, dtype="int8", block_size=64, past=(0, 700), new=(70, 1)),
    Case(head_dim=64, rotary_dim=64, heads=14, dtype="int8", past=(5, 300, 900), new=(1, 2, 20)),
    Case(head_dim=128, rotary_dim=64, heads=9, kv_heads=1, dtype="int8", window=70, past=(300,), new=(1,)),
    Case(head_dim=8, rotary_dim=8, kv_heads=4, dtype="int8", norm=False),
    Case(head_dim=256, rotary_dim=64, heads=2, kv_heads=1, dtype="int8", block_size=128),
    Case(head_dim=128, rotary_dim=128, heads=12, window=90, dtype="int8", block_size=64),
    Case(window=260, block_size=512, past=(0, 600), new=(290, 3), dtype="int8"),
    Case(head_dim=72, heads=24, window=3, dtype="int8"),
]


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("case", CASES, ids=range(len(CASES)))
def test_equals_reference(case: Case, isa: str) -> None:
    check_against_reference(case, isa, threads=2)


@pytest.mark.skipif("amx" not in ISAS, reason="this processor has no AMX tiles")
@pytest.mark.parametrize("block_size", [32, 64, 256])
@pytest.mark.parametrize("heads", [1, 7, 8, 9, 16])  # rows of a token: their two bytes fit one tile up to 8
@pytest.mark.parametrize("head_dim", [64, 192])
def test_tiles_have_the_bits_of_vectors(head_dim: int, heads: int, block_size: int) -> None:
    past, new = (0, 40, 255, 600), (1, 1, 3, 30)
    case = Case(heads, 1, head_dim, block_size, "int8", past, new, rotary_dim=head_dim, window=500)
    vectors = run_attention(make_feeds(case), case.node_attributes, "avx512")
    np.testing.assert_array_equal(run_attention(make_feeds(case), case.node_attributes, "amx"), vectors)


@pytest.mark.skipif("amx" not in ISAS, reason="this processor has no AMX tiles")
@pytest.mark.parametrize("heads", [1, 7, 16, 17, 33])  # rows of a token: tiles have 16, and two are multiplied at once
@pytest.mark.parametrize("head_dim", [8, 16, 40, 64, 72, 80, 96, 128, 200, 256])
def test_bfloat16_tiles_are_as_good_as_stated(head_dim: int, heads: int) -> None:
    """To about 1e-5 of the values: a query or softmax weight keeps 16 bits, a product misses 2^-15 at most."""
    past, new = (0, 40, 255, 600), (1, 1, 3, 30)
    case = Case(heads, 1, head_dim, 64, "float16", past, new, rotary_dim=head_dim, window=500)
    vectors = run_attention(make_feeds(case), case.node_attributes, "avx512")
    difference = run_attention(make_feeds(case), case.node_attributes, "amx") - vectors
    assert np.linalg.norm(difference) < 1.5e-5 * np.linalg.norm(vectors)
    assert np.abs(difference).max() < 1e-4


@pytest.mark.parametrize("dtype", ["float32", "int8"])
@pytest.mark.parametrize("isa", ISAS)
def test_keys_far_below_the_largest_weigh_nothing(isa: str, dtype: str) -> None:
    case = Case(rotary_dim=0, norm=False, scale=5.0, dtype=dtype)
    feeds = make_feeds(case)
    expected = paged_attention(case.attributes, **copy(feeds))
    # Scores reach 300, where one unit in the last place of float32 is 3e-5; 2^-130 of a wrong exponent is 1e30.
    np.testing.assert_allclose(run_attention(feeds, case.node_attributes, isa), expected, rtol=0, atol=1e-2)


@st.composite
def cases(draw: st.DrawFn) -> Case:
    head_dim = 8 * draw(st.sampled_from([1, 2, 3, 5, 8, 9, 10, 16, 17, 32]))
    kv_heads, group = draw(st.integers(1, 3)), draw(st.sampled_from([1, 2, 3, 7, 12]))
    sequences = draw(st.lists(st.tuples(st.integers(0, 300), st.integers(0, 40)), max_size=4))
    return Case(
        heads=kv_heads * group,
        kv_heads=kv_heads,
        head_dim=head_dim,
        block_size=draw(st.sampled_from([32, 64, 128, 512])),
        dtype=draw(st.sampled_from(["float32", "float16", "int8"])),
        past=tuple(past for past, _ in sequences),
        new=tuple(new for _, new in sequences),
        rotary_dim=2 * draw(st.integers(0, head_dim // 2)),
        norm=draw(st.booleans()),
        window=draw(st.sampled_from([-1, -1, 1, 5, 33, 100, 257])),
        scale=draw(st.sampled_from([None, 0.11])),
        seed=draw(st.integers(0, 1000)),
    )


@settings(max_examples=60, deadline=None, derandomize=True)
@given(case=cases(), isa=st.sampled_from(ISAS))
def test_equals_reference_for_any_shape(case: Case, isa: str) -> None:
    cached_session.cache_clear()
    check_against_reference(case, isa)


@pytest.mark.skipif("len(ISAS) < 2", reason="this machine has no vector instruction set")
@pytest.mark.parametrize("case", CASES, ids=range(len(CASES)))
def test_instruction_sets_give_the_same_bits(case: Case) -> None:
    isas = [isa for isa in ISAS if (isa, case.dtype) != ("amx", "float16")]
    expected, *others = [run_attention(make_feeds(case), case.node_attributes, isa) for isa in isas]
    for output in others:
        np.testing.assert_array_equal(output, expected, strict=True)


# What follows compares bits.


@dataclass(frozen=True)
class Piece:
    """New tokens of one sequence in one run: how many came before it and how many it adds."""

    past: int
    new: int


INVARIANT_CASES = [
    Case(heads=6, kv_heads=2, head_dim=40, rotary_dim=24),
    Case(heads=14, kv_heads=2, head_dim=64, rotary_dim=64, dtype="float16"),
    Case(heads=3, kv_heads=3, head_dim=80, rotary_dim=80, window=70),
    Case(heads=5, kv_heads=1, head_dim=8, rotary_dim=0, block_size=128),
    Case(heads=14, kv_heads=2, head_dim=64, rotary_dim=64, dtype="int8", block_size=64),
    Case(heads=9, kv_heads=3, head_dim=72, rotary_dim=24, dtype="int8", window=70),
    Case(heads=9, kv_heads=3, head_dim=72, rotary_dim=24, dtype="float16", window=70),
    Case(heads=19, kv_heads=1, head_dim=128, rotary_dim=128, dtype="float16", block_size=64),
]


class Conversation:
    """One sequence of ``length`` tokens fed to the operator piece by piece, through a pool of its own."""

    def __init__(self, case: Case, length: int, block_size: int, seed: int, isa: str, threads: int = 1) -> None:
        whole = dataclasses.replace(case, past=(0,), new=(length,), seed=0)
        self.feeds = make_feeds(whole)
        self.query = self.feeds["query"]
        pool_case = dataclasses.replace(whole, block_size=block_size)
        self.pool = Cache(pool_case, np.random.default_rng(seed))
        self.attributes, self.isa, self.threads = case.node_attributes, isa, threads

    def batch(self, pieces: Sequence[Piece]) -> list[np.ndarray]:
        """Run ``pieces`` of the same conversation as one batch; all but the last must not write the last one's past.

        The first piece uses the conversation's own blocks, every other one a copy of them elsewhere in the pool.
        """
        blocks, width = len(self.pool.feeds["key_cache"]), self.pool.table.shape[1]
        pools = {name: np.concatenate([pool] * len(pieces)) for name, pool in self.pool.feeds.items()}
        feeds = (
            self.feeds
            | pools
            | {
                "query": np.concatenate([self.query[p.past : p.past + p.new] for p in pieces]),
                "cumulative_lengths": np.cumsum([0, *(p.new for p in pieces)], dtype=np.int32),
                "past_lengths": np.array([p.past for p in pieces], np.int32),
                "block_table": np.concatenate([self.pool.table + i * blocks for i in range(len(pieces))]).reshape(
                    -1, width
                ),
            }
        )
        output = run_attention(feeds, self.attributes, self.isa, self.threads)
        for name, pool in pools.items():
            self.pool.feeds[name][:] = pool[:blocks]
        return np.split(output, np.cumsum([p.new for p in pieces])[:-1])

    def chunked(self, chunks: Sequence[int]) -> np.ndarray:
        starts = np.cumsum((0, *chunks))
        return np.concatenate([self.batch([Piece(int(s), n)])[0] for s, n in zip(starts, chunks, strict=False)])


LENGTH = 330  # more than one partition of 256 keys


@cache
def whole_prompt(case: Case, isa: str) -> np.ndarray:
    return Conversation(case, LENGTH, case.block_size, 1, isa).chunked([LENGTH])


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("case", INVARIANT_CASES, ids=range(len(INVARIANT_CASES)))
class TestBitsDependOnVisibleKeysOnly:
    @pytest.mark.parametrize("chunks", [(1, 31, 1, 224, 73), (255, 2, 70, 3), (17,) * 19 + (7,)])
    def test_any_chunking(self, case: Case, isa: str, chunks: tuple[int, ...]) -> None:
        chunked = Conversation(case, LENGTH, case.block_size, 1, isa).chunked(chunks)
        np.testing.assert_array_equal(chunked, whole_prompt(case, isa))

    def test_token_by_token(self, case: Case, isa: str) -> None:
        single = Conversation(case, LENGTH, case.block_size, 1, isa).chunked((1,) * LENGTH)
        np.testing.assert_array_equal(single, whole_prompt(case, isa))

    @pytest.mark.parametrize("threads", [2, 4])
    def test_any_number_of_threads(self, case: Case, isa: str, threads: int) -> None:
        chunked = Conversation(case, LENGTH, case.block_size, 1, isa, threads).chunked((250, 77, 1, 1, 1))
        np.testing.assert_array_equal(chunked, whole_prompt(case, isa))

    @pytest.mark.parametrize("block_size", [32, 64, 256, 1024])
    def test_any_block_size_and_order(self, case: Case, isa: str, block_size: int) -> None:
        chunked = Conversation(case, LENGTH, block_size, block_size, isa).chunked((300, 29, 1))
        np.testing.assert_array_equal(chunked, whole_prompt(case, isa))

    @pytest.mark.parametrize("threads", [1, 2])
    def test_any_batch(self, case: Case, isa: str, threads: int) -> None:
        conversation = Conversation(case, LENGTH, case.block_size, 1, isa, threads)
        whole = whole_prompt(case, isa)
        conversation.batch([Piece(0, 290)])
        pieces = [Piece(290, 40), Piece(0, 100), Piece(288, 1), Piece(5, 0), Piece(256, 34)]
        for piece, output in zip(pieces, conversation.batch(pieces), strict=True):
            np.testing.assert_array_equal(output, whole[piece.past : piece.past + piece.new])


@pytest.mark.parametrize("isa", ISAS)
def test_threads_that_share_partitions_change_no_bit(isa: str) -> None:
    case = Case(heads=7, kv_heads=1, head_dim=64, rotary_dim=64, past=(1500,), new=(1,), window=1300)
    outputs = [run_attention(make_feeds(case), case.node_attributes, isa, threads) for threads in (1, 2, 3)]
    np.testing.assert_array_equal(outputs[1], outputs[0])
    np.testing.assert_array_equal(outputs[2], outputs[0])


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


def test_output_shape_is_inferred() -> None:
    types = {name: (ELEMENT_TYPES[x.dtype], x.ndim) for name, x in make_feeds(Case()).items()}
    model = one_node_model(types, Case().node_attributes)
    proto = onnx.load_from_string(model)
    for value, dims in (("query", ["T", 320]), ("key_cache", ["num_blocks", 2, 1, 40, 32])):
        shape = next(x for x in proto.graph.input if x.name == value).type.tensor_type.shape
        for dim, size in zip(shape.dim, dims, strict=True):
            dim.CopyFrom(
                onnx.TensorShapeProto.Dimension(**{"dim_param" if isinstance(size, str) else "dim_value": size})
            )
    assert make_session(proto.SerializeToString()).get_outputs()[0].shape == ["T", 160]


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
