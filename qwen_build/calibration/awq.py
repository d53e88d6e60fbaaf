"""AWQ (arXiv 2306.00978): columns that large inputs multiply are scaled up, so that rounding takes less from them.

The inputs are divided by the same factors, which are folded into the weights that compute them.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from qwen_build.calibration.factor_search import least_error, normalised
from qwen_build.calibration.method import InputReaders, Method
from qwen_build.calibration.scale_search import search_scales
from qwen_build.quantization.grid import Rounded

# 0 leaves the weights as they are
RATIOS = tuple(i / 10 for i in range(10))


def awq_factors(magnitude: np.ndarray, ratio: float) -> np.ndarray:
    """``magnitude ** ratio`` (arXiv 2306.00978, eq. 5), float32, but for a common multiple.

    Args:
        magnitude: (in_features), the mean magnitude of each column of the input; one that is zero gets 1.
    """
    return normalised(np.where(magnitude > 0, magnitude.astype(np.float64) ** ratio, 0))


@dataclass(frozen=True)
class Awq(Method):
    """Scales columns of inputs that only linears of less than 8 bits read, each with the ratio of least output error.

    The scales of a weight are then those that make its output error least, group by group.
    """

    def factors(self, readers: InputReaders) -> np.ndarray | None:
        if max(readers.bits) >= 8:
            return None
        magnitude = readers.shared(np.abs(readers.statistics.sample).mean(axis=0), np.mean)
        candidates = (awq_factors(magnitude, ratio) for ratio in RATIOS)
        return least_error(candidates, readers.weights, readers.statistics, readers.schemes)

    def round(self, readers: InputReaders) -> dict[str, Rounded]:
        importance = readers.statistics.mean_square
        return {
            name: search_scales(weight, importance, readers.schemes[name]) for name, weight in readers.weights.items()
        }
