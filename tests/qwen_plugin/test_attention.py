"""qwen::PagedAttention: equal to its NumPy reference, and bit for bit independent of everything but the keys seen."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cases.attention import (
    ELEMENT_TYPES,
    ISAS,
    Cache,
    Case,
    cached_session,
    check_against_reference,
    copy,
    make_feeds,
    one_node_model,
    run_attention,
)
from cases.plugin_session import make_session
from qwen_plugin.reference import (
    paged_attention,
)

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
