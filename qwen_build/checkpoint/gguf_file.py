"""A model's GGUF file or files: metadata and where the tensors lie, checked before anything is made of them.

The format is little-endian: a magic, a version, two counts, metadata by key, a name, sizes, type and offset for each
tensor, and their blocks (https://github.com/ggml-org/ggml/blob/master/docs/gguf.md). A file may come from anyone: no
number in it is believed before it is compared with the file's length. A large model may lie in several files, whose
names end in ``-00001-of-00003.gguf`` and so on; the first has the metadata.
"""

from __future__ import annotations

import math
import os
import re
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from qwen_build.checkpoint.safetensors_file import TensorInfo, read_exactly
from qwen_engine.errors import CheckpointError, UnsupportedModel

MAGIC, VERSIONS = b"GGUF", (2, 3)
MOST_ENTRIES, MOST_TENSORS, LONGEST_HEADER = 1 << 16, 1 << 17, 1 << 29
MOST_DIMENSIONS = 4
# metadata types: number in the file -> how struct reads one
SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
STRING, ARRAY = 8, 9


@dataclass(frozen=True)
class BlockType:
    """A type of tensors: ``elements`` of a row lie together in ``size_bytes``."""

    name: str
    elements: int
    size_bytes: int


# number in the file -> the type
TYPES = {
    0: BlockType("F32", 1, 4),
    1: BlockType("F16", 1, 2),
    2: BlockType("Q4_0", 32, 18),
    3: BlockType("Q4_1", 32, 20),
    6: BlockType("Q5_0", 32, 22),
    7: BlockType("Q5_1", 32, 24),
    8: BlockType("Q8_0", 32, 34),
    10: BlockType("Q2_K", 256, 84),
    11: BlockType("Q3_K", 256, 110),
    12: BlockType("Q4_K", 256, 144),
    13: BlockType("Q5_K", 256, 176),
    14: BlockType("Q6_K", 256, 210),
    20: BlockType("IQ4_NL", 32, 18),
    23: BlockType("IQ4_XS", 256, 136),
    30: BlockType("BF16", 1, 2),
    39: BlockType("MXFP4", 32, 17),
}
BY_NAME = {kind.name: kind for kind in TYPES.values()}


_PART = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf", re.ASCII)


def part_files(path: Path) -> tuple[Path, ...]:
    """The files of the model of which ``path`` is one, by their names; a name that says of no others is alone.

    >>> [part.name for part in part_files(Path("m-00002-of-00002.gguf"))], part_files(Path("m.gguf"))
    (['m-00001-of-00002.gguf', 'm-00002-of-00002.gguf'], (PosixPath('m.gguf'),))
    """
    match = _PART.fullmatch(path.name)
    count = int(match["count"]) if match else 1
    if match is None or count < 2:
        return (path,)
    return tuple(path.with_name(f"{match['stem']}-{number:05}-of-{count:05}.gguf") for number in range(1, count + 1))


def model_name(path: Path) -> str:
    """What a GGUF file is called, without the number of a part.

    >>> model_name(Path("Qwen3-8B-Q8_0-00001-of-00002.gguf")), model_name(Path("m.gguf"))
    ('Qwen3-8B-Q8_0', 'm')
    """
    match = _PART.fullmatch(path.name)
    return match["stem"] if match else path.stem


