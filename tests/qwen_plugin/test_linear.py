"""qwen::QuantLinear and qwen::QuantEmbedding: equal to their NumPy reference, and bit for bit the same for a row
whatever the instruction set, the rows beside it and the threads."""

from __future__ import annotations

import dataclasses
import itertools
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper

from cases.linear import (
    ELEMENT_TYPES,
    OPTIONAL,
    activation_scales,
    draw_feeds,
    new_session,
    run,
)
from cases.plugin_session import ISAS, make_model, make_session
from qwen_plugin.layout import BITS, BLOCK_BITS, GROUP_SIZES, MOST_UNITS, pack_panels, round_scales
from qwen_plugin.reference_linear import QuantLinearAttributes, dequantize, quant_linear

PRECISIONS = ("int8", "int8x2", "float32")
# precision and activation scales of int4
ROUNDINGS = tuple((precision, scales) for precision in PRECISIONS for scales in ("group", "block"))
# Of y, relative to the sum of its products' magnitudes: one float32 rounding or two for each group (int8), column
# (float32); a few hundred of one sign drift.
TOLERANCE = {"int8": 1e-6, "int8x2": 1e-6, "float32": 5e-6}


def assert_reference(
    a: QuantLinearAttributes, feeds: dict[str, np.ndarray], y: np.ndarray, product_input: np.ndarray
) -> None:
    _, expected_input = quant_linear(a, **feeds)
    # A few float32 roundings, and those of exp.
    largest = np.abs(expected_input).max(axis=-1, keepdims=True)
    assert np.all(np.abs(product_input - expected_input) <= 3e-6 * largest)
    # From the operator's own input: where a column falls on half a step, the last bit decides how it is rounded.
    rest = {name: x for name, x in feeds.items() if name != "norm_weight"}
    expected, _ = quant_linear(dataclasses.replace(a, swiglu=0), **(rest | {"x": product_input}))  # not gated
    magnitude = np.abs(product_input.astype(np.float64)).max(axis=-1, keepdims=True) * np.abs(
        dequantize(feeds["weight"], a)
    ).sum(axis=1)
    for name in ("bias", "residual"):
        magnitude = magnitude + np.abs(feeds.get(name, np.zeros(1)))
    error = TOLERANCE[a.precision] * magnitude
    if a.swiglu:
        (gate, up), (gate_error, up_error) = (
            np.moveaxis(array.reshape(len(y), -1, 2, 16), 2, 0).reshape(2, len(y), -1) for array in (expected, error)
        )
        gated = gate / (1 + np.exp(-gate.clip(min=-88)))
        expected = gated * up
        error = 1.1 * gate_error * (np.abs(up) + up_error) + np.abs(gated) * up_error + 1e-6 * np.abs(expected)
    assert np.all(np.abs(y - expected) <= error)


@st.composite
def cases(draw: st.DrawFn) -> tuple[QuantLinearAttributes, int, list[str], int]:
    swiglu = draw(st.booleans())
    stored = draw(st.sampled_from(BITS)), draw(st.sampled_from(GROUP_SIZES)), draw(st.sampled_from(PRECISIONS))
    attributes = QuantLinearAttributes(
        N=32 * draw(st.integers(1, 4)) if swiglu else draw(st.integers(1, 130)),
        K=draw(st.integers(1, 400)),
        bits=stored[0],
        group_size=stored[1],
        symmetric=int(draw(st.booleans())),
        precision=stored[2],
        activation_scales=draw(st.sampled_from(activation_scales(*stored[:2]))),
        swiglu=int(swiglu),
        epsilon=draw(st.sampled_from((1e-6, 0.1))),
    )
    optional = draw(st.lists(st.sampled_from(OPTIONAL), unique=True))
    if swiglu and "residual" in optional:
        optional.remove("residual")
    rows = draw(st.one_of(st.integers(1, 40), st.integers(41, 600)))
    return attributes, rows, optional, draw(st.integers(0, 1000))


