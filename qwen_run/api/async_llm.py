"""An engine for asyncio programs such as a server: :class:`AsyncLLM`.

One background thread, the :class:`_Worker`, runs the model. What passes to it: functions to call before its next step.
What comes back: the answers that have grown in a step, each handed to the event loop of the task that reads it.
"""

from __future__ import annotations

import asyncio
import atexit
import itertools
import threading
import time
import weakref
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self

from qwen_engine.errors import EngineError, QwenError, RequestError
from qwen_run.api.llm import LLM
from qwen_run.api.outputs import RequestOutput
from qwen_run.api.pending_request import PendingRequest
from qwen_run.api.places import Places
from qwen_run.api.pooling import PoolingParams
from qwen_run.api.prompts import Prompt
from qwen_run.runtime.core import CoreStatistics
from qwen_run.runtime.flights import AnyEngine
from qwen_run.sampling.params import SamplingParams
from qwen_run.sampling.rules import RequestOutputKind
from qwen_run.text.chat_template import Message
from qwen_run.text.text_model import TextModel

_DRAIN_POLL_S = 0.01

News = RequestOutput | QwenError  # of a request: its answer as far as it has come, or why there is none


class AsyncLLM:
    """An engine that answers prompts of any number of tasks, of one event loop or of several.

    One that nobody holds any more ends as :meth:`close` ends it.

    Args:
        model: as :class:`~qwen_run.api.llm.LLM` takes it, and ``options`` too.
        max_requests: most unfinished requests; :meth:`add_request` waits while there are so many.

    Raises:
        EngineError, BuildError: as LLM.
    """

    def __init__(self, model: str | Path | AnyEngine | TextModel, *, max_requests: int = 1024, **options: Any) -> None:
        if not isinstance(max_requests, int) or max_requests < 1:
            raise EngineError(f"max_requests is {max_requests!r}, expected a whole number, 1 or more")
        self._llm = LLM(model, **options)
        self.default_params = self._llm.default_params
        self._places = Places(max_requests)
        self._worker = _Worker(self._llm)
        self._numbers = itertools.count()
        weakref.finalize(self, self._worker.end).atexit = False  # there the worker has a handler of its own

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
        self,
        prompt: Prompt,
        sampling_params: SamplingParams | PoolingParams | None = None,
        request_id: str | None = None,
    ) -> RequestStream:
        """Begin to answer ``prompt``; waits while there are ``max_requests``.

        Args:
            request_id: what :meth:`abort` calls it; a number if None.

        Returns:
            The answer, to be read in the event loop that asked for it.

        Raises:
            RequestError: the prompt is empty, too long or holds unknown ids, or ``request_id`` is in use.
            EngineError: the engine has failed or is closed.
        """
        self._worker.check_open()
        async with self._places.taken():
            if request_id is None:
                request_id = self._free_name()
            # a long prompt takes a while to tokenize, and other tasks are waiting
            pending = await asyncio.to_thread(self._llm.prepare, prompt, sampling_params, request_id)
            return self._worker.begin(RequestStream(pending, self._worker, self._places, self))

    async def abort(self, request_id: str) -> None:
        """Give a request up; its stream ends with what there is, as ``abort``. Nothing when it is finished."""
        self._worker.abort(request_id)

    async def chat_prompt(
        self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]] | None = None, **variables: Any
    ) -> str:
        """As :meth:`LLM.chat_prompt`."""
        return await asyncio.to_thread(self._llm.chat_prompt, messages, tools, **variables)

    @property
    def statistics(self) -> CoreStatistics:
        """Where the engine stands, and what it has done; any thread may ask."""
        return self._llm.core.statistics

    @property
    def llm(self) -> LLM:
        """The engine and its text, for what needs no answer: :meth:`LLM.chat_prompt`, ``tokenizer``; not to be run."""
        return self._llm

    async def check_health(self) -> None:
        """
        Raises:
            EngineError: the engine has failed or is closed.
        """
        self._worker.check_open()

    async def drain(self, timeout: float | None = None) -> bool:
        """Take no more requests, and wait until those that there are have ended.

        Args:
            timeout: most seconds to wait.

        Returns:
            False where some are unfinished when the time is up; :meth:`close` gives them up.
        """
        self._worker.refuse()
        ends = None if timeout is None else time.monotonic() + timeout
        while not self._worker.is_idle:
            if ends is not None and time.monotonic() >= ends:
                return False
            await asyncio.sleep(_DRAIN_POLL_S)
        return True

    async def close(self) -> None:
        """Give up what is unfinished, free the cache and end the thread."""
        self._worker.end()  # from here on nothing is begun
        await asyncio.to_thread(self._worker.join)

    def _free_name(self) -> str:
        while self._worker.has(name := str(next(self._numbers))):
            pass
        return name

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None
    ) -> None:
        await self.close()


