"""What the numbers of a quantised checkpoint stand for, read for a comparison: nothing of the builder is used.

Each format's definition is its own library's reading: FP8 of transformers' ``finegrained_fp8``, ``pack_to_int32`` and
``dequantize`` of compressed-tensors, ``dequantize_4bit`` of bitsandbytes. Integers that the engine keeps have scales as
its layout holds them.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol

import numpy as np

from qwen_plugin.layout import round_scales


class Stored(Protocol):
    """A tensor of a file; a slice of it is float32 or int32."""

    @property
    def element(self) -> str:
        """Its type, by the name that safetensors gives it."""

    @property
    def stored(self) -> np.ndarray:
        """What lies in the file."""

    def __getitem__(self, part: Any) -> np.ndarray: ...


class LinearParts(NamedTuple):
    """The tensors whose names begin with ``name``, and ``quantization_config``."""

    tensors: Mapping[str, Stored]
    config: Mapping[str, Any]
    name: str

    def part(self, suffix: str) -> Stored | None:
        return self.tensors.get(f"{self.name}.{suffix}")

    def need(self, suffix: str) -> Stored:
        return self.tensors[f"{self.name}.{suffix}"]


Read = Callable[[LinearParts, slice], np.ndarray]


class StoredNumbers(NamedTuple):
    """A way to store a weight: what reads rows of it, and whether they are on a grid of the engine's."""

    read: Read
    is_packed: bool


def numbers_of(linear: LinearParts) -> StoredNumbers | None:
    """How ``linear`` is stored; None: as floats, or not at all."""
    weight = linear.part("weight")
    if linear.part("weight_packed") is not None:
        return StoredNumbers(_words, is_packed=True)
    if linear.part(_STATE + "nf4") is not None or linear.part(_STATE + "fp4") is not None:
        return StoredNumbers(_four_bits, is_packed=False)
    if weight is not None and weight.element == "I8":
        return StoredNumbers(_bytes, is_packed=True)
    if weight is not None and weight.element == "F8_E4M3":
        return StoredNumbers(_fp8, is_packed=False)
    return None


# -------------------------------------------------------------------------------------------------------------- floats


def e4m3(stored: np.ndarray) -> np.ndarray:
    """The float32 of each byte: exponents have a bias of 7, NaN is all ones.

    >>> e4m3(np.array([0x38, 0xB8, 0x01, 0x7E], np.uint8)).tolist()
    [1.0, -1.0, 0.001953125, 448.0]
    """
    bits = stored.astype(np.uint32)
    sign, magnitude = (bits & 0x80) << 24, bits & 0x7F
    normal = (magnitude << 20) + (120 << 23)  # a float32 has 20 bits more of fraction, and a bias of 127
    values = np.where(magnitude < 8, magnitude.astype(np.float32) * np.float32(2**-9), normal.view(np.float32))
    values = np.where(magnitude == 0x7F, np.float32(np.nan), values)
    return np.asarray((values.astype(np.float32).view(np.uint32) | sign).view(np.float32))


