"""qwen::MoE: equal to its NumPy reference and to one qwen::QuantLinear an expert, and bit for bit the same for a token
whatever the instruction set, the tokens beside it and the threads."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cases.linear import ELEMENT_TYPES, activation_scales
from cases.linear import run as run_linear
from cases.moe import NO_SCHEME, OPTIONAL, OUTPUTS, draw_feeds, new_session, rows_of, run
from cases.plugin_session import ISAS
from qwen_plugin.layout import BITS, GROUP_SIZES
from qwen_plugin.reference_moe import (
    MoEAttributes,
    MoEOutputs,
    expert_weight,
    gated_products,
    moe,
    route,
    shared_weight,
    weighted_sum,
)

PRECISIONS = ("int8", "int8x2", "float32")
SMALL = MoEAttributes(num_experts=7, top_k=3, hidden_size=96, intermediate_size=80)
FLOATS = dataclasses.replace(SMALL, **NO_SCHEME | {"gate_up_bits": 32, "down_bits": 32})
# Of a sum of products, relative to the sum of their magnitudes: the roundings of float32 of a few hundred terms.
TOLERANCE = 5e-6


def assert_same(one: MoEOutputs, other: MoEOutputs, note: object = None) -> None:
    for name in OUTPUTS:
        assert np.array_equal(getattr(one, name), getattr(other, name), equal_nan=True), (name, note)


def largest_weights(a: MoEAttributes, name: str, stored: np.ndarray) -> np.ndarray:
    """Of each expert the largest sum of an output's magnitudes, (E)."""
    return np.array([np.abs(expert_weight(a, name, e, stored)).sum(axis=1).max() for e in range(a.num_experts)])


def assert_reference(a: MoEAttributes, feeds: dict[str, np.ndarray], own: MoEOutputs) -> None:
    """Step by step, each from what the operator made of the one before: where a number falls on half a step, its last
    bit decides how it is rounded."""
    expected = moe(a, **feeds)
    largest = np.abs(expected.input).max(axis=-1, keepdims=True)
    assert np.all(np.abs(own.input - expected.input) <= 3e-6 * largest)

    everyone = dataclasses.replace(a, top_k=a.num_experts, norm_topk_prob=0)
    ranking, probabilities = route(everyone, own.input, feeds["router"])
    of_expert = np.empty_like(probabilities)
    np.put_along_axis(of_expert, ranking, probabilities, axis=-1)
    chosen = np.take_along_axis(of_expert, own.experts, axis=-1)
    assert np.allclose(chosen, probabilities[:, : a.top_k], rtol=1e-5)  # those that are next to equal may change places
    assert all(len(set(row)) == a.top_k for row in own.experts)
    total = chosen.sum(axis=-1, keepdims=True) if a.norm_topk_prob else 1
    assert np.allclose(own.weights, chosen / total, rtol=1e-5)

    x_size = np.abs(own.input).max(axis=-1)[:, None]
    sums = x_size * largest_weights(a, "gate_up", feeds["gate_up"])[own.experts]  # (T, k): of a gate's products
    error = TOLERANCE * (2 * sums**2 + sums)
    gated = gated_products(a, own.input, own.experts, feeds["gate_up"])
    assert np.all(np.abs(own.gated - gated) <= error[..., None])

    sizes = np.abs(own.gated).max(axis=-1) * largest_weights(a, "down", feeds["down"])[own.experts]
    magnitude = np.sum(sizes * own.weights, axis=-1)[:, None]
    y = weighted_sum(a, own.gated, own.experts, own.weights, feeds["down"])
    if "shared" in feeds:
        gate = feeds.get("shared_gate")
        y = y + feeds["shared"] * (1 if gate is None else shared_weight(own.input, gate))
        magnitude = magnitude + np.abs(feeds["shared"])
    if "residual" in feeds:
        y, magnitude = y + feeds["residual"], magnitude + np.abs(feeds["residual"])
    assert np.all(np.abs(own.y - y) <= TOLERANCE * magnitude)


def schemes() -> Iterator[tuple[int, int, int, str, str]]:
    """All of bits, group_size, symmetric, precision and activation_scales, but for the static ones."""
    for bits in BITS:
        for group_size in GROUP_SIZES:
            for scales in activation_scales(bits, group_size):
                for precision in PRECISIONS if scales != "static" else ():
                    yield from ((bits, group_size, symmetric, precision, scales) for symmetric in (0, 1))


