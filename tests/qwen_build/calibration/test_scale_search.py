"""Scales that are searched: never worse than the largest weight's, on the grid, and those a reader can work out."""

from __future__ import annotations

import numpy as np
import pytest

from qwen_build.calibration import scale_search
from qwen_build.calibration.scale_search import search_scales
from qwen_build.quantization.grid import Grid
from qwen_build.quantization.scheme_table import KERNELS, SCHEMES, make_scheme
from qwen_build.quantization.schemes import StockInt

CASES = [(bits, symmetric) for bits in (4, 5, 6, 8) for symmetric in (True, False)]


def errors(weight, rounded, grid, importance):
    """Weighted squared error of each group."""
    error = importance * np.square(weight - grid.values(rounded, weight.shape[1]))
    return np.add.reduceat(error, range(0, weight.shape[1], grid.group_size), axis=1)


@pytest.mark.parametrize("kernels", ["native", "stock"])
@pytest.mark.parametrize(("bits", "symmetric"), CASES)
def test_no_group_gets_worse_and_all_together_better(bits, symmetric, kernels, monkeypatch):
    if bits not in KERNELS[kernels].bits:
        pytest.skip("these kernels have no such weights")
    monkeypatch.setattr(scale_search, "_SLICE_ELEMENTS", 1000)  # several slices
    random = np.random.default_rng(0)
    weight = random.normal(size=(70, 80)).astype(np.float32) ** 3
    importance = random.lognormal(sigma=2, size=80).astype(np.float32)
    scheme = make_scheme(f"int{bits}", 32, symmetric, "float32", kernels)
    found = search_scales(weight, importance, scheme)
    before = errors(weight, scheme.grid.round(weight, scheme.storable), scheme.grid, importance)
    after = errors(weight, found, scheme.grid, importance)
    # the scale that float16 holds is not quite the one that was found: of 255 steps that is seen
    assert (after <= before * {4: 1.001, 5: 1.01, 6: 1.01, 8: 1.02}[bits]).all()
    assert (
        after.sum() < {4: 0.9, 5: 0.95, 6: 0.98, 8: 0.99}[bits] * before.sum()
    )  # 256 steps are seldom too coarse for an outlier
    np.testing.assert_array_equal(scheme.storable(found.scales, found.zero_points), found.scales)
    scheme.store(found)
    nearest = scheme.grid.nearest(np.pad(weight, ((0, 0), (0, 16))).reshape(70, 3, 32), found.scales, found.zero_points)
    np.testing.assert_array_equal(found.q, nearest.q)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group_size", [32, 64])
def test_scales_that_go_together_in_blocks_cost_little(group_size, symmetric):
    random = np.random.default_rng(0)
    weight = random.normal(size=(200, 448)).astype(np.float32)
    importance = random.lognormal(sigma=1, size=448).astype(np.float32)
    together, apart = (
        make_scheme("int4", group_size, symmetric, None, "native", "group", scales) for scales in ("block", "group")
    )
    found = search_scales(weight, importance, together)
    together.store(found)  # does not refuse them
    weight[:, group_size : 2 * group_size] = 0
    found = search_scales(weight, importance, together)  # whose scales say nothing to the others of their block
    assert not together.grid.values(found, 448)[:, group_size : 2 * group_size].any()
    total = errors(weight, found, together.grid, importance).sum()
    by_range = together.grid.round(weight, together.storable)
    assert total < errors(weight, by_range, together.grid, importance).sum() * 0.97
    assert total < errors(weight, search_scales(weight, importance, apart), apart.grid, importance).sum() * 1.07


def test_an_outlier_that_nothing_multiplies_is_clipped():
    weight = np.full((1, 32), 0.5, np.float32)
    weight[0, :16] = -0.5
    weight[0, 3] = 0.75
    grid = Grid(4, 32, symmetric=True)
    importance = np.ones(32, np.float32)
    importance[3] = 0
    found = search_scales(weight, importance, StockInt(grid, "int8"))
    assert (
        errors(weight, found, grid, importance).sum() < 0.1 * errors(weight, grid.round(weight), grid, importance).sum()
    )
    assert grid.values(found, 32)[0, 3] < 0.75


@pytest.mark.parametrize("part", [0.95, 0.75, 0.6, 0.5])
def test_a_grid_may_reach_half_as_far_as_the_largest_weight(part):
    """All weights but one lie on the grid that reaches to ``part`` of that one, which nothing multiplies."""
    weight = np.float32(part / 7) * np.resize(np.arange(-7, 8, dtype=np.float32), (1, 32))
    weight[0, 31] = 1
    importance = np.ones(32, np.float32)
    importance[31] = 0
    grid = Grid(4, 32, symmetric=True)
    found = search_scales(weight, importance, StockInt(grid, "int8"))
    np.testing.assert_allclose(grid.values(found, 32)[0, :31], weight[0, :31], atol=1e-6)


def test_without_importance_the_largest_weight_decides():
    weight = np.random.default_rng(0).normal(size=(5, 64)).astype(np.float32)
    grid = Grid(4, 64, symmetric=False)
    found, plain = search_scales(weight, np.zeros(64, np.float32), StockInt(grid, "int8")), grid.round(weight)
    np.testing.assert_array_equal(found.q, plain.q)
    np.testing.assert_array_equal(found.scales, plain.scales)


def test_scales_that_groups_share_are_not_searched():
    weight = np.random.default_rng(0).normal(size=(5, 64)).astype(np.float32)
    grid = Grid(8, 32, True, "channel")
    found = search_scales(weight, np.ones(64, np.float32), StockInt(grid, "int8"))
    np.testing.assert_array_equal(found.scales, StockInt(grid, "int8").round(weight).scales)


def test_a_weight_that_the_layout_cannot_hold_is_refused():
    weight = np.ones((3, 32), np.float32)
    weight[2, 5] = 1e6
    with pytest.raises(OverflowError, match="1e\\+06 is too large for the native layout"):
        search_scales(weight, np.ones(32, np.float32), make_scheme("int4", 32, None, None, "native"))


def test_every_integer_scheme_has_searched_cases():
    assert {(row.bits, symmetric) for row in SCHEMES.values() if row.bits for symmetric in (True, False)} == set(CASES)
