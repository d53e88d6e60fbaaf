"""Rows of a weight from what an engine stores of it, whatever the layout; builder and runtime read with this."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np

from qwen_engine.manifest import Quantization
from qwen_plugin.layout import GATED_PANELS, PANEL, PANELS, ZERO_POINTS, gated_places, unpack_panels

# The layout in the manifest that is not of qwen_plugin/layout.py: row after row.
ROWS = "rows"

WeightShape = tuple[int, int]  # (out_features, in_features)
Tensors = Mapping[str, np.ndarray]
# q (R, G x group_size), scales (R, G) and zero points (R, G); None: symmetric
Integers = tuple[np.ndarray, np.ndarray, np.ndarray | None]


def read_rows(stored: Quantization, shape: WeightShape, tensors: Tensors, start: int, stop: int) -> np.ndarray:
    """Rows [start, stop) of a weight, float32 (rows, in_features), its columns in the order they are stored in.

    Args:
        tensors: by the last part of their name.

    Raises:
        KeyError, IndexError, TypeError, ValueError, AssertionError: the tensors are not as ``stored`` says.
    """
    if not stored.group_size:
        return tensors["weight"][start:stop]
    q, scales, zero_points = READERS[stored.layout](stored, shape, tensors, start, stop)
    groups = q.reshape(*scales.shape, stored.group_size)
    return dequantized(groups, scales, zero_points, stored.bits)[:, : shape[1]]


def dequantized(q: np.ndarray, scales: np.ndarray, zero_points: np.ndarray | None, bits: int) -> np.ndarray:
    """``scale * (q - zero_point)``, float32 (R, G x group_size).

    Args:
        q: uint8 (R, G, group_size).
        scales: float32 (R, G).
        zero_points: uint8 (R, G); None: all are 2**(bits-1).
    """
    weight = q.astype(np.float32)
    weight -= np.uint8(ZERO_POINTS[bits]) if zero_points is None else zero_points[..., None]
    weight *= scales[..., None]
    return weight.reshape(len(weight), -1)


def pack(q: np.ndarray, bits: int) -> np.ndarray:
    """Integers along the last axis as :data:`ROWS` has them: at 4 bits two to a byte, the even index in the low half.

    >>> pack(np.array([[1, 2, 3, 4]], np.uint8), bits=4).tolist()
    [[33, 67]]
    """
    return q if bits == 8 else q[..., 0::2] | q[..., 1::2] << 4


def unpack(packed: np.ndarray, bits: int) -> np.ndarray:
    """Invert :func:`pack`."""
    if bits == 8:
        return packed
    return np.stack([packed & 0x0F, packed >> 4], axis=-1).reshape(*packed.shape[:-1], -1)


def _read_panels(stored: Quantization, shape: WeightShape, tensors: Tensors, start: int, stop: int) -> Integers:
    first, blocks = start // PANEL, stored.activation_scales == "block"
    padded = -(-shape[1] // stored.group_size) * stored.group_size
    q, scales, zero_points = unpack_panels(
        tensors["panels"][first : -(-stop // PANEL)], stop - first * PANEL, padded,
        stored.bits, stored.group_size, stored.symmetric, blocks,
    )  # fmt: skip
    skip = start - first * PANEL
    return q[skip:], scales[skip:], None if zero_points is None else zero_points[skip:]


def _read_gated(stored: Quantization, shape: WeightShape, tensors: Tensors, start: int, stop: int) -> Integers:
    places = gated_places(start, stop, shape[0])
    first = int(places.min()) // PANEL * PANEL
    q, scales, zero_points = _read_panels(stored, shape, tensors, first, int(places.max()) + 1)
    places -= first
    return q[places], scales[places], None if zero_points is None else zero_points[places]


def _read_stock(stored: Quantization, shape: WeightShape, tensors: Tensors, start: int, stop: int) -> Integers:
    """As ``MatMulNBits`` and ``GatherBlockQuantized`` read them."""
    scales, zero_points = tensors["scales"][start:stop], tensors.get("zero_points")
    q = unpack(tensors["packed"][start:stop].reshape(stop - start, -1), stored.bits)
    if zero_points is not None:
        zero_points = unpack(zero_points[start:stop].reshape(stop - start, -1), stored.bits)[:, : scales.shape[1]]
    return q, scales, zero_points


READERS: dict[str, Callable[[Quantization, WeightShape, Tensors, int, int], Integers]] = {
    PANELS: _read_panels,
    GATED_PANELS: _read_gated,
    ROWS: _read_stock,
}
