"""The graph of an engine with the same weights, computing with activations in float32.

What is rounded to int8 on the way into a product cannot be compared from end to end at float thresholds, see
:meth:`qwen_run.reference.Recipe.with_float_activations`. The stock operator takes its precision from an attribute, and
that can be changed in the bytes of the graph: no other file of the engine is touched, and no onnx is needed.
"""

from __future__ import annotations

from qwen_engine.errors import EngineError

# An AttributeProto as protobuf writes it: field 1, 14 bytes of name; field 3 (i), the value (onnx.proto).
_NAME = b"accuracy_level"
_INT8, _FLOAT32 = (b"\x0a\x0e" + _NAME + b"\x18" + bytes([level]) for level in (4, 1))


def with_float_activations(graph: bytes) -> bytes:
    """``graph`` with every ``accuracy_level`` 4 of ``MatMulNBits`` turned into 1, float32.

    Raises:
        EngineError: the attribute is written some other way.
    """
    changed = graph.replace(_INT8, _FLOAT32)
    if changed.count(_FLOAT32) != changed.count(_NAME):
        raise EngineError("the graph sets accuracy_level in an unknown way; build the engine again")
    return changed