def with_scheme(a: MoEAttributes, name: str, scheme: tuple[int, int, int, str, str] | None) -> MoEAttributes:
    """``a`` with a scheme of :func:`schemes` for ``gate_up`` or ``down``; None: float32 rows."""
    kinds = ("bits", "group_size", "symmetric", "precision", "activation_scales")
    values = scheme or (32, None, None, None, None)
    return dataclasses.replace(a, **{f"{name}_{kind}": value for kind, value in zip(kinds, values, strict=True)})


@st.composite
def cases(draw: st.DrawFn) -> tuple[MoEAttributes, int, list[str], int]:
    experts = draw(st.integers(1, 20))
    a = MoEAttributes(
        num_experts=experts,
        top_k=draw(st.integers(1, min(experts, 9))),
        hidden_size=32 * draw(st.integers(1, 9)),
        intermediate_size=16 * draw(st.integers(1, 9)),
        norm_topk_prob=draw(st.integers(0, 1)),
        epsilon=draw(st.sampled_from((1e-6, 0.1))),
    )
    for name in ("gate_up", "down"):
        a = with_scheme(a, name, draw(st.sampled_from([None, *schemes()])))
    optional = draw(st.lists(st.sampled_from(OPTIONAL), unique=True))
    return a, draw(st.one_of(st.integers(1, 20), st.integers(21, 200))), optional, draw(st.integers(0, 1000))


@settings(max_examples=50, deadline=None)
@given(cases())
def test_every_instruction_set_computes_the_reference_with_the_same_bits(
    case: tuple[MoEAttributes, int, list[str], int],
) -> None:
    a, tokens, optional, seed = case
    feeds = draw_feeds(a, tokens, optional, seed)
    own = run(a, feeds, "plain")
    assert_reference(a, feeds, own)
    for isa in ISAS[1:]:
        assert_same(run(a, feeds, isa), own, isa)


@pytest.mark.parametrize("isa", ISAS)
def test_an_expert_computes_what_a_linear_does(isa: str) -> None:
    """In every scheme, bit for bit, whatever the number of its rows."""
    for scheme in schemes():
        a = with_scheme(with_scheme(SMALL, "gate_up", scheme), "down", scheme)
        feeds = draw_feeds(a, 40)
        own = run(a, feeds, isa, 2)
        summed = np.zeros_like(own.y)
        products = np.empty((40, a.top_k, a.hidden_size), np.float32)
        for e in range(a.num_experts):
            panels = {name: np.split(feeds[name], a.num_experts)[e] for name in ("gate_up", "down")}
            tokens, slots = np.nonzero(own.experts == e)
            linear = dataclasses.replace(a.linear("gate_up"), swiglu=1)
            gated, _ = run_linear(linear, {"x": own.input[tokens], "weight": panels["gate_up"]}, isa)
            assert np.array_equal(gated, own.gated[tokens, slots]), scheme
            x = np.ascontiguousarray(own.gated[tokens, slots])
            products[tokens, slots], _ = run_linear(a.linear("down"), {"x": x, "weight": panels["down"]}, isa)
        for slot in range(a.top_k):  # one rounding a slot
            summed = (products[:, slot].astype(np.float64) * own.weights[:, slot, None] + summed).astype(np.float32)
        assert np.array_equal(own.y, summed), scheme


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("a", [SMALL, FLOATS], ids=["panels", "rows"])
def test_a_token_does_not_depend_on_the_tokens_beside_it(a: MoEAttributes, isa: str) -> None:
    feeds = draw_feeds(a, 150, OPTIONAL)
    own = run(a, feeds, isa)
    rng = np.random.default_rng(1)
    for count in (1, 2, 3, 8, 17, 60, 150):
        chosen = rng.permutation(150)[:count]
        few = run(a, rows_of(feeds, chosen), isa)
        assert_same(few, MoEOutputs(*(getattr(own, name)[chosen] for name in OUTPUTS)), count)
    cut = [run(a, rows_of(feeds, slice(first, first + 64)), isa) for first in (0, 64, 128)]
    assert_same(own, MoEOutputs(*(np.concatenate([getattr(part, name) for part in cut]) for name in OUTPUTS)))


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("a", [SMALL, FLOATS], ids=["panels", "rows"])
def test_threads_do_not_change_a_bit(a: MoEAttributes, isa: str) -> None:
    a = dataclasses.replace(a, num_experts=12, top_k=5, hidden_size=512, intermediate_size=272)
    for tokens in (1, 3, 17, 100):
        feeds = draw_feeds(a, tokens, OPTIONAL)
        alone = run(a, feeds, isa)
        for threads in (2, 4, 4):
            assert_same(run(a, feeds, isa, threads), alone, (tokens, threads))


