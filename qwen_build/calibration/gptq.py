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

from dataclasses import dataclass

import numpy as np

from qwen_build.calibration.input_statistics import InputStatistics
from qwen_build.calibration.method import InputReaders, Method
from qwen_build.calibration.scale_search import search_scales
from qwen_build.quantization.grid import Grid, Rounded

# Added to the diagonal of a second moment, as part of its mean: what calibration has not seen may still come.
DAMPING = 0.05

# Columns of a triangle that are factorised, and of a weight that are rounded, without halving them further.
_FACTOR_COLUMNS, _COLUMNS = 256, 16
# Rows of a matrix that are computed at a time; elements of a weight in memory.
_PANEL_ROWS, _ELEMENTS = 1024, 1 << 25


@dataclass(frozen=True)
class Gptq(Method):
    """Divides nothing and rounds as above."""

    needs_second_moment = True

    def round(self, readers: InputReaders) -> dict[str, Rounded]:
        statistics, rounded = readers.statistics, {}
        factor, order = factorised(statistics)
        for name, weight in readers.weights.items():
            scheme = readers.schemes[name]
            scales = search_scales(weight, statistics.mean_square, scheme)
            rounded[name] = round_with_feedback(weight, factor, order, scheme.grid, scales)
        return rounded


def factorised(statistics: InputStatistics) -> tuple[np.ndarray, np.ndarray]:
    """L of the damped second moment, which it takes the memory of, and the order of its columns."""
    moment = statistics.second_moment
    assert moment is not None
    order = np.argsort(statistics.mean_square, kind="stable")
    permute(moment, order)
    moment[np.diag_indices_from(moment)] += DAMPING * moment.diagonal().mean() or 1
    factorise(moment)
    return moment, order


def permute(matrix: np.ndarray, order: np.ndarray) -> None:
    """Replace a square ``matrix`` by ``matrix[order][:, order]``, in place."""
    for start in range(0, len(matrix), _PANEL_ROWS):
        panel = matrix[start : start + _PANEL_ROWS]
        panel[...] = panel.take(order, axis=1)
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

    ``matrix`` is L D Lᵀ with L unit lower triangular; only what is on and below the diagonal is read. What is on and
    above it afterwards means nothing.

    Returns:
        D, float32 (K).
    """
    _cholesky(matrix)
    roots = matrix.diagonal().astype(np.float32)
    matrix /= roots
    return np.square(roots)


def _cholesky(matrix: np.ndarray) -> None:
    """Replace the lower triangle of ``matrix`` by that of C, where C Cᵀ = ``matrix``.

    The first half of the columns comes first: so nearly all of the work is in products of large matrices.
    """
    if len(matrix) <= _FACTOR_COLUMNS:
        matrix[...] = np.linalg.cholesky(matrix.astype(np.float64))
        return
    half = len(matrix) // 2
    first, below, rest = matrix[:half, :half], matrix[half:, :half], matrix[half:, half:]
    _cholesky(first)
    _divide(below, first)
    for start in range(0, len(rest), _PANEL_ROWS):
        stop = start + _PANEL_ROWS
        rest[start:stop, :stop] -= below[start:stop] @ below[:stop].T
    _cholesky(rest)


def _divide(rows: np.ndarray, lower: np.ndarray) -> None:
    """Replace ``rows`` (M, K) by rows @ C⁻ᵀ; C (K, K) is the triangle that :func:`_cholesky` left in ``lower``."""
    if len(lower) <= _FACTOR_COLUMNS:
        rows[...] = rows @ np.linalg.inv(lower.astype(np.float64)).T.astype(np.float32)
        return
    half = len(lower) // 2
    _divide(rows[:, :half], lower[:half, :half])
    rows[:, half:] -= rows[:, :half] @ lower[half:, :half].T
    _divide(rows[:, half:], lower[half:, half:])


def round_with_feedback(
    weight: np.ndarray, factor: np.ndarray, order: np.ndarray, grid: Grid, scales: Rounded, share: float = 1
) -> Rounded:
    """Round ``weight`` (N, K) float32 on the grids of ``scales``, column ``order[i]`` as number K - 1 - i.

    Args:
        factor: L of the second moment of the columns in ``order``, below its diagonal.
        share: of an error, what later columns take away.
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
            np.float32(share),
        ).T
    return Rounded(q, scales.scales, scales.zero_points)


def _round_rows(
    weight: np.ndarray,
    factor: np.ndarray,
    group_of: np.ndarray,
    most: int,
    scales: np.ndarray,
    zero_points: np.ndarray,
    share: np.float32,
) -> np.ndarray:
    """q, uint8 (K, N), of ``weight`` (K, N), the last row first. ``scales`` and ``zero_points`` are (groups, N)."""
    errors, rounded = np.zeros_like(weight), np.empty(weight.shape, np.uint8)
    for block in reversed(range(-(-len(weight) // _COLUMNS))):
        start = block * _COLUMNS
        stop = min(start + _COLUMNS, len(weight))
        own = np.ascontiguousarray(factor[start:stop, start:stop].T)
        for i in range(stop - 1, start - 1, -1):
            scale, zero = scales[group_of[i]], zero_points[group_of[i]]
            q = own[i - start, i + 1 - start :] @ errors[i + 1 : stop]
            q += errors[i]  # what is fed back from behind this block
            q += weight[i]
            q /= scale
            np.rint(q, out=q)
            q += zero
            np.clip(q, 0, most, out=q)
            rounded[i] = q
            q -= zero
            q *= scale
            np.subtract(weight[i], q, out=errors[i])
            if share != 1:
                errors[i] *= share
        # The largest power of two of blocks that starts with this one and is rounded now feeds back to as many before
        # it: so each block reaches each before it once, and nearly all of the work is in products of large matrices.
        width = (block & -block) * _COLUMNS
        errors[start - width : start] += (
            factor[start : start + width, start - width : start].T @ errors[start : start + width]
        )
    return rounded