class GgufFile:
    """The tensors and metadata of a GGUF file, or of several. Made by :meth:`open`; reading is safe from any thread.

    Attributes:
        path: of the file, or of the first.
        tensors: by name, shapes as Hugging Face has them: the innermost size last.
        metadata: by key, of the first file; arrays of numbers are arrays of NumPy.
        files: all of them.
    """

    def __init__(self, descriptors: Mapping[Path, int], headers: Sequence[_Header]) -> None:
        self._descriptors = descriptors
        self.files = tuple(descriptors)
        self.path = self.files[0]
        self.metadata: Mapping[str, Any] = headers[0].metadata
        self.tensors: Mapping[str, TensorInfo] = _merged(headers)
        self.notes: tuple[str, ...] = ()

    @classmethod
    def open(cls, path: Path, lists: bool = True) -> GgufFile:
        """Open ``path``, and the other files of its model; headers are read and checked, no tensor is.

        Args:
            lists: whether ``metadata`` has arrays too, of which those of the tokenizer are large.

        Raises:
            CheckpointError: a file cannot be read, is no GGUF or is damaged, or ``path`` is not the first of a model
                or others of it are missing.
            UnsupportedModel: it has a type of tensor or a version that is not read.
        """
        descriptors: dict[Path, int] = {}
        try:
            first = _opened(path, lists, descriptors)
            others = [_opened(part, False, descriptors) for part in _other_parts(first)]
            return cls(descriptors, [first, *others])
        except BaseException:
            _close(descriptors)
            raise

    def close(self) -> None:
        _close(self._descriptors)

    def blocks(self, name: str, start: int, stop: int) -> np.ndarray:
        """Rows [start, stop) as they are stored, uint8 (rows, bytes of a row); a vector is one row."""
        info = self.tensors[name]
        rows = info.shape[0] if len(info.shape) > 1 else 1
        stored = np.empty((stop - start, info.size_bytes // rows), np.uint8)
        place = info.offset + start * stored.shape[1]
        read_exactly(info.path, self._descriptors[info.path], stored.reshape(-1).data, place)
        return stored


def _opened(path: Path, lists: bool, descriptors: dict[Path, int]) -> _Header:
    """The header of ``path``, whose descriptor is added to ``descriptors``."""
    try:
        descriptors[path] = os.open(path, os.O_RDONLY)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be opened: {error.strerror}") from error
    return _Header(path, descriptors[path], lists)


def _close(descriptors: Mapping[Path, int]) -> None:
    for descriptor in descriptors.values():
        os.close(descriptor)


def _other_parts(first: _Header) -> tuple[Path, ...]:
    """The files after ``first``, none of which is missing; as llama.cpp, which wants the first to be named."""
    number, count = first.part
    if count == 1:
        return ()
    parts = part_files(first.path)
    if len(parts) != count:
        raise CheckpointError(
            f"{first.path} is file {number + 1} of {count} by its metadata; give it and the others the names that they "
            f"were published with, which end in -00001-of-{count:05}.gguf and so on"
        )
    if number or first.path != parts[0]:
        raise CheckpointError(f"{first.path} is file {number + 1} of {count}; give the first, {parts[0].name}")
    if missing := [part.name for part in parts if not part.is_file()]:
        raise CheckpointError(
            f"{first.path} is the first of {count} files, of which {', '.join(missing[:3])}"
            f"{f' and {len(missing) - 3} more' if len(missing) > 3 else ''} are not beside it; download them too"
        )
    return parts[1:]


def _merged(headers: Sequence[_Header]) -> dict[str, TensorInfo]:
    """The tensors of all files, as many as the first says."""
    tensors: dict[str, TensorInfo] = {}
    for index, header in enumerate(headers):
        if header.part != (index, len(headers)):
            number, count = header.part
            raise CheckpointError(
                f"{header.path} is file {number + 1} of {count} by its metadata, and {index + 1} of {len(headers)} by "
                "its name; download the files again"
            )
        if twice := tensors.keys() & header.tensors.keys():
            raise CheckpointError(
                f"{header.path} has {min(twice)[:80]!r}, which an earlier file has too; download the files again"
            )
        tensors |= header.tensors
    told = headers[0].metadata.get("split.tensors.count", len(tensors))
    if len(headers) > 1 and told != len(tensors):
        raise CheckpointError(
            f"{headers[0].path} and its other files have {len(tensors)} tensors, it says {told}; download them again"
        )
    return tensors


class _Header:
    """What stands before the tensors."""

    def __init__(self, path: Path, descriptor: int, lists: bool) -> None:
        self.path, self.descriptor, self.lists = path, descriptor, lists
        self.size = os.fstat(descriptor).st_size
        self.position = 0
        self.buffer, self.buffered = b"", 0
        if self.take(4) != MAGIC:
            raise CheckpointError(f"{path} is no GGUF file: it begins otherwise; download it again")
        version = self.scalar("I")
        if version not in VERSIONS:
            raise UnsupportedModel(f"{path} is GGUF of version {version}, expected {' or '.join(map(str, VERSIONS))}")
        tensors, entries = self.scalar("Q"), self.scalar("Q")
        if tensors > MOST_TENSORS or entries > MOST_ENTRIES:
            raise self.damaged(f"it would have {tensors} tensors and {entries} entries of metadata")
        self.metadata: dict[str, Any] = {}
        for _ in range(entries):
            key = self.text()
            if key in self.metadata:
                raise self.damaged(f"{key[:80]!r} is there twice")
            self.metadata[key] = self.value(self.scalar("I"))
        self.tensors = self.read_tensors(tensors)

    @property
    def part(self) -> tuple[int, int]:
        """Which file of how many it is, from 0."""
        number, count = (self.metadata.get(f"split.{name}", default) for name, default in (("no", 0), ("count", 1)))
        if type(number) is not int or type(count) is not int or not 0 <= number < max(count, 1):
            raise self.damaged(f"it would be file {str(number)[:20]} of {str(count)[:20]}")
        return number, max(count, 1)

    def read_tensors(self, count: int) -> dict[str, TensorInfo]:
        """The tensors by name, each checked to lie in the file."""
        found = []
        for _ in range(count):
            name, dimensions = self.text(), self.scalar("I")
            if not 1 <= dimensions <= MOST_DIMENSIONS:
                raise self.damaged(f"{name[:80]!r} would have {dimensions} dimensions")
            shape = tuple(reversed([self.scalar("Q") for _ in range(dimensions)]))
            number, offset = self.scalar("I"), self.scalar("Q")
            if number not in TYPES:
                raise UnsupportedModel(
                    f"{self.path}: {name[:80]!r} is of GGUF's type {number}, expected one of {', '.join(BY_NAME)}; "
                    "give another quantisation of the model"
                )
            found.append((name, shape, TYPES[number], offset))
        alignment = self.metadata.get("general.alignment", 32)
        if type(alignment) is not int or not 1 <= alignment <= 1 << 20:
            raise self.damaged(f"general.alignment is {alignment!r}")
        data = -(-self.position // alignment) * alignment
        tensors: dict[str, TensorInfo] = {}
        for name, shape, kind, offset in found:
            if min(shape) < 1 or shape[-1] % kind.elements or math.prod(shape) > 1 << 48:
                raise self.damaged(f"{name[:80]!r} of type {kind.name} would have the shape {shape}")
            size = math.prod(shape) // kind.elements * kind.size_bytes
            if data + offset + size > self.size:
                raise CheckpointError(
                    f"{self.path} is truncated: {name[:80]!r} ends {data + offset + size - self.size} bytes after it; "
                    "download it again"
                )
            if name in tensors:
                raise self.damaged(f"the tensor {name[:80]!r} is there twice")
            tensors[name] = TensorInfo(name, kind.name, shape, self.path, data + offset, size)
        return tensors

    def value(self, kind: int, depth: int = 0) -> Any:
        if kind == STRING:
            return self.text()
        if kind in SCALARS:
            return self.scalar(SCALARS[kind])
        if kind != ARRAY or depth > 2:
            raise self.damaged(f"metadata of type {kind}")
        inner, count = self.scalar("I"), self.scalar("Q")
        if count > self.size:  # each has a byte or more
            raise self.damaged(f"an array of {count}")
        if inner in SCALARS:
            element = np.dtype("<" + ("u1" if SCALARS[inner] == "?" else SCALARS[inner]))
            return np.frombuffer(self.take(count * element.itemsize), element)
        if self.lists:
            return [self.value(inner, depth + 1) for _ in range(count)]
        for _ in range(count):
            self.value(inner, depth + 1)
        return []

    def scalar(self, code: str) -> Any:
        return struct.unpack("<" + code, self.take(struct.calcsize("<" + code)))[0]

    def text(self) -> str:
        try:
            return self.take(self.scalar("Q")).decode()
        except UnicodeDecodeError as error:
            raise self.damaged(f"a text that is not UTF-8 ({error})") from error

    def take(self, count: int) -> bytes:
        """The next ``count`` bytes."""
        if count > LONGEST_HEADER or self.position + count > min(self.size, LONGEST_HEADER):
            raise CheckpointError(f"{self.path} ends in its header, or is damaged there; download it again")
        begin = self.position - self.buffered
        if begin + count > len(self.buffer):
            self.buffer = bytes(self.piece(max(count, 1 << 20)))
            self.buffered, begin = self.position, 0
        self.position += count
        return self.buffer[begin : begin + count]

    def piece(self, count: int) -> bytearray:
        piece = bytearray(min(count, self.size - self.position))
        read_exactly(self.path, self.descriptor, memoryview(piece), self.position)
        return piece

    def damaged(self, what: str) -> CheckpointError:
        return CheckpointError(f"{self.path} is damaged: {what}; download it again")
