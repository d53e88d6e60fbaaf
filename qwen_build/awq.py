"""AWQ (arXiv 2306.00978): columns that large inputs multiply are scaled up, so that rounding takes less from them.

The inputs are divided by the same factors, which are folded into the weights that compute them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from qwen_build.config import ModelConfig
from qwen_build.decoder_layer import INPUTS, LayerWeights
from qwen_build.factor_search import IntScheme, least_error, normalised
from qwen_build.folding import shared
from qwen_build.grid import Rounded
from qwen_build.scale_search import search_scales
from qwen_build.statistics import Statistics

# 0 leaves the weights as they are
RATIOS = tuple(i / 10 for i in range(10))


def awq_factors(magnitude: np.ndarray, ratio: float) -> np.ndarray:
    """``magnitude ** ratio`` (arXiv 2306.00978, eq. 5), float32, but for a common multiple.

    Args:
        magnitude: (in_features), the mean magnitude of each column of the input; one that is zero gets 1.
    """
    return normalised(np.where(magnitude > 0, magnitude.astype(np.float64) ** ratio, 0))


@dataclass(frozen=True)
class Awq:
    """Scales the columns of inputs that only int4 linears read, each with the ratio that has the least output error."""

    needs_second_moment = False

    def fold(
        self,
        config: ModelConfig,
        weights: LayerWeights,
        statistics: Mapping[str, Statistics],
        schemes: Mapping[str, IntScheme],
    ) -> dict[str, np.ndarray]:
        """The factor of each input of a layer that is scaled, see :func:`qwen_build.folding.fold_inputs`."""
        factors = {}
        for name, linears in INPUTS.items():
            readers = {linear: weights[f"{linear}.weight"] for linear in linears if linear in schemes}
            if not readers or any(schemes[linear].grid.bits != 4 for linear in readers):
                continue
            magnitude = shared(config, name, np.abs(statistics[name].sample).mean(axis=0), np.mean)
            candidates = (awq_factors(magnitude, ratio) for ratio in RATIOS)
            factors[name] = least_error(candidates, readers, statistics[name], schemes)
        return factors

    def round(
        self, weights: Mapping[str, np.ndarray], statistics: Statistics, schemes: Mapping[str, IntScheme]
    ) -> dict[str, Rounded]:
        """Each weight (N, K) with the scales that make its output error least, group by group."""
        return {
            name: search_scales(weight, statistics.mean_square, schemes[name].grid, schemes[name].storable)
            for name, weight in weights.items()
        }
