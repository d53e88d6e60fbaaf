"""What passes between stages: messages of numbers, arrays of five types and a text. Nothing in them is ever executed.

A message is a header of fixed form, the form of each array, the text, and the arrays one after the other. All numbers
are little-endian. Who reads another version of this form refuses it by number.
"""

from __future__ import annotations

import array
import math
import socket
import struct
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

import numpy as np

from qwen_run.runtime.engine import Batch
from qwen_run.runtime.kv_cache import Edit

VERSION = 1
_MAGIC = b"QwSt"
_HEADER = struct.Struct("<4sHBBIQI")  # magic, version, kind, arrays, generation, number, bytes of the text
_ARRAY = struct.Struct("<BBIQ")  # type, dimensions, and both; an array that is not there has type 0
_DTYPES: dict[int, np.dtype[Any]] = {1: np.dtype("<i8"), 2: np.dtype("<i4"), 3: np.dtype("<f4")}
_CODES = {dtype: code for code, dtype in _DTYPES.items()}
_MOST_TEXT, _MOST_ARRAYS, _MOST_ARRAY_BYTES = 1 << 20, 16, 1 << 34
_MOST_DESCRIPTORS = 2


class Kind(IntEnum):
    """What a message is for."""

    START = 1  # to a stage: what it is, JSON
    READY = 2  # from it: it is loaded, JSON about it
    FAILED = 3  # from it: why it cannot be
    CHAIN = 4  # to it, with two sockets: where batches of this generation come from, and go
    JOINED = 5  # from it: it uses them
    BEAT = 6  # from it: it lives
    BATCH = 7  # from stage to stage: a batch, edits, the hidden state
    REFUSED = 8  # the same, after a stage has refused it; the text says why


_KINDS = frozenset(Kind)


class WireError(Exception):
    """What has come is no message of this form."""


@dataclass(frozen=True)
class Message:
    """What is sent at once.

    Attributes:
        generation: of the chain of stages that it belongs to.
        number: counts the batches of a generation.
        arrays: int64, int32 or float32, of two dimensions at most; None where there is none.
    """

    kind: Kind
    generation: int = 0
    number: int = 0
    arrays: tuple[np.ndarray | None, ...] = ()
    text: str = ""


_FIELDS = tuple(Batch.__dataclass_fields__)


def batch_arrays(batch: Batch, edits: Sequence[Edit], hidden: np.ndarray | None) -> tuple[np.ndarray | None, ...]:
    """The arrays of a ``BATCH``: those of ``batch`` in their order, edits, and what the stage before gave."""
    rows = [(edit.target, -1 if edit.source is None else edit.source) for edit in edits]
    table = np.array(rows, np.int32).reshape(-1, 2)
    return (*(getattr(batch, name) for name in _FIELDS), table, hidden)


def batch_of(message: Message) -> tuple[Batch, list[Edit], np.ndarray | None]:
    """What :func:`batch_arrays` made of.

    Raises:
        WireError: the message is no such.
    """
    if len(message.arrays) != len(_FIELDS) + 2:
        raise WireError(f"a batch of {len(message.arrays)} arrays")
    *arrays, table, hidden = message.arrays
    if table is None or any(each is None for each in arrays[:5]):
        raise WireError("a batch without its arrays")
    edits = [Edit(target, None if source < 0 else source) for target, source in table.tolist()]
    return Batch(*arrays), edits, hidden  # type: ignore[arg-type]


def send(connection: socket.socket, message: Message, descriptors: Sequence[int] = ()) -> None:
    """Send ``message``, and ``descriptors`` of open files with it.

    Raises:
        OSError: nobody reads it.
    """
    text = message.text.encode()[:_MOST_TEXT]
    arrays = [None if each is None else np.ascontiguousarray(each) for each in message.arrays]
    head = _HEADER.pack(
        _MAGIC, VERSION, message.kind, len(arrays), message.generation, message.number, len(text)
    ) + b"".join(map(_form, arrays))
    if descriptors:
        ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", descriptors))]
        sent = connection.sendmsg([head], ancillary)
        connection.sendall(head[sent:] + text)
    else:
        connection.sendall(head + text)
    for each in arrays:
        if each is not None and each.size:
            connection.sendall(each.reshape(-1).view(np.uint8).data)


def receive(connection: socket.socket, descriptors: list[int] | None = None) -> Message | None:
    """The next message; None where the other side has closed.

    Args:
        descriptors: takes what came with it; what comes without being asked for is closed by the system.

    Raises:
        WireError: it is no message.
        OSError: the connection is broken.
    """
    head = _exactly(connection, _HEADER.size, descriptors)
    if head is None:
        return None
    magic, version, kind, num_arrays, generation, number, text_bytes = _HEADER.unpack(head)
    if magic != _MAGIC or version != VERSION:
        raise WireError(f"messages of version {version}, expected {VERSION}; install one version everywhere")
    if num_arrays > _MOST_ARRAYS or text_bytes > _MOST_TEXT or kind not in _KINDS:
        raise WireError(f"a message of kind {kind} with {num_arrays} arrays and a text of {text_bytes} bytes")
    forms = [_ARRAY.unpack(_whole(connection, _ARRAY.size)) for _ in range(num_arrays)]
    text = _whole(connection, text_bytes).decode(errors="replace")
    arrays = tuple(_array(connection, *form) for form in forms)
    return Message(Kind(kind), generation, number, arrays, text)


def _form(values: np.ndarray | None) -> bytes:
    if values is None:
        return _ARRAY.pack(0, 0, 0, 0)
    rows, columns = (*values.shape, 1)[:2]
    return _ARRAY.pack(_CODES[values.dtype], values.ndim, rows, columns)


def _array(connection: socket.socket, code: int, dimensions: int, rows: int, columns: int) -> np.ndarray | None:
    if code == 0:
        return None
    dtype = _DTYPES.get(code)
    shape = (rows, columns) if dimensions == 2 else (rows,)
    if dtype is None or not 1 <= dimensions <= 2 or math.prod(shape) * dtype.itemsize > _MOST_ARRAY_BYTES:
        raise WireError(f"an array of type {code}, {dimensions} dimensions {rows} x {columns}")
    values: np.ndarray = np.empty(shape, dtype)
    _fill(connection, values.reshape(-1).view(np.uint8).data)
    return values


def _exactly(connection: socket.socket, count: int, descriptors: list[int] | None) -> bytes | None:
    """So many bytes; None where there are none at all."""
    found = b""
    while len(found) < count:
        if descriptors is None:
            piece = connection.recv(count - len(found))
        else:
            piece, more, _, _ = socket.recv_fds(connection, count - len(found), _MOST_DESCRIPTORS)
            descriptors += more
        if not piece:
            if found:
                raise WireError("the other side closed in the midst of a message")
            return None
        found += piece
    return found


def _whole(connection: socket.socket, count: int) -> bytes:
    buffer = bytearray(count)
    _fill(connection, memoryview(buffer))
    return bytes(buffer)


def _fill(connection: socket.socket, view: memoryview) -> None:
    while view:
        count = connection.recv_into(view)
        if not count:
            raise WireError("the other side closed in the midst of a message")
        view = view[count:]


def closed(connections: Iterable[socket.socket]) -> None:
    """End ``connections``, also for a thread that waits for one."""
    for connection in connections:
        interrupted(connection)
        connection.close()


def interrupted(connection: socket.socket) -> None:
    """Let a thread that waits for ``connection`` go on, as if the other side had closed it."""
    with suppress(OSError):  # of one that is closed
        connection.shutdown(socket.SHUT_RDWR)
