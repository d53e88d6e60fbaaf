"""From a graph without values to the files of an engine: two ONNX files over one file of weights.

The place of every tensor in the weights file follows from its shape alone, so the file is written in
one pass, a slice of rows at a time, by a few threads, and nothing larger than a slice is ever in memory.
A weight that the graph reads twice (a tied embedding and head) has one place.
"""

from __future__ import annotations

import math
import os
import threading
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np
import onnx_ir as ir

from qwen_build.checkpoint.weights import Checkpoint
from qwen_build.graph.model import Graph
from qwen_build.quantization.grid import Rounded, joined
from qwen_build.quantization.schemes import Float32, Scheme, StoredPart
from qwen_engine.errors import BuildError, CheckpointError
from qwen_engine.graph_io import EMBEDDING, LAYERS, layer_of
from qwen_engine.manifest import WEIGHTS_FILE
from qwen_plugin.layout import gated_order
from qwen_run.runtime.machine import physical_cores

Result = TypeVar("Result")

# Elements of a weight in memory at a time, for each thread: large enough to hide Python, small enough for a cache.
SLICE_ELEMENTS = 1 << 20
# float32 arrays of a slice's size that quantising one needs at its peak.
ARRAYS_PER_SLICE = 6
_PIECE = 2 << 20  # bytes, a huge page
# Tensors start at a multiple of this: a cache line, and a page where the tensor is at least that large.
ALIGNMENTS = (64, 4096)
CONSTANTS = "constants"  # what the group of tensors is called that are no weights
_NO_LAYER = 1 << 30  # stands behind all layers
# Constants up to this size stay in the graph: ONNX's shape inference wants to see axes and the like.
INLINE_BYTES = 1024


class WeightSource(Protocol):
    """Where the values of a graph weight come from."""

    @property
    def shapes(self) -> tuple[tuple[str, tuple[int, ...]], ...]:
        """The tensors of the checkpoint it stands for, and their shapes."""

    def read(self, checkpoint: Checkpoint, start: int, stop: int) -> np.ndarray | Rounded:
        """Rows [start, stop), float32 or on the grid of their scheme already."""


@dataclass(frozen=True)
class Place:
    """Where a tensor lies in the weights file."""

    offset: int
    part: StoredPart

    @property
    def block_bytes(self) -> int:
        return self.part.size_bytes // self.part.shape[0]