@settings(max_examples=60, deadline=None)
@given(cases())
def test_every_instruction_set_computes_the_reference_with_the_same_bits(
    case: tuple[QuantLinearAttributes, int, list[str], int],
) -> None:
    attributes, rows, optional, seed = case
    feeds = draw_feeds(attributes, rows, optional, seed)
    y, product_input = run(attributes, feeds, "plain")
    assert_reference(attributes, feeds, y, product_input)
    for isa in ISAS[1:]:
        other, other_input = run(attributes, feeds, isa)
        assert np.array_equal(product_input, other_input), isa
        assert np.array_equal(y, other), isa


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("group_size", GROUP_SIZES)
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("isa", ISAS)
def test_every_number_of_rows_in_a_tile(isa: str, bits: int, group_size: int, precision: str) -> None:
    """And a row's bits do not depend on how many they are."""
    kinds = [scales for scales in ("group", "block") if scales in activation_scales(bits, group_size)]
    for symmetric, scales in itertools.product((0, 1), kinds):
        attributes = QuantLinearAttributes(37, 270, bits, group_size, symmetric, precision, scales)
        feeds = draw_feeds(attributes, 40, ["norm_weight", "bias"])
        y, product_input = run(attributes, feeds, isa)
        assert_reference(attributes, feeds, y, product_input)
        for rows in (*range(1, 20), 31, 33):
            alone, _ = run(attributes, feeds | {"x": feeds["x"][:rows]}, isa)
            assert np.array_equal(alone, y[:rows]), (symmetric, rows, scales)


@pytest.mark.parametrize(("precision", "scales"), ROUNDINGS)
@pytest.mark.parametrize("bits", BLOCK_BITS)
@pytest.mark.parametrize("isa", ISAS)
def test_a_row_does_not_depend_on_the_rows_beside_it(isa: str, bits: int, precision: str, scales: str) -> None:
    for swiglu, optional in ((0, ["residual"]), (1, ["norm_weight"])):
        attributes = QuantLinearAttributes(96, 160, bits, 32, 1, precision, scales, swiglu)
        feeds = draw_feeds(attributes, 70, optional)
        y, _ = run(attributes, feeds, isa)
        rng = np.random.default_rng(1)
        for rows in (1, 5, 18, 70):
            chosen = rng.permutation(70)[:rows]
            other = feeds | {name: feeds[name][chosen] for name in ("x", "residual") if name in feeds}
            assert np.array_equal(run(attributes, other, isa)[0], y[chosen])


@pytest.mark.parametrize(("precision", "scales"), ROUNDINGS)
@pytest.mark.parametrize("bits", BLOCK_BITS)
@pytest.mark.parametrize("isa", ISAS)
def test_threads_do_not_change_a_bit(isa: str, bits: int, precision: str, scales: str) -> None:
    for rows, swiglu in itertools.product((1, 7, 100), (0, 1)):
        attributes = QuantLinearAttributes(928, 1100, bits, 64, 0, precision, scales, swiglu)
        feeds = draw_feeds(attributes, rows, ["bias", "permutation", *(["norm_weight"] if swiglu else ["residual"])])
        alone, alone_input = run(attributes, feeds, isa, threads=1)
        for threads in (2, 4, 4):
            y, product_input = run(attributes, feeds, isa, threads)
            assert np.array_equal(y, alone)
            assert np.array_equal(product_input, alone_input)


@pytest.mark.parametrize("swiglu", [0, 1])
@pytest.mark.parametrize(("group_size", "scales"), [(32, "block"), (32, "group"), (128, "group")])
def test_panels_take_turns(group_size: int, scales: str, swiglu: int) -> None:
    """4,900 columns of 300 rows do not stay in a cache, and there are panels enough for all threads."""
    attributes = QuantLinearAttributes(4128, 4900, 4, group_size, 0, activation_scales=scales, swiglu=swiglu)
    feeds = draw_feeds(attributes, 300, ["bias"])
    y, _ = run(attributes, feeds, ISAS[-1], threads=2)
    for rows in (slice(0, 3), slice(150, 152), slice(297, 300)):
        assert np.array_equal(run(attributes, feeds | {"x": feeds["x"][rows]}, ISAS[-1])[0], y[rows])


