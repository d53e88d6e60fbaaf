"""How the weight of a linear layer or an embedding is stored, and multiplied with.

A scheme is one class with everything that has to agree on the stored layout: how a weight is
written, how it is read back, its shapes, and the operators that read it. Weights are
(out_features, in_features); every stored part has out_features as its first axis and a row of it
depends on that row of the weight alone, so a weight can be written a slice of rows at a time.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import onnx_ir as ir
from onnxscript import OpBuilder

from qwen_engine.errors import BuildError
from qwen_engine.manifest import Quantization

MICROSOFT = "com.microsoft"

Tensors = dict[str, np.ndarray]
Values = Mapping[str, ir.Value]


@dataclass(frozen=True)
class StoredPart:
    """Shape and type of one stored tensor; the first axis is out_features."""

    shape: tuple[int, ...]
    dtype: ir.DataType

    @property
    def size_bytes(self) -> int:
        return math.prod(self.shape) * int(self.dtype.bitwidth) // 8


class Scheme(Protocol):
    """What the graph, the weight writer and the manifest need from a way to store weights."""

    def parts(self, out_features: int, in_features: int) -> dict[str, StoredPart]:
        """The stored tensors of a weight, by the name they have behind the module's."""

    def quantize(self, weight: np.ndarray) -> Tensors:
        """``weight`` (out_features, in_features) float32, or some of its rows, as stored."""

    def dequantize(self, tensors: Tensors, in_features: int) -> np.ndarray:
        """The (out_features, in_features) float32 weight the engine computes with."""

    def linear(self, op: OpBuilder, x: ir.Value, weight: Values, bias: ir.Value | None, in_features: int) -> ir.Value:
        """``x @ weight.T + bias`` for x (T, in_features)."""

    def lookup(self, op: OpBuilder, token_ids: ir.Value, weight: Values, in_features: int) -> ir.Value:
        """Rows ``token_ids`` (T) of the weight, (T, in_features) float32."""

    @property
    def record(self) -> Quantization:
        """The scheme as the manifest describes it."""


@dataclass(frozen=True)
class Float32:
    """The weight as it is, in float32: 16-bit checkpoints are represented exactly."""

    def parts(self, out_features: int, in_features: int) -> dict[str, StoredPart]:
        return {"weight": StoredPart((out_features, in_features), ir.DataType.FLOAT)}

    def quantize(self, weight: np.ndarray) -> Tensors:
        return {"weight": weight}

    def dequantize(self, tensors: Tensors, in_features: int) -> np.ndarray:
        return tensors["weight"]

    def linear(self, op: OpBuilder, x: ir.Value, weight: Values, bias: ir.Value | None, in_features: int) -> ir.Value:
        return op.Gemm(x, weight["weight"], bias, transB=1)

    def lookup(self, op: OpBuilder, token_ids: ir.Value, weight: Values, in_features: int) -> ir.Value:
        return op.Gather(weight["weight"], token_ids)

    @property
    def record(self) -> Quantization:
        return Quantization("none", bits=32, group_size=0, symmetric=True, activations="float32")


# activation precision -> accuracy_level of MatMulNBits. Levels 0 to 3 are the same on CPU.
ACCURACY_LEVELS = {"int8": 4, "float32": 1}


