"""One GGUF file: its metadata and where its tensors lie, checked before anything is made of them.

The format is little-endian: a magic, a version, two counts, metadata by key, a name, sizes, type and offset for each
tensor, and their blocks (https://github.com/ggml-org/ggml/blob/master/docs/gguf.md). A file may come from anyone: no
number in it is believed before it is compared with the file's length.
"""

from __future__ import annotations

import math
import os
import struct
from collections.abc import Mapping
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


class GgufFile:
    """The tensors and metadata of a GGUF file. Made by :meth:`open`; reading is safe from several threads.

    Attributes:
        tensors: by name, shapes as Hugging Face has them: the innermost size last.
        metadata: by key; arrays of numbers are arrays of NumPy.
    """

    def __init__(self, path: Path, descriptor: int, header: _Header) -> None:
        self.path, self._descriptor = path, descriptor
        self.tensors: Mapping[str, TensorInfo] = header.tensors
        self.metadata: Mapping[str, Any] = header.metadata
        self.files = (path,)
        self.notes: tuple[str, ...] = ()

    @classmethod
    def open(cls, path: Path, lists: bool = True) -> GgufFile:
        """Open ``path``; its header is read and checked, no tensor is.

        Args:
            lists: whether ``metadata`` has arrays too, of which those of the tokenizer are large.

        Raises:
            CheckpointError: it cannot be read, is no GGUF, or is damaged.
            UnsupportedModel: it has a type of tensor or a version that is not read.
        """
        try:
            descriptor = os.open(path, os.O_RDONLY)
        except OSError as error:
            raise CheckpointError(f"{path} cannot be opened: {error.strerror}") from error
        try:
            return cls(path, descriptor, _Header(path, descriptor, lists))
        except BaseException:
            os.close(descriptor)
            raise

    def close(self) -> None:
        os.close(self._descriptor)

    def blocks(self, name: str, start: int, stop: int) -> np.ndarray:
        """Rows [start, stop) as they are stored, uint8 (rows, bytes of a row); a vector is one row."""
        info = self.tensors[name]
        rows = info.shape[0] if len(info.shape) > 1 else 1
        stored = np.empty((stop - start, info.size_bytes // rows), np.uint8)
        read_exactly(info.path, self._descriptor, stored.reshape(-1).data, info.offset + start * stored.shape[1])
        return stored


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