@pytest.mark.parametrize("tokens", [1, 2, 33])
@pytest.mark.parametrize("norm_topk_prob", [0, 1])
@pytest.mark.parametrize(("num_experts", "top_k"), [(1, 1), (4, 4), (60, 4), (128, 8)])
def test_few_and_many_experts(num_experts: int, top_k: int, norm_topk_prob: int, tokens: int) -> None:
    """One, all of them, and as many as released models have."""
    a = dataclasses.replace(SMALL, num_experts=num_experts, top_k=top_k, norm_topk_prob=norm_topk_prob)
    feeds = draw_feeds(a, tokens, OPTIONAL)
    own = run(a, feeds, threads=2)
    assert_reference(a, feeds, own)
    if norm_topk_prob or num_experts == top_k:
        assert np.allclose(own.weights.sum(axis=-1), 1)
    assert np.all(np.diff(own.weights, axis=-1) <= 0)  # the likeliest first


@pytest.mark.parametrize("a", [SMALL, FLOATS], ids=["panels", "rows"])
def test_an_expert_of_all_tokens_and_experts_of_none(a: MoEAttributes) -> None:
    """The bytes of the others change nothing, as they are not read: here they would make everything NaN."""
    a = dataclasses.replace(a, top_k=2)
    feeds = draw_feeds(a, 50)
    feeds["x"][:, 0] = 5
    feeds["router"][:, 0] = [0, 9, 0, 0, 0, 8, 0]
    own = run(a, feeds, threads=2)
    assert np.array_equal(np.sort(own.experts), np.tile([1, 5], (50, 1)))
    assert_reference(a, feeds, own)
    damaged = feeds | {name: feeds[name].copy() for name in ("gate_up", "down")}
    for name in ("gate_up", "down"):
        for e in (0, 2, 3, 4, 6):
            part = np.split(damaged[name], a.num_experts)[e]
            part[...] = 255 if part.dtype == np.uint8 else np.nan
    assert_same(run(a, damaged, threads=2), own)


def resident_bytes(path: Path) -> int:
    """Of all maps of a file in this process: what of it has been read through them."""
    total, of_file = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if line[0] in "0123456789abcdef":
            of_file = line.endswith(str(path))
        elif of_file and line.startswith("Rss:"):
            total += 1024 * int(line.split()[1])
    return total


@pytest.mark.skipif(not Path("/proc/self/smaps").is_file(), reason="needs Linux's list of maps")
@pytest.mark.parametrize("a", [SMALL, FLOATS], ids=["panels", "rows"])
def test_pages_of_experts_without_tokens_are_not_read(tmp_path: Path, a: MoEAttributes) -> None:
    few = draw_feeds(dataclasses.replace(a, num_experts=1, top_k=1, hidden_size=1024, intermediate_size=1024), 1)
    a = dataclasses.replace(a, num_experts=64, top_k=2, hidden_size=1024, intermediate_size=1024)
    feeds = few | {"router": np.random.default_rng(0).standard_normal((64, 1024), np.float32)}
    files = {name: tmp_path / name for name in ("gate_up", "down")}
    for name, path in files.items():
        rows, columns = few[name].shape
        feeds[name] = np.memmap(path, few[name].dtype, "w+", shape=(64 * rows, columns))  # zeros, which take no disk
    run(a, feeds, threads=2)
    for name, path in files.items():
        around = 4 * 2**21  # the system maps up to 2 MiB around a page, at both ends of both experts
        assert 2 * few[name].nbytes <= resident_bytes(path) <= 2 * few[name].nbytes + around < feeds[name].nbytes / 2


@pytest.mark.parametrize("isa", ISAS)
def test_of_equally_likely_experts_the_first_ones_are_chosen(isa: str) -> None:
    for num_experts in (7, 16, 40):
        a = dataclasses.replace(SMALL, num_experts=num_experts)
        feeds = draw_feeds(a, 20)
        feeds["router"][:] = feeds["router"][0]
        own = run(a, feeds, isa)
        assert np.array_equal(own.experts, np.tile([0, 1, 2], (20, 1)))
        assert np.allclose(own.weights, 1 / num_experts, rtol=1e-6)
        feeds["router"][[3, 5]] *= 2  # likelier or less likely than all others, and equal to each other
        own = run(a, feeds, isa)
        doubled = own.input @ feeds["router"][0] > 0
        assert np.array_equal(own.experts[doubled], np.tile([3, 5, 0], (doubled.sum(), 1)))
        assert np.array_equal(own.experts[~doubled], np.tile([0, 1, 2], ((~doubled).sum(), 1)))


