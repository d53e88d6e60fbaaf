"""Scales and zero points that make the output error small, on all processors."""

from __future__ import annotations

import numpy as np

from qwen_build.quantization.grid import Rounded, joined
from qwen_build.quantization.schemes import IntScheme
from qwen_build.writing.weights_file import in_threads

# Elements of a weight that are searched at a time.
_SLICE_ELEMENTS = 1 << 20


def search_scales(weight: np.ndarray, importance: np.ndarray, scheme: IntScheme) -> Rounded:
    """Round ``weight`` (N, K) float32 so that the sum of importanceₖ (wₖ - roundedₖ)² is least in every group.

    Where groups share a scale, it is that of their largest weight.

    Args:
        importance: float32 (K), not negative. The mean square of each input makes the sum the output error, as far as
            inputs do not correlate.

    Raises:
        OverflowError: a value is larger than the scheme can store.
    """
    if scheme.grid.weight_scales != "group":
        return scheme.round(weight)
    step = max(1, _SLICE_ELEMENTS // weight.shape[1])
    found: dict[int, Rounded] = {}

    def search(start: int) -> None:
        found[start] = scheme.round_weighing(weight[start : start + step], importance)

    for _ in in_threads(search, ((start,) for start in range(0, len(weight), step))):
        pass
    rounded = joined([found[start] for start in sorted(found)], np.concatenate)
    assert isinstance(rounded, Rounded)
    return rounded
