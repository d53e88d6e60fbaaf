"""Weights of GGUF files: what the engine's grids hold bit for bit, and what is dequantised.

A row is blocks of 32 or 256 numbers with a scale each. Q4_0 and Q8_0 are the engine's own symmetric groups of 32;
IQ4_NL and MXFP4 have 16 values that are whole numbers, and fit 8 bits. Q4_1 and the K-quants have no such grid: their
definition is ``dequantize`` of the package gguf, which reads them here.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from qwen_build.checkpoint.gguf_file import BY_NAME, GgufFile
from qwen_build.checkpoint.safetensors_file import STORAGE, Float32
from qwen_build.checkpoint.stored import Found, PackedWeight, Shape, StoredWeight, storable_scales
from qwen_build.quantization.grid import Grid, Rounded
from qwen_engine.errors import BuildError, CheckpointError

GROUP = 32
IQ4_NL = np.array([-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113], np.int16)
MXFP4 = np.array([0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12], np.int16)

# GGUF tensor -> Hugging Face module, inside a layer and outside
LAYER_MODULES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
MODULES = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_LAYER = re.compile(r"blk\.(\d{1,9})\.(\w+)\.(weight|bias)")
# architecture -> the heads of the tensors whose rows a head has in pairs, for a rotation of neighbours
PAIRED = {"llama": {"attn_q": "head_count", "attn_k": "head_count_kv"}}


def _nibbles(packed: np.ndarray) -> np.ndarray:
    """16 bytes as 32 numbers: all low halves, then all high ones."""
    return np.concatenate([packed & 15, packed >> 4], axis=-1)


@dataclass(frozen=True)
class PackedType:
    """How blocks of a type become a grid.

    Attributes:
        scale_bytes: of a block, at its beginning.
        scales: makes numbers of them, (rows, blocks, scale_bytes) uint8 -> (rows, blocks) float32.
        q: makes the integers of the grid of the rest.
    """

    bits: int
    scale_bytes: int
    scales: Callable[[np.ndarray], np.ndarray]
    q: Callable[[np.ndarray], np.ndarray]


def _half(stored: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(stored).view("<f2")[..., 0].astype(np.float32)


def _power(stored: np.ndarray) -> np.ndarray:
    """e8m0: powers of two; halved, because ``MXFP4`` has twice the values."""
    return np.ldexp(np.float32(1), stored[..., 0].astype(np.int32) - 128).astype(np.float32)


# the types that are stored bit for bit
PACKED = {
    "Q4_0": PackedType(4, 2, _half, _nibbles),
    "Q8_0": PackedType(8, 2, _half, lambda stored: stored.view(np.uint8) + np.uint8(128)),
    "IQ4_NL": PackedType(8, 2, _half, lambda stored: (IQ4_NL[_nibbles(stored)] + 128).astype(np.uint8)),
    "MXFP4": PackedType(8, 1, _power, lambda stored: (MXFP4[_nibbles(stored)] + 128).astype(np.uint8)),
}


@dataclass(frozen=True)
class RowsOfHeads:
    """Where rows of a matrix lie: in pairs, row i of a head beside row i + head_dim / 2, or as Hugging Face has them.

    Attributes:
        head_dim: rows of a head; 0: the rows lie as Hugging Face has them.
    """

    head_dim: int = 0

    def read(self, file: GgufFile, name: str, start: int, stop: int) -> np.ndarray:
        """Rows [start, stop) of Hugging Face's order, as they are stored."""
        if not self.head_dim:
            return file.blocks(name, start, stop)
        first = start // self.head_dim * self.head_dim
        last = -(-stop // self.head_dim) * self.head_dim
        head, row = np.divmod(np.arange(start, stop), self.head_dim)
        half, pair = np.divmod(row, self.head_dim // 2)
        rows: np.ndarray = file.blocks(name, first, last)[head * self.head_dim + 2 * pair + half - first]
        return rows


@dataclass(frozen=True)
class GgufWeight(StoredWeight):
    """A tensor that yields floats: as they are, or dequantised."""

    name: str
    shape: Shape
    dtype: str
    file: GgufFile
    tensor: str
    rows: RowsOfHeads

    def read(self, start: int, stop: int) -> Float32:
        vector = len(self.shape) == 1
        stored = self.file.blocks(self.tensor, 0, 1) if vector else self.rows.read(self.file, self.tensor, start, stop)
        if self.dtype in STORAGE:
            values = np.empty((len(stored), self.shape[-1]), np.float32)
            STORAGE[self.dtype].decode(stored.view(STORAGE[self.dtype].element), values)
        else:
            values = _dequantized(stored, self.dtype)
        if not np.isfinite(values).all():
            raise CheckpointError(f"{self.file.path}: {self.tensor} has NaN or infinite values; download it again")
        return values[0, start:stop] if vector else values


@dataclass(frozen=True)
class GgufPacked(PackedWeight):
    """A matrix that is on one of the engine's grids."""

    name: str
    shape: Shape
    dtype: str
    file: GgufFile
    tensor: str
    rows: RowsOfHeads

    @property
    def grid(self) -> Grid:
        return Grid(PACKED[self.dtype].bits, GROUP, symmetric=True)

    @cached_property
    def exact(self) -> bool:
        return self.dtype != "MXFP4" or not storable_scales(self._scales(self._blocks(0, self.shape[0])))[1]

    def rounded(self, start: int, stop: int) -> Rounded:
        blocks, kind = self._blocks(start, stop), PACKED[self.dtype]
        scales, _ = storable_scales(self._scales(blocks))
        return Rounded(kind.q(np.ascontiguousarray(blocks[..., kind.scale_bytes :])), scales, None)

    def _blocks(self, start: int, stop: int) -> np.ndarray:
        stored = self.rows.read(self.file, self.tensor, start, stop)
        return stored.reshape(len(stored), -1, BY_NAME[self.dtype].size_bytes)

    def _scales(self, blocks: np.ndarray) -> np.ndarray:
        kind = PACKED[self.dtype]
        scales = kind.scales(blocks[..., : kind.scale_bytes])
        if not np.isfinite(scales).all():
            raise CheckpointError(f"{self.file.path}: {self.tensor} has NaN or infinite scales; download it again")
        return scales


def find_gguf(config: Mapping[str, Any], file: GgufFile) -> Found:
    """The weights of ``file`` by Hugging Face's names."""
    architecture = file.metadata.get("general.architecture")
    paired = PAIRED.get(architecture, {}) if isinstance(architecture, str) else {}
    weights: dict[str, StoredWeight] = {}
    parts = {name for name in file.tensors if name == "rope_freqs.weight"}
    for name, info in file.tensors.items():
        if (found := graph_name_of(name)) is None:
            continue
        stem = name.split(".")[-2]
        heads = file.metadata.get(f"{architecture}.attention.{paired[stem]}") if stem in paired else None
        rows = RowsOfHeads()
        if type(heads) is int and heads > 0 and info.shape[0] % (2 * heads) == 0:
            rows = RowsOfHeads(info.shape[0] // heads)
        packed = info.dtype in PACKED and len(info.shape) == 2 and stem != "token_embd"  # as --embedding-quant says
        make = GgufPacked if packed else GgufWeight
        weights[found] = make(found, info.shape, info.dtype, file, name, rows)
        parts.add(name)
    return Found(weights, frozenset(parts))


def graph_name_of(tensor: str) -> str | None:
    """Hugging Face's name of a GGUF tensor; None: there is none.

    >>> graph_name_of("blk.3.attn_q.bias"), graph_name_of("output.weight"), graph_name_of("blk.0.ffn_gate_inp.weight")
    ('model.layers.3.self_attn.q_proj.bias', 'lm_head.weight', None)
    """
    if (match := _LAYER.fullmatch(tensor)) and match[2] in LAYER_MODULES:
        return f"model.layers.{match[1]}.{LAYER_MODULES[match[2]]}.{match[3]}"
    stem, _, kind = tensor.rpartition(".")
    return f"{MODULES[stem]}.{kind}" if stem in MODULES else None


def _dequantized(stored: np.ndarray, name: str) -> Float32:
    try:
        from gguf import GGMLQuantizationType, dequantize
    except ImportError:
        raise BuildError(f"tensors of type {name} need the package gguf; run `pip install gguf`") from None
    with np.errstate(all="ignore"):  # what is not finite is refused afterwards
        values: Float32 = dequantize(stored, GGMLQuantizationType[name]).astype(np.float32)
    return values
