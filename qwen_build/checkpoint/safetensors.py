"""Reading and writing the weights of a Hugging Face checkpoint: safetensors, streamed.

A safetensors file is an 8-byte little-endian length, a JSON header of that length that gives every
tensor a dtype, a shape and the bytes it owns, and those bytes without gap or overlap
(https://github.com/huggingface/safetensors#format). Rows are read with positioned reads rather than
through a memory map, whose walked pages would count as resident.
"""

from __future__ import annotations

import json
import math
import os
import struct
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from qwen_build.checkpoint.files import read_json
from qwen_engine.errors import CheckpointError

WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"

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


# what the packed linears of ``packed.py`` are made of beside floats: safetensors dtype -> element
PACKED_STORAGE = {"I32": "<i4"}
PACKED_SUFFIXES = (".qweight", ".qzeros", ".g_idx")


@dataclass(frozen=True)
class TensorInfo:
    """Where a tensor lies: safetensors dtype, shape, file, first byte in the file.

    The dtype is a key of ``STORAGE`` or ``PACKED_STORAGE``.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    path: Path
    offset: int


class Checkpoint:
    """The weights of a Hugging Face directory. Made by :meth:`open`; a context manager that closes its files.

    ``tensors`` maps every name to its :class:`TensorInfo`; ``files`` are the safetensors files. Reading is
    safe from several threads.
    """

    def __init__(self, tensors: Mapping[str, TensorInfo], descriptors: Mapping[Path, int]) -> None:
        self.tensors = tensors
        self.files = tuple(descriptors)
        self._descriptors = descriptors

    @classmethod
    def open(cls, directory: Path) -> Checkpoint:
        """Open ``model.safetensors``, or all shards that ``model.safetensors.index.json`` names.

        Every header is read and checked against its file's length; no weight is read.

        Raises:
            CheckpointError: there are no such weights, a file is truncated or damaged, index and shards
                disagree, or a dtype is none of float32, float16 and bfloat16, nor int32 of a packed linear.
        """
        try:
            index = None if (directory / WEIGHTS_FILE).is_file() else _read_index(directory)
        except OSError as error:
            raise CheckpointError(f"{directory} cannot be read: {error.strerror}") from error
        names = [WEIGHTS_FILE] if index is None else sorted(set(index.values()))
        descriptors: dict[Path, int] = {}
        try:
            shards = []
            for path in (directory / name for name in names):
                descriptors[path] = _open_file(path)
                shards.append(_read_header(path, descriptors[path]))
            tensors = _merge(shards)
            if index is not None:
                _check_index(directory / INDEX_FILE, index, tensors)
            _check_dtypes(directory, tensors)
            return cls(tensors, descriptors)
        except BaseException:
            _close(descriptors)
            raise

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        _close(self._descriptors)
        self._descriptors = {}

    @property
    def dtype(self) -> str:
        """The dtype most parameters are stored in: ``float32``, ``float16`` or ``bfloat16``."""
        parameters: Counter[str] = Counter()
        for info in self.tensors.values():
            if info.dtype in STORAGE:
                parameters[info.dtype] += math.prod(info.shape)
        return STORAGE[max(parameters, key=parameters.__getitem__)].hf_name

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Float32:
        """Rows ``[start, stop)`` of the first axis, all by default, in a new C-contiguous float32 array.

        Beside the result, about a megabyte is in memory.

        Raises:
            CheckpointError: a value is NaN or infinite, or the file became shorter since it was opened.
        """
        info = self.tensors[name]
        storage = STORAGE[info.dtype]
        rows = info.shape[0] if info.shape else 1
        stop = rows if stop is None else stop
        if not 0 <= start <= stop <= rows:
            raise IndexError(f"{name} has {rows} rows, asked for [{start}, {stop})")

        out = np.empty((stop - start, *info.shape[1:]) if info.shape else (), np.float32)
        values = out.reshape(-1)
        chunk = np.empty(CHUNK_BYTES // np.dtype(storage.element).itemsize, storage.element)
        offset = info.offset + start * math.prod(info.shape[1:]) * chunk.itemsize
        finite = True
        for first in range(0, values.size, chunk.size):
            part = values[first : first + chunk.size]
            stored = chunk[: part.size]
            _read_exactly(info.path, self._descriptors[info.path], stored.data, offset + first * chunk.itemsize)
            storage.decode(stored, part)
            finite = finite and bool(np.isfinite(part).all())
        if not finite:
            raise _not_finite(info, out, start)
        return out

    def read_columns(self, name: str, start: int = 0, stop: int | None = None) -> NDArray[Any]:
        """Columns ``[start, stop)`` of a matrix, all by default, in a new array: int32 where packed, else float32.

        A vector is read as a matrix of one row.

        Raises:
            CheckpointError: a value is NaN or infinite, or the file became shorter since it was opened.
        """
        info = self.tensors[name]
        rows, columns = (1, 1, *info.shape)[-2:]
        stop = columns if stop is None else stop
        if not 0 <= start <= stop <= columns:
            raise IndexError(f"{name} has {columns} columns, asked for [{start}, {stop})")

        element = PACKED_STORAGE.get(info.dtype) or STORAGE[info.dtype].element
        stored = np.empty((rows, stop - start), element)
        descriptor = self._descriptors[info.path]
        if stop - start == columns:  # then the rows follow each other
            _read_exactly(info.path, descriptor, stored.data, info.offset)
        else:
            for row in range(rows):
                offset = info.offset + (row * columns + start) * stored.itemsize
                _read_exactly(info.path, descriptor, stored[row].data, offset)
        if info.dtype in PACKED_STORAGE:
            return stored
        values = np.empty(stored.shape, np.float32)
        STORAGE[info.dtype].decode(stored, values)
        if not np.isfinite(values).all():
            raise _not_finite(info, values, 0)
        return values


def _not_finite(info: TensorInfo, values: Float32, start: int) -> CheckpointError:
    bad = np.argwhere(~np.isfinite(values))
    position = [int(i) for i in bad[0]]
    if position:
        position[0] += start
    return CheckpointError(
        f"{info.name} in {info.path} has {len(bad)} NaN or infinite values, the first at {position}; "
        "the checkpoint is damaged, download or save it again"
    )


def _open_file(path: Path) -> int:
    try:
        return os.open(path, os.O_RDONLY)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be opened: {error.strerror}") from error


def _close(descriptors: Mapping[Path, int]) -> None:
    for descriptor in descriptors.values():
        os.close(descriptor)


def _read_exactly(path: Path, descriptor: int, out: memoryview, offset: int) -> None:
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


def _read_index(directory: Path) -> dict[str, str]:
    """The index's tensor name -> shard name, every shard there."""
    path = directory / INDEX_FILE
    if not path.is_file():
        raise CheckpointError(_no_weights(directory))
    index = read_json(path).get("weight_map")
    # a shard is a plain name, so that an index cannot point outside its directory
    if (
        not isinstance(index, dict)
        or not index
        or not all(isinstance(shard, str) and shard and shard == Path(shard).name for shard in index.values())
    ):
        raise CheckpointError(f"{path} has no weight_map from tensor names to file names; download it again")
    missing = sorted(shard for shard in set(index.values()) if not (directory / shard).is_file())
    if missing:
        raise CheckpointError(f"{directory} lacks {_some(missing)}, named in {INDEX_FILE}; download what is missing")
    return index


