"""A server as a process: listen, load the engine, answer, and end in order when told to."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import socket
import stat
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import uvicorn

from qwen_engine.errors import EngineError
from qwen_engine.tasks import GENERATE, TASKS
from qwen_run.cluster.ray_nodes import keep_signals
from qwen_run.cluster.replicated_llm import ReplicatedLLM
from qwen_run.runtime.request import message_of
from qwen_run.sampling.params import SamplingParams
from qwen_serve.common.errors import ServeError
from qwen_serve.common.settings import Settings
from qwen_serve.engine.serving import Serving, Status
from qwen_serve.http.app import make_app
from qwen_serve.http.protocol import Protocol

_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_AFTER_DRAIN_S = 5  # for the last chunks to reach their clients
_BACKLOG = 1024

Say = Callable[[str], None]


def serve(settings: Settings, say: Say) -> None:
    """Answer until a signal ends it.

    Args:
        say: takes what a person is told.

    Raises:
        EngineError, BuildError: the address cannot be had, or the engine cannot be loaded.
    """
    logging.getLogger("uvicorn.error").setLevel(logging.ERROR)
    with _listening(settings) as listener:
        if not settings.unix_socket:
            settings = replace(settings, port=listener.getsockname()[1])  # where it was 0, the one that was found
        asyncio.run(_serve(settings, listener, say))


async def _serve(settings: Settings, listener: socket.socket, say: Say) -> None:
    serving = Serving(settings)
    server = new_server(settings, make_app(serving))
    loop = asyncio.get_running_loop()
    for number in _SIGNALS:
        loop.add_signal_handler(number, server.end)
    answering = asyncio.ensure_future(server.serve(sockets=[listener]))
    loading = asyncio.ensure_future(asyncio.to_thread(serving.open))
    try:
        await asyncio.wait({answering, loading}, return_when=asyncio.FIRST_COMPLETED)
        if loading.done() and loading.exception() is None:
            keep_signals()
            for line in in_force(serving):
                say(line)
        if not loading.done() or loading.exception() is None:
            await server.told_to_end(serving)
            await asyncio.shield(loading)
        await serving.drain()
    finally:
        server.should_exit = True
        await answering
    loading.result()
    if serving.failure is not None:
        raise EngineError(f"the engine has stopped: {message_of(serving.failure)}; start the server again")


class _Server(uvicorn.Server):
    """uvicorn's, which ends when the engine has: a first signal lets requests end, a second does not."""

    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self._told = asyncio.Event()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """The program has handlers of its own."""
        yield

    def end(self) -> None:
        """A signal has come."""
        if self._told.is_set():
            os._exit(1)
        self._told.set()

    async def told_to_end(self, serving: Serving) -> None:
        """Wait for a signal, or until the engine has failed."""
        while not self._told.is_set() and serving.status is not Status.STOPPED:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._told.wait(), 1.0)
            with contextlib.suppress(ServeError):
                await serving.check()


def new_server(settings: Settings, app: Any) -> _Server:
    """A server of ``app`` that has not begun.

    Raises:
        EngineError: the certificate cannot be used.
    """
    return _Server(_config(settings, app))


def _config(settings: Settings, app: Any) -> uvicorn.Config:
    protocol = type("_Protocol", (Protocol,), {"read_timeout_s": settings.read_timeout_s})
    try:
        config = uvicorn.Config(
            app,
            http=protocol,
            loop="asyncio",
            ws="none",
            lifespan="off",
            root_path=settings.root_path,
            access_log=False,
            log_config=None,
            server_header=False,
            timeout_graceful_shutdown=_AFTER_DRAIN_S,
            ssl_certfile=settings.certificate and str(settings.certificate),
            ssl_keyfile=settings.private_key and str(settings.private_key),
        )
        config.load()
    except OSError as error:  # ssl.SSLError is one
        raise EngineError(f"{settings.certificate}: {error}; expected a certificate and its key in PEM") from error
    return config


@contextlib.contextmanager
def _listening(settings: Settings) -> Iterator[socket.socket]:
    """A socket that is bound before the engine is loaded, so that a wrong address is known at once.

    Raises:
        EngineError: the address cannot be had.
    """
    path = settings.unix_socket
    family = socket.AF_UNIX if path else socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as listener:
        try:
            if path:
                _remove_stale(path)
                listener.bind(str(path))
            else:
                listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                listener.bind((settings.host, settings.port))
            listener.listen(_BACKLOG)
        except (OSError, OverflowError) as error:
            where = path or f"{settings.host}:{settings.port}"
            raise EngineError(f"cannot listen at {where}: {error}; choose another --port or --host") from error
        try:
            yield listener
        finally:
            if path:
                path.unlink(missing_ok=True)


def _remove_stale(path: Path) -> None:
    """Remove a socket that a server which was killed has left, and at which nobody listens."""
    if not path.exists() or not stat.S_ISSOCK(path.stat().st_mode):
        return
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        try:
            probe.connect(str(path))
        except ConnectionRefusedError:
            path.unlink()


def in_force(serving: Serving) -> Iterator[str]:
    """What a person wants to know of a server that has begun."""
    settings, opened = serving.settings, serving.opened
    assert opened is not None
    llm, params = opened.llm, opened.default_params
    options = llm.core.options
    yield f"{serving.name} at {settings.address}/v1"
    if settings.page and settings.unix_socket is None:
        yield f"a page to chat at {settings.address}/"
    if isinstance(opened, ReplicatedLLM):
        for replica in opened.descriptions:
            yield f"a replica at {replica.name}"
    at_once = options.max_batch_size * settings.num_replicas
    yield (
        f"at most {llm.max_seq_len} tokens a conversation; {at_once} answers at once, "
        f"{serving.admission.most - at_once} wait, more are refused"
    )
    if llm.task != GENERATE:
        yield f"the engine {TASKS[llm.task].does}: {TASKS[llm.task].ask}"
    else:
        yield from _of_answers(serving, params)
    if not settings.is_local and not settings.api_keys:
        yield "everybody who reaches this machine may ask: there is no --api-key"


def _of_answers(serving: Serving, params: SamplingParams) -> Iterator[str]:
    """The same of an engine that writes text."""
    yield (
        f"sampling where a request says nothing, from the checkpoint: temperature {params.temperature:g}, "
        f"top_p {params.top_p:g}, top_k {params.top_k}"
    )
    knows = serving.template_knows
    if knows is None:
        yield "no chat template: /v1/completions alone"
    else:
        calls, thinks = ("yes" if knows[name] else "no" for name in ("tools", "thinking"))
        yield f"of the chat template: tools {calls}, thinking {thinks}"
