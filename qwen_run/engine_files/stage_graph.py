"""The graph of some layers of an engine: its bytes cut in memory, without onnx, from the file that all stages have.

A stage has the embedding where it begins with the first layer, and the head where it ends with the last. Between two
stages exactly one value may cross: the hidden state. Where that is so is found by what operators read and write: the
residual is added between the last weight of a layer and the first of the next.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from qwen_engine.errors import EngineError
from qwen_engine.graph_io import layer_of
from qwen_engine.manifest import ITEM_BYTES, Manifest
from qwen_run.engine_files.onnx_file import Tensor, node_of, tensor_of
from qwen_run.engine_files.protobuf import Field, counted, fields, whole

# Numbers of fields, of onnx.proto.
_GRAPH = 7  # of ModelProto
_NODE, _INITIALIZER, _INPUT, _OUTPUT, _VALUE_INFO = 1, 5, 11, 12, 13  # of GraphProto
_ATTRIBUTES, _SUBGRAPHS = 5, (6, 11)  # of NodeProto, of AttributeProto
_FLOAT32 = 1  # of TensorProto.DataType


@dataclass(frozen=True)
class StageGraph:
    """A graph of some layers.

    Attributes:
        model: the bytes of the ONNX model.
        layers: which, of all.
        hidden_in: the input (T, hidden_size) float32 in place of what the layers before give; None: begins the model.
        hidden_out: the output of the same form; None: ends the model.
        stretches: first byte and end in the weights file of every tensor that is read.
    """

    model: bytes
    layers: range
    hidden_in: str | None
    hidden_out: str | None
    stretches: tuple[tuple[int, int], ...]

    @property
    def weight_bytes(self) -> int:
        """Of the weights file that are read."""
        return sum(end - start for start, end in self.stretches)


@dataclass(frozen=True)
class _Operator:
    """An operator: its bytes, what it reads and writes, and the layer whose weights or states it reads."""

    field: Field
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    layer: int | None


def check_layers(layers: range, num_layers: int) -> None:
    """
    Raises:
        EngineError: ``layers`` are no neighbouring layers of an engine that has ``num_layers``.
    """
    if layers.step != 1 or not 0 <= layers.start < layers.stop <= num_layers:
        raise EngineError(
            f"layers is {layers!r}, expected neighbouring ones of the {num_layers} that the engine has, "
            f"such as range(0, {max(1, num_layers // 2)})"
        )


def stage_graph(model: bytes, layers: range, manifest: Manifest) -> StageGraph:
    """Cut ``layers`` out of ``model``, the bytes of the graph of the engine of ``manifest``.

    Raises:
        EngineError: there are no such layers; the bytes are no ONNX model; or more than one value crosses an edge.
    """
    num_layers = manifest.model.num_hidden_layers
    check_layers(layers, num_layers)
    pools = {spec.name: spec.layer for spec in manifest.states if spec.layer is not None}
    try:
        parts = list(fields(model))
        (graph,) = (part.value for part in parts if part.number == _GRAPH and isinstance(part.value, bytes))
        graph_fields = list(fields(graph))
        operators = [_operator(field, pools) for field in graph_fields if field.number == _NODE]
        initializers = {
            tensor.name: (field, tensor)
            for field in graph_fields
            if field.number == _INITIALIZER and isinstance(field.value, bytes)
            for tensor in [tensor_of(field.value)]
        }
        inputs = {_name(field): field for field in graph_fields if field.number == _INPUT}
    except (LookupError, ValueError, TypeError, AttributeError) as error:
        raise EngineError("the graph is not ONNX; build the engine again") from error
    start, hidden_in = _edge(operators, layers.start, num_layers, {*initializers, *inputs})
    stop, hidden_out = _edge(operators, layers.stop, num_layers, {*initializers, *inputs})
    kept = operators[start:stop]
    read = {name for operator in kept for name in operator.inputs}
    info = [_value_info(name, manifest.model.hidden_size) for name in (hidden_in, hidden_out) if name]
    new = [
        *(graph[field.start : field.end] for field in graph_fields if field.number not in _REPLACED),
        *(graph[operator.field.start : operator.field.end] for operator in kept),
        *(graph[field.start : field.end] for name, (field, _) in initializers.items() if name in read),
        *(graph[field.start : field.end] for name, field in inputs.items() if name in read),
        *([counted(_INPUT, info[0])] if hidden_in else []),
        *(
            [counted(_OUTPUT, info[-1])]
            if hidden_out
            else (graph[field.start : field.end] for field in graph_fields if field.number == _OUTPUT)
        ),
    ]
    whole = b"".join(
        counted(_GRAPH, b"".join(new)) if part.number == _GRAPH else model[part.start : part.end] for part in parts
    )
    stretches = (_stretch(tensor) for name, (_, tensor) in initializers.items() if name in read)
    return StageGraph(whole, layers, hidden_in, hidden_out, tuple(each for each in stretches if each))


# What a stage has of its own, or, of the descriptions of values between operators, does without.
_REPLACED = (_NODE, _INITIALIZER, _INPUT, _OUTPUT, _VALUE_INFO)


def _edge(operators: Sequence[_Operator], layer: int, num_layers: int, given: set[str]) -> tuple[int, str | None]:
    """Where ``layer`` begins among ``operators``, and the value that crosses there; none at the ends of the model."""
    if layer == 0:
        return 0, None
    if layer == num_layers:
        return len(operators), None
    before = [index for index, each in enumerate(operators) if each.layer is not None and each.layer < layer]
    after = [index for index, each in enumerate(operators) if each.layer is not None and each.layer >= layer]
    if not before or not after or before[-1] > after[0]:
        raise EngineError(
            f"the graph has no place between layers {layer - 1} and {layer}; run it whole, without stages"
        )
    crossing: list[str] = []
    for index in range(after[0], before[-1], -1):
        crossing = _crossing(operators, index, given)
        if len(crossing) == 1:
            return index, crossing[0]
    raise EngineError(
        f"{len(crossing)} values cross from layer {layer - 1} to {layer} ({', '.join(crossing[:3])}), expected the "
        "hidden state alone; run it whole, without stages"
    )


def _crossing(operators: Sequence[_Operator], index: int, given: set[str]) -> list[str]:
    """What operators before ``index`` write and those from it on read, in order; ``given`` are inputs and weights."""
    written = {name for operator in operators[:index] for name in operator.outputs} - given
    return list(dict.fromkeys(n for operator in operators[index:] for n in operator.inputs if n in written))


def _operator(field: Field, pools: Mapping[str, int]) -> _Operator:
    assert isinstance(field.value, bytes)
    node = node_of(field.value)
    for attribute in _messages(field.value, _ATTRIBUTES):
        if any(inner.number in _SUBGRAPHS for inner in fields(attribute)):
            raise EngineError(f"{node.op_type} has a graph of its own, which is not cut; run it whole, without stages")
    layers = {pools.get(name, layer_of(name)) for name in node.inputs} - {None}
    return _Operator(
        field, node.inputs, node.outputs, max((layer for layer in layers if layer is not None), default=None)
    )


def _messages(message: bytes, wanted: int) -> Iterator[bytes]:
    return (f.value for f in fields(message) if f.number == wanted and isinstance(f.value, bytes))


def _name(field: Field) -> str:
    """Of a ValueInfoProto."""
    assert isinstance(field.value, bytes)
    return next(_messages(field.value, 1)).decode()


def _value_info(name: str, hidden_size: int) -> bytes:
    """A ValueInfoProto of float32 (T, hidden_size)."""
    shape = counted(1, counted(2, b"T")) + counted(1, whole(1, hidden_size))
    return counted(1, name.encode()) + counted(2, counted(1, whole(1, _FLOAT32) + counted(2, shape)))


def _stretch(tensor: Tensor) -> tuple[int, int] | None:
    if tensor.offset is None:
        return None
    size = ITEM_BYTES.get(tensor.dtype, 0)
    for dimension in tensor.shape:
        size *= dimension
    return tensor.offset, tensor.offset + size
