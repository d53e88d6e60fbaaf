"""The operators of an ONNX file and the tensors they read, without onnx.

Numbers of fields are those of onnx.proto. ONNX Runtime has no way to ask a session for its operators.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from pathlib import Path

from qwen_engine.errors import EngineError
from qwen_engine.regular_files import read_regular
from qwen_run.engine_files.protobuf import fields, varints

# TensorProto.DataType
_DTYPES = {1: "float32", 2: "uint8", 3: "int8", 6: "int32", 7: "int64", 10: "float16"}

Attribute = int | float | str


@dataclass(frozen=True)
class Tensor:
    """An initializer: its type and shape, and its values: ``raw`` here, or at ``offset`` bytes of the weights file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    raw: bytes = b""
    offset: int | None = None


@dataclass(frozen=True)
class Node:
    """One operator. An input or output that is not given has an empty name."""

    name: str
    domain: str
    op_type: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    attributes: dict[str, Attribute]


@dataclass(frozen=True)
class OnnxGraph:
    """The operators of a graph in the order they run, and its initializers by name."""

    nodes: tuple[Node, ...]
    initializers: dict[str, Tensor]


def read_graph(path: Path) -> OnnxGraph:
    """Read the ONNX file ``path``.

    Raises:
        EngineError: it cannot be read, or is not ONNX.
    """
    try:
        (graph,) = (value for number, value in _bytes_of(read_regular(path)) if number == 7)
        parts = _bytes_of(graph)
        initializers = [tensor_of(value) for number, value in parts if number == 5]
        nodes = tuple(node_of(value) for number, value in parts if number == 1)
    except OSError as error:
        raise EngineError(f"{path} cannot be read: {error.strerror}; build the engine again") from error
    except (LookupError, ValueError, TypeError, AttributeError, struct.error) as error:
        raise EngineError(f"{path} is not ONNX; build the engine again") from error
    return OnnxGraph(nodes, {tensor.name: tensor for tensor in initializers})


def node_of(message: bytes) -> Node:
    """The operator that a NodeProto describes."""
    values: dict[int, list[bytes]] = {}
    for number, value in _bytes_of(message):
        values.setdefault(number, []).append(value)

    def texts(number: int) -> tuple[str, ...]:
        return tuple(value.decode() for value in values.get(number, []))

    return Node(
        name="".join(texts(3)),
        domain="".join(texts(7)),
        op_type="".join(texts(4)),
        inputs=texts(1),
        outputs=texts(2),
        attributes=dict(_attribute(value) for value in values.get(5, [])),
    )


def _attribute(message: bytes) -> tuple[str, Attribute]:
    """Name and value; one that is no number and no text reads as an empty text."""
    name, result = "", ""  # type: str, Attribute
    for number, value, *_ in fields(message):
        if number == 1 and isinstance(value, bytes):
            name = value.decode()
        elif number == 2 and isinstance(value, bytes):
            (result,) = struct.unpack("<f", value)
        elif number == 3 and isinstance(value, int):
            result = value - (value >> 63 << 64)  # negative ones are written as 64 bits
        elif number == 4 and isinstance(value, bytes):
            result = value.decode()
    return name, result


def tensor_of(message: bytes) -> Tensor:
    """The initializer that a TensorProto describes."""
    name, dtype, shape, raw, offset = "", "", list[int](), b"", None
    for number, value, *_ in fields(message):
        if number == 1:
            shape += [value] if isinstance(value, int) else varints(value)
        elif number == 2 and isinstance(value, int):
            dtype = _DTYPES.get(value, f"type {value}")
        elif number == 8 and isinstance(value, bytes):
            name = value.decode()
        elif number == 9 and isinstance(value, bytes):
            raw = value
        elif number == 13 and isinstance(value, bytes):  # external_data: a key and its value, both text
            entry = dict(_bytes_of(value))
            if entry[1] == b"offset":
                offset = int(entry[2])
    return Tensor(name, dtype, tuple(shape), raw, offset)


def _bytes_of(message: bytes) -> list[tuple[int, bytes]]:
    """The fields that are no plain numbers."""
    return [(number, value) for number, value, *_ in fields(message) if isinstance(value, bytes)]
