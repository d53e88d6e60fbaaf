"""Dividing what a linear reads by a factor for each column, without changing what the layer computes.

``x @ W.T`` equals ``(x / s) @ (W * s).T``. The division goes into the weights of whatever computes x, so nothing of it
is left to do at run time (SmoothQuant, arXiv 2211.10438, eq. 3; AWQ, arXiv 2306.00978, eq. 4).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np

from qwen_build.calibration.layer_runner import LayerWeights
from qwen_build.checkpoint.config import ModelConfig
from qwen_build.graph.architecture import InputSpec, LayerKind


def fold_inputs(
    config: ModelConfig, kind: LayerKind, weights: LayerWeights, factors: Mapping[str, np.ndarray]
) -> LayerWeights:
    """The layer whose inputs are divided by ``factors`` and whose output is that of ``weights``, but for rounding.

    Attention takes weighted means of the rows of v, and ``down_proj`` reads a product with ``up_proj``'s outputs: both
    hand a factor of their columns on.

    Args:
        factors: name of an input of ``kind`` that has a producer -> s (in_features) float32, positive, as
            :func:`shared` makes them.
    """
    folded = dict(weights)
    for name, s in factors.items():
        for linear in kind.readers(name):
            folded[f"{linear.name}.weight"] = folded[f"{linear.name}.weight"] * s
        read = kind.inputs[name]
        assert read.producer is not None, f"nothing can take a factor of {name}"
        s = _of_producer(config, read, s)
        for parameter in (f"{read.producer}.weight", f"{read.producer}.bias"):
            if parameter in folded:
                folded[parameter] = (folded[parameter].T / s).T
    return folded


def shared(
    config: ModelConfig, read: InputSpec, values: np.ndarray, reduce: Callable[..., np.ndarray] = np.max
) -> np.ndarray:
    """``values`` (in_features) of the input ``read``, made equal where one output of its producer feeds them all."""
    if read.copies(config) == 1:
        return values
    copies = _by_copy(config, read, values)
    return np.broadcast_to(reduce(copies, axis=1, keepdims=True), copies.shape).reshape(-1)


def _of_producer(config: ModelConfig, read: InputSpec, s: np.ndarray) -> np.ndarray:
    """The factor of each output of what produces the input ``read``."""
    copies = _by_copy(config, read, s)
    assert (copies == copies[:, :1]).all(), f"factors of {read.name} differ between columns that one output feeds"
    return copies[:, 0].reshape(-1)


def _by_copy(config: ModelConfig, read: InputSpec, values: np.ndarray) -> np.ndarray:
    """(runs, copies, outputs of a run), see :class:`InputSpec`: key/value heads, query heads of each, channels."""
    return values.reshape(-1, read.copies(config), read.run(config))