@pytest.mark.parametrize("isa", ISAS)
def test_a_wide_input_in_blocks_of_rows(isa: str) -> None:
    """18,944 columns of 300 rows do not stay in a cache."""
    attributes = QuantLinearAttributes(64, 18944, 4, 128, 1)
    feeds = draw_feeds(attributes, 300)
    y, product_input = run(attributes, feeds, isa, threads=2)
    assert_reference(attributes, feeds, y, product_input)
    assert np.array_equal(run(attributes, feeds | {"x": feeds["x"][200:203]}, isa)[0], y[200:203])


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("isa", ISAS)
def test_the_largest_products(isa: str, bits: int, precision: str) -> None:
    """Every weight at an end of its range, every column at an end of a group's: sums nowhere overflow or saturate."""
    for symmetric, zero_point in ((1, None), (0, 0), (0, 2**bits - 1)):
        attributes = QuantLinearAttributes(64, 256, bits, 128, symmetric, precision)
        signs = np.random.default_rng(0).choice(np.float32([-1, 1]), (9, 256))
        signs[0], signs[1] = 1, -1
        zero_points = None if zero_point is None else np.full((64, 2), zero_point, np.uint8)
        for q in (0, 2**bits - 1):
            scales = round_scales(np.full((64, 2), 0.01, np.float32))
            weight = pack_panels(np.full((64, 256), q, np.uint8), scales, zero_points, bits, 128)
            # 32767 / 32512 of the largest makes int8x2's low parts -128.
            feeds = {"x": signs * np.float32(3.0), "weight": weight}
            y, product_input = run(attributes, feeds, isa)
            assert_reference(attributes, feeds, y, product_input)
            feeds["x"][:, 1:] *= np.float32(32384 / 32512)
            y, product_input = run(attributes, feeds, isa)
            assert_reference(attributes, feeds, y, product_input)


@pytest.mark.parametrize("precision", ["int8", "int8x2"])
@pytest.mark.parametrize("symmetric", [0, 1])
@pytest.mark.parametrize("group_size", [32, 64])
@pytest.mark.parametrize("bits", BLOCK_BITS)
@pytest.mark.parametrize("isa", ISAS)
def test_the_largest_sum_of_a_block(isa: str, bits: int, group_size: int, symmetric: int, precision: str) -> None:
    """As the sum of its groups is exact, a block with a scale of its own is off by a few roundings alone."""
    a = QuantLinearAttributes(64, 128, bits, group_size, symmetric, precision, "block")
    largest = 2**bits - 1
    rng = np.random.default_rng(0)
    groups = 128 // group_size
    for zero_point, q in ((0, largest), (largest, 0)):
        zero_points = None if symmetric else np.full((64, groups), zero_point, np.uint8)
        most = MOST_UNITS[bits] if symmetric else MOST_UNITS[bits] // 2  # as zero points are at the ends
        scales = np.full((64, groups), most / 2**13, np.float32)
        scales[1::2, 1:] = rng.integers(1, most, (32, groups - 1)) / 2**13
        weight = pack_panels(np.full((64, 128), q, np.uint8), scales, zero_points, bits, group_size, blocks=True)
        x = np.full((20, 128), 127, np.float32)
        x[1::2] *= rng.choice(np.float32([-1, 1, 126 / 127]), (10, 128))
        if precision == "int8x2":
            x[:, 1:] -= np.float32(0.5)  # the low parts are -128, and their sums as large as they can be
        expected, _ = quant_linear(a, x, weight)
        for rows in (3, 20):  # with tiles and without
            y, _ = run(a, {"x": x[:rows], "weight": weight}, isa)
            if precision == "int8":
                assert np.array_equal(y, expected[:rows])  # the scale is 1, and the sums have 24 bits
            else:  # the scale is 1 / 256, three roundings; high and low parts together have 31 bits
                np.testing.assert_allclose(y, expected[:rows], rtol=3 * 2.0**-24)


