"""Scales and zero points that make the output error small, where the largest weight of a group alone says little."""

from __future__ import annotations

import numpy as np

from qwen_build.quantization.grid import Grid, Rounded
from qwen_build.quantization.schemes import IntScheme
from qwen_build.writing.weights_file import in_threads
from qwen_plugin.layout import block_units

# Parts of a group's range that are tried: what lies beyond is clipped, and all else has finer steps.
SHRINKS = tuple(float(part) for part in np.linspace(1, 0.5, 21))

# Elements of a weight that are searched at a time, for each thread: a few arrays of them fit a cache.
_SLICE_ELEMENTS = 1 << 17


def search_scales(weight: np.ndarray, importance: np.ndarray, scheme: IntScheme) -> Rounded:
    """Round ``weight`` (N, K) float32 so that the sum of importanceₖ (wₖ - roundedₖ)² is least in every group.

    Where groups share a scale, it is that of their largest weight.

    Args:
        importance: float32 (K), not negative. The mean square of each input makes the sum the output error, as far as
            inputs do not correlate.

    Raises:
        OverflowError: a value is larger than the scheme can store.
    """
    rounded, grid = scheme.round(weight), scheme.grid
    if grid.weight_scales != "group":
        return rounded
    _, groups, group_size = rounded.q.shape
    padding = groups * group_size - weight.shape[1]
    importance = np.pad(importance, (0, padding)).reshape(groups, group_size)
    rows = max(1, _SLICE_ELEMENTS // importance.size)

    def search(start: int) -> None:
        part = slice(start, start + rows)
        values = np.pad(weight[part], ((0, 0), (0, padding))).reshape(-1, groups, group_size)
        found = _search_slice(values, importance, scheme)
        rounded.q[part], rounded.scales[part] = found.q, found.scales
        if rounded.zero_points is not None and found.zero_points is not None:
            rounded.zero_points[part] = found.zero_points

    for _ in in_threads(search, ((start,) for start in range(0, len(weight), rows))):
        pass
    return rounded


def _search_slice(values: np.ndarray, importance: np.ndarray, scheme: IntScheme) -> Rounded:
    """``values`` (N, groups, group_size), each group on the best of its grids."""
    grid, lowest, highest = scheme.grid, values.min(axis=-1), values.max(axis=-1)
    if grid.symmetric:
        highest = np.maximum(highest, -lowest)
    least = np.full(lowest.shape, np.inf, np.float32)
    scales, zero_points = np.empty_like(least), None if grid.symmetric else np.empty(lowest.shape, np.uint8)
    for shrink in SHRINKS:
        tried, zero = grid.reaching(lowest * np.float32(shrink), highest * np.float32(shrink), scheme.storable_alone)
        error = _error(values, importance, grid, tried, zero)
        better = error < least
        least[better], scales[better] = error[better], tried[better]
        if zero_points is not None and zero is not None:
            zero_points[better] = zero[better]
    together = scheme.storable(scales, zero_points)
    if not np.array_equal(together, scales):
        together = _nearby(values, importance, grid, together, zero_points)
    return grid.nearest(values, together, zero_points)


def _nearby(
    values: np.ndarray, importance: np.ndarray, grid: Grid, scales: np.ndarray, zero_points: np.ndarray | None
) -> np.ndarray:
    """``scales`` that go together in blocks, each the best of those one unit below and above that do so too."""
    units, most = block_units(scales, grid.group_size, zero_points)
    least, best = _error(values, importance, grid, scales, zero_points), scales.copy()
    for step in (-units, units):
        tried = np.where((scales == most) | (scales + step > most) | (scales + step < units), scales, scales + step)
        error = _error(values, importance, grid, tried, zero_points)
        better = error < least
        least[better], best[better] = error[better], tried[better]
    return best


def _error(
    values: np.ndarray, importance: np.ndarray, grid: Grid, scales: np.ndarray, zero_points: np.ndarray | None
) -> np.ndarray:
    """What rounding ``values`` adds to the sum in each group, (N, groups)."""
    lowest = np.float32(-grid.middle) if zero_points is None else -zero_points[..., None].astype(np.float32)
    error = values / scales[..., None]
    np.rint(error, out=error)
    np.maximum(error, lowest, out=error)  # np.clip takes twice as long where its limits are arrays
    np.minimum(error, lowest + grid.most, out=error)
    error *= scales[..., None]
    error -= values
    np.square(error, out=error)
    total: np.ndarray = np.einsum("ngk,gk->ng", error, importance)
    return total
