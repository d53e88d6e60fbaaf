"""GPTQ as far as it carries over: how much of an error later columns take away is what held-out text says.

A second moment that few tokens make has correlations that other text does not have. Feeding back only a share of each
error trusts it less: none is rounding to the nearest, on scales that are weighed by the inputs, all of it is GPTQ.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from qwen_build.calibration.factor_search import spread
from qwen_build.calibration.gptq import factorised, round_with_feedback
from qwen_build.calibration.method import InputReaders, Method
from qwen_build.calibration.scale_search import search_scales
from qwen_build.quantization.grid import Rounded

# Of an error, what later columns take away; the first of equals is taken.
SHARES = (1.0, 0.85, 0.65, 0.4, 0.0)

# Outputs of a linear, evenly spread, that are enough to tell shares apart.
_OUTPUTS = 256


@dataclass(frozen=True)
class Best(Method):
    """Rounds each linear with the share that has the least output error on tokens which are held out."""

    needs_second_moment, needs_held_out = True, True

    def round(self, readers: InputReaders) -> dict[str, Rounded]:
        statistics, rounded = readers.statistics, {}
        factor, order = factorised(statistics)
        held_out = statistics.held_out
        assert held_out is not None
        for name, weight in readers.weights.items():
            grid = readers.schemes[name].grid
            scales = search_scales(weight, statistics.mean_square, readers.schemes[name])
            some, some_scales = spread(weight, _OUTPUTS), _spread_rounded(scales)
            expected = held_out @ some.T

            def error(share: float) -> float:
                found = round_with_feedback(some, factor, order, grid, some_scales, share)  # noqa: B023
                values = grid.values(found, some.shape[1])  # noqa: B023
                return float(np.square(held_out @ values.T - expected).sum(dtype=np.float64))  # noqa: B023

            share = min(SHARES, key=error)
            rounded[name] = round_with_feedback(weight, factor, order, grid, scales, share)
        return rounded


def _spread_rounded(scales: Rounded) -> Rounded:
    """The rows that :func:`spread` takes."""
    zero_points = scales.zero_points
    return Rounded(
        spread(scales.q, _OUTPUTS),
        spread(scales.scales, _OUTPUTS),
        None if zero_points is None else spread(zero_points, _OUTPUTS),
    )
