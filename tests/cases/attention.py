"""qwen::PagedAttention alone in a model: a case, its feeds, and its reference."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import onnxruntime as ort
from onnx import TensorProto, helper

from cases.plugin_session import ISAS as SUPPORTED
from cases.plugin_session import make_model, make_session
from qwen_plugin.reference import (
    PagedAttentionAttributes,
    paged_attention,
    quantize_tokens,
    tokens_of_keys,
    tokens_of_values,
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
