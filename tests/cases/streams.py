"""Many streams of a server at once, read to their ends: what each client got, and whether it was whole."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import httpx2

from cases.processes import PATIENCE_S

_WORDS = ("time", "river", "stone", "music", "paper", "green", "window", "science", "market", "winter", "history")


@dataclass
class Streamed:
    """What one client got.

    Attributes:
        error: what went wrong; None where the stream came to its end.
        num_chunks: events with text.
    """

    text: str = ""
    finish_reason: str | None = None
    error: str | None = None
    num_chunks: int = field(default=0, compare=False)


def bodies(count: int, max_tokens: int) -> list[dict[str, Any]]:
    """Requests that differ: every second one samples, with a seed of its own."""
    return [
        {
            "messages": [
                {"role": "user", "content": f"Write about {_word(index)} and {_word(3 * index + index // 16)}."}
            ],
            "max_tokens": max_tokens,
            "temperature": 0.8 * (index % 2),
            "seed": index,
            "stream": True,
        }
        for index in range(count)
    ]


def _question(index: int) -> str:
    return f"Write about {_word(index)} and {_word(5 * index + index // 11)}."


def _word(index: int) -> str:
    return _WORDS[index % len(_WORDS)]


async def read_all(
    url: str, requests: list[dict[str, Any]], on_chunk: Callable[[int], object] = lambda total: None
) -> list[Streamed]:
    """Every stream at once.

    Args:
        on_chunk: is told how many chunks have come in all.
    """
    total = 0

    async def read(client: httpx2.AsyncClient, body: dict[str, Any]) -> Streamed:
        nonlocal total
        got, is_done = Streamed(), False
        try:
            async with client.stream("POST", f"{url}/v1/chat/completions", json=body) as response:
                if response.status_code != 200:
                    return Streamed(error=f"{response.status_code} {(await response.aread()).decode()}")
                async for line in response.aiter_lines():
                    if not line.startswith("data: "):
                        continue
                    if line == "data: [DONE]":
                        is_done = True
                        continue
                    chunk = json.loads(line.removeprefix("data: "))
                    if "error" in chunk:
                        return Streamed(got.text, None, chunk["error"]["message"])
                    for choice in chunk["choices"]:
                        got.text += choice["delta"].get("content") or ""
                        got.finish_reason = choice["finish_reason"] or got.finish_reason
                    got.num_chunks += 1
                    total += 1
                    on_chunk(total)
        except httpx2.TransportError as error:
            return Streamed(got.text, None, f"{type(error).__name__}: {error}")
        return got if is_done else Streamed(got.text, None, "the stream has ended early")

    limits = httpx2.Limits(max_connections=len(requests))
    async with httpx2.AsyncClient(timeout=PATIENCE_S, limits=limits) as client:
        return list(await asyncio.gather(*(read(client, body) for body in requests)))
