"""Matrices whose stored numbers have scales for blocks of rows and columns: FP8, as Qwen's own releases have it.

A weight is its number times the scale of its block (``weight_scale_inv`` of fine-grained FP8, whose name is that of the
inverse of what quantised it; ``weight_scale`` elsewhere). Numbers are e4m3 floats (arXiv 2209.05433, table 1), which
have no infinity and one NaN.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from qwen_build.checkpoint.patterns import expect_names
from qwen_build.checkpoint.safetensors import Safetensors, not_finite
from qwen_build.checkpoint.safetensors_file import STORAGE, Float32
from qwen_build.checkpoint.stored import Found, Shape, StoredWeight
from qwen_engine.errors import CheckpointError, UnsupportedModel, WeightMismatch

FP8 = "F8_E4M3"
SCALES = ("weight_scale_inv", "weight_scale")
# scales of inputs, which the engine finds by itself
INPUT_SCALES = ("input_scale", "activation_scale")


def _e4m3_values() -> Float32:
    """What each of 256 bytes stands for: sign, 4 bits of exponent, 3 of fraction; 0x7f and 0xff are NaN."""
    bits = np.arange(256)
    exponent, fraction = bits >> 3 & 15, (bits & 7) / 8
    values = np.where(exponent == 0, fraction * 2.0**-6, (1 + fraction) * 2.0 ** (exponent - 7.0))
    values[(bits & 127) == 127] = np.nan
    return np.where(bits & 128, -values, values).astype(np.float32)


E4M3 = _e4m3_values()


@dataclass(frozen=True)
class ScaledWeight(StoredWeight):
    """The FP8 matrix ``name`` and its scales ``scale``, one for each block of ``block`` rows and columns."""

    name: str
    shape: Shape
    dtype: str
    files: Safetensors
    scale: str
    block: tuple[int, int]

    def read(self, start: int, stop: int) -> Float32:
        rows, columns = self.block
        values: Float32 = E4M3[self.files.read_rows(self.name, start, stop)]
        stored = self.files.tensors[self.scale]
        counts = -(-self.shape[0] // rows), -(-self.shape[1] // columns)
        scales = self.files.read(self.scale, 0, stored.shape[0] if stored.shape else 1).reshape(counts)
        by_row = scales[np.arange(start, stop) // rows]
        values *= by_row.repeat(columns, axis=1)[:, : self.shape[1]]
        if not np.isfinite(values).all():
            raise not_finite(self.files.tensors[self.name], values, start)
        return values


def find_fp8(config: Mapping[str, Any], files: Safetensors) -> Found:
    """The FP8 linears of ``files``, in blocks of ``weight_block_size`` or with one scale for all of a matrix.

    Raises:
        UnsupportedModel: ``quantization_config`` asks for another kind of float.
        WeightMismatch: a matrix has no scales, or of another shape.
    """
    expect_names(config, "modules_to_not_convert")  # which the types of the tensors show
    if (kind := config.get("fmt", "e4m3")) not in ("e4m3", "float8_e4m3fn"):
        raise UnsupportedModel(
            f"quantization_config of fp8 has fmt {kind!r}, expected 'e4m3'; give the float checkpoint"
        )
    block = config.get("weight_block_size")
    if block is not None and not (
        isinstance(block, list) and len(block) == 2 and all(type(size) is int and size > 0 for size in block)
    ):
        raise CheckpointError(f"config.json: weight_block_size is {block!r}, expected two sizes such as [128, 128]")
    names = sorted(name for name, info in files.tensors.items() if info.dtype == FP8 and name.endswith(".weight"))
    weights, faults = {}, []
    for name in names:
        found = scaled_weight(files, name, tuple(block) if block else None)
        if isinstance(found, ScaledWeight):
            weights[name] = found
        else:
            faults.append(found)
    if faults:
        raise WeightMismatch(f"{'; '.join(faults)}; download or save the checkpoint again")
    return Found(weights, frozenset(scale_parts(files, names)), input_notes(files, names))


def scaled_weight(files: Safetensors, name: str, block: tuple[int, int] | None) -> ScaledWeight | str:
    """The FP8 matrix ``name``, or what is wrong with it."""
    info = files.tensors[name]
    linear = name.removesuffix(".weight")
    scale = next((part for part in (f"{linear}.{suffix}" for suffix in SCALES) if part in files.tensors), None)
    if len(info.shape) != 2 or 0 in info.shape:
        return f"{name} is {info.shape}, expected a matrix"
    if scale is None:
        return f"the checkpoint lacks {linear}.{SCALES[0]}"
    rows, columns = info.shape
    stored = files.tensors[scale]
    sizes: dict[Shape, tuple[int, int]] = {(): (rows, columns), (1,): (rows, columns), (1, 1): (rows, columns)}
    sizes[rows, 1] = (1, columns)
    if block is not None:
        sizes = {(-(-rows // block[0]), -(-columns // block[1])): block}
    if stored.dtype not in STORAGE or stored.shape not in sizes:
        return f"{scale} is {stored.dtype} {stored.shape}, expected floats {' or '.join(map(str, sizes))}"
    return ScaledWeight(name, info.shape, FP8, files, scale, sizes[stored.shape])


def scale_parts(files: Safetensors, names: list[str]) -> Iterator[str]:
    """The tensors beside the matrices ``names`` that are no weights."""
    for name in names:
        linear = name.removesuffix(".weight")
        yield from (
            part for part in (f"{linear}.{suffix}" for suffix in (*SCALES, *INPUT_SCALES)) if part in files.tensors
        )


def input_notes(files: Safetensors, names: list[str]) -> tuple[str, ...]:
    """A sentence where the checkpoint has scales of inputs."""
    linears = [name.rpartition(".")[0] for name in names]
    found = [part for linear in linears for suffix in INPUT_SCALES if (part := f"{linear}.{suffix}") in files.tensors]
    if not found:
        return ()
    return (f"{found[0]} and {len(found) - 1} more are left out: inputs are rounded by scales of their own.",)
