"""How the weight of a linear layer or an embedding is stored, and multiplied with.

A scheme is one class with everything that has to agree on the stored layout: how a weight is written, its shapes, and
the operators that read it; ``qwen_run/engine_files/stored_rows.py`` reads it back. Weights are (out_features,
in_features); every stored part has blocks of ``block_rows`` of their rows, one after the other, as its first axis. A
block depends on its rows alone, so a weight can be written some blocks at a time.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import onnx_ir as ir
from onnxscript import OpBuilder

from qwen_build.quantization.grid import Grid, Rounded
from qwen_build.quantization.scale_search import is_searched, round_searched
from qwen_engine.graph_io import PLUGIN_DOMAIN
from qwen_engine.manifest import Quantization
from qwen_plugin.layout import (
    PANEL,
    PANELS,
    pack_panels,
    panel_bytes,
    round_block_scales,
    round_scales,
)
from qwen_run.engine_files.stored_rows import ROWS, WeightShape, pack, read_rows

MICROSOFT = "com.microsoft"

Tensors = dict[str, np.ndarray]
Values = Mapping[str, ir.Value]


@dataclass(frozen=True)
class StoredPart:
    """Shape and type of one stored tensor; the first axis counts blocks of rows."""

    shape: tuple[int, ...]
    dtype: ir.DataType

    @property
    def size_bytes(self) -> int:
        return math.prod(self.shape) * int(self.dtype.bitwidth) // 8


# activation precision -> accuracy_level of MatMulNBits. Levels 0 to 3 are the same on CPU.
ACCURACY_LEVELS = {"int8": 4, "float32": 1}


@dataclass(frozen=True)
class Norm:
    """The weight of an RMS norm, float32 (features), and its epsilon."""

    weight: ir.Value
    eps: float


@dataclass(frozen=True)
class Fusion:
    """What the native operator computes along with a product.

    Attributes:
        norm: of x, is what goes into the product.
        swiglu: with a weight in gated panels, multiply silu of the product's first half with the second.
        residual: (T, out_features), is added at last.
        permutation: int32 (in_features), stored column k multiplies column permutation[k] of the input.
        input_scale: float32 (1), what a scheme whose activation scales are static rounds the input with.
        with_input: give the input of the product too, (T, in_features).
    """

    norm: Norm | None = None
    swiglu: bool = False
    residual: ir.Value | None = None
    permutation: ir.Value | None = None
    input_scale: ir.Value | None = None
    with_input: bool = False


class Scheme(Protocol):
    """What the graph, the weight writer and the manifest need from a way to store weights of some ``shape``."""

    @property
    def block_rows(self) -> int:
        """Rows of a weight that are stored together; what is written begins at a multiple of it."""

    def parts(self, shape: WeightShape) -> dict[str, StoredPart]:
        """The stored tensors of a weight, by the name they have behind the module's."""

    @property
    def fuses(self) -> bool:
        """Whether :meth:`linear` computes a :class:`Fusion`; else it is asked for products alone."""

    def quantize(self, weight: np.ndarray | Rounded) -> Tensors:
        """``weight`` (out_features, in_features) float32, or some of its blocks of rows, as stored.

        Where it is on the grid of this scheme already, it stays as it is.

        Raises:
            OverflowError: a value is larger than the scheme can store, or a scale cannot be stored exactly.
        """

    def linear(
        self, op: OpBuilder, x: ir.Value, weight: Values, bias: ir.Value | None, shape: WeightShape, fusion: Fusion
    ) -> tuple[ir.Value, ir.Value | None]:
        """``x @ weight.T + bias`` for x (T, in_features), with ``fusion`` around it.

        Returns:
            The product, and its input where ``fusion`` asks for it.
        """

    def lookup(self, op: OpBuilder, token_ids: ir.Value, weight: Values, shape: WeightShape) -> ir.Value:
        """Rows ``token_ids`` (T) of the weight, (T, in_features) float32."""

    @property
    def in_experts(self) -> Mapping[str, int | str]:
        """What ``qwen::MoE`` has to know of it; empty where it cannot read such a weight."""

    @property
    def record(self) -> Quantization:
        """The scheme as the manifest describes it."""


@dataclass(frozen=True)
class Float32:
    """The weight as it is, in float32: 16-bit checkpoints are represented exactly."""

    block_rows = 1
    fuses = False

    def parts(self, shape: WeightShape) -> dict[str, StoredPart]:
        return {"weight": StoredPart(shape, ir.DataType.FLOAT)}

    def quantize(self, weight: np.ndarray | Rounded) -> Tensors:
        assert isinstance(weight, np.ndarray), "there is no grid"
        return {"weight": weight}

    def linear(
        self, op: OpBuilder, x: ir.Value, weight: Values, bias: ir.Value | None, shape: WeightShape, fusion: Fusion
    ) -> tuple[ir.Value, None]:
        return op.Gemm(x, weight["weight"], bias, transB=1), None

    def lookup(self, op: OpBuilder, token_ids: ir.Value, weight: Values, shape: WeightShape) -> ir.Value:
        return op.Gather(weight["weight"], token_ids)

    @property
    def in_experts(self) -> Mapping[str, int | str]:
        return {"bits": 32}

    @property
    def record(self) -> Quantization:
        return Quantization("none", 32, 0, True, "float32", "stock", ROWS, "group", "group", "none")


