"""Dividing what a linear reads by a factor for each column, without changing what the layer computes.

``x @ W.T`` equals ``(x / s) @ (W * s).T``. The division goes into the weights of whatever computes x, so nothing of it
is left to do at run time (SmoothQuant, arXiv 2211.10438, eq. 3; AWQ, arXiv 2306.00978, eq. 4).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np

from qwen_build.calibration.layer_runner import INPUTS, LayerWeights
from qwen_build.checkpoint.config import ModelConfig

# input of linears, see INPUTS -> the module whose output rows are divided in its place
PRODUCERS = {
    "input_layernorm": "input_layernorm",
    "self_attn.o_proj.input": "self_attn.v_proj",
    "post_attention_layernorm": "post_attention_layernorm",
    "mlp.down_proj.input": "mlp.up_proj",
}


def fold_inputs(config: ModelConfig, weights: LayerWeights, factors: Mapping[str, np.ndarray]) -> LayerWeights:
    """The layer whose inputs are divided by ``factors`` and whose output is that of ``weights``, but for rounding.

    Attention takes weighted means of the rows of v, and ``down_proj`` reads a product with ``up_proj``'s outputs: both
    hand a factor of their columns on.

    Args:
        factors: key of ``INPUTS`` -> s (in_features) float32, positive; one of ``self_attn.o_proj.input`` must be as
            :func:`shared` makes them.
    """
    folded = dict(weights)
    for name, s in factors.items():
        for linear in INPUTS[name]:
            folded[f"{linear}.weight"] = folded[f"{linear}.weight"] * s
        producer, s = PRODUCERS[name], _of_producer(config, name, s)
        for parameter in (f"{producer}.weight", f"{producer}.bias"):
            if parameter in folded:
                folded[parameter] = (folded[parameter].T / s).T
    return folded


def shared(
    config: ModelConfig, name: str, values: np.ndarray, reduce: Callable[..., np.ndarray] = np.max
) -> np.ndarray:
    """``values`` (in_features) of the input ``name``, made equal where one row of what computes it feeds them all.

    That is so for ``o_proj``: all query heads of a key/value head read the same values.
    """
    if name != "self_attn.o_proj.input":
        return values
    heads = _by_head(config, values)
    return np.broadcast_to(reduce(heads, axis=1, keepdims=True), heads.shape).reshape(-1)


def _of_producer(config: ModelConfig, name: str, s: np.ndarray) -> np.ndarray:
    """The factor of each output of what computes the input ``name``."""
    if name != "self_attn.o_proj.input":
        return s
    heads = _by_head(config, s)
    assert (heads == heads[:, :1]).all(), "a factor differs between query heads of one key/value head"
    return heads[:, 0].reshape(-1)


def _by_head(config: ModelConfig, values: np.ndarray) -> np.ndarray:
    """(K, N / K, D): key/value heads, the query heads of each, channels."""
    return values.reshape(config.num_key_value_heads, -1, config.head_dim)
