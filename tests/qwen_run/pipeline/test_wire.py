"""Messages between stages: what is sent comes as it was, and anything else is refused."""

from __future__ import annotations

import os
import socket
import struct
import threading
from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen_run.pipeline.wire import Kind, Message, WireError, batch_arrays, batch_of, closed, receive, send
from qwen_run.runtime.engine import Batch
from qwen_run.runtime.kv_cache import Edit

BATCH = Batch(
    np.arange(5),
    np.array([0, 2, 5], np.int32),
    np.array([7, 0], np.int32),
    np.array([[1, 2, 3], [4, 0, 0]], np.int32),
    np.array([4]),
)


@pytest.fixture
def pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    ours, theirs = socket.socketpair()
    theirs.settimeout(20)
    yield ours, theirs
    closed([ours, theirs])


def test_a_batch_comes_as_it_was_sent(pair: tuple[socket.socket, socket.socket]) -> None:
    hidden = np.random.default_rng(0).normal(size=(5, 4000)).astype(np.float32)
    edits = [Edit(3, None), Edit(4, 3)]
    message = Message(Kind.BATCH, 3, 1 << 40, batch_arrays(BATCH, edits, hidden), "ä text")
    threading.Thread(target=send, args=(pair[0], message)).start()
    found = receive(pair[1])
    assert found is not None
    assert (found.kind, found.generation, found.number, found.text) == (Kind.BATCH, 3, 1 << 40, "ä text")
    batch, told, state = batch_of(found)
    assert told == edits
    assert state is not None
    assert np.array_equal(state, hidden)
    for name in Batch.__dataclass_fields__:
        sent, come = getattr(BATCH, name), getattr(batch, name)
        assert (sent is None and come is None) or (np.array_equal(sent, come) and sent.dtype == come.dtype)


def test_arrays_of_nothing_and_none(pair: tuple[socket.socket, socket.socket]) -> None:
    send(pair[0], Message(Kind.BATCH, arrays=(None, np.zeros((0, 7), np.float32), np.zeros(0, np.int64))))
    found = receive(pair[1])
    assert found is not None
    assert found.arrays[0] is None
    assert [each.shape for each in found.arrays[1:] if each is not None] == [(0, 7), (0,)]


def test_open_files_travel_with_a_message(pair: tuple[socket.socket, socket.socket]) -> None:
    reading, writing = os.pipe()
    send(pair[0], Message(Kind.CHAIN, 2, text="x" * 5000), [writing])
    os.close(writing)
    found: list[int] = []
    message = receive(pair[1], found)
    assert message is not None
    assert message.text == "x" * 5000
    os.write(found[0], b"here")
    assert os.read(reading, 9) == b"here"
    os.close(found[0])
    os.close(reading)


def test_the_other_side_has_closed(pair: tuple[socket.socket, socket.socket]) -> None:
    pair[0].shutdown(socket.SHUT_WR)
    assert receive(pair[1]) is None


@settings(max_examples=200, deadline=None)
@given(st.binary(min_size=1, max_size=200))
def test_what_is_no_message_is_refused(data: bytes) -> None:
    ours, theirs = socket.socketpair()
    theirs.settimeout(20)
    ours.sendall(data)
    ours.shutdown(socket.SHUT_WR)
    with pytest.raises(WireError):
        receive(theirs)
    closed([ours, theirs])


@pytest.mark.parametrize(
    ("head", "complaint"),
    [
        ((b"QwSt", 2, 7, 0, 0, 0, 0), "messages of version 2, expected 1; install one version everywhere"),
        ((b"QwSt", 1, 99, 0, 0, 0, 0), "a message of kind 99"),
        ((b"QwSt", 1, 7, 17, 0, 0, 0), "with 17 arrays"),
        ((b"QwSt", 1, 7, 0, 0, 0, 1 << 30), "a text of 1073741824 bytes"),
    ],
)
def test_a_header_of_another_form(
    pair: tuple[socket.socket, socket.socket], head: tuple[object, ...], complaint: str
) -> None:
    pair[0].sendall(struct.pack("<4sHBBIQI", *head))
    with pytest.raises(WireError, match=complaint):
        receive(pair[1])


@pytest.mark.parametrize("form", [(9, 1, 4, 1), (1, 3, 4, 1), (3, 2, 1 << 31, 1 << 40)])
def test_an_array_of_another_form(pair: tuple[socket.socket, socket.socket], form: tuple[int, ...]) -> None:
    pair[0].sendall(struct.pack("<4sHBBIQI", b"QwSt", 1, 7, 1, 0, 0, 0) + struct.pack("<BBIQ", *form))
    with pytest.raises(WireError, match="an array of type"):
        receive(pair[1])


def test_a_batch_that_is_none() -> None:
    for arrays in ((), (None,) * 9, batch_arrays(BATCH, [], None)[:-1]):
        with pytest.raises(WireError, match="a batch"):
            batch_of(Message(Kind.BATCH, arrays=arrays))