def _no_weights(directory: Path) -> str:
    """What to say of a directory that has neither weights nor an index."""
    if directory.suffix == ".gguf":
        return f"{directory} is a GGUF file, which is not supported; give the Hugging Face directory of the model"
    if not directory.is_dir():
        return f"{directory} is not a directory; give the Hugging Face directory of the model"
    for pattern, advice in (
        ("*.safetensors", f"there is neither {WEIGHTS_FILE} nor {INDEX_FILE}; download the index, or rename the file"),
        ("*.bin", "only safetensors is read; convert it with save_pretrained of a recent transformers"),
        ("*.gguf", "GGUF is not supported; use the safetensors of the model"),
    ):
        found = sorted(path.name for path in directory.glob(pattern))
        if found:
            return f"{directory} has {_some(found)}: {advice}"
    return f"{directory} has no weights: expected {WEIGHTS_FILE} or {INDEX_FILE}"


def _read_header(path: Path, descriptor: int) -> list[TensorInfo]:
    """The tensors of one file, checked to lie one after the other up to its end."""
    file_bytes = os.fstat(descriptor).st_size
    if file_bytes < 8:
        raise CheckpointError(f"{path} has {file_bytes} bytes, too few for a safetensors file; download it again")
    prefix = bytearray(8)
    _read_exactly(path, descriptor, memoryview(prefix), 0)
    if prefix == b"version ":
        raise CheckpointError(f"{path} is a Git LFS pointer, not the weights; run `git lfs pull` beside it")
    (header_bytes,) = struct.unpack("<Q", prefix)
    if not 2 <= header_bytes <= MAX_HEADER_BYTES:
        raise CheckpointError(f"{path} is not a safetensors file: its header would have {header_bytes} bytes")
    data = 8 + header_bytes
    if data > file_bytes:
        raise _truncated(path, f"at least {data - file_bytes}")
    text = bytearray(header_bytes)
    _read_exactly(path, descriptor, memoryview(text), 8)
    try:
        header = json.loads(text.decode("utf-8"), object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"the header of {path} is damaged: {error}; download it again") from error
    if not isinstance(header, dict):
        raise CheckpointError(f"the header of {path} is not an object; download it again")
    header.pop("__metadata__", None)

    spans = sorted((_parse_entry(path, name, entry) for name, entry in header.items()), key=lambda span: span[1])
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
    return [TensorInfo(info.name, info.dtype, info.shape, path, data + begin) for info, begin, _ in spans]


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
    if 0 in shape:
        raise CheckpointError(f"{path}: {name} has shape {shape}, without values; save the checkpoint whole")
    if element := PACKED_STORAGE.get(dtype) or (dtype in STORAGE and STORAGE[dtype].element):
        needed = math.prod(shape) * np.dtype(element).itemsize
        if end - begin != needed:
            raise CheckpointError(
                f"{path}: {name} owns {end - begin} bytes, {dtype} {shape} needs {needed}; download the file again"
            )
    return TensorInfo(name, dtype, shape, path, begin), begin, end


