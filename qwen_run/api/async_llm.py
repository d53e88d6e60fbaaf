"""An engine for asyncio programs such as a server: :class:`AsyncLLM`.

One background thread runs the model, and nothing else touches the core. Streams belong to the event loop. What passes
between the two: functions for the thread to call before its next step, and the answers that have grown in a step.
"""

from __future__ import annotations

import asyncio
import atexit
import itertools
import threading
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from qwen_engine.errors import EngineError, QwenError, RequestError
from qwen_run.api.llm import LLM, Prompt
from qwen_run.api.outputs import RequestOutput
from qwen_run.api.pending_request import PendingRequest
from qwen_run.runtime.engine import Engine
from qwen_run.sampling.params import SamplingParams
from qwen_run.text.chat_template import Message


class AsyncLLM:
    """An engine that answers prompts of any number of tasks of one event loop.

    Args:
        model: as :class:`~qwen_run.api.llm.LLM` takes it, and ``options`` too.
        max_requests: most unfinished requests; :meth:`add_request` waits while there are so many.

    Raises:
        EngineError, BuildError: as LLM.
    """

    def __init__(self, model: str | Path | Engine, *, max_requests: int = 1024, **options: Any) -> None:
        if not isinstance(max_requests, int) or max_requests < 1:
            raise EngineError(f"max_requests is {max_requests!r}, expected a whole number, 1 or more")
        self._llm = LLM(model, **options)
        self.default_params = self._llm.default_params
        self._slots = asyncio.Semaphore(max_requests)
        self._streams: dict[str, RequestStream] = {}
        self._names = (str(number) for number in itertools.count())
        self._loop: asyncio.AbstractEventLoop | None = None
        self._failure: BaseException | None = None
        self._wake = threading.Condition()
        self._orders: list[Callable[[], object]] = []  # for the thread; guarded by _wake
        self._closing = False  # guarded by _wake
        self._thread = threading.Thread(target=self._serve, name="qwen-engine", daemon=True)
        self._thread.start()
        atexit.register(self._stop)  # a thread in native code must not outlive the interpreter

    async def generate(
        self, prompt: Prompt, sampling_params: SamplingParams | None = None, request_id: str | None = None
    ) -> AsyncGenerator[RequestOutput, None]:
        """Answer ``prompt``, a text or token ids; yield the answer as far as it has come, when it has grown.

        A consumer that is slower than the model skips what lies between. One that is cancelled or closes the
        generator gives the request up.

        Raises:
            RequestError, EngineError: as :meth:`add_request`, or the engine has failed.
        """
        stream = await self.add_request(prompt, sampling_params, request_id)
        try:
            async for output in stream:
                yield output
        finally:
            stream.close()

    async def add_request(
        self, prompt: Prompt, sampling_params: SamplingParams | None = None, request_id: str | None = None
    ) -> RequestStream:
        """Begin to answer ``prompt``; waits while there are ``max_requests``.

        Args:
            request_id: what :meth:`abort` calls it; a number if None.

        Raises:
            RequestError: the prompt is empty, too long or holds unknown ids, or ``request_id`` is in use.
            EngineError: the engine has failed or is closed.
        """
        self._loop = asyncio.get_running_loop()
        self._check_open()
        await self._slots.acquire()
        try:
            if request_id is None:
                request_id = next(name for name in self._names if name not in self._streams)
            # a long prompt takes a while to tokenize, and other tasks are waiting
            answering = await asyncio.to_thread(self._llm.prepare, prompt, sampling_params, request_id)
            self._check_open()
            if request_id in self._streams:
                raise RequestError(f"request {request_id!r} is not finished; choose another request_id")
        except BaseException:
            self._slots.release()
            raise
        stream = self._streams[request_id] = RequestStream(answering, self._forget)
        self._order(partial(self._submit, answering))
        return stream

    async def abort(self, request_id: str) -> None:
        """Give a request up; its stream ends with what there is, as ``abort``. Nothing when it is finished."""
        if stream := self._streams.get(request_id):
            self._order(partial(self._abort, stream.answering))

    async def chat_prompt(
        self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]] | None = None, **variables: Any
    ) -> str:
        """As :meth:`LLM.chat_prompt`."""
        return await asyncio.to_thread(self._llm.chat_prompt, messages, tools, **variables)

    async def close(self) -> None:
        """Give up what is unfinished, free the cache and end the thread."""
        self._end()  # in the event loop: add_request finds it closed, or its order is still taken
        await asyncio.to_thread(self._stop)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None
    ) -> None:
        await self.close()

    def _check_open(self) -> None:
        if self._failure is not None:
            raise _stopped(self._failure)
        if self._closing:
            raise EngineError("the engine is closed; load it again")

    def _forget(self, stream: RequestStream) -> None:
        """Nobody reads ``stream`` any more."""
        if self._streams.pop(stream.answering.request_id, None):
            self._slots.release()
            if not stream.answering.is_told:
                self._order(partial(self._llm.abort, stream.answering))

    def _order(self, order: Callable[[], object]) -> None:
        with self._wake:
            self._orders.append(order)
            self._wake.notify()

    def _stop(self) -> None:
        atexit.unregister(self._stop)
        self._end()
        self._thread.join()

    def _end(self) -> None:
        with self._wake:
            self._closing = True
            self._wake.notify()

    # -- in the background thread

    def _serve(self) -> None:
        try:
            while self._take_orders():
                self._tell(self._llm.step())
            self._tell(self._llm.abort_all())
            self._llm.close()
        except BaseException as error:
            self._call(self._fail, error)

    def _take_orders(self) -> bool:
        """Do what is asked for, and wait while there is nothing to do; False when it is time to end."""
        with self._wake:
            while not self._orders and not self._closing and self._llm.core.is_done:
                self._wake.wait()
            orders, self._orders = self._orders, []
        for order in orders:
            order()
        return not self._closing

    def _submit(self, answering: PendingRequest) -> None:
        try:
            self._llm.submit(answering)
        except RequestError as error:
            self._call(self._refuse, answering, error)

    def _abort(self, answering: PendingRequest) -> None:
        if not answering.is_told:
            self._llm.abort(answering)
            self._tell([answering])

    def _tell(self, grown: list[PendingRequest]) -> None:
        if grown:
            self._call(self._deliver, [answering.output() for answering in grown])

    def _call(self, function: Callable[..., None], *arguments: Any) -> None:
        if self._loop is not None and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(function, *arguments)

    # -- in the event loop

    def _deliver(self, outputs: list[RequestOutput]) -> None:
        for output in outputs:
            if stream := self._streams.get(output.request_id):
                stream.put(output)
                if output.finished:
                    self._forget(stream)

    def _refuse(self, answering: PendingRequest, error: RequestError) -> None:
        if stream := self._streams.get(answering.request_id):
            stream.put(error)
            self._forget(stream)

    def _fail(self, error: BaseException) -> None:
        self._failure = error
        for stream in list(self._streams.values()):
            stream.put(_stopped(error))
            self._forget(stream)