@pytest.mark.parametrize("rows", [2, 20])  # 20 are multiplied with tiles, where there are any
@pytest.mark.parametrize("precision", ["int8", "int8x2"])
@pytest.mark.parametrize("isa", ISAS)
def test_where_the_scale_of_an_input_comes_from(isa: str, precision: str, rows: int) -> None:
    """By hand, through an identity as the weight: the integers that the columns of one row become, and their scale."""
    q = np.full((64, 64), 128, np.uint8)
    np.fill_diagonal(q, 129)
    feeds = {"weight": pack_panels(q, np.ones((64, 2), np.float32), None, 8, 32)}
    x = np.zeros((rows, 64), np.float32)
    x[0, [0, 1, 2, 32, 33]] = [10, 5, -1000, 1, 0.3]
    x[1:] = 1000  # another row changes nothing
    fine = 256 if precision == "int8x2" else 1
    limit = 127 * fine
    for scales, largest in (("group", [1000, 1]), ("token", [1000, 1000]), ("static", [127 * 0.25, 127 * 0.25])):
        attributes = QuantLinearAttributes(64, 64, 8, 32, 1, precision, scales)
        feeds |= {"x": x} | ({"input_scale": np.float32([0.25])} if scales == "static" else {})
        y, _ = run(attributes, feeds, isa)
        step = np.repeat(largest, 32) / limit
        expected = np.rint(x[0] / step).clip(-limit, limit) * step
        assert np.allclose(y[0], expected, rtol=1e-6, atol=0), scales


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize(
    ("precision", "scales"), [(one, scales) for one in ("int8", "int8x2") for scales in activation_scales(4, 32)]
)
@pytest.mark.parametrize("isa", ISAS)
def test_no_scale_hides_what_is_not_finite(isa: str, precision: str, scales: str, value: float) -> None:
    attributes = QuantLinearAttributes(40, 150, 4, 32, 0, precision, scales)
    for rows in (3, 40):
        feeds = draw_feeds(attributes, rows)
        clean, _ = run(attributes, feeds, isa)
        feeds["x"][1, 100] = value
        y, _ = run(attributes, feeds, isa)
        assert np.isnan(y[1]).all()
        assert np.array_equal(np.delete(y, 1, axis=0), np.delete(clean, 1, axis=0))


@pytest.mark.parametrize("scale", [1e-45, 1e-30, 1e30])
@pytest.mark.parametrize("precision", ["int8", "int8x2"])
@pytest.mark.parametrize("isa", ISAS)
def test_extreme_static_scales(isa: str, precision: str, scale: float) -> None:
    """One whose reciprocal is infinite stands for 0; far too small ones clip everything, far too large ones lose it."""
    attributes = QuantLinearAttributes(40, 100, 8, 32, 1, precision, "static")
    feeds = draw_feeds(attributes, 5) | {"input_scale": np.float32([scale])}
    y, product_input = run(attributes, feeds, isa)
    assert_reference(attributes, feeds, y, product_input)
    assert (scale == 1e-30) == bool(y.any())


@pytest.mark.parametrize(("precision", "scales"), ROUNDINGS)
@pytest.mark.parametrize("isa", ISAS)
def test_extreme_inputs(isa: str, precision: str, scales: str) -> None:
    attributes = QuantLinearAttributes(40, 192, 4, 64, 1, precision, scales)
    feeds = draw_feeds(attributes, 8)
    x = feeds["x"]
    x[0] = 0
    x[1, :64] = 0  # a whole group
    x[2] *= 1e-38  # 127 / x is infinite, x is normal or not
    x[3] *= 1e-30
    x[4] *= 1e30
    x[5, 7] = 1e20  # everything else of its group vanishes
    y, product_input = run(attributes, feeds, isa)
    tiny = 2 if precision != "float32" else 0
    kept = [0, 1, 3, 4, 5, 6, 7]
    assert_reference(attributes, feeds | {"x": x[kept]}, y[kept], product_input[kept])
    assert not y[0].any()
    assert not y[tiny].any()
    assert np.array_equal(y, run(attributes, feeds, "plain")[0])


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("scale", [1e-9, 1e-6, 60.0])
@pytest.mark.parametrize("isa", ISAS)
def test_tiny_and_huge_scales(isa: str, bits: int, scale: float, precision: str) -> None:
    for scales in activation_scales(bits, 32):
        attributes = QuantLinearAttributes(40, 100, bits, 32, 0, precision, scales)
        for rows in (5, 20):
            # a zero point at an end of its range halves the largest scale that a block can have
            feeds = draw_feeds(attributes, rows, scale=scale / 2 if scales == "block" else scale)
            y, product_input = run(attributes, feeds, isa)
            assert_reference(attributes, feeds, y, product_input)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("isa", ISAS)
