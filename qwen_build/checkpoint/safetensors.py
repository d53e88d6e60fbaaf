"""Reading the weights of a Hugging Face checkpoint, streamed.

Rows are read with positioned reads rather than through a memory map, whose walked pages would count as resident.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qwen_build.checkpoint.safetensors_file import (
    CHUNK_BYTES,
    PACKED_STORAGE,
    PACKED_SUFFIXES,
    STORAGE,
    Float32,
    TensorInfo,
    read_exactly,
)
from qwen_build.checkpoint.shards import Shards, close, open_shards, some
from qwen_engine.errors import CheckpointError


class Checkpoint:
    """The weights of a Hugging Face directory. Made by :meth:`open`; a context manager that closes its files.

    ``tensors`` maps every name to its :class:`TensorInfo`; ``files`` are the safetensors files; ``notes`` say what of
    them is read in another way than it is written. Reading is
    safe from several threads.
    """

    def __init__(self, shards: Shards) -> None:
        self.tensors: Mapping[str, TensorInfo] = shards.tensors
        self.files = tuple(shards.descriptors)
        self.notes = shards.notes
        self._descriptors: Mapping[Path, int] = shards.descriptors

    @classmethod
    def open(cls, directory: Path) -> Checkpoint:
        """Open the weights of ``directory``. Every header is read and checked against its file's length, no weight is.

        Raises:
            CheckpointError: see :func:`qwen_build.checkpoint.shards.open_shards`.
        """
        return cls(open_shards(directory))

    def check_readable(self, names: Iterable[str]) -> None:
        """Refuse tensors that are stored in another way than this class reads, of those that are there.

        Raises:
            CheckpointError: names them.
        """
        infos = [self.tensors[name] for name in sorted(names) if name in self.tensors]
        if empty := [f"{info.name} {info.shape}" for info in infos if 0 in info.shape]:
            raise CheckpointError(f"{some(empty)} have no values; save the checkpoint whole")
        kinds = {info.name: PACKED_STORAGE if info.name.endswith(PACKED_SUFFIXES) else STORAGE for info in infos}
        if strange := [f"{info.name} ({info.dtype})" for info in infos if info.dtype not in kinds[info.name]]:
            raise CheckpointError(
                f"the checkpoint stores {some(strange)}, expected only {', '.join(STORAGE)}; of checkpoints that "
                "are already quantised, GPTQ and AWQ are read (not FP8, bitsandbytes), use the one it was made from"
            )

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        close(self._descriptors)
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
            read_exactly(info.path, self._descriptors[info.path], stored.data, offset + first * chunk.itemsize)
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
            read_exactly(info.path, descriptor, stored.data, info.offset)
        else:
            for row in range(rows):
                offset = info.offset + (row * columns + start) * stored.itemsize
                read_exactly(info.path, descriptor, stored[row].data, offset)
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
