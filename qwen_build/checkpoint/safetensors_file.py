"""One safetensors file: its header, checked; its bytes, read; and a new one, written.

A safetensors file is an 8-byte little-endian length, a JSON header of that length that gives every
tensor a dtype, a shape and the bytes it owns, and those bytes without gap or overlap
(https://github.com/huggingface/safetensors#format).
"""

from __future__ import annotations

import json
import math
import os
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from qwen_engine.errors import CheckpointError

MAX_HEADER_BYTES = 100_000_000  # the format's own limit
CHUNK_BYTES = 1 << 20  # one read while streaming: small enough that its conversion stays in the cache

Float32 = NDArray[np.float32]


def _decode_cast(stored: NDArray[Any], out: Float32) -> None:
    out[...] = stored


def _decode_bfloat16(stored: NDArray[np.uint16], out: Float32) -> None:
    np.left_shift(stored, 16, out=out.view(np.uint32), dtype=np.uint32)


def _encode_bfloat16(values: Float32) -> NDArray[np.uint16]:
    """Round to nearest, ties to even; a NaN stays a NaN."""
    bits = np.where(np.isnan(values), np.uint32(0x7FC00000), values.view(np.uint32))
    rounded: NDArray[np.uint32] = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return rounded.astype(np.uint16)


class Storage(NamedTuple):
    """How float32 values are stored: Hugging Face's name, the stored element, both conversions."""

    hf_name: str
    element: str
    decode: Callable[[NDArray[Any], Float32], None]
    encode: Callable[[Float32], NDArray[Any]]


STORAGE = {
    "F32": Storage("float32", "<f4", _decode_cast, lambda values: values),
    "F16": Storage("float16", "<f2", _decode_cast, lambda values: values.astype("<f2")),
    "BF16": Storage("bfloat16", "<u2", _decode_bfloat16, _encode_bfloat16),
}


# every safetensors dtype that is read -> the element that holds it; what ``formats`` are made of beside floats
ELEMENTS = {key: storage.element for key, storage in STORAGE.items()} | {
    "I64": "<i8",
    "I32": "<i4",
    "I8": "|i1",
    "U8": "|u1",
    "F8_E4M3": "|u1",
}


