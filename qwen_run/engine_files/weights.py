"""The weights an engine computes with, read from its own files: float32, by the names Hugging Face gives them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from qwen_engine.errors import EngineError, shown
from qwen_engine.graph_io import EMBEDDING, HEAD
from qwen_engine.manifest import GRAPH_FILE, MANIFEST_FILE, WEIGHTS_FILE, LinearRecord, Manifest
from qwen_plugin.layout import PANEL, ZERO_POINTS
from qwen_run.engine_files.checksums import check_operators
from qwen_run.engine_files.onnx_file import Tensor, read_graph
from qwen_run.engine_files.stored_rows import READERS, WeightShape, read_rows

# elements of a weight that are dequantised at a time: bounds the memory that takes to some tens of megabytes
SLICE_ELEMENTS = 1 << 20


@dataclass(frozen=True)
class WeightPart:
    """Rows [start, stop) of what the engine stores as ``owner``, which Hugging Face has by themselves as ``name``."""

    name: str
    owner: str
    start: int
    stop: int


def parts_of(record: LinearRecord) -> Iterator[WeightPart]:
    """The modules of Hugging Face whose rows a linear of the engine has."""
    start = 0
    for part in record.all_parts:
        yield WeightPart(part.name, record.name, start, start + part.rows)
        start += part.rows


@dataclass(frozen=True)
class StoredLinear:
    """A linear or embedding as its engine stores it.

    Attributes:
        tensors: by the last part of their name.
        permutation: int32 (in_features), stored column k multiplies input column permutation[k]; None: in order.
    """

    record: LinearRecord
    tensors: Mapping[str, np.ndarray]
    permutation: np.ndarray | None

    def rows(self, start: int, stop: int) -> np.ndarray:
        """Rows [start, stop) of the weight, float32 (rows, in_features), the columns in the order of the inputs."""
        tensors, shape, first = self._holding(start, stop)
        return self._in_order(read_rows(self.record.quantization, shape, tensors, start - first, stop - first))

    def integers(self, start: int, stop: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Rows [start, stop) of a weight that is (q - zero point) * scale: these three, each (rows, in_features)."""
        stored = self.record.quantization
        tensors, shape, first = self._holding(start, stop)
        q, scales, zero_points = READERS[stored.layout](stored, shape, tensors, start - first, stop - first)
        if zero_points is None:
            zero_points = np.full(scales.shape, ZERO_POINTS[stored.bits], np.uint8)
        spread = (values.repeat(stored.group_size, axis=1) for values in (scales, zero_points))
        scales, zero_points = (self._in_order(values) for values in spread)
        return self._in_order(q), scales, zero_points

    def _holding(self, start: int, stop: int) -> tuple[Mapping[str, np.ndarray], WeightShape, int]:
        """The weight of the stack that rows [start, stop) are in: its tensors, its shape, its first row."""
        record = self.record
        each = record.out_features // record.stack
        number = start // each
        assert stop <= (number + 1) * each, "no part has rows of two weights"
        return self.weight(number), (each, record.in_features), number * each

    def weight(self, number: int) -> Mapping[str, np.ndarray]:
        """The tensors of one weight of the stack."""
        count = self.record.stack
        if count == 1:
            return self.tensors
        shares = {kind: len(tensor) // count for kind, tensor in self.tensors.items()}
        return {kind: tensor[number * shares[kind] :][: shares[kind]] for kind, tensor in self.tensors.items()}

    def _in_order(self, stored: np.ndarray) -> np.ndarray:
        """Stored columns (R, padded) in the order of the inputs, (R, in_features)."""
        stored = stored[:, : self.record.in_features]
        if self.permutation is None:
            return stored
        ordered = np.empty_like(stored)
        ordered[:, self.permutation] = stored
        return ordered


class EngineWeights:
    """Everything a model of Hugging Face has as a parameter.

    Attributes:
        linears: by the engine's names.
        vectors: norms and biases, float32, by Hugging Face's names.
        parts: the linears and the embedding by Hugging Face's names.

    Args:
        engine: its directory; the files are read where they are, a slice at a time.

    Raises:
        EngineError: a file cannot be read, or has something else than the manifest says, or this installation has its
            operators in other versions.
    """

    def __init__(self, engine: Path) -> None:
        self.manifest = Manifest.read(engine)
        check_operators(engine, self.manifest)
        initializers = read_graph(engine / GRAPH_FILE).initializers
        file = _map(engine / WEIGHTS_FILE)
        self.linears: dict[str, StoredLinear] = {}
        self.parts: dict[str, WeightPart] = {}
        self.vectors: dict[str, np.ndarray] = {}
        self._places: dict[str, list[int | None]] = {}
        owned: dict[str, dict[str, Tensor]] = {}  # module -> its tensors by the last part of their name
        for name, tensor in initializers.items():
            module, _, kind = name.rpartition(".")
            owned.setdefault(module, {})[kind] = tensor
        for record in self.manifest.linears:
            tensors = owned.pop(record.name, None)
            if tensors is None:
                raise EngineError(f"{engine / GRAPH_FILE} has no weight of {record.name}; build the engine again")
            bias, permutation = tensors.pop("bias", None), tensors.pop("permutation", None)
            arrays = {kind: _values(tensor, file) for kind, tensor in tensors.items()}
            order = None if permutation is None else _values(permutation, file)
            self.linears[record.name] = StoredLinear(record, arrays, order)
            self._places[record.name] = [tensor.offset for tensor in tensors.values()]
            for part in parts_of(record):
                self.parts[part.name] = part
                if bias is not None:
                    self.vectors[f"{part.name}.bias"] = _values(bias, file)[part.start : part.stop]
        for module, tensors in owned.items():  # what is left are norms, and constants such as the rotary tables
            if "weight" in tensors:
                self.vectors[f"{module}.weight"] = _values(tensors["weight"], file)

    @property
    def head_is_shared(self) -> bool:
        """Whether head and embedding are the same bytes."""
        return self._places[EMBEDDING] == self._places[HEAD]

    def pieces(self, name: str) -> Iterator[tuple[slice, np.ndarray]]:
        """The weight of the linear that Hugging Face calls ``name``, some rows at a time: which, and their values."""
        part = self.parts[name]
        linear = self.linears[part.owner]
        for rows in slices(part.stop - part.start, linear.record.in_features):
            try:
                values = linear.rows(part.start + rows.start, part.start + rows.stop)
            except (KeyError, IndexError, TypeError, ValueError, AssertionError) as error:  # layouts assert shapes
                raise EngineError(
                    f"{part.owner} is not stored as {MANIFEST_FILE} says; build the engine again"
                ) from error
            yield rows, values


def slices(rows: int, in_features: int) -> Iterator[slice]:
    """All of ``rows``, as many at a time as have ``SLICE_ELEMENTS``."""
    step = max(1, SLICE_ELEMENTS // in_features // PANEL) * PANEL
    return (slice(start, min(start + step, rows)) for start in range(0, rows, step))


def _map(path: Path) -> np.ndarray:
    try:
        return np.memmap(path, np.uint8, "r")
    except (OSError, ValueError) as error:
        raise EngineError(f"{path} cannot be read: {error}; build the engine again") from error


def _values(tensor: Tensor, file: np.ndarray) -> np.ndarray:
    try:
        dtype = np.dtype(tensor.dtype)
        if tensor.offset is None:
            return np.frombuffer(tensor.raw, dtype).reshape(tensor.shape)
        stop = tensor.offset + dtype.itemsize * math.prod(tensor.shape)
        if not 0 <= tensor.offset <= stop <= len(file):
            raise EngineError(f"{tensor.name} lies beyond the end of {WEIGHTS_FILE}; build the engine again")
        return file[tensor.offset : stop].view(dtype).reshape(tensor.shape)
    except (TypeError, ValueError) as error:
        raise EngineError(
            f"{tensor.name} is no array of {shown(tensor.dtype)} {shown(tensor.shape)}; build the engine again"
        ) from error