def _fp8(linear: LinearParts, rows: slice) -> np.ndarray:
    """Each number times the scale of its block, of its row, or of all."""
    values = e4m3(linear.need("weight").stored[rows])
    found = linear.part("weight_scale_inv") or linear.need("weight_scale")
    scales, (outputs, inputs) = np.atleast_2d(found[...]), linear.need("weight").stored.shape
    block = (1, inputs) if scales.shape == (outputs, 1) else (outputs, inputs)
    if scales.size > 1 and (told := _block_of(linear.config)) is not None:
        block = told
    of_rows, of_columns = (np.arange(size) // own for size, own in zip((outputs, inputs), block, strict=True))
    return np.asarray(values * scales.reshape(-1, -(-inputs // block[1]))[of_rows[rows]][:, of_columns])


def _block_of(config: Mapping[str, Any]) -> tuple[int, int] | None:
    """Rows and columns of a block, where there are some."""
    groups = [group.get("weights") or {} for group in (config.get("config_groups") or {}).values()]
    told = [config.get("weight_block_size"), *(weights.get("block_structure") for weights in groups)]
    return next(((int(each[0]), int(each[1])) for each in told if each), None)


# ------------------------------------------------------------------------------------------------------------ integers


def _words(linear: LinearParts, rows: slice) -> np.ndarray:
    """Unsigned integers in words, of 4 bits or 8; half of the range is 0."""
    words = linear.need("weight_packed").stored[rows]
    inputs = int(linear.need("weight_shape")[...][1])
    bits = 32 // -(-inputs // words.shape[1])
    bits = 4 if bits < 8 else 8  # the last word may be filled up
    q = _unpacked(words, bits)[:, :inputs]
    points = linear.part("weight_zero_point")
    if points is None:
        return _on_grid(linear, q, np.zeros((1, 1), np.int32), rows)
    along_outputs = _unpacked(np.ascontiguousarray(points[...].T), bits).T
    return _on_grid(linear, q, along_outputs[rows], rows)


def _unpacked(words: np.ndarray, bits: int) -> np.ndarray:
    """The integers of words (rows, words), int32 (rows, integers) around 0: the first in the lowest bits."""
    places = np.arange(0, 32, bits, dtype=np.uint32)
    q = (words.view(np.uint32)[..., None] >> places) & np.uint32((1 << bits) - 1)
    return np.asarray(q.astype(np.int32).reshape(len(words), -1) - (1 << (bits - 1)))


def _bytes(linear: LinearParts, rows: slice) -> np.ndarray:
    """Integers with a sign."""
    points = linear.part("weight_zero_point")
    every = np.zeros((1, 1), np.int32) if points is None else np.atleast_2d(points[...])
    return _on_grid(linear, linear.need("weight")[rows], every[rows] if len(every) > 1 else every, rows)


def _on_grid(linear: LinearParts, q: np.ndarray, points: np.ndarray, rows: slice) -> np.ndarray:
    """(q - zero point) * scale, the latter two of the group of each input."""
    stored = linear.need("weight_scale")[...]
    scales = stored.reshape(len(stored) if stored.ndim > 1 else 1, -1)
    scales = scales[rows] if len(scales) > 1 else scales
    held = round_scales(scales)
    scales = np.where(np.isfinite(held), held, scales)
    inputs, groups = q.shape[1], scales.shape[1]
    order = linear.part("weight_g_idx")
    group_of = np.arange(inputs) // group_size_of(inputs, groups)
    if order is not None and (order[...] >= 0).all():
        group_of = order[...]
    point_of = group_of if points.shape[1] > 1 else np.zeros(inputs, np.int64)
    return np.asarray((q - points[:, point_of]).astype(np.float32) * scales[:, group_of])


def group_size_of(inputs: int, groups: int) -> int:
    """How many of ``inputs`` share a scale: an engine has groups of whole multiples of 32, the last may be shorter.

    >>> group_size_of(112, 2), group_size_of(896, 7)
    (64, 128)
    """
    return -(-inputs // (32 * groups)) * 32


# ---------------------------------------------------------------------------------------------------------- four bits

_STATE = "weight.quant_state.bitsandbytes__"


def _four_bits(linear: LinearParts, rows: slice) -> np.ndarray:
    """The number of a table for each half of a byte, the high one first, times the largest of its block."""
    text = linear.part(_STATE + "nf4") or linear.need(_STATE + "fp4")
    state = json.loads(text.stored.tobytes())
    inputs = int(state["shape"][1])
    first, last = rows.start * inputs, rows.stop * inputs
    packed = linear.need("weight").stored.reshape(-1)[first // 2 : -(-last // 2)]
    codes = np.stack([packed >> 4, packed & 15], -1).reshape(-1)[first % 2 :][: last - first]
    block = np.arange(first, last) // int(state["blocksize"])
    largest = linear.need("weight.absmax")[...].reshape(-1)
    if state.get("nested_blocksize"):
        outer = linear.need("weight.nested_absmax")[...][np.arange(len(largest)) // int(state["nested_blocksize"])]
        largest = linear.need("weight.nested_quant_map")[...][largest] * outer + np.float32(state["nested_offset"])
    values = linear.need("weight.quant_map")[...][codes] * largest[block]
    return np.asarray(values.reshape(-1, inputs))
