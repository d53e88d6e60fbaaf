"""Rounding on grids that are searched for: their scales and zero points leave the least error of those tried.

The smallest and largest weight of a group alone say little of the best grid: where the outermost weights are clipped,
all others have finer steps. The search itself is ``qwen_plugin/scale_search.py``.
"""

from __future__ import annotations

import math

import numpy as np

from qwen_build.quantization.grid import Grid, Rounded, Storable, positive
from qwen_plugin.scale_search import Search, search_scales

# Larger weights may need scales that the layout cannot hold: see NativeInt.round, which then says so.
_LARGEST = 256.0


def is_searched(grid: Grid) -> bool:
    """Whether rounding without calibration searches: each group has a scale of its own, and steps are coarse."""
    return grid.bits < 8 and grid.weight_scales == "group"


def round_searched(
    weight: np.ndarray,
    grid: Grid,
    blocks: bool,
    storable: Storable,
    importance: np.ndarray | None = None,
    flatness: float = math.inf,
) -> Rounded:
    """Round ``weight`` (N, K) float32 on the best grids.

    Args:
        blocks: whether scales go together in blocks.
        storable: see :class:`Grid`.
        importance: float32 (K), not negative, of a squared error in each column; None: all have the same.
        flatness: see :class:`qwen_plugin.scale_search.Search`.
    """
    if np.abs(weight).max(initial=0) > _LARGEST:
        return grid.round(weight, storable)
    padding = -weight.shape[1] % grid.group_size
    if importance is None:
        importance = np.ones(weight.shape[1], np.float32)
    if padding:
        weight, importance = np.pad(weight, ((0, 0), (0, padding))), np.pad(importance, (0, padding))
    search = Search(grid.bits, grid.group_size, grid.symmetric, blocks, flatness)
    scales, zero_points = search_scales(weight, importance, search)
    stored_zero_points = None if grid.symmetric else zero_points
    scales = positive(storable(scales, stored_zero_points))
    return grid.nearest(weight.reshape(len(weight), -1, grid.group_size), scales, stored_zero_points)
