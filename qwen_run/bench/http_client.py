"""As much of HTTP as a benchmark of servers needs: one request a connection, and its answer line by line."""

from __future__ import annotations

import asyncio
import json
import ssl
from collections.abc import AsyncIterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Self
from urllib.parse import urlsplit

from qwen_engine.errors import RequestError

_PORTS = {"http": 80, "https": 443}
_LONGEST_LINE = 1 << 24


@dataclass(frozen=True)
class Address:
    """Where a server is."""

    scheme: str
    host: str
    port: int
    path: str

    @classmethod
    def of(cls, url: str) -> Self:
        """The address in ``url``; ``/v1`` at its end is left out.

        Raises:
            RequestError: it is no URL of http or https.
        """
        try:
            parts = urlsplit(url)
            port = parts.port or _PORTS[parts.scheme]
        except (KeyError, ValueError):
            raise RequestError(f"the URL is {url!r}, expected one such as http://127.0.0.1:8000") from None
        if not parts.hostname:
            raise RequestError(f"the URL is {url!r}, expected one such as http://127.0.0.1:8000")
        return cls(parts.scheme, parts.hostname, port, parts.path.rstrip("/").removesuffix("/v1"))


async def post(address: Address, path: str, body: Mapping[str, Any], key: str | None = None) -> AsyncIterator[str]:
    """Send ``body`` as JSON, and yield the lines of the answer as they come.

    Raises:
        RequestError: there is no server, or it answers with an error.
    """
    try:
        reader, writer = await asyncio.open_connection(
            address.host,
            address.port,
            limit=_LONGEST_LINE,
            ssl=ssl.create_default_context() if address.scheme == "https" else None,
        )
    except OSError as error:
        raise RequestError(
            f"there is no server at {address.host}:{address.port}: {error}; start one, or name another with --url"
        ) from error
    try:
        writer.write(_request(address, path, json.dumps(body).encode(), key))
        await writer.drain()
        status, headers = await _head(reader)
        lines = _lines(_pieces(reader, headers))
        if status != 200:
            said = " ".join([line async for line in lines])
            raise RequestError(f"{path} answers with status {status}: {said[:300]}")
        async for line in lines:
            yield line
    except (OSError, asyncio.IncompleteReadError, ValueError) as error:
        raise RequestError(f"{path}: the connection has ended in the midst of an answer: {error}") from error
    finally:
        writer.close()
        with suppress(OSError):
            await writer.wait_closed()


def _request(address: Address, path: str, body: bytes, key: str | None) -> bytes:
    lines = [
        f"POST {address.path}{path} HTTP/1.1",
        f"Host: {address.host}:{address.port}",
        "Content-Type: application/json",
        f"Content-Length: {len(body)}",
        "Connection: close",
    ]
    if key is not None:
        lines.append(f"Authorization: Bearer {key}")
    return "\r\n".join([*lines, "", ""]).encode() + body


async def _head(reader: asyncio.StreamReader) -> tuple[int, dict[str, str]]:
    first = (await reader.readline()).split(maxsplit=2)
    if len(first) < 2 or not first[1].isdigit():
        raise ValueError("no HTTP")
    headers = {}
    while line := (await reader.readline()).strip():
        name, _, value = line.decode("latin-1").partition(":")
        headers[name.lower()] = value.strip()
    return int(first[1]), headers


async def _pieces(reader: asyncio.StreamReader, headers: Mapping[str, str]) -> AsyncIterator[bytes]:
    """The body as it comes: in chunks, or until the connection ends."""
    if headers.get("transfer-encoding", "").lower() == "chunked":
        while size := int((await reader.readline()).split(b";")[0], 16):
            yield (await reader.readexactly(size + 2))[:-2]
        return
    while piece := await reader.read(1 << 16):
        yield piece


async def _lines(pieces: AsyncIterator[bytes]) -> AsyncIterator[str]:
    rest = b""
    async for piece in pieces:
        *whole, rest = (rest + piece).split(b"\n")
        for line in whole:
            yield line.decode("utf-8", "replace")
    if rest:
        yield rest.decode("utf-8", "replace")
