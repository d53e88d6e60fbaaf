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

# The beginning of an AttributeProto as protobuf writes it: field 1, a length and so many bytes of name; then
# field 3 (i), a number, or field 4 (s), a length and so many bytes. -> the same for float32
_FLOAT32_LEVEL = b"\x0a\x0eaccuracy_level\x18\x01"  # of MatMulNBits
_FLOAT32_PRECISION = b"\x0a\x09precision\x22\x07float32"  # of QuantLinear
_TO_FLOAT32 = {
    b"\x0a\x0eaccuracy_level\x18\x04": _FLOAT32_LEVEL,
    _FLOAT32_LEVEL: _FLOAT32_LEVEL,
    b"\x0a\x09precision\x22\x04int8": _FLOAT32_PRECISION,
    b"\x0a\x09precision\x22\x06int8x2": _FLOAT32_PRECISION,
    _FLOAT32_PRECISION: _FLOAT32_PRECISION,
}
_NAMES = (b"\x0a\x0eaccuracy_level", b"\x0a\x09precision")
_TYPE = b"\xa0\x01"  # the field that follows, 20


def with_float_activations(graph: bytes) -> bytes:
    """``graph``, an ONNX model, with every ``MatMulNBits`` and ``QuantLinear`` told to compute in float32.

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
