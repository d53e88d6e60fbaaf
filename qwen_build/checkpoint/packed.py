"""Linears that a checkpoint stores as small integers already: GPTQ and AWQ, read without losing a bit.

A packed linear has ``32 / bits`` integers in each int32 of ``qweight`` and ``qzeros``, the first in the lowest bits,
and one of ``scales`` for each output and group of inputs; a weight is (q - zero point) * scale. The formats differ in
what lies along which axis, in the order within an int32 and in the zero point, see :data:`FORMATS`. Their definition
is the code that unpacks them: ``qlinear`` of AutoGPTQ and GPTQModel, ``gemm`` of AutoAWQ.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import numpy as np

from qwen_build.checkpoint.safetensors import Checkpoint
from qwen_build.quantization.grid import Grid, Rounded
from qwen_engine.errors import CheckpointError, UnsupportedModel
from qwen_plugin.layout import GROUP_SIZES
from qwen_run.engine_files.stored_rows import unpack

Shape = tuple[int, ...]

WORD_BITS = 32


@dataclass(frozen=True)
class FormatRow:
    """What one ``quant_method`` and version of it has, and another has not.

    Attributes:
        bits: the sizes of integers it comes in.
        along_inputs: whether an int32 of ``qweight`` holds inputs of one output, or outputs of one input.
        order: the place within an int32 of qweight or qzeros where output 0, 1, ... of its outputs lies, at 4 bits.
        zero_offset: what is added to a stored zero point.
        has_order: whether ``g_idx`` tells the group of each input, so that a group's inputs may lie anywhere.
    """

    bits: tuple[int, ...]
    along_inputs: bool
    order: tuple[int, ...]
    zero_offset: int
    has_order: bool


IN_ORDER = (0, 1, 2, 3, 4, 5, 6, 7)

# (quant_method, version) -> its row; the names of the versions are those of quantization_config
FORMATS = {
    ("gptq", "gptq"): FormatRow((4, 8), along_inputs=True, order=IN_ORDER, zero_offset=1, has_order=True),
    ("gptq", "gptq_v2"): FormatRow((4, 8), along_inputs=True, order=IN_ORDER, zero_offset=0, has_order=True),
    ("awq", "gemm"): FormatRow(
        (4,), along_inputs=False, order=(0, 4, 1, 5, 2, 6, 3, 7), zero_offset=0, has_order=False
    ),
}

# quant_method -> (the keys that name its version, the version where none does)
VERSION_KEYS = {"gptq": (("checkpoint_format", "format"), "gptq"), "awq": (("version", "format"), "gemm")}


@dataclass(frozen=True)
class PackedFormat:
    """How the packed linears of one checkpoint are stored. ``group_size`` -1: all inputs are one group."""

    method: str
    version: str
    bits: int
    group_size: int
    symmetric: bool

    @classmethod
    def from_json(cls, config: Any) -> PackedFormat:
        """Read ``quantization_config`` of a config.json.

        Raises:
            UnsupportedModel: it asks for something that :data:`FORMATS` has not.
        """
        if not isinstance(config, dict):
            raise CheckpointError(f"config.json: quantization_config is {config!r}, expected an object")
        method = config.get("quant_method")
        if not isinstance(method, str) or method not in VERSION_KEYS:
            raise UnsupportedModel(
                f"the checkpoint is already quantised ({method}), only {' and '.join(VERSION_KEYS)} can be read; "
                "give the float checkpoint"
            )
        keys, default = VERSION_KEYS[method]
        version = next((config[key] for key in keys if config.get(key) is not None), default)
        version = version.lower() if isinstance(version, str) else version
        if config.get("backend") == "llm-awq":  # whose files say gemm and are not
            version = "llm-awq"
        versions = [name for owner, name in FORMATS if owner == method]
        bits, group_size = config.get("bits", config.get("w_bit")), config.get("group_size", config.get("q_group_size"))
        if version not in versions:
            raise _unsupported(method, "version", version, versions)
        if type(bits) is not int or bits not in FORMATS[method, version].bits:
            raise _unsupported(method, "bits", bits, FORMATS[method, version].bits)
        if type(group_size) is not int or (group_size != -1 and (group_size < 1 or group_size % GROUP_SIZES[0])):
            raise _unsupported(method, "group_size", group_size, ("multiples of 32", -1))
        for key, value in (("is_marlin_format", False), ("pack_dtype", "int32")):
            if config.get(key, value) != value:
                raise _unsupported(method, key, config[key], (value,))
        _check_dynamic(config, {"bits": bits, "group_size": group_size})
        return cls(method, version, bits, group_size, symmetric=_says_symmetric(config))

    def as_stored(self, checkpoint: Checkpoint) -> tuple[PackedFormat, tuple[str, ...]]:
        """The format that the zero points of ``checkpoint`` have, and what of its config they contradict.

        Some programs label zero points that are stored as they are (``gptq_v2``) as stored less one (``gptq``). Read
        so, those of a symmetric grid would all be one too large, and no program makes such a grid.
        """
        notes, found = [], self
        if (self.method, self.version) == ("gptq", "gptq") and found._all_zero_points(checkpoint, self.grid.middle):
            found = dataclasses.replace(found, version="gptq_v2")
            middle = self.grid.middle
            notes.append(f"all zero points are stored as {middle}: read as gptq_v2's, though config.json says gptq.")
        if self.symmetric and not found._all_zero_points(checkpoint, self.grid.middle - found.row.zero_offset):
            found = dataclasses.replace(found, symmetric=False)
            notes.append("config.json says that the grid is symmetric; the zero points differ, and count.")
        return found, tuple(notes)

    def _all_zero_points(self, checkpoint: Checkpoint, value: int) -> bool:
        """Whether every linear has zero points, and all of them are stored as ``value``."""
        names = [name for name in checkpoint.tensors if name.endswith(".qzeros")]
        checkpoint.check_readable(names)
        return bool(names) and all(
            (integers(checkpoint.read_columns(name), self.bits) == value).all() for name in names
        )

    @property
    def quant(self) -> str:
        """The name of the grid among the choices of ``--quant``."""
        return f"int{self.bits}"

    @property
    def row(self) -> FormatRow:
        return FORMATS[self.method, self.version]

    @property
    def grid(self) -> Grid:
        """The grid of our own that holds the same values: larger groups are several with the same scale."""
        size = GROUP_SIZES[-1] if self.group_size == -1 else self.group_size
        return Grid(self.bits, max(own for own in GROUP_SIZES if size % own == 0), self.symmetric)

    @property
    def per_word(self) -> int:
        return WORD_BITS // self.bits

    def groups(self, in_features: int) -> int:
        return 1 if self.group_size == -1 else -(-in_features // self.group_size)

    def tensors(self, linear: str, out_features: int, in_features: int) -> tuple[tuple[str, Shape], ...]:
        """Names and shapes of what stores ``linear``.

        Raises:
            UnsupportedModel: its integers do not fill whole int32.
        """
        packed = in_features if self.row.along_inputs else out_features
        if packed % self.per_word or out_features % self.per_word:
            raise UnsupportedModel(
                f"{linear}: {out_features} outputs and {in_features} inputs do not fill whole int32 of "
                f"{self.per_word} integers; give the float checkpoint"
            )
        words, groups = out_features // self.per_word, self.groups(in_features)
        along_inputs = (in_features // self.per_word, out_features)
        return (
            (f"{linear}.qweight", along_inputs if self.row.along_inputs else (in_features, words)),
            (f"{linear}.qzeros", (groups, words)),
            (f"{linear}.scales", (groups, out_features)),
            *([(f"{linear}.g_idx", (in_features,))] if self.row.has_order else []),
        )


@dataclass(frozen=True)
class PackedSource:
    """The packed linears whose outputs, one linear after the other, are the rows of a graph weight.

    Attributes:
        linears: name and outputs of each; with ``g_idx``, all have the same.
    """

    format: PackedFormat
    linears: tuple[tuple[str, int], ...]
    in_features: int

    @property
    def shapes(self) -> tuple[tuple[str, Shape], ...]:
        """The tensors of the checkpoint that are read."""
        return tuple(pair for name, rows in self.linears for pair in self.format.tensors(name, rows, self.in_features))

    def read(self, checkpoint: Checkpoint, start: int, stop: int) -> Rounded:
        """Outputs [start, stop) on ``format.grid``, the inputs in the order of :func:`column_order`.

        Raises:
            UnsupportedModel: a zero point is outside the grid.
        """
        pieces = []
        for name, rows in self.linears:
            if start < rows and stop > 0:
                pieces.append(self._read_one(checkpoint, name, max(start, 0), min(stop, rows)))
            start, stop = start - rows, stop - rows
        q, scales, zero_points = (np.concatenate(parts) for parts in zip(*pieces, strict=True))
        return Rounded(q, scales, None if self.format.symmetric else zero_points)

    def _read_one(
        self, checkpoint: Checkpoint, name: str, start: int, stop: int
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """q, scales and zero points of a grid, see :class:`Rounded`."""
        row, per_word, grid = self.format.row, self.format.per_word, self.format.grid
        words = slice(start // per_word, -(-stop // per_word))
        first = start - words.start * per_word

        stored = checkpoint.read_columns(f"{name}.qzeros", words.start, words.stop)
        zero_points = self._outputs(stored)[:, first : first + stop - start].T  # (outputs, groups)
        zero_points = self._zero_points(name, zero_points)
        scales = checkpoint.read_columns(f"{name}.scales", start, stop).T

        if row.along_inputs:
            packed = checkpoint.read_columns(f"{name}.qweight", start, stop)  # (inputs / per_word, outputs)
            q = integers(packed, self.format.bits).swapaxes(0, 1).reshape(stop - start, -1)
        else:
            packed = checkpoint.read_columns(f"{name}.qweight", words.start, words.stop)  # (inputs, outputs / per_word)
            q = self._outputs(packed)[:, first : first + stop - start].T
        if (order := column_order(self.format, checkpoint, name)) is not None:
            q = q[:, order]

        groups = -(-self.in_features // grid.group_size)
        repeats = groups if self.format.group_size == -1 else self.format.group_size // grid.group_size
        scales, zero_points = (part.repeat(repeats, axis=1)[:, :groups] for part in (scales, zero_points))
        filling = zero_points[:, -1:].repeat(groups * grid.group_size - self.in_features, axis=1)
        return np.concatenate([q, filling], axis=1).reshape(-1, groups, grid.group_size), scales, zero_points

    def _outputs(self, packed: np.ndarray) -> np.ndarray:
        """Integers of an int32 matrix (rows, outputs / per_word) that holds outputs side by side: (rows, outputs)."""
        values = integers(packed, self.format.bits)
        if self.format.bits == 4:
            values = values[..., list(self.format.row.order)]
        return values.reshape(len(packed), -1)

    def _zero_points(self, name: str, stored: np.ndarray) -> np.ndarray:
        grid, offset = self.format.grid, self.format.row.zero_offset
        if offset and (stored == grid.most).any():
            raise UnsupportedModel(
                f"{name}.qzeros has {grid.most}, which some programs read as zero point {grid.most + 1} and some as 0; "
                "give a checkpoint in gptq_v2 format, or the float one"
            )
        zero_points = stored + np.uint8(offset)
        assert not self.format.symmetric or (zero_points == grid.middle).all(), "not the format of as_stored"
        return zero_points


def integers(packed: np.ndarray, bits: int) -> np.ndarray:
    """The unsigned integers in each int32 of a matrix, lowest bits first, (rows, columns, 32 / bits) uint8.

    >>> integers(np.array([[0x76543210]], np.int32), bits=4).tolist()
    [[[0, 1, 2, 3, 4, 5, 6, 7]]]
    """
    return unpack(np.ascontiguousarray(packed, "<i4")[..., None].view(np.uint8), bits)


def column_order(packed: PackedFormat, checkpoint: Checkpoint, linear: str) -> np.ndarray | None:
    """The inputs of ``linear`` sorted by group, int32 (in_features); None where they lie so.

    Raises:
        CheckpointError: the checkpoint lacks g_idx.
        UnsupportedModel: a group has not as many inputs as the config says.
    """
    if not packed.row.has_order or packed.group_size == -1:
        return None
    name = f"{linear}.g_idx"
    if name not in checkpoint.tensors:
        raise CheckpointError(f"the checkpoint lacks {name}; download it again")
    group_of = checkpoint.read_columns(name)[0]
    order = np.argsort(group_of, kind="stable").astype(np.int32)
    if not np.array_equal(group_of[order], np.arange(len(order)) // packed.group_size):
        raise UnsupportedModel(f"{name} has not {packed.group_size} inputs in every group; give the float checkpoint")
    return None if np.array_equal(order, np.arange(len(order))) else order


def is_packed(checkpoint: Checkpoint, linear: str) -> bool:
    return f"{linear}.qweight" in checkpoint.tensors


def read_linear(
    checkpoint: Checkpoint,
    packed: PackedFormat | None,
    linear: str,
    shape: tuple[int, int],
    start: int = 0,
    stop: int | None = None,
) -> np.ndarray:
    """Rows [start, stop) of the weight of ``linear``, float32, whether the checkpoint has it ``packed`` or not.

    Args:
        shape: (out_features, in_features) of the whole weight.
        stop: all rows if None.
    """
    stop = shape[0] if stop is None else stop
    if not is_packed(checkpoint, linear):
        return checkpoint.read(f"{linear}.weight", start, stop)
    assert packed is not None
    rounded = PackedSource(packed, ((linear, shape[0]),), shape[1]).read(checkpoint, start, stop)
    weight = packed.grid.values(rounded, shape[1])
    order = column_order(packed, checkpoint, linear)
    return weight if order is None else weight[:, np.argsort(order)]


def _says_symmetric(config: dict[str, Any]) -> bool:
    if config["quant_method"] == "awq":
        return config.get("zero_point") is False
    return config.get("sym") is True


def _check_dynamic(config: dict[str, Any], common: dict[str, int]) -> None:
    """Refuse linears that GPTQModel's ``dynamic`` stores otherwise; what it leaves float is seen in the weights."""
    dynamic = config.get("dynamic") or {}
    if not isinstance(dynamic, dict):
        raise CheckpointError(f"config.json: dynamic of quantization_config is {dynamic!r}, expected an object")
    for pattern, own in dynamic.items():
        for key, value in common.items():
            if not pattern.startswith("-:") and isinstance(own, dict) and own.get(key, value) != value:
                raise UnsupportedModel(
                    f"quantization_config of {config['quant_method']} has dynamic: {key} {own[key]} for {pattern!r}, "
                    f"{value} for the others; give a checkpoint that has the same for all, or the float one"
                )


def _unsupported(method: str, key: str, found: object, expected: Any) -> UnsupportedModel:
    return UnsupportedModel(
        f"quantization_config of {method} has {key} {found!r}, expected {' or '.join(map(str, expected))}; "
        "give the float checkpoint"
    )
