"""4-bit weights of bitsandbytes: NF4 and FP4, as QLoRA's base models have them (arXiv 2305.14314).

A weight is one of 16 values times the largest of its block of ``blocksize`` weights, row after row. Of two weights in a
byte the first has the high half. The largest values may be 8-bit codes themselves, with an offset.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from qwen_build.checkpoint.safetensors import Safetensors
from qwen_build.checkpoint.safetensors_file import STORAGE, Float32
from qwen_build.checkpoint.stored import Found, Shape, StoredWeight
from qwen_engine.errors import CheckpointError, UnsupportedModel, WeightMismatch

STATES = {"nf4": ".quant_state.bitsandbytes__nf4", "fp4": ".quant_state.bitsandbytes__fp4"}
LONGEST_STATE = 1 << 16  # bytes


@dataclass(frozen=True)
class BlockState:
    """What ``quant_state`` says of one weight; ``nested`` blocks are those of its largest values, 0: there are none."""

    shape: tuple[int, int]
    block: int
    nested: int
    offset: float


@dataclass(frozen=True)
class FourBitWeight(StoredWeight):
    """The matrix ``name`` of 4-bit codes."""

    name: str
    shape: Shape
    dtype: str
    files: Safetensors
    state: BlockState

    def read(self, start: int, stop: int) -> Float32:
        first, last = start * self.shape[1], stop * self.shape[1]
        packed = self.files.read_rows(self.name, first // 2, -(-last // 2)).reshape(-1)
        codes = np.stack([packed >> 4, packed & 15], axis=-1).reshape(-1)[first % 2 :][: last - first]
        weight = self.files.read(f"{self.name}.quant_map")[codes]
        blocks = slice(first // self.state.block, -(-last // self.state.block))
        largest = self._largest(blocks.start, blocks.stop).repeat(self.state.block)
        weight *= largest[first - blocks.start * self.state.block :][: last - first]
        return weight.reshape(stop - start, -1)

    def _largest(self, start: int, stop: int) -> Float32:
        """The largest value of each block [start, stop)."""
        name = f"{self.name}.absmax"
        if not self.state.nested:
            return self.files.read(name, start, stop)
        codes = self.files.read_rows(name, start, stop)
        values = self.files.read(f"{self.name}.nested_quant_map")[codes]
        values *= self.files.read(f"{self.name}.nested_absmax")[np.arange(start, stop) // self.state.nested]
        return np.asarray(values + np.float32(self.state.offset))


def find_four_bits(config: Mapping[str, Any], files: Safetensors) -> Found:
    """The 4-bit linears of ``files``.

    Raises:
        UnsupportedModel: they have 8 bits.
        WeightMismatch: tensors of a linear are missing, or of another shape or type.
    """
    if config.get("load_in_8bit") or any(name.endswith(".SCB") for name in files.tensors):
        raise UnsupportedModel(
            "the checkpoint is quantised by bitsandbytes with 8 bits, only 4 bits are read; give the float checkpoint"
        )
    states = {
        name.removesuffix(suffix): (kind, name)
        for name in files.tensors
        for kind, suffix in STATES.items()
        if name.endswith(suffix)
    }
    weights, parts, faults = {}, set(), []
    for name, (kind, state_name) in sorted(states.items()):
        state = _read_state(files, state_name)
        expected = _expected(name, state)
        for part, (shapes, kinds) in expected.items():
            info = files.tensors.get(part)
            if info is None:
                faults.append(f"the checkpoint lacks {part}")
            elif info.shape not in shapes or info.dtype not in kinds:
                faults.append(f"{part} is {info.dtype} {info.shape}, expected {' or '.join(kinds)} {shapes[0]}")
        weights[name] = FourBitWeight(name, state.shape, kind, files, state)
        parts |= {state_name, *(part for part in expected if part != name)}
    if faults:
        raise WeightMismatch(f"{'; '.join(faults)}; download or save the checkpoint again")
    return Found(weights, frozenset(parts))


def _expected(name: str, state: BlockState) -> dict[str, tuple[tuple[Shape, ...], tuple[str, ...]]]:
    """The tensors of a weight: the shapes and types that each may have."""
    elements = state.shape[0] * state.shape[1]
    size, blocks, floats = -(-elements // 2), -(-elements // state.block), tuple(STORAGE)
    expected: dict[str, tuple[tuple[Shape, ...], tuple[str, ...]]] = {
        name: (((size, 1), (size,)), ("U8",)),
        f"{name}.quant_map": (((16,),), floats),
        f"{name}.absmax": (((blocks,),), ("U8",) if state.nested else floats),
    }
    if state.nested:
        expected[f"{name}.nested_quant_map"] = (((256,),), floats)
        expected[f"{name}.nested_absmax"] = (((-(-blocks // state.nested),),), floats)
    return expected


def _read_state(files: Safetensors, name: str) -> BlockState:
    info = files.tensors[name]
    try:
        if info.dtype != "U8" or info.size_bytes > LONGEST_STATE:
            raise ValueError(f"it is {info.dtype} {info.shape}")
        state = json.loads(bytes(files.read_rows(name).reshape(-1)).decode())
        shape, block = tuple(state["shape"]), state["blocksize"]
        nested, offset = state.get("nested_blocksize", 0), state.get("nested_offset", 0.0)
        sizes = (*shape, block)
        if len(shape) != 2 or not all(type(size) is int and 0 < size < 2**31 for size in sizes):
            raise ValueError(f"shape {shape}, blocksize {block}")
        if type(nested) is not int or nested < 0 or not isinstance(offset, int | float) or not abs(offset) < 3e38:
            raise ValueError(f"nested_blocksize {nested}, nested_offset {offset}")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{name} is damaged: {error}; download the checkpoint again") from error
    return BlockState((shape[0], shape[1]), block, nested, float(offset))