@dataclass(frozen=True)
class TensorInfo:
    """Where a tensor lies: safetensors dtype, shape, file, first byte in the file.

    The dtype is a key of ``ELEMENTS``, or of no use. ``columns``: the first, and of how many, where a matrix is
    some columns of what is stored; :meth:`~qwen_build.checkpoint.safetensors.Checkpoint.read_columns` alone reads it.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    path: Path
    offset: int
    size_bytes: int
    columns: tuple[int, int] | None = None


def read_exactly(path: Path, descriptor: int, out: memoryview, offset: int) -> None:
    """Fill ``out`` with the bytes that stand at ``offset``."""
    view = out.cast("B")
    while view:
        try:
            count = os.preadv(descriptor, [view], offset)
        except OSError as error:
            raise CheckpointError(f"{path} cannot be read at byte {offset}: {error.strerror}") from error
        if count == 0:
            raise CheckpointError(f"{path} ended at byte {offset}: it changed while it was read; build again")
        view, offset = view[count:], offset + count


def read_header(path: Path, descriptor: int) -> list[TensorInfo]:
    """The tensors of one file, checked to lie one after the other up to its end."""
    file_bytes = os.fstat(descriptor).st_size
    if file_bytes < 8:
        raise CheckpointError(f"{path} has {file_bytes} bytes, too few for a safetensors file; download it again")
    prefix = bytearray(8)
    read_exactly(path, descriptor, memoryview(prefix), 0)
    if prefix == b"version ":
        raise CheckpointError(f"{path} is a Git LFS pointer, not the weights; run `git lfs pull` beside it")
    (header_bytes,) = struct.unpack("<Q", prefix)
    if not 2 <= header_bytes <= MAX_HEADER_BYTES:
        raise CheckpointError(f"{path} is not a safetensors file: its header would have {header_bytes} bytes")
    data = 8 + header_bytes
    if data > file_bytes:
        raise _truncated(path, f"at least {data - file_bytes}")
    text = bytearray(header_bytes)
    read_exactly(path, descriptor, memoryview(text), 8)
    try:
        header = json.loads(text.decode("utf-8"), object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"the header of {path} is damaged: {error}; download it again") from error
    if not isinstance(header, dict):
        raise CheckpointError(f"the header of {path} is not an object; download it again")
    header.pop("__metadata__", None)

    spans = sorted((_parse_entry(path, name, entry) for name, entry in header.items()), key=lambda span: span[1:])
    end = 0
    for info, begin, stop in spans:
        if begin != end:
            fault = "overlaps the tensor before it" if begin < end else "leaves a gap before it"
            raise CheckpointError(f"{path}: {info.name} {fault} at byte {begin} of the data; download it again")
        end = stop
    if data + end > file_bytes:
        raise _truncated(path, str(data + end - file_bytes))
    if data + end < file_bytes:
        extra = file_bytes - data - end
        raise CheckpointError(f"{path} has {extra} bytes that belong to no tensor; download it again")
    return [replace(info, offset=data + begin) for info, begin, _ in spans]


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    entries = dict(pairs)
    if len(entries) != len(pairs):
        raise ValueError("a name appears twice")
    return entries


def _truncated(path: Path, missing: str) -> CheckpointError:
    return CheckpointError(f"{path} is truncated: {missing} bytes are missing; download it again")


def _parse_entry(path: Path, name: str, entry: Any) -> tuple[TensorInfo, int, int]:
    """A tensor of the header and the bytes ``[begin, end)`` of the data it owns."""
    try:
        dtype, shape, (begin, end) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
        valid = isinstance(dtype, str) and all(type(number) is int for number in (*shape, begin, end))
    except (KeyError, TypeError, ValueError):
        valid = False
    if not valid or begin < 0 or end < begin or any(size < 0 for size in shape):
        raise CheckpointError(f"{path}: the header entry of {name} is damaged; download the file again")
    if element := ELEMENTS.get(dtype):
        needed = math.prod(shape) * np.dtype(element).itemsize
        if end - begin != needed:
            raise CheckpointError(
                f"{path}: {name} owns {end - begin} bytes, {dtype} {shape} needs {needed}; download the file again"
            )
    return TensorInfo(name, dtype, shape, path, begin, end - begin), begin, end


@dataclass(frozen=True)
class LazyTensor:
    """A tensor to be written whose values, float32 of ``shape``, are made when its turn comes."""

    shape: tuple[int, ...]
    load: Callable[[], Float32]


def write_safetensors(path: Path, tensors: Mapping[str, Float32 | LazyTensor], dtype: str = "bfloat16") -> None:
    """Write ``tensors`` in their order, each rounded from float32 to ``dtype``, one in memory at a time.

    Args:
        dtype: ``float32``, ``float16`` or ``bfloat16``.
    """
    (key,) = (key for key, storage in STORAGE.items() if storage.hf_name == dtype)
    storage = STORAGE[key]
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, tensor in tensors.items():
        begin, end = end, end + math.prod(tensor.shape) * np.dtype(storage.element).itemsize
        header[name] = {"dtype": key, "shape": list(tensor.shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the data starts at a multiple of 8
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for name, tensor in tensors.items():
            values = tensor.load() if isinstance(tensor, LazyTensor) else tensor
            assert (values.shape, values.dtype) == (tensor.shape, np.dtype(np.float32)), name
            flat = np.ascontiguousarray(values).reshape(-1)
            for first in range(0, flat.size, CHUNK_BYTES):
                file.write(storage.encode(flat[first : first + CHUNK_BYTES]).data)