class RequestStream:
    """The answer to one request as it comes, to be read with ``async for`` by one task.

    Only the newest state is kept, so a slow reader costs no memory.
    """

    def __init__(self, answering: PendingRequest, forget: Callable[[RequestStream], None]) -> None:
        self.answering = answering
        self._forget = forget
        self._news: RequestOutput | QwenError | None = None
        self._has_news = asyncio.Event()
        self._is_over = False

    @property
    def request_id(self) -> str:
        return self.answering.request_id

    def put(self, news: RequestOutput | QwenError) -> None:
        """Replace what the reader gets next."""
        self._news = news
        self._has_news.set()

    def close(self) -> None:
        """Stop reading; the request is given up if it is not finished."""
        self._is_over = True
        self._forget(self)

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> RequestOutput:
        if self._is_over:
            raise StopAsyncIteration
        try:
            await self._has_news.wait()
        except BaseException:  # the reader is cancelled
            self.close()
            raise
        self._has_news.clear()
        news = self._news
        assert news is not None
        self._is_over = isinstance(news, QwenError) or news.finished
        if isinstance(news, QwenError):
            raise news
        return news


def _stopped(failure: BaseException) -> EngineError:
    error = EngineError(f"the engine has stopped: {failure}; load it again")
    error.__cause__ = failure
    return error
