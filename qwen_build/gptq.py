"""GPTQ (arXiv 2210.17323): what rounding a column of a weight adds to the output, later columns take away.

With second moment H = L D Lᵀ, L unit lower triangular, the output error of a row's rounding error e is
eᵀ H e = |D^½ Lᵀ e|². Rounding columns from the last to the first, each to the value nearest to

    tᵢ = wᵢ + Σ_{j>i} eⱼ Lⱼᵢ,    eⱼ = wⱼ - roundedⱼ

makes component i of Lᵀ e the rounding error of tᵢ alone. That is GPTQ without an inverse (LDLQ, arXiv 2307.13304,
theorem 6). Columns are rounded in the order of falling second moment, in which the large ones err least ("act-order"),
each with the scale of its group ("static groups"): they lie where they lay. Scales are those that make
Σ Hᵢᵢ (wᵢ - roundedᵢ)² least. Weighing by D instead, which is what the errors of the t weigh, is worse: with the demo in
groups of 64 a KL of 0.166 against 0.138.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from qwen_build.config import ModelConfig
from qwen_build.decoder_layer import LayerWeights
from qwen_build.grid import Grid, Rounded
from qwen_build.quantize import NativeInt, StockInt
from qwen_build.scale_search import search_scales
from qwen_build.statistics import Statistics

# Added to the diagonal of a second moment, as part of its mean: what calibration has not seen may still come.
DAMPING = 0.05

# Columns of a factorisation's step; columns whose errors are kept from each other; elements of a weight in memory.
_FACTOR_COLUMNS, _COLUMNS, _ELEMENTS = 256, 64, 1 << 25
# Rows that are updated at a time.
_PANEL_ROWS = 2048


@dataclass(frozen=True)
class Gptq:
    """The method."""

    needs_second_moment = True

    def fold(
        self,
        config: ModelConfig,
        weights: LayerWeights,
        statistics: Mapping[str, Statistics],
        schemes: Mapping[str, NativeInt | StockInt],
    ) -> dict[str, np.ndarray]:
        """Nothing."""
        return {}

    def round(
        self, weights: Mapping[str, np.ndarray], statistics: Statistics, schemes: Mapping[str, NativeInt | StockInt]
    ) -> dict[str, Rounded]:
        """Each weight (N, K) as above; overwrites ``statistics.second_moment``."""
        moment = statistics.second_moment
        assert moment is not None
        order = np.argsort(statistics.mean_square, kind="stable")
        permute(moment, order)
        moment[np.diag_indices_from(moment)] += DAMPING * moment.diagonal().mean() or 1
        factorise(moment)
        rounded = {}
        for name, weight in weights.items():
            scheme = schemes[name]
            scales = search_scales(weight, statistics.mean_square, scheme.grid, scheme.storable)
            rounded[name] = round_with_feedback(weight, moment, order, scheme.grid, scales)
        return rounded


def permute(matrix: np.ndarray, order: np.ndarray) -> None:
    """Replace a square ``matrix`` by ``matrix[order][:, order]``, in place."""
    for start in range(0, len(matrix), _PANEL_ROWS):
        panel = matrix[start : start + _PANEL_ROWS]
        panel[...] = panel[:, order]
    moved = np.zeros(len(order), bool)
    for first in range(len(order)):
        if moved[first]:
            continue
        row, held = first, matrix[first].copy()
        while True:  # along one cycle of the permutation
            moved[row] = True
            source = order[row]
            if source == first:
                break
            matrix[row] = matrix[source]
            row = source
        matrix[row] = held


def factorise(matrix: np.ndarray) -> np.ndarray:
    """Replace the part of a positive definite float32 ``matrix`` below its diagonal by that of L, in place.

    ``matrix`` is L D Lᵀ with L unit lower triangular. What is on and above the diagonal afterwards means nothing.

    Returns:
        D, float32 (K).
    """
    size = len(matrix)
    roots = np.empty(size, np.float32)
    for start in range(0, size, _FACTOR_COLUMNS):
        stop = min(start + _FACTOR_COLUMNS, size)
        own = np.linalg.cholesky(matrix[start:stop, start:stop].astype(np.float64))
        below = matrix[stop:, start:stop] @ np.linalg.inv(own).T.astype(np.float32)
        for row in range(stop, size, _PANEL_ROWS):
            end = min(row + _PANEL_ROWS, size)
            matrix[row:end, stop:end] -= below[row - stop : end - stop] @ below[: end - stop].T
        roots[start:stop] = own.diagonal()
        matrix[start:stop, start:stop] = own / own.diagonal()
        matrix[stop:, start:stop] = below / roots[start:stop]
    return np.square(roots)


def round_with_feedback(
    weight: np.ndarray, factor: np.ndarray, order: np.ndarray, grid: Grid, scales: Rounded
) -> Rounded:
    """Round ``weight`` (N, K) float32 on the grids of ``scales``, column ``order[i]`` as number K - 1 - i.

    Args:
        factor: L of the second moment of the columns in ``order``, below its diagonal.
    """
    outputs, inputs = weight.shape
    groups = scales.scales.shape[1]
    zero_points = np.full((outputs, groups), grid.middle) if scales.zero_points is None else scales.zero_points
    q = np.repeat(zero_points[..., None], grid.group_size, axis=2).astype(np.uint8)  # what fills up the last group
    columns = q.reshape(outputs, -1)
    step = max(1, _ELEMENTS // inputs)
    for start in range(0, outputs, step):
        rows = slice(start, start + step)
        columns[rows, order] = _round_rows(
            np.ascontiguousarray(weight[rows].T[order]),
            factor,
            order // grid.group_size,
            grid.most,
            np.ascontiguousarray(scales.scales[rows].T),
            np.ascontiguousarray(zero_points[rows].T, np.float32),
        ).T
    return Rounded(q, scales.scales, scales.zero_points)


def _round_rows(
    weight: np.ndarray, factor: np.ndarray, group_of: np.ndarray, most: int, scales: np.ndarray, zero_points: np.ndarray
) -> np.ndarray:
    """q, uint8 (K, N), of ``weight`` (K, N), the last row first. ``scales`` and ``zero_points`` are (groups, N)."""
    inputs = len(weight)
    errors, rounded = np.empty_like(weight), np.empty(weight.shape, np.uint8)
    for stop in range(inputs, 0, -_COLUMNS):
        start = max(stop - _COLUMNS, 0)
        target = weight[start:stop] + factor[stop:, start:stop].T @ errors[stop:]
        for i in range(stop - 1, start - 1, -1):
            if i + 1 < stop:
                target[i - start] += factor[i + 1 : stop, i] @ errors[i + 1 : stop]
            scale, zero = scales[group_of[i]], zero_points[group_of[i]]
            q = target[i - start] / scale
            np.rint(q, out=q)
            q += zero
            np.clip(q, 0, most, out=q)
            rounded[i] = q
            q -= zero
            q *= scale
            np.subtract(weight[i], q, out=errors[i])
    return rounded
