"""Which factors to divide an input by: those with which the engine's products come closest to the float ones."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

import numpy as np

from qwen_build.calibration.input_statistics import InputStatistics
from qwen_build.quantization.grid import positive
from qwen_build.quantization.schemes import IntScheme
from qwen_plugin.reference_linear import QuantLinearAttributes, quantize_rows

# How far a factor may be from the usual one: columns beyond are dead, and float16 has to hold the weights' scales.
_SPREAD = 2.0**10


# Tokens and outputs of a linear, evenly spread, that are enough to tell factors apart.
_TOKENS, _OUTPUTS = 256, 512


def normalised(factors: np.ndarray) -> np.ndarray:
    """``factors`` (in_features) times what makes the median of the positive ones 1, float32, extreme ones clipped.

    A common multiple changes no rounding: it would only move the weights' scales out of the range of float16. Those
    that are 0 become 1.
    """
    known = factors > 0
    middle = np.median(factors[known]) if known.any() else 1
    return np.where(known, (factors / middle).clip(1 / _SPREAD, _SPREAD), 1).astype(np.float32)


def spread(rows: np.ndarray, count: int) -> np.ndarray:
    """At least ``count`` of the rows at equal distances, if there are as many.

    >>> spread(np.arange(11), 3)
    array([0, 3, 6, 9])
    """
    return rows[:: max(1, len(rows) // count)]


def as_multiplied(x: np.ndarray, largest: np.ndarray, scheme: IntScheme) -> np.ndarray:
    """The rows x (T, K) as the operator of ``scheme`` rounds them, float32.

    Args:
        largest: (K), the calibrated largest magnitudes, of which static scales are made.
    """
    stored = scheme.record
    attributes = QuantLinearAttributes(
        N=0, K=x.shape[1], bits=stored.bits, group_size=stored.group_size, symmetric=int(stored.symmetric),
        precision=stored.activations, activation_scales=stored.activation_scales,
    )  # fmt: skip
    rounded: np.ndarray = quantize_rows(attributes, x, input_scale(largest)).astype(np.float32)
    return rounded


def input_scale(largest: np.ndarray) -> np.ndarray:
    """The static scale, float32 (1), of an input whose columns reach ``largest`` (K)."""
    return positive(largest.max(keepdims=True) / np.float32(127))


def least_error(
    candidates: Iterable[np.ndarray],
    weights: Mapping[str, np.ndarray],
    statistics: InputStatistics,
    schemes: Mapping[str, IntScheme],
) -> np.ndarray:
    """The factors (K) among ``candidates`` with the least output error, the first of equals.

    The error is that of products of sampled tokens, weights and inputs rounded as in the engine; linears that share the
    input weigh the same, whatever the size of their outputs. Only some of the outputs are computed.

    Args:
        weights: linear name -> (N, K) of the linears that read the input.
        schemes: how each of them is stored.
    """
    sample = spread(statistics.sample, _TOKENS)
    weights = {name: spread(weight, _OUTPUTS) for name, weight in weights.items()}
    exact = {name: sample @ weight.T for name, weight in weights.items()}

    def error(factors: np.ndarray) -> float:
        divided, largest = sample / factors, statistics.largest / factors
        inputs = {scheme: as_multiplied(divided, largest, scheme) for scheme in {schemes[name] for name in weights}}
        total = 0.0
        for name, weight in weights.items():
            try:
                rounded = schemes[name].grid.values(schemes[name].round(weight * factors), weight.shape[1])
            except OverflowError:
                return math.inf
            difference = inputs[schemes[name]] @ rounded.T
            difference -= exact[name]
            if whole := np.square(exact[name]).sum(dtype=np.float64):
                total += float(np.square(difference).sum(dtype=np.float64) / whole)
        return total

    return min(candidates, key=error)
