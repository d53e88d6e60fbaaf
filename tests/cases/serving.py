"""A server that answers from a script, in a thread of the test, and ways to ask it."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx2

from cases.processes import PATIENCE_S
from cases.scripted import scripted_model, write_text_files
from qwen_serve.common.settings import Settings
from qwen_serve.engine.serving import Serving
from qwen_serve.http.app import make_app
from qwen_serve.http.program import new_server


@dataclass
class Running:
    """A server that runs.

    Attributes:
        log: its records of requests.
        client: asks it; keeps connections.
    """

    serving: Serving
    url: str
    port: int
    log: list[dict[str, Any]] = field(default_factory=list)
    client: httpx2.Client = field(init=False)

    def __post_init__(self) -> None:
        self.client = httpx2.Client(base_url=self.url, timeout=PATIENCE_S)

    def post(self, path: str, body: Any, **options: Any) -> httpx2.Response:
        return self.client.post(path, json=body, **options)

    def chat(self, question: str = "hi", **fields: Any) -> dict[str, Any]:
        """The answer to one question, whole."""
        response = self.post("/v1/chat/completions", {"messages": [{"role": "user", "content": question}], **fields})
        assert response.status_code == 200, response.text
        found: dict[str, Any] = json.loads(response.text, parse_constant=_refuse)
        return found

    def stream(self, path: str, body: dict[str, Any]) -> list[dict[str, Any]]:
        """The chunks of a streamed answer; the last event says that it is complete, or is an error."""
        chunks = []
        with self.client.stream("POST", path, json={**body, "stream": True}) as response:
            assert response.status_code == 200, response.read()
            lines = [line for line in response.iter_lines() if line and not line.startswith(":")]
        for line in lines:
            data = line.removeprefix("data: ")
            chunks += [] if data == "[DONE]" else [json.loads(data, parse_constant=_refuse)]
        assert lines[-1] == "data: [DONE]" or "error" in chunks[-1]
        return chunks

    def is_idle(self) -> bool:
        """Nobody is inside, and no block of the cache is taken."""
        core = self.serving.opened.llm.core
        cache = core.engine.cache
        return core.is_done and cache.num_free == cache.num_blocks and self.serving.admission.num_inside == 0

    def wait_until_idle(self) -> None:
        wait_until(self.is_idle)


def wait_until(happened: Callable[[], Any]) -> None:
    deadline = time.monotonic() + 60
    while not happened():
        assert time.monotonic() < deadline, "it never happened"
        time.sleep(0.005)


@contextmanager
def running(model: Any, at_most_s: float = 1800, **settings: Any) -> Iterator[Running]:
    """A server of ``model``, which need not be a path; it is gone, and idle, at the end, and after ``at_most_s``."""
    chosen = {"served_names": ("scripted",), "options": {"max_batch_size": 4}} | settings
    serving = Serving(Settings(model=model, **chosen))
    serving.open()
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        found = Running(serving, f"http://127.0.0.1:{port}", port)
        server = new_server(serving.settings, make_app(serving, lambda record: found.log.append(record)))
        answering = server.serve(sockets=[listener])
        thread = threading.Thread(target=lambda: asyncio.run(asyncio.wait_for(answering, at_most_s)))
        thread.start()
        try:
            wait_until(lambda: server.started)
            yield found
        finally:
            found.client.close()
            server.should_exit = True
            thread.join(PATIENCE_S)
            asyncio.run(asyncio.wait_for(serving.opened.close(), PATIENCE_S))


def _refuse(constant: str) -> None:
    raise AssertionError(f"{constant} is not JSON")


@contextmanager
def scripted_server(directory: Path, reply: Callable[[str], str]) -> Iterator[Any]:
    """A server of a model that says what ``reply`` makes of a prompt of Qwen3; at the end nothing is left in it."""
    model, _ = scripted_model(write_text_files(directory, "qwen3"), reply, max_seq_len=2000)
    with running(model) as found:
        yield found
        found.wait_until_idle()