@dataclass(frozen=True)
class PlannedWeight:
    """A weight of the checkpoint, how it is stored, and where each of its parts lies."""

    source: WeightSource
    shape: tuple[int, ...]
    scheme: Scheme
    places: Mapping[str, Place]
    gated_panels: bool = False

    def read(self, checkpoint: Checkpoint, start: int, stop: int) -> np.ndarray | Rounded:
        """Rows [start, stop) in the order they are stored in: as the source has them, or in gated panels."""
        if not self.gated_panels:
            return self.source.read(checkpoint, start, stop)
        half = self.shape[0] // 2
        halves = [self.source.read(checkpoint, first + start // 2, first + stop // 2) for first in (0, half)]
        order = gated_order(0, stop - start, stop - start)
        return joined(halves, lambda arrays: np.concatenate(arrays)[order])

    def slices(self) -> Iterator[tuple[int, int]]:
        """Row ranges of whole blocks: at most ``SLICE_ELEMENTS`` elements, or one block."""
        rows, *rest = self.shape
        block = self.scheme.block_rows
        step = max(1, SLICE_ELEMENTS // math.prod(rest) // block if rest else rows) * block
        return ((start, min(start + step, rows)) for start in range(0, rows, step))


@dataclass(frozen=True)
class Layout:
    """The weights file: what is written where, and which place each initializer of the graph reads.

    Attributes:
        groups: what lies together, and where it ends; see ``qwen_engine/extents.py``.
    """

    weights: tuple[PlannedWeight, ...]
    constants: tuple[tuple[np.ndarray, Place], ...]
    places: Mapping[str, Place]
    size_bytes: int
    groups: tuple[tuple[str, int], ...]


def plan_layout(graph: Graph, sources: Mapping[str, WeightSource]) -> Layout:
    """Give every tensor of ``graph`` its place. ``sources`` has the source of each graph weight.

    What belongs to a decoder layer lies together, so that a stage of some layers reads one stretch of the file.
    """
    end = 0
    places: dict[str, Place] = {}
    planned: dict[tuple[WeightSource, Scheme], PlannedWeight] = {}
    constants: list[tuple[np.ndarray, Place]] = []
    groups: list[tuple[str, int]] = []  # what lies together, and where it begins

    def put(part: StoredPart) -> Place:
        nonlocal end
        alignment = max(a for a in ALIGNMENTS if a == ALIGNMENTS[0] or part.size_bytes >= a)
        offset = -(-end // alignment) * alignment
        end = offset + part.size_bytes
        return Place(offset, part)

    def put_weight(name: str) -> None:
        scheme: Scheme
        if name in graph.plain:
            value, scheme = graph.plain[name], Float32()
            shape, gated = tuple(value.shape), False
            parts = {"weight": StoredPart(shape, ir.DataType.FLOAT)}
            values = {"weight": value}
        else:
            module = graph.stored[name]
            shape, scheme, gated = module.shape, module.scheme, module.gated_panels
            parts, values = module.scheme.parts(shape), module.parts
        key = sources[name], scheme
        if key not in planned:
            placed = {part: put(stored) for part, stored in parts.items()}
            planned[key] = PlannedWeight(sources[name], shape, scheme, placed, gated)
        places.update({value.name: planned[key].places[part] for part, value in values.items()})

    for name, value in graph.model.graph.initializers.items():
        if value.const_value is not None and value.const_value.nbytes > INLINE_BYTES:
            array = np.ascontiguousarray(value.const_value.numpy())
            places[name] = put(StoredPart(array.shape, value.const_value.dtype))
            constants.append((array, places[name]))
            groups = [(CONSTANTS, 0)]
    # Large ones first: they begin at a page, and so does the group.
    for group, names in _grouped([*graph.stored, *graph.plain]):
        before = end
        for name in names:
            put_weight(name)
        if end > before:  # else it is tied to what is there already
            groups.append((group, before))
    ends = [start for _, start in groups[1:]] + [end]
    extents = tuple((holds, last) for (holds, _), last in zip(groups, ends, strict=True))
    return Layout(tuple(planned.values()), tuple(constants), places, end, extents)


def _grouped(names: Iterable[str]) -> list[tuple[str, list[str]]]:
    """The names of weights by the decoder layer or the module that they belong to, in the order these compute."""
    groups: dict[str, list[str]] = {EMBEDDING: []}
    for name in sorted(names, key=lambda name: _NO_LAYER if (layer := layer_of(name)) is None else layer):
        layer = layer_of(name)
        groups.setdefault(name.rpartition(".")[0] if layer is None else f"{LAYERS}.{layer}", []).append(name)
    return list(groups.items())


def write_graph(graph: Graph, layout: Layout, path: Path) -> None:
    """Write the graph to ``path``, its initializers pointing into the weights file beside it.

    Nodes read a tied head and embedding through one of the two: ONNX Runtime maps every initializer by itself, and
    memory that is read through two maps counts twice. The other stays, for those who look for a linear by its name.
    """
    readers: dict[tuple[int, tuple[int, ...]], ir.Value] = {}
    for name, value in graph.model.graph.initializers.items():
        if name not in layout.places:
            continue
        place = layout.places[name]
        one = readers.setdefault((place.offset, tuple(map(int, value.shape or ()))), value)
        if one is not value:
            ir.convenience.replace_all_uses_with(value, one)
        value.const_value = ir.ExternalTensor(
            WEIGHTS_FILE, place.offset, place.part.size_bytes, place.part.dtype,
            shape=value.shape, name=name, base_dir=path.parent,
        )  # fmt: skip
    path.write_bytes(ir.to_proto(graph.model).SerializeToString())


def write_weights(layout: Layout, checkpoint: Checkpoint, path: Path, advance: Callable[[int], object]) -> None:
    """Write the weights file, reading each weight of ``checkpoint`` once.

    Args:
        advance: called with the number of bytes newly written, from this thread.

    Raises:
        BuildError: the disk is full.
        CheckpointError: a weight cannot be read, is not finite, or too large for its scheme.
    """
    try:
        with closing(WeightsFile(path, layout.size_bytes)) as file:
            for array, place in layout.constants:
                file.write(array, place.offset)
                advance(array.nbytes)

            def write_slice(weight: PlannedWeight, start: int, stop: int) -> int:
                try:
                    tensors = weight.scheme.quantize(weight.read(checkpoint, start, stop))
                except OverflowError as error:
                    name = " or ".join(name for name, _ in weight.source.shapes)
                    raise CheckpointError(f"{name}: {error}; use --kernels stock") from error
                for part, place in weight.places.items():
                    offset = place.offset + start // weight.scheme.block_rows * place.block_bytes
                    file.write(tensors[part], offset)
                return sum(tensor.nbytes for tensor in tensors.values())

            jobs = ((weight, *rows) for weight in layout.weights for rows in weight.slices())
            with closing(in_threads(write_slice, jobs)) as results:  # no thread writes once the file is closed
                for written in results:
                    advance(written)
    except OSError as error:
        size = f"{layout.size_bytes / 2**20:,.0f} MiB"
        raise BuildError(f"the weights cannot be written: {error.strerror}; the engine takes {size}") from error


class WeightsFile:
    """A new file of ``size_bytes`` that threads write to.

    Each aligned piece of 2 MiB is filled with zeros, in one write, before anything else is written to it. Linux then
    keeps it in a huge page of the file cache, as it does when it reads the file from the disk. Pages of 4 KiB all over
    the memory are read slower: of the 0.5B shape a token's products took 13.4 ms out of them, 12.4 out of these.
    """

    def __init__(self, path: Path, size_bytes: int) -> None:
        self._size_bytes = size_bytes
        self._filled = bytearray(-(-size_bytes // _PIECE))  # 1 where a piece is
        self._lock = threading.Lock()
        self._descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
        try:
            reserve(self._descriptor, size_bytes)
        except BaseException:
            self.close()
            raise

    def write(self, array: np.ndarray, offset: int) -> None:
        """Write the bytes of ``array`` at ``offset``."""
        view = np.ascontiguousarray(array).reshape(-1).view(np.uint8).data
        for piece in range(offset // _PIECE, -(-(offset + len(view)) // _PIECE)):
            with self._lock:
                if not self._filled[piece]:
                    start = piece * _PIECE
                    self._write_exactly(memoryview(bytes(min(_PIECE, self._size_bytes - start))), start)
                    self._filled[piece] = 1
        self._write_exactly(view, offset)

    def close(self) -> None:
        os.close(self._descriptor)

    def _write_exactly(self, view: memoryview, offset: int) -> None:
        while view:  # a short write goes on where it stopped
            written = os.pwrite(self._descriptor, view, offset)
            view, offset = view[written:], offset + written


def in_threads(work: Callable[..., Result], jobs: Iterable[tuple[Any, ...]]) -> Generator[Result, None, None]:
    """Results of ``work(*job)`` as they come, a few jobs at a time; the first error ends it."""
    threads = physical_cores()
    with ThreadPoolExecutor(threads) as pool:
        running: set[Future[Result]] = set()
        try:
            for job in jobs:
                running.add(pool.submit(work, *job))
                if len(running) > threads:
                    done, running = wait(running, return_when=FIRST_COMPLETED)
                    yield from (future.result() for future in done)
            yield from (future.result() for future in running)
        finally:
            for future in running:
                future.cancel()


def reserve(descriptor: int, size_bytes: int) -> None:
    """Give the file its final size; a full disk shows here, and not after minutes."""
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(descriptor, 0, size_bytes)
    else:  # macOS
        os.ftruncate(descriptor, size_bytes)
