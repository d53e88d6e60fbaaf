"""What is true of every request: its name, who may send it, how large it is, and a line about it in the log.

Plain ASGI: a middleware that wraps responses would hold streams back and hide that a client has gone.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import re
import secrets
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from qwen_serve.anthropic.messages import anthropic_error
from qwen_serve.common.errors import ServeError
from qwen_serve.common.settings import LOOPBACK, Settings
from qwen_serve.common.sse import JsonAnswer

_ANTHROPICS = "/v1/messages"
_NAMES_OF_REQUESTS = re.compile(r"[A-Za-z0-9._:-]{1,128}")

Log = Callable[[dict[str, Any]], None]


class Door:
    """Lets requests in, and says who came.

    Args:
        app: what answers.
        settings: keys and hosts.
        open_paths: what needs no key.
        log: takes one record a request.
    """

    def __init__(self, app: ASGIApp, settings: Settings, log: Log, open_paths: frozenset[str]) -> None:
        self._app, self._settings, self._log, self._open_paths = app, settings, log, open_paths
        self._keys = [hashlib.sha256(key.encode()).digest() for key in settings.api_keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers, started = Headers(scope=scope), time.monotonic()
        request_id = headers.get("x-request-id", "")
        if not _NAMES_OF_REQUESTS.fullmatch(request_id):
            request_id = f"req-{secrets.token_hex(12)}"
        state = scope.setdefault("state", {})
        state["request_id"], status = request_id, 499

        async def told(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message["headers"], (b"x-request-id", request_id.encode())]
            await send(message)

        try:
            self._check(scope, headers)
        except ServeError as error:
            await error_response(error, scope)(scope, receive, told)
        else:
            await self._app(scope, receive, told)
        finally:
            if self._settings.access_log:
                self._log(_record(scope, headers, status, started))

    def _check(self, scope: Scope, headers: Headers) -> None:
        """
        Raises:
            ServeError: this request is not let in.
        """
        if self._settings.is_local and self._settings.unix_socket is None:
            host = headers.get("host", "")
            if _without_port(host) not in LOOPBACK:  # a page whose name was made to mean this machine
                message = f"the host is {host!r:.80}, expected localhost; behind a proxy, use --unix-socket"
                raise ServeError("forbidden_host", message)
        path = scope["path"].removeprefix(scope.get("root_path", ""))
        if self._keys and path not in self._open_paths and scope["method"] != "OPTIONS":
            scope["state"]["api_key"] = self._key_of(headers)

    def _key_of(self, headers: Headers) -> str:
        """A digest of the key, to tell clients apart by."""
        kind, _, given = headers.get("authorization", "").partition(" ")
        if kind.lower() != "bearer":
            given = headers.get("x-api-key", "")
        digest = hashlib.sha256(given.encode("utf-8", "surrogateescape")).digest()
        # all are compared, each in a time that does not depend on where they differ
        if not sum([hmac.compare_digest(digest, key) for key in self._keys]):
            found = "a wrong key" if given else "no key"
            raise ServeError("invalid_api_key", f"{found} came with the request; send Authorization: Bearer KEY")
        return digest.hex()


async def read_body(receive: Receive, headers: Headers, most: int) -> bytes:
    """The body of a request.

    Raises:
        ServeError: it is larger than ``most`` bytes, or no JSON by its own account.
    """
    kind = headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":  # also what keeps pages of other origins out: browsers ask before they send it
        message = f"the content-type is {kind!r:.80}, expected application/json"
        raise ServeError("unsupported_media_type", message)
    too_large = ServeError("request_too_large", f"the request has more than {most} bytes; shorten it")
    length = headers.get("content-length", "")
    if length.isdecimal() and int(length) > most:
        raise too_large
    body = bytearray()
    while True:
        message_ = await receive()
        if message_["type"] == "http.disconnect":
            raise ServeError("client_closed_request", "the client has gone")
        body += message_.get("body", b"")
        if len(body) > most:
            raise too_large
        if not message_.get("more_body", False):
            return bytes(body)


def error_response(error: ServeError, scope: Scope) -> JsonAnswer:
    """``error`` as a client of the route reads it."""
    path = scope["path"].removeprefix(scope.get("root_path", ""))
    body = anthropic_error(error) if path.startswith(_ANTHROPICS) else error.body()
    return JsonAnswer(body, error.kind.status, error.headers())


def log_line(record: dict[str, Any]) -> None:
    """Write ``record`` to standard error as one line of JSON."""
    sys.stderr.write(json.dumps(record) + "\n")


def _record(scope: Scope, headers: Headers, status: int, started: float) -> dict[str, Any]:
    """What the log keeps: never a word of a prompt or of an answer."""
    state = scope["state"]
    record = {
        "time": datetime.now(UTC).isoformat(timespec="milliseconds"),
        "request_id": state["request_id"],
        "method": scope["method"],
        "path": scope["path"],
        "status": status,
        "ms": round(1000 * (time.monotonic() - started), 1),
    }
    if "traceparent" in headers:
        record["traceparent"] = headers["traceparent"][:128]
    job = state.get("job")
    if job is not None:
        counted = job.counted
        record |= {"prompt_tokens": counted.prompt_tokens, "cached_tokens": counted.cached_tokens}
        record |= {"completion_tokens": counted.completion_tokens, "finish_reasons": job.finish_reasons}
    return {**record, **state.get("log", {})}


def _without_port(host: str) -> str:
    """
    >>> _without_port("localhost:8000"), _without_port("[::1]:8000"), _without_port("::1")
    ('localhost', '::1', '::1')
    """
    if host.startswith("["):
        return host[1:].partition("]")[0]
    return host.partition(":")[0] if host.count(":") == 1 else host
