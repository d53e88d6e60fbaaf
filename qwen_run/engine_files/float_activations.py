"""The graph of an engine with the same weights, computing with activations in float32.

What is rounded on the way into a product cannot be compared from end to end at float thresholds, see
:meth:`qwen_run.accuracy.reference.Recipe.with_float_activations`. The operators take their precision from an attribute,
and that can be changed in the bytes of the graph: no other file of the engine is touched, and no onnx is needed.
"""

from __future__ import annotations

from qwen_engine.errors import EngineError
from qwen_run.engine_files.protobuf import rewritten

# Field numbers on the way to an attribute (onnx.proto): ModelProto.graph, GraphProto.node, NodeProto.attribute.
_ATTRIBUTES = (7, 1, 5)

# of QuantLinear, and of the two products of MoE
_PRECISIONS = (b"precision", b"gate_up_precision", b"down_precision")


def _named(name: bytes) -> bytes:
    """How an AttributeProto of this name begins, as protobuf writes it: field 1, a length and so many bytes."""
    return b"\x0a" + bytes([len(name)]) + name


def _text(name: bytes, value: bytes) -> bytes:
    """The same with its value behind it: field 4 (s), a length and so many bytes."""
    return _named(name) + b"\x22" + bytes([len(value)]) + value


# The beginning of an attribute -> the same for float32. A number is field 3 (i).
_LEVEL = _named(b"accuracy_level") + b"\x18"  # of MatMulNBits
_TO_FLOAT32 = {_LEVEL + level: _LEVEL + b"\x01" for level in (b"\x01", b"\x04")} | {
    _text(name, value): _text(name, b"float32") for name in _PRECISIONS for value in (b"int8", b"int8x2", b"float32")
}
_NAMES = tuple(_named(name) for name in (b"accuracy_level", *_PRECISIONS))
_TYPE = b"\xa0\x01"  # the field that follows, 20


def with_float_activations(graph: bytes) -> bytes:
    """``graph``, an ONNX model, with every ``MatMulNBits``, ``QuantLinear`` and ``MoE`` told to compute in float32.

    Raises:
        EngineError: it is no ONNX model, or sets a precision in an unknown way.
    """
    try:
        return rewritten(graph, _ATTRIBUTES, _to_float32)
    except IndexError:
        raise EngineError("the graph is not ONNX; build the engine again") from None


def _to_float32(attribute: bytes) -> bytes:
    if not attribute.startswith(_NAMES):
        return attribute
    value, separator, kind = attribute.partition(_TYPE)
    if value not in _TO_FLOAT32:
        raise EngineError("the graph sets the precision of a product in an unknown way; build the engine again")
    return _TO_FLOAT32[value] + separator + kind
