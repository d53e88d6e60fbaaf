"""How a server behaves: :class:`Settings`, each with its default in one place."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

LOOPBACK = ("127.0.0.1", "::1", "localhost")


@dataclass(frozen=True)
class Settings:
    """How a server behaves.

    Attributes:
        model: an engine or a checkpoint.
        options: of :class:`~qwen_run.api.llm.LLM`.
        host, port: where it listens, unless ``unix_socket`` is given.
        unix_socket: the path of a socket to listen at.
        certificate, private_key: files for TLS.
        root_path: what a proxy takes off the beginning of paths.
        served_names: what the model is called; the first is what answers say.
        strict_model: refuse other names of models.
        api_keys: one of them must come with a request; none is asked for where there are none.
        origins: web pages of other origins that may ask.
        max_queue: most requests that wait beside those that are answered.
        max_body_bytes: of a request.
        request_timeout_s: most seconds of a request.
        drain_timeout_s: seconds that requests have to end when the server is told to.
        keep_alive_s: silence in a stream after which a comment is sent.
        read_timeout_s: seconds that a client has to send a request.
        access_log: a JSON line a request.
        page: serve the chat page at ``/``.
        metrics_prefix: of the names at ``/metrics``.
        cache_per_key: requests of different API keys share nothing in the cache.
        thinking_budget: tokens of thinking where a request names none.
        ray_address: of the Ray cluster that runs the engine; None: this process does.
        num_replicas: processes of the cluster, each with the engine.
    """

    model: Path | str
    options: Mapping[str, Any] = field(default_factory=dict)
    host: str = "127.0.0.1"
    port: int = 8000
    unix_socket: Path | None = None
    certificate: Path | None = None
    private_key: Path | None = None
    root_path: str = ""
    served_names: tuple[str, ...] = ()
    strict_model: bool = False
    api_keys: tuple[str, ...] = ()
    origins: tuple[str, ...] = ()
    max_queue: int | None = None
    max_body_bytes: int = 8 << 20
    request_timeout_s: float | None = None
    drain_timeout_s: float = 30.0
    keep_alive_s: float = 15.0
    read_timeout_s: float = 30.0
    access_log: bool = True
    page: bool = True
    metrics_prefix: str = "qwen:"
    cache_per_key: bool = False
    thinking_budget: int | None = None
    ray_address: str | None = None
    num_replicas: int = 1

    @property
    def is_local(self) -> bool:
        """Only programs of this machine reach it."""
        return self.unix_socket is not None or self.host in LOOPBACK

    @property
    def address(self) -> str:
        """Where a client of this machine finds it."""
        if self.unix_socket is not None:
            return f"unix:{self.unix_socket}"
        scheme = "https" if self.certificate else "http"
        host = {"0.0.0.0": "127.0.0.1", "::": "[::1]", "::1": "[::1]"}.get(self.host, self.host)
        return f"{scheme}://{host}:{self.port}{self.root_path}"
