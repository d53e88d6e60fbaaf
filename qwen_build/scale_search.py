"""Scales and zero points that make the output error small, where the largest weight of a group alone says little."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from qwen_build.export import in_threads
from qwen_build.grid import Grid, Rounded

# Parts of a group's range that are tried: what lies beyond is clipped, and all else has finer steps.
SHRINKS = tuple(float(part) for part in np.linspace(1, 0.5, 21))

# Elements of a weight that are searched at a time, for each thread: a few arrays of them fit a cache.
_SLICE_ELEMENTS = 1 << 17


def search_scales(
    weight: np.ndarray, importance: np.ndarray, grid: Grid, storable: Callable[[np.ndarray], np.ndarray]
) -> Rounded:
    """Round ``weight`` (N, K) float32 so that the sum of importanceₖ (wₖ - roundedₖ)² is least in every group.

    Where groups share a scale, it is that of their largest weight.

    Args:
        importance: float32 (K), not negative. The mean square of each input makes the sum the output error, as far as
            inputs do not correlate.
        storable: see :meth:`Grid.round`.
    """
    rounded = grid.round(weight, storable)
    if grid.weight_scales != "group":
        return rounded
    _, groups, group_size = rounded.q.shape
    padding = groups * group_size - weight.shape[1]
    importance = np.pad(importance, (0, padding)).reshape(groups, group_size)
    rows = max(1, _SLICE_ELEMENTS // importance.size)

    def search(start: int) -> None:
        part = slice(start, start + rows)
        values = np.pad(weight[part], ((0, 0), (0, padding))).reshape(-1, groups, group_size)
        _search_slice(values, importance, grid, storable, _rows(rounded, part))

    for _ in in_threads(search, ((start,) for start in range(0, len(weight), rows))):
        pass
    return rounded


def _rows(rounded: Rounded, part: slice) -> Rounded:
    zero_points = None if rounded.zero_points is None else rounded.zero_points[part]
    return Rounded(rounded.q[part], rounded.scales[part], zero_points)


def _search_slice(
    values: np.ndarray,
    importance: np.ndarray,
    grid: Grid,
    storable: Callable[[np.ndarray], np.ndarray],
    best: Rounded,
) -> None:
    """Replace what is in ``best`` group by group. ``values`` is (N, groups, group_size)."""
    lowest, highest = values.min(axis=-1), values.max(axis=-1)
    if grid.symmetric:
        highest = np.maximum(highest, -lowest)
    least = np.full(lowest.shape, np.inf, np.float32)
    for shrink in SHRINKS:
        candidate = grid.within(values, lowest * np.float32(shrink), highest * np.float32(shrink), storable)
        error = _error(values, importance, grid, candidate)
        _take(best, candidate, error, least)


def _error(values: np.ndarray, importance: np.ndarray, grid: Grid, candidate: Rounded) -> np.ndarray:
    """(N, groups)"""
    error = grid.values(candidate, values[0].size).reshape(values.shape)
    error -= values
    np.square(error, out=error)
    total: np.ndarray = np.einsum("ngk,gk->ng", error, importance)
    return total


def _take(best: Rounded, candidate: Rounded, error: np.ndarray, least: np.ndarray) -> None:
    better = error < least
    least[better] = error[better]
    best.q[better] = candidate.q[better]
    best.scales[better] = candidate.scales[better]
    if best.zero_points is not None and candidate.zero_points is not None:
        best.zero_points[better] = candidate.zero_points[better]
