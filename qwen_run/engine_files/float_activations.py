"""The graph of an engine with the same weights, computing with activations in float32.

What is rounded on the way into a product cannot be compared from end to end at float thresholds, see
:meth:`qwen_run.accuracy.reference.Recipe.with_float_activations`. The operators take their precision from an attribute,
and that can be changed in the bytes of the graph: no other file of the engine is touched, and no onnx is needed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from qwen_engine.errors import EngineError

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
        return _rewrite(graph, _ATTRIBUTES, _to_float32)
    except IndexError:
        raise EngineError("the graph is not ONNX; build the engine again") from None


def _to_float32(attribute: bytes) -> bytes:
    if not attribute.startswith(_NAMES):
        return attribute
    value, separator, kind = attribute.partition(_TYPE)
    if value not in _TO_FLOAT32:
        raise EngineError("the graph sets the precision of a product in an unknown way; build the engine again")
    return _TO_FLOAT32[value] + separator + kind


def _rewrite(message: bytes, path: Sequence[int], change: Callable[[bytes], bytes]) -> bytes:
    """The protobuf ``message`` with ``change`` made to everything at the field numbers ``path``.

    Raises:
        IndexError: the message ends in the middle of a field, or has one of an unknown kind.
    """
    if not path:
        return change(message)
    rewritten, end = bytearray(), 0
    while end < len(message):
        start = end
        tag, end = _read_varint(message, start)
        number, kind = tag >> 3, tag & 7
        content = end
        if kind == 0:  # a varint
            _, end = _read_varint(message, end)
        elif kind == 2:  # a length, and so many bytes
            length, content = _read_varint(message, end)
            end = content + length
        else:  # so many bytes
            end += {1: 8, 5: 4}.get(kind, len(message))
        if end > len(message):
            raise IndexError
        if kind == 2 and number == path[0]:
            inner = _rewrite(message[content:end], path[1:], change)
            rewritten += _varint(tag) + _varint(len(inner)) + inner
        else:
            rewritten += message[start:end]
    return bytes(rewritten)


def _read_varint(message: bytes, start: int) -> tuple[int, int]:
    """The number at ``start``, seven bits a byte from the lowest, and where it ends."""
    value, end = message[start] & 0x7F, start + 1
    while message[end - 1] & 0x80:
        value |= (message[end] & 0x7F) << 7 * (end - start)
        end += 1
    return value, end


def _varint(value: int) -> bytes:
    encoded = bytearray()
    while value >= 0x80:
        encoded.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*encoded, value])