@pytest.mark.parametrize("isa", ISAS)
def test_scores_far_apart(isa: str) -> None:
    """No number overflows, and experts that are all next to impossible are equally so."""
    a = dataclasses.replace(SMALL, top_k=7)
    feeds = draw_feeds(a, 5)
    feeds["x"][:] = 0
    feeds["x"][:, 0] = [1, -1, 100, 1e30, 0]
    feeds["router"][:, 0] = [-50, 10, 0, 60, 20, 40, -200]
    own = run(a, feeds, isa)
    assert np.isfinite(own.weights).all()
    assert own.experts[0].tolist() == [3, 5, 4, 1, 2, 0, 6]
    assert own.experts[2].tolist() == own.experts[3].tolist() == [3, 0, 1, 2, 4, 5, 6]
    assert np.allclose(own.weights[0, :3], [1, np.exp(-20), np.exp(-40)], rtol=1e-5)
    assert own.experts[1, 0] == 6
    assert own.experts[4].tolist() == list(range(7))


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 3e38])
@pytest.mark.parametrize("norm", [[], ["norm_weight"]])
@pytest.mark.parametrize("a", [SMALL, FLOATS], ids=["panels", "rows"])
@pytest.mark.parametrize("isa", ISAS)
def test_what_is_not_finite_stays_in_its_token(isa: str, a: MoEAttributes, norm: list[str], value: float) -> None:
    for tokens in (1, 4, 40):
        feeds = draw_feeds(a, tokens, [*norm, "residual"])
        clean = run(a, feeds, isa)
        feeds["x"][tokens // 2, 50] = value
        own = run(a, feeds, isa)
        others = np.arange(tokens) != tokens // 2
        kept, expected = (MoEOutputs(*(getattr(o, name)[others] for name in OUTPUTS)) for o in (own, clean))
        assert_same(kept, expected)
        assert not np.isfinite(own.y[tokens // 2]).all() or np.isfinite(value)
        assert len(set(own.experts[tokens // 2])) == a.top_k
        assert own.experts.min() >= 0
        assert own.experts.max() < a.num_experts


@pytest.mark.parametrize("part", ["router", "shared", "shared_gate", "norm_weight", "residual"])
def test_weights_that_are_not_finite_do_no_harm(part: str) -> None:
    feeds = draw_feeds(SMALL, 9, OPTIONAL)
    for value in (np.nan, np.inf, -np.inf):
        feeds[part][...] = value
        own = run(SMALL, feeds, threads=2)
        assert not np.isfinite(own.y).any()
        assert all(set(row) <= set(range(SMALL.num_experts)) and len(set(row)) == SMALL.top_k for row in own.experts)


def test_no_tokens() -> None:
    own = run(SMALL, draw_feeds(SMALL, 0, OPTIONAL))
    assert [getattr(own, name).shape for name in OUTPUTS] == [(0, 96), (0, 96), (0, 3), (0, 3), (0, 3, 80)]


def test_products_that_are_added_up_a_part_at_a_time() -> None:
    """1,100 tokens with 6 experts have 27 MB of products."""
    a = MoEAttributes(num_experts=9, top_k=6, hidden_size=1024, intermediate_size=32, down_activation_scales="block")
    feeds = draw_feeds(a, 1100, OPTIONAL)
    own = run(a, feeds, threads=2)
    few = run(a, rows_of(feeds, slice(500, 520)))
    assert_same(few, MoEOutputs(*(getattr(own, name)[500:520] for name in OUTPUTS)))


def test_all_outputs_but_the_first_are_optional() -> None:
    feeds = draw_feeds(SMALL, 9, OPTIONAL)
    types = {name: ELEMENT_TYPES[x.dtype] for name, x in feeds.items()}
    y = run(SMALL, feeds).y
    for outputs in (["y"], ["y", ""], ["y", "", "experts"], ["y", "", "", "", "gated"]):
        session = new_session(SMALL.of_node(), types, outputs)
        assert np.array_equal(session.run(None, feeds)[0], y)
