"""The engine that a server has, or does not have yet: :class:`Serving`."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import Callable, Sequence
from enum import Enum
from pathlib import Path
from typing import Any, TypeVar

from qwen_engine.errors import EngineError, QwenError
from qwen_run.api.async_llm import AsyncLLM, RequestStream
from qwen_run.api.pooling import PoolingParams
from qwen_run.cluster.handles import NoReplica
from qwen_run.cluster.replicated_llm import ReplicatedLLM
from qwen_run.runtime.request import message_of
from qwen_run.sampling.params import SamplingParams
from qwen_serve.common.errors import ServeError
from qwen_serve.common.settings import Settings
from qwen_serve.engine.admission import Admission
from qwen_serve.engine.metrics import Metrics

Result = TypeVar("Result")

Served = AsyncLLM | ReplicatedLLM

QUEUE_PER_PLACE = 4  # answers that wait for each that is made
_MAX_REQUESTS = 1 << 20  # admission bounds them
_TOKENIZING = 2  # texts that are tokenized at once


class Status(Enum):
    """Where a server stands."""

    LOADING = "loading"
    READY = "ready"
    DRAINING = "draining"
    STOPPED = "stopped"


class Serving:
    """A server's engine, and who waits for it.

    Attributes:
        name: what the model is called in answers.
        created: seconds since the epoch.
    """

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.name = settings.served_names[0] if settings.served_names else Path(settings.model).name
        self.created = int(time.time())
        self.metrics = Metrics(settings.metrics_prefix, self.name, self._statistics)
        self.admission = Admission(1, 0)
        self.failure: BaseException | None = None
        self._llm: Served | None = None
        self._is_draining = False
        self._tokenizing = asyncio.Semaphore(_TOKENIZING)

    @property
    def status(self) -> Status:
        if self.failure is not None:
            return Status.STOPPED
        if self._llm is None:
            return Status.LOADING
        return Status.DRAINING if self._is_draining else Status.READY

    @property
    def names(self) -> tuple[str, ...]:
        """Everything the model is called."""
        return self.settings.served_names or (self.name,)

    @property
    def llm(self) -> Served:
        """
        Raises:
            ServeError: there is no engine yet, or no longer.
        """
        if self._llm is not None and self.failure is None and not self._is_draining:
            return self._llm
        raise self.unavailable()

    @property
    def opened(self) -> Served | None:
        """The engine, also while the server ends."""
        return self._llm

    @property
    def template_knows(self) -> dict[str, bool] | None:
        """Whether the chat template knows tools and thinking; None without a template, or before there is an engine."""
        llm = None if self._llm is None else self._llm.llm
        template = llm.text.template if llm is not None and llm.has_template else None
        if llm is None or template is None:
            return None
        thinks = llm.tokenizer.token_id("<think>") is not None
        return {"tools": writes_tools(template.source), "thinking": thinks}

    def unavailable(self) -> ServeError:
        """Why there is no answer."""
        if self.failure is not None:
            return ServeError("engine_stopped", f"the engine has stopped: {message_of(self.failure)}")
        if self._is_draining:
            return ServeError("draining", "the server is about to end and takes no more requests", retry_after=5)
        return ServeError("loading", "the engine is being loaded; try again in a few seconds", retry_after=1)

    def open(self) -> None:
        """Load the engine; takes a while, and may be called by any thread.

        Raises:
            EngineError, BuildError: it cannot be loaded.
        """
        try:
            llm = self._load()
        except BaseException as error:
            self.failure = error
            raise
        batch_size = llm.llm.core.options.max_batch_size * self.settings.num_replicas
        max_queue = self.settings.max_queue
        self.admission = Admission(batch_size, QUEUE_PER_PLACE * batch_size if max_queue is None else max_queue)
        self._llm = llm

    def _load(self) -> Served:
        settings = self.settings
        if settings.ray_address is None:
            return AsyncLLM(settings.model, max_requests=_MAX_REQUESTS, **settings.options)
        return ReplicatedLLM(
            settings.model,
            ray_address=settings.ray_address,
            num_replicas=settings.num_replicas,
            max_requests=_MAX_REQUESTS,
            **settings.options,
        )

    async def begin(
        self, ids: Sequence[int], params: SamplingParams | PoolingParams, session: str | None
    ) -> RequestStream:
        """Let the engine answer.

        Args:
            session: what keeps requests with one replica; nothing where there is one engine.

        Raises:
            ServeError, RequestError, EngineError: it cannot.
        """
        llm, request_id = self.llm, f"serve-{secrets.token_hex(12)}"
        if isinstance(llm, ReplicatedLLM):
            return await llm.add_request(list(ids), params, request_id, session)
        return await llm.add_request(list(ids), params, request_id)

    async def check(self) -> None:
        """
        Raises:
            ServeError: the engine is not there, or has failed.
        """
        llm = self.llm
        try:
            await llm.check_health()
        except NoReplica as error:
            raise ServeError("loading", f"{error}; try again in a few seconds", retry_after=1) from None
        except EngineError as error:
            self.failure = error.__cause__ or error
            raise self.unavailable() from None

    async def tokenizing(self, function: Callable[..., Result], *arguments: Any) -> Result:
        """``function`` of a text, in a thread; few at a time, so that the model keeps its cores."""
        async with self._tokenizing:
            return await asyncio.to_thread(function, *arguments)

    async def drain(self) -> None:
        """Take no more requests, let those that there are end, and end what has not when the time is up."""
        self._is_draining = True
        if self._llm is not None:
            await self._llm.drain(self.settings.drain_timeout_s)
            await self._llm.close()

    def check_model(self, name: str | None) -> None:
        """
        Raises:
            ServeError: another model is asked for, and that matters.
        """
        if self.settings.strict_model and name not in (None, *self.names):
            expected = ", ".join(self.names)
            raise ServeError("model_not_found", f"there is no model {name!r:.80}, expected {expected}", "model")

    def _statistics(self) -> Any:
        return None if self._llm is None else self._llm.statistics


def writes_tools(template: str) -> bool:
    """Whether a chat template writes the tools of a request."""
    return "tools" in template


def refused(error: QwenError, param: str | None = None) -> ServeError:
    """What a client is told of an error of the runtime's."""
    if isinstance(error, ServeError):
        return error
    code = "engine_error" if isinstance(error, EngineError) else "invalid_request"
    return ServeError(code, str(error), param)
