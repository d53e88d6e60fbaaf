"""One request on its way to whichever replica answers it: :class:`Ticket`."""

from __future__ import annotations

import time
from dataclasses import replace

from qwen_engine.errors import EngineError
from qwen_run.api.async_llm import News as Output
from qwen_run.api.async_llm import RequestStream
from qwen_run.api.outputs import CompletionOutput, RequestMetrics, RequestOutput
from qwen_run.api.pooling import PoolingParams
from qwen_run.cluster.delivered import Delivered
from qwen_run.cluster.replica import Forwarded, Told
from qwen_run.cluster.routing import block_keys
from qwen_run.sampling.params import SamplingParams
from qwen_run.sampling.rules import RequestOutputKind

SUSPECTED_FROM = 2  # replicas that have ended, one after the other, while a request got no further on any
MOST_DEATHS = 3  # after which one that is suspected, and was the only such one on each of them, is refused

_FINAL, _DELTA = RequestOutputKind.FINAL_ONLY, RequestOutputKind.DELTA


class Ticket:
    """A request, its stream, and what the stream's reader has of the answer.

    Args:
        given: the parameters of the request as it was made.
        session: what requests of one conversation have in common.

    Attributes:
        asked: what a replica is asked: token ids and a seed, so that every replica answers the same.
        is_suspect: it may be what ends replicas: it is not sent to one that has another such request.
    """

    def __init__(
        self, stream: RequestStream, given: SamplingParams | PoolingParams | None, session: str | None
    ) -> None:
        request = stream.pending.request
        self.stream, self.session = stream, session
        self.is_suspect = False
        self._kind = request.params.output_kind
        params: SamplingParams | PoolingParams
        if isinstance(given, PoolingParams):
            params = given
        else:
            kind = _FINAL if self._kind == _FINAL else _DELTA
            params = replace(request.params, seed=request.seed, output_kind=kind)
        self.asked = Forwarded(stream.request_id, request.prompt, params)
        self.keys = block_keys(request.prompt, params.cache_salt)
        self._delivered = Delivered()
        self._metrics = RequestMetrics(stream.pending.metrics.arrival_time)
        self._placed = self._metrics.arrival_time
        self._num_deaths = self._longest = self._length = 0

    @property
    def request_id(self) -> str:
        return self.asked.request_id

    def place(self) -> None:
        """A replica is asked."""
        self._placed = time.time()

    def move(self) -> EngineError | None:
        """The replica has ended; why no other is asked, if so.

        A request that gets no further on several replicas may be what ends them, or may have waited beside one that
        is. Those are tried one by one.
        """
        self._num_deaths += 1
        if self.is_suspect and self._num_deaths >= MOST_DEATHS:
            return EngineError(f"{MOST_DEATHS} replicas have ended while they answered this request; ask for less")
        if not self.is_suspect and self._num_deaths >= SUSPECTED_FROM:
            self.is_suspect, self._num_deaths = True, 0
        self._delivered.restart()
        self._length = 0
        return None

    def reach(self, num_tokens: int) -> None:
        """The replica has come so far; further than any before it clears the request."""
        self._length = num_tokens
        if num_tokens > self._longest:
            self._longest, self._num_deaths, self.is_suspect = num_tokens, 0, False

    def take(self, told: Told) -> Output | None:
        """What the reader is told of ``told``; None if it has all of it."""
        if told.error is not None:
            return told.error
        assert told.output is not None
        if told.pooled is not None:
            self.stream.pending.request.pooled = told.pooled
        self._time(told.output)
        self.reach(self._length + sum(len(answer.token_ids) for answer in told.output.outputs))
        if self._kind == _FINAL:
            return self._complete(told.output)
        try:
            output = self._delivered.take(told.output)
        except EngineError as error:
            return error
        return output and self._complete(output if self._kind == _DELTA else self._delivered.whole(output))

    def aborted(self) -> RequestOutput:
        """The end of a request that is given up."""
        last = self._delivered.last
        answers = [replace(answer, text="", token_ids=[], logprobs=None) for answer in last.outputs] if last else []
        ended = [
            replace(answer, finish_reason=answer.finish_reason or "abort")
            for answer in answers or [CompletionOutput(0, "", [])]
        ]
        output = RequestOutput(self.request_id, None, [], None, ended, True)
        if last is not None:
            output = replace(last, outputs=ended, finished=True)
            if self._kind not in (_DELTA, _FINAL):
                output = self._delivered.whole(output)
        self._metrics.finished_time = time.time()
        return self._complete(output)

    def _complete(self, output: RequestOutput) -> RequestOutput:
        """``output`` with what a replica leaves out, and this machine's times."""
        pending = self.stream.pending
        return replace(
            output,
            prompt=pending.prompt,
            prompt_token_ids=pending.prompt_token_ids,
            metrics=replace(self._metrics),
        )

    def _time(self, output: RequestOutput) -> None:
        """Note a replica's times by this machine's clock; what came first stays with a request that has moved."""
        theirs, mine = output.metrics, self._metrics
        if theirs is None:
            return
        shift = self._placed - theirs.arrival_time
        for name in ("first_scheduled_time", "first_token_time"):
            found = getattr(theirs, name)
            if getattr(mine, name) is None and found is not None:
                setattr(mine, name, found + shift)
        if mine.first_scheduled_time is not None:
            mine.time_in_queue = mine.first_scheduled_time - mine.arrival_time
        for name in ("last_token_time", "finished_time"):
            found = getattr(theirs, name)
            setattr(mine, name, None if found is None else found + shift)
