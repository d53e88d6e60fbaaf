"""Server-sent events: a stream of chunks that a client may leave at any time, and that never falls silent for long."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, Callable, Coroutine
from contextlib import suppress
from typing import Any, TypeVar

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

Result = TypeVar("Result")

DONE = "data: [DONE]\n\n"
_encode = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"), allow_nan=False).encode
_KEEP_ALIVE = b": keep-alive\n\n"
_HEADERS = {"cache-control": "no-cache", "x-accel-buffering": "no", "content-type": "text/event-stream; charset=utf-8"}


class JsonAnswer(Response):
    """A response of JSON; half a character, which a request may hold and an answer repeat, becomes a question mark."""

    media_type = "application/json"

    def render(self, content: Any) -> bytes:
        text = json.dumps(content, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
        return text.encode("utf-8", "replace")


class ClientGone(Exception):
    """The client has closed its connection; nobody reads an answer."""


def event(data: Any, name: str | None = None) -> str:
    """One event of a stream.

    >>> event({"a": 1})
    'data: {"a":1}\\n\\n'
    """
    head = "" if name is None else f"event: {name}\n"
    return f"{head}data: {_encode(data)}\n\n"


class Chunks:
    """Events that begin with the same fields, which are written once.

    >>> Chunks({"id": "a"}).event({"n": 1})
    'data: {"id":"a","n":1}\\n\\n'
    """

    def __init__(self, head: dict[str, Any]) -> None:
        self._head = _encode(head)[:-1]

    def event(self, fields: dict[str, Any]) -> str:
        """One event of a stream; there is at least one field."""
        return f"data: {self._head},{_encode(fields)[1:]}\n\n"


class EventStream(Response):
    """A response made of events as they come; a client that goes ends the generator within one event.

    Args:
        events: what is sent, each with its line ends.
        keep_alive_s: silence after which a comment is sent.
        on_end: is called when the stream ends, however it does.
    """

    def __init__(
        self, events: AsyncGenerator[str, None], keep_alive_s: float, on_end: Callable[[], object] = lambda: None
    ) -> None:
        self.status_code, self.background = 200, None
        self.raw_headers = [(name.encode(), value.encode()) for name, value in _HEADERS.items()]
        self._events, self._keep_alive_s, self._on_end = events, keep_alive_s, on_end
        self._last_sent = 0.0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        loop = asyncio.get_running_loop()
        self._last_sent = loop.time()
        pump, gone = asyncio.ensure_future(self._pump(send)), asyncio.ensure_future(disconnected(receive))
        try:
            while not pump.done():
                left = self._last_sent + self._keep_alive_s - loop.time()
                await asyncio.wait({pump, gone}, timeout=max(0.0, left), return_when=asyncio.FIRST_COMPLETED)
                if gone.done():
                    break
                if not pump.done() and loop.time() >= self._last_sent + self._keep_alive_s:
                    await self._send(send, _KEEP_ALIVE)
            if pump.done():
                pump.result()
        finally:
            await _end(pump, gone)
            self._on_end()
            await self._events.aclose()

    async def _pump(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        async for each in self._events:
            await self._send(send, each.encode("utf-8", "replace"))
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _send(self, send: Send, body: bytes) -> None:
        self._last_sent = asyncio.get_running_loop().time()
        await send({"type": "http.response.body", "body": body, "more_body": True})


async def disconnected(receive: Receive) -> None:
    """Return when the client has gone."""
    while (await receive())["type"] != "http.disconnect":
        pass


async def unless_gone(receive: Receive, work: Coroutine[Any, Any, Result]) -> Result:
    """What ``work`` returns, unless the client goes before: then it is cancelled.

    Raises:
        ClientGone: the client has gone.
    """
    task, gone = asyncio.ensure_future(work), asyncio.ensure_future(disconnected(receive))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientGone
        return task.result()
    finally:
        await _end(task, gone)


async def _end(*tasks: asyncio.Future[Any]) -> None:
    for task in tasks:
        task.cancel()
    for task in tasks:
        with suppress(asyncio.CancelledError, Exception):
            await task