def test_what_is_not_finite_stays_in_its_row(isa: str, precision: str, value: float) -> None:
    attributes = QuantLinearAttributes(40, 150, 4, 64, 1, precision)
    for rows in (1, 3, 20):
        feeds = draw_feeds(attributes, rows, ["norm_weight", "residual"])
        clean, _ = run(attributes, feeds, isa)
        x = feeds["x"].copy()
        x[rows // 2, 100] = value
        y, _ = run(attributes, feeds | {"x": x}, isa)
        others = np.arange(rows) != rows // 2
        assert np.array_equal(y[others], clean[others])
        assert np.isnan(y[rows // 2]).all()


@pytest.mark.parametrize("isa", ISAS)
def test_silu_at_its_ends(isa: str) -> None:
    gate = np.float32([-1e30, -200, -88, -20, -1e-20, 0, 1e-20, 20, 88, 200, 1e30, -0.5, 0.5, 3, -3, 7])
    exact = gate.astype(np.float64) / (1 + np.exp(-np.maximum(gate.astype(np.float64), -700)))
    expected = np.where(gate < -88, 0, exact)
    for rows, precision in itertools.product((1, 20), PRECISIONS):
        attributes = QuantLinearAttributes(32, 8, 8, 32, 1, precision, swiglu=1)
        feeds = draw_feeds(attributes, rows) | {"x": np.zeros((rows, 8), np.float32)}
        feeds["bias"] = np.concatenate([gate, np.ones_like(gate)])  # all there is
        y, _ = run(attributes, feeds, isa)
        assert np.all(np.abs(y - expected) <= np.maximum(1e-6 * np.abs(expected), 1e-36))


@pytest.mark.parametrize("isa", ISAS)
def test_no_rows(isa: str) -> None:
    attributes = QuantLinearAttributes(40, 100, 4, 32, 1)
    y, product_input = run(attributes, draw_feeds(attributes, 0), isa)
    assert y.shape == (0, 40)
    assert product_input.shape == (0, 100)


def test_the_second_output_is_optional() -> None:
    attributes = QuantLinearAttributes(64, 100, 4, 32, 1, swiglu=1)
    feeds = draw_feeds(attributes, 3, ["norm_weight"])
    types = {name: ELEMENT_TYPES[x.dtype] for name, x in feeds.items()}
    y, _ = run(attributes, feeds, ISAS[-1])
    for outputs in (["y"], ["y", ""]):
        session = new_session("QuantLinear", dataclasses.asdict(attributes), types, outputs, ISAS[-1])
        assert np.array_equal(session.run(None, feeds)[0], y)


def test_many_sessions_and_threads_at_once() -> None:
    attributes = QuantLinearAttributes(300, 500, 4, 32, 1)
    feeds = [draw_feeds(attributes, rows, ["norm_weight"], seed=rows) for rows in (1, 9, 40, 150)]
    expected = [run(attributes, f, ISAS[-1])[0] for f in feeds]

    def repeat(i: int) -> bool:
        return all(
            np.array_equal(run(attributes, feeds[i], ISAS[-1], threads=1 + i % 2)[0], expected[i]) for _ in range(20)
        )

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(repeat, [0, 1, 2, 3] * 4))


@pytest.mark.parametrize("swiglu", [0, 1])
def test_the_output_has_a_shape_before_anything_runs(swiglu: int) -> None:
    table = {"N": 9, "K": 100, "bits": 4, "group_size": 32, "symmetric": 1}
    attributes = table | {"N": 64, "precision": "int8", "swiglu": swiglu}
    nodes = [
        helper.make_node("QuantEmbedding", ["ids", "table"], ["x"], domain="qwen", **table),
        helper.make_node("QuantLinear", ["x", "weight"], ["y"], domain="qwen", **attributes),
    ]
    model = make_model(
        nodes,
        [
            helper.make_tensor_value_info("ids", TensorProto.INT64, ["tokens"]),
            helper.make_tensor_value_info("table", TensorProto.UINT8, None),
            helper.make_tensor_value_info("weight", TensorProto.UINT8, None),
        ],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
    )
    assert make_session(model).get_outputs()[0].shape == ["tokens", 32 if swiglu else 64]