@dataclass(frozen=True)
class StockInt:
    """A grid as ONNX Runtime's ``MatMulNBits`` and ``GatherBlockQuantized`` read it.

    ``packed`` (out_features, groups, group_size * bits / 8) uint8; ``scales`` (out_features, groups) float32; unless
    symmetric, ``zero_points`` (out_features, groups * bits / 8 rounded up) uint8.

    ``activations`` "int8" rounds each input row to int8, group by group, before it is multiplied.
    """

    grid: Grid
    activations: str

    block_rows = 1
    fuses = False

    def parts(self, shape: WeightShape) -> dict[str, StoredPart]:
        out_features, in_features = shape
        bits, group_size = self.grid.bits, self.grid.group_size
        groups = -(-in_features // group_size)
        parts = {
            "packed": StoredPart((out_features, groups, group_size * bits // 8), ir.DataType.UINT8),
            "scales": StoredPart((out_features, groups), ir.DataType.FLOAT),
        }
        if not self.grid.symmetric:
            parts["zero_points"] = StoredPart((out_features, -(-groups * bits // 8)), ir.DataType.UINT8)
        return parts

    def round(self, weight: np.ndarray) -> Rounded:
        """``weight`` (out_features, in_features) float32 on the grid, without calibration."""
        if not is_searched(self.grid):
            return self.grid.round(weight, self.storable)
        return round_searched(weight, self.grid, False, self.storable)

    def round_weighing(self, weight: np.ndarray, importance: np.ndarray) -> Rounded:
        """The same, where a squared error in column k counts ``importance[k]``, float32 (in_features)."""
        return round_searched(weight, self.grid, False, self.storable, importance)

    def storable(self, scales: np.ndarray, zero_points: np.ndarray | None) -> np.ndarray:
        """The nearest scales that can be stored: all."""
        return scales

    def quantize(self, weight: np.ndarray | Rounded) -> Tensors:
        return self.store(weight if isinstance(weight, Rounded) else self.round(weight))

    def store(self, rounded: Rounded) -> Tensors:
        """A weight that is on the grid already, as stored."""
        tensors = {"packed": pack(rounded.q, self.grid.bits), "scales": rounded.scales}
        if rounded.zero_points is not None:
            # a row ends with a whole byte
            padding = -rounded.zero_points.shape[1] % (8 // self.grid.bits)
            tensors["zero_points"] = pack(np.pad(rounded.zero_points, ((0, 0), (0, padding))), self.grid.bits)
        return tensors

    def linear(
        self, op: OpBuilder, x: ir.Value, weight: Values, bias: ir.Value | None, shape: WeightShape, fusion: Fusion
    ) -> tuple[ir.Value, None]:
        product = op.MatMulNBits(
            x, weight["packed"], weight["scales"], weight.get("zero_points"), None, bias,
            N=shape[0], K=shape[1], bits=self.grid.bits, block_size=self.grid.group_size,
            accuracy_level=ACCURACY_LEVELS[self.activations], _domain=MICROSOFT,
        )  # fmt: skip
        return product, None

    def lookup(self, op: OpBuilder, token_ids: ir.Value, weight: Values, shape: WeightShape) -> ir.Value:
        rows = op.GatherBlockQuantized(
            weight["packed"], token_ids, weight["scales"], weight.get("zero_points"),
            bits=self.grid.bits, block_size=self.grid.group_size, gather_axis=0, quantize_axis=1, _domain=MICROSOFT,
        )  # fmt: skip
        if shape[1] % self.grid.group_size == 0:
            return rows
        return op.Slice(rows, [0], [shape[1]], [1])  # the padding of the last group

    @property
    def in_experts(self) -> Mapping[str, int | str]:
        return {}

    @property
    def record(self) -> Quantization:
        return int_record(self.grid, self.activations, "stock", ROWS)


@dataclass(frozen=True)
class NativeInt:
    """A grid as the plugin's ``QuantLinear`` and ``QuantEmbedding`` read it: panels, see ``qwen_plugin/layout.py``.

    Scales are rounded to what a panel holds before q is computed. ``activations`` "int8" rounds each input row to
    int8 before it is multiplied; "int8x2" to about 15 bits. ``activation_scales``: each "group" of a row has a scale
    of its own, a "block" of 128 columns has one, a row ("token"), or the linear has a constant one ("static"), which
    comes from calibration. Blocks are for less than 8 bits in groups of 32 or 64 alone, and make the weight's scales
    small whole multiples of a unit: sums over a block are then exact, in whatever order AMX tiles take them.
    """

    grid: Grid
    activations: str
    activation_scales: str = "group"

    block_rows = PANEL
    fuses = True

    def parts(self, shape: WeightShape) -> dict[str, StoredPart]:
        out_features, in_features = shape
        grid = self.grid
        bytes_each = panel_bytes(in_features, grid.bits, grid.group_size, grid.symmetric, self._blocks)
        return {"panels": StoredPart((-(-out_features // PANEL), bytes_each), ir.DataType.UINT8)}

    def round(self, weight: np.ndarray) -> Rounded:
        """``weight`` (out_features, in_features) float32 on the grid, without calibration.

        Raises:
            OverflowError: a value is larger than the layout can store.
        """
        if not is_searched(self.grid):
            return self._checked(weight, self.grid.round(weight, self.storable))
        return self._checked(weight, round_searched(weight, self.grid, self._blocks, self.storable))

    def round_weighing(self, weight: np.ndarray, importance: np.ndarray) -> Rounded:
        """The same, where a squared error in column k counts ``importance[k]``, float32 (in_features)."""
        return self._checked(weight, round_searched(weight, self.grid, self._blocks, self.storable, importance))

    @staticmethod
    def _checked(weight: np.ndarray, rounded: Rounded) -> Rounded:
        if not np.isfinite(rounded.scales).all():
            largest = float(np.abs(weight).max())
            raise OverflowError(f"{largest:g} is too large for the native layout's float16 scales")
        return rounded

    def storable(self, scales: np.ndarray, zero_points: np.ndarray | None) -> np.ndarray:
        """The nearest scales (out_features, groups) that can be stored beside these zero points."""
        if self._blocks:
            return round_block_scales(scales, self.grid.bits, self.grid.group_size, zero_points)
        return round_scales(scales)

    def quantize(self, weight: np.ndarray | Rounded) -> Tensors:
        return self.store(weight if isinstance(weight, Rounded) else self.round(weight))

    def store(self, rounded: Rounded) -> Tensors:
        """A weight that is on the grid already, as stored.

        Raises:
            OverflowError: the layout cannot hold a scale exactly.
        """
        lost = self.storable(rounded.scales, rounded.zero_points) != rounded.scales
        if lost.any():
            raise OverflowError(f"the native layout's float16 scales cannot hold the scale {rounded.scales[lost][0]:g}")
        q = rounded.q.reshape(len(rounded.q), -1)
        grid = self.grid
        panels = pack_panels(q, rounded.scales, rounded.zero_points, grid.bits, grid.group_size, self._blocks)
        return {"panels": panels}

    def linear(
        self, op: OpBuilder, x: ir.Value, weight: Values, bias: ir.Value | None, shape: WeightShape, fusion: Fusion
    ) -> tuple[ir.Value, ir.Value | None]:
        norm = fusion.norm
        outputs = op.QuantLinear(
            x, weight["panels"], bias, norm.weight if norm else None, fusion.residual,
            fusion.permutation, fusion.input_scale,
            **self._attributes(shape), precision=self.activations, activation_scales=self.activation_scales,
            swiglu=int(fusion.swiglu), **({"epsilon": norm.eps} if norm else {}),
            _domain=PLUGIN_DOMAIN, _outputs=1 + fusion.with_input,
        )  # fmt: skip
        return (outputs[0], outputs[1]) if fusion.with_input else (outputs, None)

    def lookup(self, op: OpBuilder, token_ids: ir.Value, weight: Values, shape: WeightShape) -> ir.Value:
        return op.QuantEmbedding(
            token_ids, weight["panels"], **self._attributes(shape), blocks=int(self._blocks), _domain=PLUGIN_DOMAIN
        )

    def _attributes(self, shape: WeightShape) -> dict[str, int]:
        grid = self.grid
        return {
            "N": shape[0],
            "K": shape[1],
            "bits": grid.bits,
            "group_size": grid.group_size,
            "symmetric": int(grid.symmetric),
        }

    @property
    def in_experts(self) -> Mapping[str, int | str]:
        if self.activation_scales == "static":  # a constant for each expert, which the operator does not take
            return {}
        return {
            "bits": self.grid.bits,
            "group_size": self.grid.group_size,
            "symmetric": int(self.grid.symmetric),
            "precision": self.activations,
            "activation_scales": self.activation_scales,
        }

    @property
    def _blocks(self) -> bool:
        return self.activation_scales == "block"

    @property
    def record(self) -> Quantization:
        return int_record(self.grid, self.activations, "native", PANELS, self.activation_scales)


# the schemes that round to a grid
IntScheme = NativeInt | StockInt


def int_record(
    grid: Grid, activations: str, kernels: str, layout: str, activation_scales: str = "group"
) -> Quantization:
    return Quantization(
        f"int{grid.bits}", grid.bits, grid.group_size, grid.symmetric, activations, kernels, layout,
        grid.weight_scales, activation_scales, "rtn",
    )  # fmt: skip


def dequantize(scheme: Scheme, tensors: Tensors, shape: WeightShape) -> np.ndarray:
    """The float32 weight (out_features, in_features) that an engine computes with, from what ``scheme`` stored."""
    return read_rows(scheme.record, shape, tensors, 0, shape[0])
