"""qwen::QuantLinear with AMX tiles: bit for bit what plain kernels compute, and what few rows get without tiles."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cases.linear import activation_scales, draw_feeds, run
from cases.plugin_session import ISAS
from qwen_plugin.layout import BITS, GROUP_SIZES
from qwen_plugin.reference_linear import QuantLinearAttributes

pytestmark = pytest.mark.skipif("amx" not in ISAS, reason="this processor has no AMX tiles")

# The tile kernels' sizes: 8 or 12 rows a tile, with blocks 8 or 16, 16 tiles and 512 columns at a time, groups in
# pairs. They begin with 8 to 10 rows, int8x2's with 6 or 8.
ROWS = st.one_of(st.integers(6, 17), st.integers(18, 70), st.integers(500, 600), st.integers(760, 800))


def attributes_with(**changes: Any) -> QuantLinearAttributes:
    defaults: dict[str, Any] = {"N": 70, "K": 300, "bits": 4, "group_size": 32, "symmetric": 1, "precision": "int8"}
    return QuantLinearAttributes(**(defaults | changes))


@st.composite
def attributes(draw: st.DrawFn) -> QuantLinearAttributes:
    bits, group_size = draw(st.sampled_from(BITS)), draw(st.sampled_from(GROUP_SIZES))
    precision = draw(st.sampled_from(("int8", "int8x2")))
    return QuantLinearAttributes(
        N=draw(st.integers(1, 100)),
        K=draw(st.integers(1, 1300)),
        bits=bits,
        group_size=group_size,
        symmetric=draw(st.sampled_from((0, 1))),
        precision=precision,
        activation_scales=draw(st.sampled_from(activation_scales(bits, group_size))),
    )


def assert_same_bits(y: np.ndarray, expected: np.ndarray) -> None:
    np.testing.assert_array_equal(y.view(np.uint32), expected.view(np.uint32))


@settings(max_examples=60, deadline=None)
@given(attributes(), ROWS, st.sampled_from(((), ("bias", "residual"), ("norm_weight", "permutation"))))
def test_tiles_have_the_bits_of_plain_kernels(a: QuantLinearAttributes, rows: int, optional: tuple[str, ...]) -> None:
    feeds = draw_feeds(a, rows, optional, seed=rows)
    expected, expected_input = run(a, feeds, "plain")
    for threads in (1, 2):
        y, product_input = run(a, feeds, "amx", threads)
        assert_same_bits(y, expected)
        assert_same_bits(product_input, expected_input)


@pytest.mark.parametrize("precision", ["int8", "int8x2"])
@pytest.mark.parametrize("group_size", GROUP_SIZES)
@pytest.mark.parametrize(("bits", "symmetric"), [(4, 1), (4, 0), (8, 1), (8, 0)])
def test_a_single_tile(bits: int, symmetric: int, group_size: int, precision: str) -> None:
    """From the fewest rows that are multiplied with tiles to one more than a tile has; columns end within a block."""
    for scales in activation_scales(bits, group_size)[:2]:
        a = QuantLinearAttributes(70, 700, bits, group_size, symmetric, precision, scales)
        for rows in range(5, 18):
            feeds = draw_feeds(a, rows, ("bias",), seed=rows)
            expected = run(a, feeds, "plain")[0]
            for threads in (1, 2):
                assert_same_bits(run(a, feeds, "amx", threads)[0], expected)


@pytest.mark.parametrize("precision", ["int8", "int8x2"])
@pytest.mark.parametrize("group_size", GROUP_SIZES)
@pytest.mark.parametrize(("bits", "symmetric"), [(4, 1), (4, 0), (8, 1), (8, 0)])
def test_long_rows(bits: int, symmetric: int, group_size: int, precision: str) -> None:
    for scales in activation_scales(bits, group_size)[:2]:
        a = QuantLinearAttributes(33, 18_944 - 5, bits, group_size, symmetric, precision, scales)
        feeds = draw_feeds(a, 35)
        assert_same_bits(run(a, feeds, "amx", 2)[0], run(a, feeds, "plain")[0])


@pytest.mark.parametrize("out_features", [4096, 4112, 4100])
def test_a_large_output(out_features: int) -> None:
    """8 MiB and more are written past the caches, unless the rows' ends are not those of cache lines."""
    for scales in ("group", "block"):
        a = attributes_with(N=out_features, K=40, activation_scales=scales)
        feeds = draw_feeds(a, 512, ("bias", "residual"))
        assert_same_bits(run(a, feeds, "amx", 2)[0], run(a, feeds, "plain")[0])


@pytest.mark.parametrize("precision", ["int8", "int8x2"])
@pytest.mark.parametrize("bits", [4, 8])
def test_the_largest_sums(bits: int, precision: str) -> None:
    """Every product as large as it can be, with either sign: a sum just fits where it becomes a float."""
    a = attributes_with(K=256, bits=bits, group_size=128, symmetric=0, precision=precision)
    feeds = draw_feeds(a, 32)
    feeds["x"] = np.sign(feeds["x"]).astype(np.float32)
    feeds["x"][:16] = np.array([[1.0], [-1.0]] * 8, np.float32)
    # A panel: two groups' zero points, padded to 64 bytes, then for each group 32 float16 scales and the weights.
    points, weights = 4 * bits, 128 * 4 * bits
    for g, (weight, zero_point) in enumerate([(255, 0), (0, 255)]):
        feeds["weight"][:, g * points : (g + 1) * points] = zero_point
        feeds["weight"][:, 64 + g * (64 + weights) + 64 :][:, :weights] = weight
    assert_same_bits(run(a, feeds, "amx")[0], run(a, feeds, "plain")[0])


@pytest.mark.parametrize("precision", ["int8", "int8x2"])
@pytest.mark.parametrize("group_size", GROUP_SIZES)
def test_a_row_is_the_same_alone(group_size: int, precision: str) -> None:
    """Few rows are multiplied without tiles, many with them."""
    a = attributes_with(group_size=group_size, precision=precision)
    feeds = draw_feeds(a, 50)
    together, _ = run(a, feeds, "amx")
    for row in (0, 17, 49):
        alone, _ = run(a, feeds | {"x": feeds["x"][row : row + 1]}, "amx")
        assert_same_bits(alone[0], together[row])


@pytest.mark.parametrize("precision", ["int8", "int8x2"])
@pytest.mark.parametrize(("bits", "symmetric"), [(4, 1), (8, 0)])
def test_extreme_rows(bits: int, symmetric: int, precision: str) -> None:
    scales = activation_scales(bits, 32)[1]  # of a block, where they can be
    a = attributes_with(bits=bits, symmetric=symmetric, precision=precision, activation_scales=scales)
    feeds = draw_feeds(a, 40)
    values = [0.0, -0.0, 1e-45, 1e-38, -1e-30, 1e30, 3e38, np.inf, -np.inf, np.nan]
    for row, value in enumerate(values):
        feeds["x"][row, row * 3 : row * 3 + 40] = value
    feeds["x"][20:30] = np.array(values, np.float32)[:, None]
    y, _ = run(a, feeds, "amx")
    expected, _ = run(a, feeds, "plain")
    # The bits of a NaN say nothing.
    np.testing.assert_array_equal(np.isnan(y), np.isnan(expected))
    assert_same_bits(np.nan_to_num(y, nan=0), np.nan_to_num(expected, nan=0))
    assert np.isfinite(y[10:20]).all()
