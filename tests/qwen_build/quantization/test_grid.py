"""Grids: every weight goes to the nearest value, and every zero point to the nearest integer."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qwen_build.quantization.grid import Grid
from qwen_build.quantization.scheme_table import KERNELS, make_scheme


def powers_of_two(scales: np.ndarray, zero_points: np.ndarray | None) -> np.ndarray:
    """A storage so coarse that the zero point of the exact scale is often not that of the stored one."""
    return np.exp2(np.rint(np.log2(scales)))


def distances(grid: Grid, lowest: np.ndarray, scales: np.ndarray, zero_points: np.ndarray) -> np.ndarray:
    """How far a grid begins from where it should, in steps, with each zero point that the grid has and its own."""
    every = np.arange(grid.most + 1).reshape(-1, *[1] * lowest.ndim)
    steps = lowest.clip(max=0).astype(np.float64) / scales
    return np.abs(steps + every).min(axis=0), np.abs(steps + zero_points)


@given(
    st.sampled_from([4, 8]),
    st.lists(st.tuples(st.floats(-4, 4, width=32), st.floats(-4, 4, width=32)), min_size=1, max_size=20),
)
def test_no_other_zero_point_is_nearer_for_the_scale_that_is_stored(bits: int, ends: list[tuple[float, float]]) -> None:
    grid = Grid(bits, 32, symmetric=False)
    lowest, highest = np.sort(np.float32(ends), axis=1).T.reshape(2, -1, 1)
    scales, zero_points = grid.reaching(lowest, highest + np.float32(0.01), powers_of_two)
    nearest, own = distances(grid, lowest, scales, zero_points)
    np.testing.assert_allclose(own, nearest, atol=1e-3)  # float32 quotients, up to 255


@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize("bits", [4, 8])
def test_no_other_zero_point_is_nearer_with_the_scales_of_a_scheme(bits: int, kernels: str) -> None:
    weight = np.random.default_rng(0).normal(0.3, 1, (3000, 32)).astype(np.float32)
    scheme = make_scheme(f"int{bits}", 32, False, None, kernels, "group", "group")
    rounded = scheme.grid.round(weight, scheme.storable)
    nearest, own = distances(scheme.grid, weight.min(axis=1, keepdims=True), rounded.scales, rounded.zero_points)
    np.testing.assert_allclose(own, nearest, atol=1e-3)
