"""compressed-tensors, the format of llm-compressor: integers in words, integers in bytes, FP8.

``config_groups`` say of which linears the numbers are what. Their definition is the code of ``compressed_tensors``:
``pack_to_int32`` adds half of the range to a signed integer and puts the first into the lowest bits of a word, along
the inputs of a weight and along the outputs of its zero points.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from qwen_build.checkpoint.formats.scaled import FP8, ScaledWeight, input_notes, scale_parts, scaled_weight
from qwen_build.checkpoint.formats.words import WORD_BITS, integers, sorted_by_group
from qwen_build.checkpoint.patterns import expect_names, expect_object, matches
from qwen_build.checkpoint.safetensors import Safetensors
from qwen_build.checkpoint.safetensors_file import STORAGE
from qwen_build.checkpoint.stored import Found, PackedWeight, Shape, StoredWeight, storable_scales
from qwen_build.quantization.grid import Grid, Rounded
from qwen_engine.errors import CheckpointError, UnsupportedModel, WeightMismatch
from qwen_plugin.layout import GROUP_SIZES

METHOD = "compressed-tensors"
LAYOUTS = ("dense", "pack-quantized", "int-quantized", "float-quantized", "naive-quantized", "mixed-precision")
STRATEGIES = ("tensor", "channel", "group", "block")
PACKED, INTEGER = "weight_packed", "I8"
PARTS = ("weight_packed", "weight_scale", "weight_zero_point", "weight_shape", "weight_g_idx")


@dataclass(frozen=True)
class WeightGroup:
    """What one of ``config_groups`` says of the weights of its linears.

    Attributes:
        group_size: inputs that share a scale; None: all of an output, or of the whole weight.
        block: rows and columns that share a scale, of FP8; None: no such blocks.
        rounds_inputs: whether inputs are rounded to 8 bits as well.
    """

    bits: int
    symmetric: bool
    group_size: int | None
    block: tuple[int, int] | None
    rounds_inputs: bool


@dataclass(frozen=True)
class IntegerWeight(PackedWeight):
    """Integers of one linear: in words (``weight_packed``), or in bytes with a sign (``weight``)."""

    linear: str
    shape: Shape
    group: WeightGroup
    files: Safetensors
    in_words: bool

    @property
    def name(self) -> str:  # type: ignore[override]
        return f"{self.linear}.weight"

    @property
    def dtype(self) -> str:  # type: ignore[override]
        return f"{METHOD} int{self.group.bits}"

    @property
    def activation_scales(self) -> str | None:  # type: ignore[override]
        return "token" if self.group.rounds_inputs else None

    @property
    def grid(self) -> Grid:
        symmetric = self._part("weight_zero_point") not in self.files.tensors
        if self.group.group_size is None:
            size = max((own for own in GROUP_SIZES if self.shape[1] % own == 0), default=GROUP_SIZES[0])
        else:
            size = max(own for own in GROUP_SIZES if self.group.group_size % own == 0)
        channel = symmetric and self.group.rounds_inputs and self.group.group_size is None
        return Grid(self.group.bits, size, symmetric, "channel" if channel else "group")

    @cached_property
    def order(self) -> np.ndarray | None:
        name = self._part("weight_g_idx")
        if name not in self.files.tensors or self.group.group_size is None:
            return None
        group_of = self.files.read_columns(name)[0]
        if (group_of < 0).all():
            return None
        return sorted_by_group(name, group_of, self.group.group_size)

    @cached_property
    def exact(self) -> bool:
        return not storable_scales(self.scales(0, self.shape[0]))[1]

    def rounded(self, start: int, stop: int) -> Rounded:
        columns, grid = self.shape[1], self.grid
        if self.in_words:
            words = self.files.read_rows(self._part(PACKED), start, stop)
            q = integers(words, self.group.bits).reshape(stop - start, -1)[:, :columns]
        else:
            q = self.files.read_rows(self.name, start, stop).view(np.uint8) + np.uint8(128)
        if self.order is not None:
            q = q[:, self.order]
        groups = -(-columns // grid.group_size)
        repeats = groups if self.group.group_size is None else self.group.group_size // grid.group_size

        def by_group(values: np.ndarray) -> np.ndarray:
            """Numbers of each scale, as many as the grid has groups."""
            rows = values.repeat(stop - start, axis=0) if len(values) < stop - start else values
            return rows.repeat(repeats, axis=1)[:, :groups]

        scales, _ = storable_scales(self.scales(start, stop))
        zero_points = None if grid.symmetric else by_group(self._zero_points(start, stop))
        middle = grid.middle if zero_points is None else zero_points[:, -1:]
        filling = np.broadcast_to(np.asarray(middle, np.uint8), (stop - start, groups * grid.group_size - columns))
        grouped = np.concatenate([q, filling], axis=1).reshape(-1, groups, grid.group_size)
        return Rounded(grouped, np.ascontiguousarray(by_group(scales)), zero_points)

    def scales(self, start: int, stop: int) -> np.ndarray:
        """Scales of rows [start, stop), float32 (rows, groups); one row where all rows have the same."""
        name = self._part("weight_scale")
        shape = self.files.tensors[name].shape
        if len(shape) == 2 and shape[0] == self.shape[0]:
            return self.files.read(name, start, stop)
        return self.files.read(name, 0, shape[0] if shape else 1).reshape(1, 1)

    def _zero_points(self, start: int, stop: int) -> np.ndarray:
        name = self._part("weight_zero_point")
        if not self.in_words:
            return self.files.read_rows(name, start, stop).view(np.uint8) + np.uint8(128)
        per_word = WORD_BITS // self.group.bits
        first = start // per_word
        words = self.files.read_rows(name, first, -(-stop // per_word))  # (outputs / per_word, groups)
        points = integers(words, self.group.bits).swapaxes(1, 2).reshape(-1, words.shape[1])
        return points[start - first * per_word :][: stop - start]

    def _part(self, suffix: str) -> str:
        return f"{self.linear}.{suffix}"


def find_compressed(config: Mapping[str, Any], files: Safetensors) -> Found:
    """The linears that ``files`` store as compressed-tensors does.

    Raises:
        UnsupportedModel: ``quantization_config`` has what is not read.
        WeightMismatch: tensors of a linear are missing, or of another shape or type.
    """
    groups = _read_groups(config)
    ignored = expect_names(config, "ignore")
    words = [name.removesuffix(f".{PACKED}") for name in files.tensors if name.endswith(f".{PACKED}")]
    in_bytes = [
        name for name, info in files.tensors.items() if name.endswith(".weight") and info.dtype in (INTEGER, FP8)
    ]
    weights: dict[str, StoredWeight] = {}
    faults: list[str] = []
    for linear in sorted([*words, *(name.removesuffix(".weight") for name in in_bytes)]):
        group = _group_of(linear, groups)
        if group is None:
            listed = (
                "ignore lists it" if any(_targets(one, linear) for one in ignored) else "no config_groups target it"
            )
            faults.append(f"{linear} is quantised, and {listed}")
            continue
        found = _weight(files, linear, group, linear in words)
        if isinstance(found, str):
            faults.append(found)
        else:
            weights[f"{linear}.weight"] = found
    if faults:
        raise WeightMismatch(f"{'; '.join(faults)}; download or save the checkpoint again")
    parts = {
        part for name in weights for suffix in PARTS if (part := name.removesuffix("weight") + suffix) in files.tensors
    }
    names = list(weights)
    return Found(
        weights, frozenset([*parts, *scale_parts(files, names)]), (*input_notes(files, names), *_notes(weights))
    )


def _notes(weights: Mapping[str, StoredWeight]) -> Iterator[str]:
    """A sentence where scales are not to the last bit what the checkpoint has."""
    if lost := [name for name, one in weights.items() if isinstance(one, IntegerWeight) and not one.exact]:
        yield f"{lost[0]} and {len(lost) - 1} more have scales that float16 does not hold: they are rounded to it."


def _weight(files: Safetensors, linear: str, group: WeightGroup, in_words: bool) -> StoredWeight | str:
    """The weight of ``linear``, or what is wrong with its tensors."""
    if not in_words and files.tensors[f"{linear}.weight"].dtype == FP8:
        found: ScaledWeight | str = scaled_weight(files, f"{linear}.weight", group.block)
        return found
    if in_words:
        name = f"{linear}.weight_shape"
        if (
            name not in files.tensors
            or files.tensors[name].shape != (2,)
            or files.tensors[name].dtype not in ("I64", "I32")
        ):
            return f"the checkpoint lacks {name}, two whole numbers"
        rows, columns = (int(size) for size in files.read_rows(name))
    else:
        shape = files.tensors[f"{linear}.weight"].shape
        if len(shape) != 2 or 0 in shape:
            return f"{linear}.weight is {shape}, expected a matrix"
        rows, columns = shape
    per_word = WORD_BITS // group.bits
    groups = 1 if group.group_size is None else -(-columns // group.group_size)
    many: tuple[Shape, ...] = ((rows, groups),) if group.group_size else ((rows, 1), (1,), (1, 1), ())
    floats = tuple(STORAGE)
    expected: dict[str, tuple[tuple[Shape, ...], tuple[str, ...]]] = {"weight_scale": (many, floats)}
    if in_words:
        expected[PACKED] = (((rows, -(-columns // per_word)),), ("I32",))
    if not group.symmetric:
        points: Shape = (-(-rows // per_word), groups) if in_words else (rows, groups)
        expected["weight_zero_point"] = ((points,), ("I32",) if in_words else (INTEGER,))
    if f"{linear}.weight_g_idx" in files.tensors:
        expected["weight_g_idx"] = (((columns,),), ("I32",))
    for suffix, (shapes, kinds) in expected.items():
        info = files.tensors.get(f"{linear}.{suffix}")
        if info is None:
            return f"the checkpoint lacks {linear}.{suffix}"
        if info.shape not in shapes or info.dtype not in kinds:
            wanted = f"{' or '.join(kinds)} {' or '.join(map(str, shapes))}"
            return f"{linear}.{suffix} is {info.dtype} {info.shape}, expected {wanted}"
    return IntegerWeight(linear, (rows, columns), group, files, in_words)


def _read_groups(config: Mapping[str, Any]) -> list[tuple[tuple[str, ...], WeightGroup]]:
    """Targets and weights of each of ``config_groups``, in their order."""
    for key, value in (("sparsity_config", "format"), ("transform_config", "config_groups")):
        if expect_object(config, key).get(value) not in (None, "dense", {}):
            raise UnsupportedModel(
                f"quantization_config of {METHOD} has {key}, which is not read; give the float checkpoint"
            )
    groups = []
    for name, own in expect_object(config, "config_groups").items():
        where = f"config_groups.{name}"
        layout = own.get("format") or config.get("format") if isinstance(own, dict) else None
        if not isinstance(own, dict) or layout not in LAYOUTS:
            raise UnsupportedModel(
                f"quantization_config of {METHOD} has format {layout!r}, expected one of {', '.join(LAYOUTS)}; "
                "give the float checkpoint"
            )
        weights, inputs = expect_object(own, "weights"), expect_object(own, "input_activations")
        groups.append((expect_names(own, "targets"), _read_group(where, weights, bool(inputs))))
    if not groups:
        raise CheckpointError(f"config.json: quantization_config of {METHOD} has no config_groups; download it again")
    return groups


def _read_group(where: str, weights: Mapping[str, Any], rounds_inputs: bool) -> WeightGroup:
    bits, kind, strategy = weights.get("num_bits"), weights.get("type", "int"), weights.get("strategy") or "tensor"
    size = weights.get("group_size")
    choices = {"int": (4, 8), "float": (8,)}
    checks = (
        ("type", kind, tuple(choices), kind in choices),
        ("num_bits", bits, choices.get(kind, ()), type(bits) is int and bits in choices.get(kind, ())),
        ("strategy", strategy, STRATEGIES, strategy in STRATEGIES and (strategy != "block" or kind == "float")),
        (
            "group_size",
            size,
            ("multiples of 32",),
            strategy != "group" or (type(size) is int and size > 0 and size % 32 == 0),
        ),
    )
    for key, found, expected, fits in checks:
        if not fits:
            raise UnsupportedModel(
                f"quantization_config of {METHOD} has {key} {found!r} in {where}, expected "
                f"{' or '.join(map(str, expected))}; give the float checkpoint"
            )
    block = weights.get("block_structure")
    if strategy == "block" and not (
        isinstance(block, list) and len(block) == 2 and all(type(n) is int and n > 0 for n in block)
    ):
        raise CheckpointError(
            f"config.json: block_structure of {where} is {block!r}, expected two sizes such as [128, 128]"
        )
    assert type(bits) is int
    symmetric = weights.get("symmetric", True) is not False
    blocks = (block[0], block[1]) if strategy == "block" and block else None
    return WeightGroup(bits, symmetric, size if strategy == "group" else None, blocks, rounds_inputs)


def _is_size(value: object, multiple: int = 1) -> bool:
    return type(value) is int and value > 0 and value % multiple == 0


def _group_of(linear: str, groups: list[tuple[tuple[str, ...], WeightGroup]]) -> WeightGroup | None:
    """The group that targets ``linear``: by its name, or else by what it is."""
    named = next((group for targets, group in groups if any(_targets(one, linear) for one in targets)), None)
    return named or next((group for targets, group in groups if "Linear" in targets), None)


def _targets(target: str, linear: str) -> bool:
    return (
        matches(target[3:], linear) if target.startswith("re:") else linear == target or linear.endswith(f".{target}")
    )
