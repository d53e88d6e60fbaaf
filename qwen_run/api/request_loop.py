"""The one loop that drives a model: requests go in, answers come out as they grow. :class:`RequestLoop`.

Any thread may call it. One runs the model at a time, for the requests of all: whoever waits for an answer takes the
next step when its turn comes, so that the threads share batches.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager
from types import TracebackType
from typing import Self

from qwen_engine.errors import EngineError
from qwen_run.api.outputs import RequestOutput
from qwen_run.api.pending_request import PendingRequest
from qwen_run.api.turns import Turns
from qwen_run.runtime.core import Core
from qwen_run.runtime.request import Sequence as TokenSequence
from qwen_run.runtime.request import message_of


class RequestLoop:
    """A core and the requests it is answering.

    Attributes:
        core: what answers; only the thread whose turn it is may change it.
    """

    def __init__(self, core: Core) -> None:
        self.core = core
        self._turns = Turns()
        self._answering: dict[int, PendingRequest] = {}  # by the request's number
        self._waiting: list[PendingRequest] = []  # submitted, and not read by the model yet
        self._given_up: deque[PendingRequest] = deque()

    def run(
        self, answerings: Sequence[PendingRequest], *, final_only: bool = False
    ) -> Generator[RequestOutput, None, None]:
        """Answer prepared requests, and yield each as far as it has come, every time it has grown.

        Closing the iterator gives up what is not finished. Several may be read in turn, or by a thread each.

        Args:
            final_only: yield each answer once, when it is complete.

        Raises:
            RequestError: there is no room for the beams of one; none is answered.
            EngineError: the engine cannot run at all; every request is given up.
        """
        try:
            self.submit(*answerings)
            unfinished = list(answerings)
            while unfinished:
                yield from self._advance(unfinished, final_only)
                unfinished = [pending for pending in unfinished if not pending.is_told]
        finally:
            self.abort(*answerings)

    def finish(self, answerings: Sequence[PendingRequest], shows_progress: bool) -> Iterator[RequestOutput]:
        """As :meth:`run`, each answer when it is complete; progress is shown where standard error is a terminal."""
        if not shows_progress:
            yield from self.run(answerings, final_only=True)
            return
        import tqdm

        with tqdm.tqdm(total=len(answerings), unit="prompt", disable=None) as bar:
            for output in self.run(answerings, final_only=True):
                bar.update()
                yield output

    def submit(self, *answerings: PendingRequest) -> None:
        """Let prepared requests run with the next :meth:`step`.

        Raises:
            RequestError: there is no room for the beams of one; those before it are submitted.
        """
        with self._turn():
            for pending in answerings:
                self._answering[self.core.add(pending.request)] = pending
                self._waiting.append(pending)

    def step(self) -> list[PendingRequest]:
        """Run the model once; the requests whose answers have grown, none when nothing is left to do.

        Raises:
            EngineError: the engine cannot run at all; every request is given up.
        """
        with self._turn():
            return self._step()

    def abort(self, *answerings: PendingRequest) -> None:
        """Give submitted requests up and free their cache; nothing for those that are finished or were not submitted.

        While another thread runs the model this does not wait: the requests end with that step.
        """
        self._given_up.extend(answerings)
        self._drop_given_up()

    def abort_all(self) -> list[PendingRequest]:
        """Give up every unfinished request; those."""
        with self._turn():
            return self._abort_all()

    def close(self) -> None:
        """Give up all requests and free every cache block."""
        with self._turn():
            self._close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def _advance(self, own: list[PendingRequest], final_only: bool) -> list[RequestOutput]:
        """Those of ``own`` that have something to tell; runs the model where none has.

        Raises:
            EngineError: the engine cannot run at all, seen in this thread or in another.
        """
        with self._turn():
            if not any(pending.is_new for pending in own):
                self._step()  # for the requests of other threads, too
            for pending in own:
                if pending.failure is not None:
                    raise EngineError(
                        f"the engine has stopped: {message_of(pending.failure)}; ask again"
                    ) from pending.failure
            told = [p for p in own if p.is_new and (p.request.is_finished or not (final_only or p.is_silent))]
            for pending in own:
                pending.is_new = False
            return [pending.output(whole=final_only) for pending in told]

    @contextmanager
    def _turn(self) -> Iterator[None]:
        try:
            with self._turns.turn():
                self._abort_given_up()
                yield
        finally:
            self._drop_given_up()

    def _drop_given_up(self) -> None:
        """Abort what was given up, unless a thread has the turn: it does so when it ends it.

        A stream that nobody reads any more is closed by whichever thread collects it, maybe in the midst of a step of
        its own: it must not wait for a turn.
        """
        while self._given_up:
            with self._turns.turn_if_free() as is_free:
                if not is_free:
                    return
                self._abort_given_up()

    # -- what follows is for the thread whose turn it is

    def _step(self) -> list[PendingRequest]:
        failed: list[TokenSequence] = []
        started = time.time()
        try:
            tokens = self.core.step(failed)
        except BaseException as error:
            for pending in self._answering.values():
                pending.failure = error
            self._close()
            raise
        numbers = [token.request_index for token in tokens] + [sequence.request.number for sequence in failed]
        grown = {number: self._answering[number] for number in numbers}
        for token in tokens:
            if token.logits is not None:
                grown[token.request_index].logits.append(token.logits)
        for number, pending in grown.items():
            pending.is_new = True
            if pending.request.is_finished:
                del self._answering[number]
        self._note_times(started, time.time(), grown.values())
        return list(grown.values())

    def _note_times(self, started: float, ended: float, grown: Iterable[PendingRequest]) -> None:
        """Note what a step has meant for the requests that waited, and for those whose answers have grown."""
        for pending in self._waiting:
            if pending.request.num_cached_tokens is not None:
                pending.metrics.first_scheduled_time = started
                pending.metrics.time_in_queue = started - pending.metrics.arrival_time
        self._waiting = [p for p in self._waiting if p.request.num_cached_tokens is None and not p.request.is_finished]
        for pending in grown:
            metrics = pending.metrics
            metrics.first_token_time = metrics.first_token_time or ended
            metrics.last_token_time = ended
            metrics.finished_time = ended if pending.request.is_finished else None

    def _abort_given_up(self) -> None:
        while self._given_up:
            self._abort(self._given_up.popleft())

    def _abort(self, pending: PendingRequest) -> None:
        if self._answering.pop(pending.request.number, None):
            self.core.abort(pending.request)
            pending.metrics.finished_time = time.time()
            pending.is_new = True  # a stream that is still read ends with it

    def _abort_all(self) -> list[PendingRequest]:
        given_up = list(self._answering.values())
        for pending in given_up:
            self._abort(pending)
        return given_up

    def _close(self) -> None:
        self._abort_all()
        self.core.close()
