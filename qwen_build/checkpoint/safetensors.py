"""Reading the tensors of safetensors files as they are stored, streamed.

Rows are read with positioned reads rather than through a memory map, whose walked pages would count as resident.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qwen_build.checkpoint.safetensors_file import (
    CHUNK_BYTES,
    ELEMENTS,
    STORAGE,
    Float32,
    TensorInfo,
    read_exactly,
)
from qwen_build.checkpoint.shards import Shards, close, open_file, open_shards
from qwen_engine.errors import CheckpointError


class Safetensors:
    """The tensors of a Hugging Face directory, by the names of the graph. Made by :meth:`open`.

    ``tensors`` maps every name to its :class:`TensorInfo`; ``files`` are the safetensors files; ``notes`` say what of
    their names is read in another way than it is written. Reading is safe from several threads.
    """

    def __init__(self, shards: Shards) -> None:
        self.tensors: Mapping[str, TensorInfo] = shards.tensors
        self.files = tuple(shards.descriptors)
        self.notes = shards.notes
        self._descriptors: Mapping[Path, int] = shards.descriptors

    @classmethod
    def open(cls, directory: Path) -> Safetensors:
        """Open the files of ``directory``. Every header is read and checked against its file's length, no weight is.

        Raises:
            CheckpointError: see :func:`qwen_build.checkpoint.shards.open_shards`.
        """
        return cls(open_shards(directory))

    @classmethod
    def open_file(cls, path: Path) -> Safetensors:
        """Open one file by itself. Raises as :meth:`open`."""
        return cls(open_file(path))

    def close(self) -> None:
        close(self._descriptors)
        self._descriptors = {}

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Float32:
        """Rows ``[start, stop)`` of the first axis, all by default, in a new C-contiguous float32 array.

        Beside the result, about a megabyte is in memory.

        Raises:
            CheckpointError: a value is NaN or infinite, or the file became shorter since it was opened.
        """
        info = self.tensors[name]
        if info.columns:
            return np.asarray(self.read_columns(name)[start:stop], np.float32)
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
            read_exactly(info.path, self._descriptors[info.path], stored.data, offset + first * chunk.itemsize)
            storage.decode(stored, part)
            finite = finite and bool(np.isfinite(part).all())
        if not finite:
            raise not_finite(info, out, start)
        return out

    def read_columns(self, name: str, start: int = 0, stop: int | None = None) -> NDArray[Any]:
        """Columns ``[start, stop)`` of a matrix, all by default, in a new array: integers as stored, floats as float32.

        A vector is read as a matrix of one row. FP8 is given as the bytes it is.

        Raises:
            CheckpointError: a value is NaN or infinite, or the file became shorter since it was opened.
        """
        info = self.tensors[name]
        rows, columns = (1, 1, *info.shape)[-2:]
        stop = columns if stop is None else stop
        if not 0 <= start <= stop <= columns:
            raise IndexError(f"{name} has {columns} columns, asked for [{start}, {stop})")

        stored = np.empty((rows, stop - start), ELEMENTS[info.dtype])
        descriptor = self._descriptors[info.path]
        first, whole = info.columns or (0, columns)
        if stop - start == whole:  # then the rows follow each other
            read_exactly(info.path, descriptor, stored.data, info.offset)
        else:
            for row in range(rows):
                offset = info.offset + (row * whole + first + start) * stored.itemsize
                read_exactly(info.path, descriptor, stored[row].data, offset)
        if info.dtype not in STORAGE:
            return stored
        values = np.empty(stored.shape, np.float32)
        STORAGE[info.dtype].decode(stored, values)
        if not np.isfinite(values).all():
            raise not_finite(info, values, 0)
        return values

    def read_rows(self, name: str, start: int = 0, stop: int | None = None) -> NDArray[Any]:
        """Rows ``[start, stop)`` of the first axis, all by default, in a new array of the elements as they are stored.

        Raises:
            CheckpointError: the file became shorter since it was opened.
        """
        info = self.tensors[name]
        rows, *rest = info.shape or (1,)
        stop = rows if stop is None else stop
        if not 0 <= start <= stop <= rows:
            raise IndexError(f"{name} has {rows} rows, asked for [{start}, {stop})")
        stored = np.empty((stop - start, *rest), ELEMENTS[info.dtype])
        offset = info.offset + start * math.prod(rest) * stored.itemsize
        read_exactly(info.path, self._descriptors[info.path], stored.reshape(-1).data, offset)
        return stored


def not_finite(info: TensorInfo, values: Float32, start: int) -> CheckpointError:
    bad = np.argwhere(~np.isfinite(values))
    position = [int(i) for i in bad[0]]
    if position:
        position[0] += start
    return CheckpointError(
        f"{info.name} in {info.path} has {len(bad)} NaN or infinite values, the first at {position}; "
        "the checkpoint is damaged, download or save it again"
    )
