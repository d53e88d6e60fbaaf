"""A connection of HTTP/1.1 as uvicorn and h11 have it, with less work for each piece of a stream."""

from __future__ import annotations

from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

_CHUNKED = b"transfer-encoding: chunked"


class Protocol(H11Protocol):
    """A connection on which no request has come after a while is closed.

    Attributes:
        read_timeout_s: that while.
    """

    read_timeout_s = 30.0

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        most = self.config.h11_max_incomplete_event_size
        self.conn = Connection(h11.SERVER, **({} if most is None else {"max_incomplete_event_size": most}))

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._first_request = self.loop.call_later(self.read_timeout_s, self._reap)

    def connection_lost(self, exc: Exception | None) -> None:
        self._first_request.cancel()
        super().connection_lost(exc)

    def _reap(self) -> None:
        if self.cycle is None:
            self.transport.close()


class Connection(h11.Connection):
    """h11's, which frames a piece of a chunked body without h11's checks of every event: a stream has thousands."""

    _is_chunked = False

    def send(self, event: Any) -> Any:
        """As h11's."""
        if self._is_chunked and type(event) is h11.Data and self.our_state is h11.SEND_BODY:
            return b"%x\r\n%b\r\n" % (len(event.data), event.data) if event.data else b""
        sent = super().send(event)
        if type(event) is h11.Response:
            self._is_chunked = sent is not None and _CHUNKED in sent.lower()
        return sent