class _Worker:
    """The thread that runs the model, and the streams whose answers it makes; any thread may call it.

    It knows nothing of the :class:`AsyncLLM` it works for, so that one that is dropped can be collected.
    """

    def __init__(self, llm: LLM) -> None:
        self._llm = llm
        self._wake = threading.Condition()  # guards all below
        self._orders: list[Callable[[], object]] = []  # for the thread
        self._streams: dict[str, RequestStream] = {}
        self._failure: BaseException | None = None
        self._is_closing = self._refuses = False
        self.thread = threading.Thread(target=self._serve, name="qwen-engine", daemon=True)
        self.thread.start()
        atexit.register(self._end_and_join)  # a thread in native code must not outlive the interpreter

    @property
    def is_idle(self) -> bool:
        """Nobody waits for an answer."""
        return not self._streams

    def has(self, request_id: str) -> bool:
        """There is an unfinished request of this name."""
        return request_id in self._streams

    def check_open(self) -> None:
        """
        Raises:
            EngineError: the engine has failed or is closed.
        """
        if self._failure is not None:
            raise _stopped(self._failure)
        if self._is_closing:
            raise EngineError("the engine is closed; load it again")
        if self._refuses:
            raise EngineError("the engine is about to close and takes no more requests; ask another")

    def refuse(self) -> None:
        """Begin no more requests."""
        self._refuses = True

    def begin(self, stream: RequestStream) -> RequestStream:
        """Let the request of ``stream`` run.

        Raises:
            RequestError: another of its name is unfinished.
            EngineError: the engine has failed or is closed.
        """
        with self._wake:
            self.check_open()
            if stream.request_id in self._streams:
                raise RequestError(f"request {stream.request_id!r} is not finished; choose another request_id")
            self._streams[stream.request_id] = stream
            self._order(partial(self._submit, stream))
        return stream

    def abort(self, request_id: str) -> None:
        """Give a request up; its stream is told."""
        with self._wake:
            if stream := self._streams.get(request_id):
                self._order(partial(self._abort, stream.pending))

    def forget(self, stream: RequestStream) -> bool:
        """Nobody reads ``stream`` any more; False where that is known."""
        with self._wake:
            if self._streams.get(stream.request_id) is not stream:
                return False
            del self._streams[stream.request_id]
            if not stream.pending.is_told:
                self._order(partial(self._llm.abort, stream.pending))
            return True

    def end(self) -> None:
        """Let the thread give up what is unfinished, and end."""
        with self._wake:
            self._is_closing = True
            self._wake.notify()

    def join(self) -> None:
        """Wait until the thread has ended."""
        self.thread.join()

    def _end_and_join(self) -> None:
        self.end()
        self.join()

    def _order(self, order: Callable[[], object]) -> None:
        self._orders.append(order)
        self._wake.notify()

    # -- in the thread

    def _serve(self) -> None:
        try:
            while self._take_orders():
                self._tell(self._llm.step())
            self._tell(self._llm.abort_all())
            self._llm.close()
        except BaseException as error:
            with self._wake:
                self._failure = error
                streams = list(self._streams.values())
            send([(stream, _stopped(error)) for stream in streams])
        finally:
            atexit.unregister(self._end_and_join)

    def _take_orders(self) -> bool:
        """Do what is asked for, and wait while there is nothing to do; False when it is time to end."""
        with self._wake:
            while not self._orders and not self._is_closing and self._llm.core.is_done:
                self._wake.wait()
            orders, self._orders = self._orders, []
        for order in orders:
            order()
        return not self._is_closing

    def _submit(self, stream: RequestStream) -> None:
        try:
            self._llm.submit(stream.pending)
        except RequestError as error:
            send([(stream, error)])

    def _abort(self, pending: PendingRequest) -> None:
        if not pending.is_told:
            self._llm.abort(pending)
            self._tell([pending])

    def _tell(self, grown: list[PendingRequest]) -> None:
        read = [(self._streams.get(pending.request_id), pending) for pending in grown]
        send([(stream, pending.output()) for stream, pending in read if stream and not pending.is_silent])


class StreamSource(Protocol):
    """Who makes the answers that streams are read from."""

    def forget(self, stream: RequestStream) -> bool:
        """Nobody reads ``stream`` any more; False where that is known."""


class RequestStream:
    """The answer to one request as it comes, to be read with ``async for`` by one task of the loop it was made in.

    Only the newest state is kept, so a slow reader costs no memory; where outputs are parts, those not read are joined.
    """

    def __init__(self, pending: PendingRequest, worker: StreamSource, places: Places, owner: object) -> None:
        self.pending = pending
        self.loop = asyncio.get_running_loop()
        self._worker, self._places = worker, places
        self._owner = owner  # is not to end while there is something to read
        self._news: News | None = None
        self._has_news = asyncio.Event()
        self._is_over = False
        self._is_delta = pending.request.params.output_kind == RequestOutputKind.DELTA

    @property
    def request_id(self) -> str:
        return self.pending.request_id

    def put(self, news: News) -> None:
        """Replace what the reader gets next; in the stream's loop."""
        if self._is_delta and self._has_news.is_set():  # the reader has not seen the part before
            news = _joined(self._news, news)
        self._news = news
        self._has_news.set()
        if isinstance(news, QwenError) or news.finished:
            self.release()

    def release(self) -> None:
        """Nobody waits for more; an unfinished request is given up. For any thread."""
        if self._worker.forget(self):
            self._places.give_back()

    def close(self) -> None:
        """Stop reading; the request is given up if it is not finished."""
        self._is_over = True
        self.release()

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


def _joined(earlier: News | None, later: News) -> News:
    if isinstance(earlier, RequestOutput) and isinstance(later, RequestOutput):
        return earlier.followed_by(later)
    return later


def send(news: list[tuple[RequestStream, News]]) -> None:
    """Give each stream its news, in one call of each event loop."""
    by_loop: dict[asyncio.AbstractEventLoop, list[tuple[RequestStream, News]]] = {}
    for stream, each in news:
        by_loop.setdefault(stream.loop, []).append((stream, each))
    for loop, some in by_loop.items():
        try:
            loop.call_soon_threadsafe(_put_all, some)
        except RuntimeError:  # the loop is closed: nobody can read them
            for stream, _ in some:
                stream.release()


def _put_all(news: list[tuple[RequestStream, News]]) -> None:
    for stream, each in news:
        stream.put(each)


def _stopped(failure: BaseException) -> EngineError:
    error = EngineError(f"the engine has stopped: {failure}; load it again")
    error.__cause__ = failure
    return error
