"""The fields of a protobuf message, and back: as much as ONNX files need, without the protobuf package."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

_VARINT, _EIGHT_BYTES, _COUNTED, _FOUR_BYTES = 0, 1, 2, 5
_MOST_VARINT_BYTES = 10  # of 64 bits, seven in a byte


class Field(NamedTuple):
    """A field: its number, and its value, an int or the bytes of anything else; ``start`` and ``end`` where it lies.

    ``is_counted`` tells bytes that have their own length: texts and messages.
    """

    number: int
    value: int | bytes
    is_counted: bool
    start: int
    end: int


def fields(message: bytes) -> Iterator[Field]:
    """Every field of ``message`` in its order.

    Raises:
        IndexError: the message ends in the middle of a field, or has one of an unknown kind.
    """
    end = 0
    while end < len(message):
        start = end
        tag, end = _read_varint(message, start)
        number, kind = tag >> 3, tag & 7
        if kind == _VARINT:
            value, end = _read_varint(message, end)
            yield Field(number, value, False, start, end)
            continue
        length = {_EIGHT_BYTES: 8, _FOUR_BYTES: 4}.get(kind, len(message) + 1)
        if kind == _COUNTED:
            length, end = _read_varint(message, end)
        if end + length > len(message):
            raise IndexError
        end += length
        yield Field(number, message[end - length : end], kind == _COUNTED, start, end)


def varints(message: bytes) -> list[int]:
    """The numbers of a packed list.

    Raises:
        IndexError: the last one has no end.
    """
    values, end = [], 0
    while end < len(message):
        value, end = _read_varint(message, end)
        values.append(value)
    return values


def rewritten(message: bytes, path: Sequence[int], change: Callable[[bytes], bytes]) -> bytes:
    """``message`` with ``change`` made to the messages at the field numbers ``path``; all else stays byte for byte.

    Raises:
        IndexError: as :func:`fields` does.
    """
    if not path:
        return change(message)
    parts = []
    for field in fields(message):
        if field.is_counted and field.number == path[0] and isinstance(field.value, bytes):
            inner = rewritten(field.value, path[1:], change)
            parts.append(counted(field.number, inner))
        else:
            parts.append(message[field.start : field.end])
    return b"".join(parts)


def counted(number: int, value: bytes) -> bytes:
    """A field of a text or a message."""
    return _varint(number << 3 | _COUNTED) + _varint(len(value)) + value


def whole(number: int, value: int) -> bytes:
    """A field of a whole number that is not negative."""
    return _varint(number << 3 | _VARINT) + _varint(value)


def _read_varint(message: bytes, start: int) -> tuple[int, int]:
    """The number at ``start``, seven bits a byte from the lowest, and where it ends."""
    value = 0
    for end in range(start, start + _MOST_VARINT_BYTES):
        value |= (message[end] & 0x7F) << 7 * (end - start)
        if message[end] < 0x80:
            return value, end + 1
    raise IndexError


def _varint(value: int) -> bytes:
    encoded = bytearray()
    while value >= 0x80:
        encoded.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*encoded, value])