def _merge(shards: Iterable[Iterable[TensorInfo]]) -> dict[str, TensorInfo]:
    tensors: dict[str, TensorInfo] = {}
    for info in (info for shard in shards for info in shard):
        if info.name in tensors:
            both = f"{tensors[info.name].path.name} and {info.path}"
            raise CheckpointError(f"{info.name} is in both {both}; remove the file that is left over")
        tensors[info.name] = info
    return tensors


def _check_index(path: Path, index: Mapping[str, str], tensors: Mapping[str, TensorInfo]) -> None:
    """Index and shards name the same tensors in the same files."""
    missing = sorted(n for n, shard in index.items() if n not in tensors or tensors[n].path.name != shard)
    unlisted = sorted(tensors.keys() - index.keys())
    if missing or unlisted:
        raise CheckpointError(
            f"{path} and its shards disagree: not in the shard it names: {_some(missing)}; "
            f"in a shard, not in the index: {_some(unlisted)}; download the checkpoint again"
        )


def _check_dtypes(directory: Path, tensors: Mapping[str, TensorInfo]) -> None:
    if not tensors:
        raise CheckpointError(f"{directory} has weight files without a tensor; download or save it again")
    strange = sorted(
        f"{info.name} ({info.dtype})"
        for info in tensors.values()
        if info.dtype not in (PACKED_STORAGE if info.name.endswith(PACKED_SUFFIXES) else STORAGE)
    )
    if strange:
        raise CheckpointError(
            f"{directory} stores {_some(strange)}, expected only {', '.join(STORAGE)}; of checkpoints that "
            "are already quantised, GPTQ and AWQ are read (not FP8, bitsandbytes), use the one it was made from"
        )


def _some(names: Sequence[str], limit: int = 5) -> str:
    """The first ``limit`` names, and how many more there are."""
    listed = ", ".join(names[:limit]) or "none"
    return listed if len(names) <= limit else f"{listed} and {len(names) - limit} more"


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