@dataclass(frozen=True)
class GroupwiseInt:
    """``weight ~= scale * (q - zero_point)``, one scale and zero point for ``group_size`` inputs of one output.

    Stored as ONNX Runtime's ``MatMulNBits`` reads it: ``packed`` (out_features, groups, group_size *
    bits / 8) uint8; ``scales`` (out_features, groups) float32; unless symmetric, ``zero_points``
    (out_features, groups * bits / 8 rounded up) uint8. in_features that are no multiple of group_size
    are padded with zeros. Symmetric means zero_point = 2**(bits-1), not stored.

    ``activations`` "int8" rounds each input row to int8, group by group, before it is multiplied.
    """

    bits: int
    group_size: int
    symmetric: bool
    activations: str

    def parts(self, out_features: int, in_features: int) -> dict[str, StoredPart]:
        groups = -(-in_features // self.group_size)
        packed = (out_features, groups, self.group_size * self.bits // 8)
        parts = {
            "packed": StoredPart(packed, ir.DataType.UINT8),
            "scales": StoredPart((out_features, groups), ir.DataType.FLOAT),
        }
        if not self.symmetric:
            zero_points = (out_features, -(-groups * self.bits // 8))
            parts["zero_points"] = StoredPart(zero_points, ir.DataType.UINT8)
        return parts

    def quantize(self, weight: np.ndarray) -> Tensors:
        """Round ``weight`` to the nearest multiple of its group's scale (round to nearest, no calibration)."""
        groups = self._groups(weight)  # (out_features, groups, group_size)
        scales, zero_points = self._symmetric_grid(groups) if self.symmetric else self._asymmetric_grid(groups)
        q = groups / scales[..., None]
        np.rint(q, out=q)
        q += zero_points[..., None]
        np.clip(q, 0, self._levels, out=q)
        tensors = {"packed": pack(q.astype(np.uint8), self.bits), "scales": scales}
        if not self.symmetric:
            tensors["zero_points"] = pack(self._padded(zero_points).astype(np.uint8), self.bits)
        return tensors

    def dequantize(self, tensors: Tensors, in_features: int) -> np.ndarray:
        scales = tensors["scales"]
        zero_points: np.ndarray | float = float(self._middle)
        if not self.symmetric:
            stored = unpack(tensors["zero_points"], self.bits)[:, : scales.shape[1]]
            zero_points = stored.astype(np.float32)[..., None]
        weight = unpack(tensors["packed"], self.bits).astype(np.float32) - zero_points
        return (weight * scales[..., None]).reshape(len(weight), -1)[:, :in_features]

    def linear(self, op: OpBuilder, x: ir.Value, weight: Values, bias: ir.Value | None, in_features: int) -> ir.Value:
        return op.MatMulNBits(
            x, weight["packed"], weight["scales"], weight.get("zero_points"), None, bias,
            N=weight["packed"].shape[0], K=in_features, bits=self.bits, block_size=self.group_size,
            accuracy_level=ACCURACY_LEVELS[self.activations], _domain=MICROSOFT,
        )  # fmt: skip

    def lookup(self, op: OpBuilder, token_ids: ir.Value, weight: Values, in_features: int) -> ir.Value:
        rows = op.GatherBlockQuantized(
            weight["packed"], token_ids, weight["scales"], weight.get("zero_points"),
            bits=self.bits, block_size=self.group_size, gather_axis=0, quantize_axis=1, _domain=MICROSOFT,
        )  # fmt: skip
        if in_features % self.group_size == 0:
            return rows
        return op.Slice(rows, [0], [in_features], [1])  # the padding of the last group

    @property
    def record(self) -> Quantization:
        return Quantization(f"int{self.bits}", self.bits, self.group_size, self.symmetric, self.activations)

    @property
    def _levels(self) -> int:
        return (1 << self.bits) - 1

    @property
    def _middle(self) -> int:
        return 1 << (self.bits - 1)

    def _groups(self, weight: np.ndarray) -> np.ndarray:
        padding = -weight.shape[1] % self.group_size
        padded = np.pad(weight, ((0, 0), (0, padding))) if padding else weight
        return padded.reshape(len(weight), -1, self.group_size)

    def _padded(self, zero_points: np.ndarray) -> np.ndarray:
        """With a last column of zeros where a row would end in the middle of a byte."""
        return np.pad(zero_points, ((0, 0), (0, -zero_points.shape[1] % (8 // self.bits))))

    def _symmetric_grid(self, groups: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        largest = np.maximum(groups.max(axis=-1), -groups.min(axis=-1))
        scales = positive(largest / (self._middle - 1))
        return scales, np.full_like(scales, self._middle)

    def _asymmetric_grid(self, groups: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        lowest, highest = groups.min(axis=-1).clip(max=0), groups.max(axis=-1).clip(min=0)  # 0 stays exact
        scales = positive((highest - lowest) / self._levels)
        return scales, np.rint(-lowest / scales)


def positive(scales: np.ndarray) -> np.ndarray:
    """Replace the scale of an all-zero group, or one whose reciprocal would overflow, by 1."""
    return np.where(scales > 1e-37, scales, np.float32(1))


def pack(q: np.ndarray, bits: int) -> np.ndarray:
    """Store 4-bit values two to a byte along the last axis, the even index in the low half.

    >>> pack(np.array([[1, 2, 3, 4]], np.uint8), bits=4).tolist()
    [[33, 67]]
    """
    return q if bits == 8 else q[..., 0::2] | q[..., 1::2] << 4


def unpack(packed: np.ndarray, bits: int) -> np.ndarray:
    """Invert :func:`pack`."""
    if bits == 8:
        return packed
    return np.stack([packed & 0x0F, packed >> 4], axis=-1).reshape(*packed.shape[:-1], -1)


@dataclass(frozen=True)
class SchemeRow:
    """A choice of ``--quant``: its bits (0: float32), whether its grid is symmetric unless asked, what it is for.

    A zero point takes a quarter of int4's KL off and nothing of int8's, see ``benchmarks/results/accuracy.md``.
    """

    bits: int
    symmetric: bool
    help: str


# name on the command line -> scheme; option choices, help text and tests are made from this table
SCHEMES = {
    "none": SchemeRow(0, True, "float32, equal to Hugging Face"),
    "int8": SchemeRow(8, True, "8-bit weights, a scale for each group"),
    "int4": SchemeRow(4, False, "4-bit weights, a scale for each group"),
}

GROUP_SIZES = (32, 64, 128)


def make_scheme(name: str, group_size: int, symmetric: bool | None, activations: str) -> Scheme:
    """The scheme called ``name`` on the command line; ``symmetric`` None is its row's default.

    Raises:
        BuildError: an option is not one of its table.
    """
    for option, value, choices in (
        ("quant", name, tuple(SCHEMES)),
        ("group-size", group_size, GROUP_SIZES),
        ("activations", activations, tuple(ACCURACY_LEVELS)),
    ):
        if value not in choices:
            raise BuildError(f"--{option} {value} is not one of {', '.join(map(str, choices))}")
    row = SCHEMES[name]
    if not row.bits:
        return Float32()
    return GroupwiseInt(row.bits, group_size, row.symmetric if symmetric is None else symmetric, activations)
