"""What ``qwen::QuantLinear`` and ``qwen::QuantEmbedding`` compute, in NumPy: the readable definition for tests."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qwen_plugin.layout import BLOCK_COLUMNS, ZERO_POINTS, gated_places, unpack_panels

Array = NDArray[Any]

# precision -> the integer that the largest column of a group becomes
LIMITS = {"int8": 127, "int8x2": 127 * 256}


@dataclass(frozen=True)
class QuantLinearAttributes:
    """Attributes of the operator, by its own names."""

    N: int
    K: int
    bits: int
    group_size: int
    symmetric: int
    precision: str = "int8"
    activation_scales: str = "group"
    swiglu: int = 0
    epsilon: float = 1e-6


def dequantize(weight: Array, attributes: QuantLinearAttributes) -> Array:
    """The weight float32 (N, K) whose panels these are, with its columns in the order they are stored in."""
    a = attributes
    blocks = a.activation_scales == "block"
    q, scales, zero_points = unpack_panels(weight, a.N, a.K, a.bits, a.group_size, bool(a.symmetric), blocks)
    if zero_points is None:
        zero_points = np.full(scales.shape, ZERO_POINTS[a.bits], np.uint8)
    columns = np.arange(a.K) // a.group_size
    return ((q.astype(np.float32) - zero_points[:, columns]) * scales[:, columns]).astype(np.float32)


def quantize_rows(attributes: QuantLinearAttributes, x: Array, input_scale: Array | None = None) -> Array:
    """``x`` (T, K) as the product sees it, float64: each group rounded to whole multiples of its scale.

    ``activation_scales``: "group", "block" and "token" make the largest column of a group, of 128 or of a row the
    largest integer;
    "static" takes ``input_scale`` (1) for all, whatever lies beyond 127 of it is clipped.
    """
    a = attributes
    if a.precision == "float32":
        return x.astype(np.float64)
    rows, columns = x.shape
    size = {"block": BLOCK_COLUMNS, "token": columns}.get(a.activation_scales, a.group_size)
    groups = np.pad(x.astype(np.float32), ((0, 0), (0, -columns % size))).reshape(rows, -1, size)
    limit = np.float32(LIMITS[a.precision])
    with np.errstate(divide="ignore", over="ignore"):
        if a.activation_scales == "static":
            assert input_scale is not None
            scale, inverse = input_scale * (127 / limit), limit / 127 / input_scale
        else:
            largest = np.abs(groups).max(axis=-1, keepdims=True)
            scale, inverse = largest / limit, limit / largest
    steps = (groups * np.where(np.isinf(inverse), 0, inverse)).clip(-limit, limit)
    return np.asarray(np.rint(steps).astype(np.float64) * scale).reshape(rows, -1)[:, :columns]


def quant_linear(
    attributes: QuantLinearAttributes,
    x: Array,
    weight: Array,
    bias: Array | None = None,
    norm_weight: Array | None = None,
    residual: Array | None = None,
    permutation: Array | None = None,
    input_scale: Array | None = None,
) -> tuple[Array, Array]:
    """The product of rows with a quantised weight, and what was multiplied.

    Args:
        attributes: with its ``swiglu``, outputs 0 to 15 of each 32 are gates of the 16 behind them.
        x: float32 (T, K), finite.
        weight: its panels, see :mod:`qwen_plugin.layout`.
        bias: (N).
        norm_weight: (K), RMS norm of x first.
        residual: (T, N), added last; not with ``swiglu``.
        permutation: int32 (K), stored column k multiplies input column ``permutation[k]``.
        input_scale: (1), with ``activation_scales`` "static" alone, see :func:`quantize_rows`.

    Returns:
        y float64 (T, N), (T, N / 2) with ``swiglu``: silu(gate) * up; and the product's input float32 (T, K), before it
        is permuted and quantised.
    """
    a = attributes
    source = x.astype(np.float64)
    if norm_weight is not None:
        source = source / np.sqrt(np.mean(source**2, axis=-1, keepdims=True) + a.epsilon) * norm_weight
    product_input = source.astype(np.float32)
    stored_order = product_input if permutation is None else product_input[:, permutation]
    y = quantize_rows(a, stored_order, input_scale) @ dequantize(weight, a).T.astype(np.float64)
    for addend in (bias, residual):
        y = y if addend is None else y + addend
    if a.swiglu:
        gate, up = np.split(y[:, gated_places(0, a.N, a.N)], 2, axis=1)
        gate = gate.clip(min=-88)
        y = gate / (1 + np.exp(-gate)) * up
    return y, product_input


def quant_embedding(attributes: QuantLinearAttributes, token_ids: Array, weight: Array) -> Array:
    """Rows of the dequantised weight, float32 (T, K), for int64 (T) in 0 to N - 1."""
    return np.asarray(dequantize(weight, attributes)[token_ids])
