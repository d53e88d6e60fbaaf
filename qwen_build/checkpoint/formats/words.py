"""Linears as small integers in words of 32 bits: GPTQ, AWQ and AutoRound, read without losing a bit.

A packed linear has ``32 / bits`` integers in each int32 of ``qweight`` and ``qzeros``, the first in the lowest bits,
and one of ``scales`` for each output and group of inputs; a weight is (q - zero point) * scale. The formats differ in
what lies along which axis, in the order within an int32 and in the zero point, see :data:`LAYOUTS`. Their definition
is the code that unpacks them: ``qlinear`` of AutoGPTQ, GPTQModel and AutoRound, ``gemm`` of AutoAWQ.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from qwen_build.checkpoint.patterns import expect_object, matches
from qwen_build.checkpoint.safetensors import Safetensors
from qwen_build.checkpoint.safetensors_file import STORAGE
from qwen_build.checkpoint.stored import Found, PackedWeight, Shape
from qwen_build.quantization.grid import Grid, Rounded
from qwen_engine.errors import CheckpointError, UnsupportedModel, WeightMismatch
from qwen_plugin.layout import GROUP_SIZES
from qwen_run.engine_files.stored_rows import unpack

WORD_BITS = 32
FLOAT_BITS = 16  # from here on "bits" of a config mean that a linear is left float


@dataclass(frozen=True)
class WordLayout:
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


IN_ORDER, AWQ_ORDER = (0, 1, 2, 3, 4, 5, 6, 7), (0, 4, 1, 5, 2, 6, 3, 7)

# (quant_method, version) -> its row; the names of the versions are those of quantization_config
LAYOUTS = {
    ("gptq", "gptq"): WordLayout((4, 8), along_inputs=True, order=IN_ORDER, zero_offset=1, has_order=True),
    ("gptq", "gptq_v2"): WordLayout((4, 8), along_inputs=True, order=IN_ORDER, zero_offset=0, has_order=True),
    ("awq", "gemm"): WordLayout((4,), along_inputs=False, order=AWQ_ORDER, zero_offset=0, has_order=False),
    ("auto-round", "auto_round"): WordLayout((4, 8), True, IN_ORDER, zero_offset=0, has_order=False),
    ("auto-round", "auto_round:auto_gptq"): WordLayout((4, 8), True, IN_ORDER, zero_offset=1, has_order=False),
    ("auto-round", "auto_round:gptqmodel"): WordLayout((4, 8), True, IN_ORDER, zero_offset=1, has_order=False),
    ("auto-round", "auto_round:auto_awq"): WordLayout((4,), False, AWQ_ORDER, zero_offset=0, has_order=False),
}

# quant_method -> (the keys that name its version, the version where none does)
VERSION_KEYS = {
    "gptq": (("checkpoint_format", "format"), "gptq"),
    "awq": (("version", "format"), "gemm"),
    "auto-round": (("packing_format",), "auto_round:auto_gptq"),
}


@dataclass(frozen=True)
class WordFormat:
    """How the packed linears of one checkpoint are stored. ``group_size`` -1: all inputs are one group."""

    method: str
    version: str
    bits: int
    group_size: int
    symmetric: bool

    @classmethod
    def from_json(cls, config: Mapping[str, Any]) -> WordFormat:
        """Read ``quantization_config`` of a config.json, whose ``quant_method`` is one of ``VERSION_KEYS``.

        Raises:
            UnsupportedModel: it asks for something that :data:`LAYOUTS` has not.
        """
        method = config["quant_method"]
        keys, default = VERSION_KEYS[method]
        version = next((config[key] for key in keys if config.get(key) is not None), default)
        version = version.lower() if isinstance(version, str) else version
        if config.get("backend") == "llm-awq":  # whose files say gemm and are not
            version = "llm-awq"
        versions = [name for owner, name in LAYOUTS if owner == method]
        bits, group_size = config.get("bits", config.get("w_bit")), config.get("group_size", config.get("q_group_size"))
        if version not in versions:
            raise _unsupported(method, "version", version, versions)
        if type(bits) is not int or bits not in LAYOUTS[method, version].bits:
            raise _unsupported(method, "bits", bits, LAYOUTS[method, version].bits)
        if type(group_size) is not int or (group_size != -1 and (group_size < 1 or group_size % GROUP_SIZES[0])):
            raise _unsupported(method, "group_size", group_size, ("multiples of 32", -1))
        for key, value in (("is_marlin_format", False), ("pack_dtype", "int32"), ("data_type", "int")):
            if config.get(key, value) != value:
                raise _unsupported(method, key, config[key], (value,))
        return cls(method, version, bits, group_size, symmetric=_says_symmetric(config))

    @property
    def quant(self) -> str:
        """The name of the grid among the choices of ``--quant``."""
        return f"int{self.bits}"

    @property
    def row(self) -> WordLayout:
        return LAYOUTS[self.method, self.version]

    @property
    def grid(self) -> Grid:
        """The grid of our own that holds the same values: larger groups are several with the same scale."""
        size = GROUP_SIZES[-1] if self.group_size == -1 else self.group_size
        return Grid(self.bits, max(own for own in GROUP_SIZES if size % own == 0), self.symmetric)

    @property
    def per_word(self) -> int:
        return WORD_BITS // self.bits

    def shape_of(self, files: Safetensors, linear: str) -> tuple[int, int]:
        """(out_features, in_features) of ``linear``, as its ``qweight`` has them."""
        found = files.tensors[f"{linear}.qweight"].shape
        if len(found) != 2 or 0 in found:
            raise CheckpointError(f"{linear}.qweight has shape {found}, expected a matrix; download it again")
        return (found[1], found[0] * self.per_word) if self.row.along_inputs else (found[1] * self.per_word, found[0])

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
class WordWeight(PackedWeight):
    """The weight of a linear in words; ``linear`` is its name without ``.weight``."""

    linear: str
    shape: Shape
    format: WordFormat
    files: Safetensors

    @property
    def name(self) -> str:  # type: ignore[override]
        return f"{self.linear}.weight"

    @property
    def dtype(self) -> str:  # type: ignore[override]
        return f"{self.format.method} {self.format.quant}"

    @property
    def grid(self) -> Grid:
        return self.format.grid

    @cached_property
    def order(self) -> np.ndarray | None:
        """See :attr:`PackedWeight.order`.

        Raises:
            UnsupportedModel: a group has not as many inputs as the config says.
        """
        if not self.format.row.has_order or self.format.group_size == -1:
            return None
        group_of = self.files.read_columns(f"{self.linear}.g_idx")[0]
        return sorted_by_group(f"{self.linear}.g_idx", group_of, self.format.group_size)

    def rounded(self, start: int, stop: int) -> Rounded:
        """See :meth:`PackedWeight.rounded`.

        Raises:
            UnsupportedModel: a zero point is outside the grid.
        """
        row, per_word, grid = self.format.row, self.format.per_word, self.format.grid
        words = slice(start // per_word, -(-stop // per_word))
        first = start - words.start * per_word

        stored = self.files.read_columns(f"{self.linear}.qzeros", words.start, words.stop)
        zero_points = self._zero_points(self._outputs(stored)[:, first : first + stop - start].T)  # (outputs, groups)
        scales = self.files.read_columns(f"{self.linear}.scales", start, stop).T
        if row.along_inputs:
            packed = self.files.read_columns(f"{self.linear}.qweight", start, stop)  # (inputs / per_word, outputs)
            q = integers(packed, self.format.bits).swapaxes(0, 1).reshape(stop - start, -1)
        else:  # (inputs, outputs / per_word)
            packed = self.files.read_columns(f"{self.linear}.qweight", words.start, words.stop)
            q = self._outputs(packed)[:, first : first + stop - start].T
        if self.order is not None:
            q = q[:, self.order]

        in_features = self.shape[1]
        groups = -(-in_features // grid.group_size)
        repeats = groups if self.format.group_size == -1 else self.format.group_size // grid.group_size
        scales, zero_points = (part.repeat(repeats, axis=1)[:, :groups] for part in (scales, zero_points))
        filling = zero_points[:, -1:].repeat(groups * grid.group_size - in_features, axis=1)
        grouped = np.concatenate([q, filling], axis=1).reshape(-1, groups, grid.group_size)
        return Rounded(grouped, scales, None if self.format.symmetric else zero_points)

    def _outputs(self, packed: np.ndarray) -> np.ndarray:
        """Integers of an int32 matrix (rows, outputs / per_word) that holds outputs side by side: (rows, outputs)."""
        values = integers(packed, self.format.bits)
        if self.format.bits == 4:
            values = values[..., list(self.format.row.order)]
        return values.reshape(len(packed), -1)

    def _zero_points(self, stored: np.ndarray) -> np.ndarray:
        grid, offset = self.format.grid, self.format.row.zero_offset
        if offset and (stored == grid.most).any():
            raise UnsupportedModel(
                f"{self.linear}.qzeros has {grid.most}, which some programs read as zero point {grid.most + 1} and "
                "some as 0; give a checkpoint in gptq_v2 format, or the float one"
            )
        zero_points = stored + np.uint8(offset)
        assert not self.format.symmetric or (zero_points == grid.middle).all(), "not the format that was found"
        return zero_points


def find_words(config: Mapping[str, Any], files: Safetensors) -> Found:
    """The linears that ``files`` store in words, as ``quantization_config`` says.

    Raises:
        UnsupportedModel: it asks for what is not read.
        WeightMismatch: tensors of a linear are missing, or of another shape or type.
    """
    common = WordFormat.from_json(config)
    linears = sorted(name.removesuffix(".qweight") for name in files.tensors if name.endswith(".qweight"))
    formats = {linear: dataclasses.replace(common, **_own(config, common, linear)) for linear in linears}
    shapes = {linear: one.shape_of(files, linear) for linear, one in formats.items()}
    if complaints := [fault for name in linears for fault in _faults(name, formats[name], shapes[name], files)]:
        raise WeightMismatch(f"{'; '.join(complaints)}; download or save the checkpoint again")
    formats, notes = _as_stored(formats, files)
    weights = {f"{name}.weight": WordWeight(name, shapes[name], formats[name], files) for name in linears}
    parts = {part for name in linears for part, _ in formats[name].tensors(name, *shapes[name])}
    return Found(weights, frozenset(parts), notes)


def _own(config: Mapping[str, Any], common: WordFormat, linear: str) -> dict[str, Any]:
    """What of ``common`` is otherwise in one linear: the first pattern of GPTQModel's ``dynamic`` that matches its name
    says so, or AutoRound's ``extra_config``.

    Raises:
        UnsupportedModel: it says what :data:`LAYOUTS` has not.
    """
    rules = expect_object(config, "extra_config" if common.method == "auto-round" else "dynamic")
    for pattern, own in rules.items():
        if not (pattern == linear or matches(pattern.removeprefix("+:").removeprefix("-:"), linear)):
            continue
        own = own if isinstance(own, dict) and not pattern.startswith("-:") else {}
        bits = own.get("bits")
        if type(bits) is int and bits >= FLOAT_BITS:
            return {}  # and yet it is packed, as the others are
        given = {key: own[key] for key in ("bits", "group_size", "sym", "zero_point") if own.get(key) is not None}
        try:
            found = WordFormat.from_json({**config, **given})
        except UnsupportedModel as error:
            raise UnsupportedModel(f"{linear}: {pattern!r} of quantization_config: {error}") from error
        return {"bits": found.bits, "group_size": found.group_size, "symmetric": found.symmetric}
    return {}


def _faults(linear: str, words: WordFormat, shape: tuple[int, int], files: Safetensors) -> Iterator[str]:
    """What of the tensors of ``linear`` is not as ``words`` has it."""
    for name, expected in words.tensors(linear, *shape):
        info = files.tensors.get(name)
        kinds = tuple(STORAGE) if name.endswith(".scales") else ("I32",)
        if info is None:
            yield f"the checkpoint lacks {name}"
        elif info.shape != expected or info.dtype not in kinds:
            yield f"{name} is {info.dtype} {info.shape}, expected {' or '.join(kinds)} {expected}"


def _as_stored(formats: Mapping[str, WordFormat], files: Safetensors) -> tuple[dict[str, WordFormat], tuple[str, ...]]:
    """``formats`` as the zero points of ``files`` have them, and what of the config they contradict.

    Some programs label zero points that are stored as they are (``gptq_v2``) as stored less one (``gptq``). Read so,
    those of a symmetric grid would all be one too large, and no program makes such a grid.
    """

    def all_are(value: Mapping[str, int]) -> bool:
        return bool(value) and all(
            (integers(files.read_columns(f"{name}.qzeros"), formats[name].bits) == zero).all()
            for name, zero in value.items()
        )

    found, notes = dict(formats), []
    v1 = {name: one.grid.middle for name, one in found.items() if (one.method, one.version) == ("gptq", "gptq")}
    if all_are(v1):
        found |= {name: dataclasses.replace(found[name], version="gptq_v2") for name in v1}
        middles = " and ".join(map(str, sorted(set(v1.values()))))
        notes.append(f"all zero points are stored as {middles}: read as gptq_v2's, though config.json says gptq.")
    middle = {name: one.grid.middle - one.row.zero_offset for name, one in found.items() if one.symmetric}
    if middle and not all_are(middle):
        found |= {name: dataclasses.replace(found[name], symmetric=False) for name in middle}
        notes.append("config.json says that the grid is symmetric; the zero points differ, and count.")
    return found, tuple(notes)


def integers(packed: np.ndarray, bits: int) -> np.ndarray:
    """The unsigned integers in each int32 of a matrix, lowest bits first, (rows, columns, 32 / bits) uint8.

    >>> integers(np.array([[0x76543210]], np.int32), bits=4).tolist()
    [[[0, 1, 2, 3, 4, 5, 6, 7]]]
    """
    return unpack(np.ascontiguousarray(packed, "<i4")[..., None].view(np.uint8), bits)


def sorted_by_group(name: str, group_of: np.ndarray, size: int) -> np.ndarray | None:
    """The inputs in the order of their groups, int32; None where they lie so. ``group_of`` is the tensor ``name``.

    Raises:
        UnsupportedModel: a group has not ``size`` inputs.
    """
    order = np.argsort(group_of, kind="stable").astype(np.int32)
    if not np.array_equal(group_of[order], np.arange(len(order)) // size):
        raise UnsupportedModel(f"{name} has not {size} inputs in every group; give the float checkpoint")
    return None if np.array_equal(order, np.arange(len(order))) else order


def _says_symmetric(config: Mapping[str, Any]) -> bool:
    if config["quant_method"] == "awq":
        return config.get("zero_point") is False
    return config.get("sym") is True


def _unsupported(method: str, key: str, found: object, expected: Any) -> UnsupportedModel:
    return UnsupportedModel(
        f"quantization_config of {method} has {key} {found!r}, expected {' or '.join(map(str, expected))}; "
        "give the float checkpoint"
    )
