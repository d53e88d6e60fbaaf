"""Replicas that are kept alive, and the requests that move among them: :class:`Fleet`.

One background thread has an event loop. For each place a task starts a replica, listens to it, and starts another when
it has ended or fallen silent; its requests begin again elsewhere, and their readers see none of it.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
import time
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from typing import Any, TypeVar

from qwen_engine.errors import EngineError, QwenError, RequestError, first_line
from qwen_run.api.async_llm import News as Output
from qwen_run.api.async_llm import RequestStream, send
from qwen_run.cluster.fleet_statistics import NOTHING, FleetStatistics, done_by, total
from qwen_run.cluster.handles import Handle, NoReplica, ReplicaGone, Replicas
from qwen_run.cluster.patience import Patience, within
from qwen_run.cluster.replica import Description, Forwarded, News
from qwen_run.cluster.routing import Router
from qwen_run.cluster.ticket import Ticket
from qwen_run.runtime.core import CoreStatistics

_log = logging.getLogger(__name__)
Result = TypeVar("Result")

_POLL_S = 1.0  # how long a replica keeps a question for news when there are none
_PAUSES_S = (0.0, 1.0, 2.0, 5.0, 10.0, 30.0)  # before a place that gets no replica tries again


@dataclass
class _Place:
    """A place for a replica, and what the one in it has to do."""

    number: int
    handle: Handle | None = None
    is_ready: bool = False
    tickets: dict[str, Ticket] = field(default_factory=dict)
    outbox: list[Forwarded] = field(default_factory=list)
    statistics: CoreStatistics = NOTHING


class Fleet:
    """So many replicas of one engine.

    Args:
        slack: requests that one replica may have more than another for the sake of what is in its cache.
    """

    def __init__(self, replicas: Callable[[], Replicas], count: int, slack: int, patience: Patience) -> None:
        self._make, self._patience = replicas, patience
        self._replicas: Replicas | None = None
        self._places = [_Place(number) for number in range(count)]
        self._router = Router(slack)
        self._waiting: dict[str, Ticket] = {}  # for any replica
        self._expected: Description | None = None
        self._least_room: int | None = None  # tokens of a request, what others rely on from the start on
        self._gone = NOTHING
        self._num_deaths = self._num_moved = 0
        self._why = ""
        self._guard = threading.Lock()  # of what follows
        self._tickets: dict[str, Ticket] = {}
        self._is_closing = self._refuses = False
        self._loop = asyncio.new_event_loop()
        self._keepers: list[asyncio.Task[None]] = []
        self._errands: set[asyncio.Task[None]] = set()
        self._thread = threading.Thread(target=self._loop.run_forever, name="qwen-replicas", daemon=True)
        self._thread.start()

    # -- for any thread

    def open(self) -> list[Description]:
        """Start the replicas, and wait until each has answered once.

        Raises:
            EngineError, BuildError: one cannot be started or differs from another; all are ended.
        """
        try:
            return self._call(self._open())
        except BaseException:
            self.close()
            raise

    @property
    def statistics(self) -> FleetStatistics:
        found = total([self._gone, *(place.statistics for place in self._places)])
        return FleetStatistics(
            **{**vars(found), "num_waiting": found.num_waiting + len(self._waiting)},
            num_replicas=len(self._places),
            num_ready=sum(place.is_ready for place in self._places),
            num_deaths=self._num_deaths,
            num_moved=self._num_moved,
        )

    @property
    def is_idle(self) -> bool:
        """Nobody waits for an answer."""
        return not self._tickets

    def refuse(self) -> None:
        """Begin no more requests."""
        self._refuses = True

    def check_open(self) -> None:
        """
        Raises:
            EngineError: the replicas are ended, or are about to be.
        """
        if self._is_closing:
            raise EngineError("the replicas are closed; start them again")
        if self._refuses:
            raise EngineError("the replicas are about to close and take no more requests; ask another")

    def check_ready(self) -> None:
        """
        Raises:
            NoReplica: none has answered and lives.
            EngineError: as :meth:`check_open`.
        """
        self.check_open()
        if not any(place.is_ready for place in self._places):
            why = f"; the last one: {self._why}" if self._why else ""
            raise NoReplica(f"none of {len(self._places)} replicas answers, they are being started{why}")

    def has(self, request_id: str) -> bool:
        """There is an unfinished request of this name."""
        return request_id in self._tickets

    def begin(self, ticket: Ticket) -> RequestStream:
        """Let a replica answer, the next one that is ready if none is.

        Raises:
            RequestError: another request of its name is unfinished.
            EngineError: as :meth:`check_open`.
        """
        with self._guard:
            self.check_open()
            if ticket.request_id in self._tickets:
                raise RequestError(f"request {ticket.request_id!r} is not finished; choose another request_id")
            self._tickets[ticket.request_id] = ticket
        self._order(lambda: self._put(ticket))
        return ticket.stream

    def forget(self, stream: RequestStream) -> bool:
        """Nobody reads ``stream`` any more; False where that is known."""
        with self._guard:
            ticket = self._tickets.get(stream.request_id)
            if ticket is None or ticket.stream is not stream:
                return False
            del self._tickets[stream.request_id]
        self._order(lambda: self._drop(ticket))
        return True

    def abort(self, request_id: str) -> None:
        """End a request with what there is; nothing where it is finished."""
        if ticket := self._tickets.get(request_id):
            self._order(lambda: self._abort(ticket))

    def close(self) -> None:
        """Give up what is unfinished, and end the replicas."""
        with self._guard:
            if self._is_closing:
                return
            self._is_closing = True
        self._call(self._close())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def _call(self, work: Coroutine[Any, Any, Result]) -> Result:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()

    def _order(self, order: Callable[[], object]) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed, and everything was given up
            self._loop.call_soon_threadsafe(order)

    # -- in the thread

    async def _open(self) -> list[Description]:
        self._replicas = self._make()
        firsts = [self._loop.create_future() for _ in self._places]
        for place, first in zip(self._places, firsts, strict=True):
            self._keepers.append(asyncio.ensure_future(self._keep(self._replicas, place, first)))
        found = list(await asyncio.gather(*firsts))
        self._least_room = min(each.max_seq_len for each in found)
        return found

    async def _close(self) -> None:
        for ticket in list(self._tickets.values()):
            self._abort(ticket)
        for task in [*self._keepers, *self._errands]:
            task.cancel()
        await asyncio.gather(*self._keepers, *self._errands, return_exceptions=True)
        if self._replicas is not None:
            self._replicas.close()

    async def _keep(self, replicas: Replicas, place: _Place, first: asyncio.Future[Description]) -> None:
        """Have a replica in ``place``, one after the other.

        Args:
            first: takes what the first one is, or why there is none.
        """
        num_failures = 0
        while True:
            handle: Handle | None = None
            was_ready, reason = False, ""
            try:
                handle = place.handle = replicas.start()
                description = await within(handle.open(), self._patience.open_s)
                self._compare(description)
                place.is_ready = was_ready = True
                if not first.done():
                    first.set_result(description)
                self._place_waiting()
                await self._listen(place, handle)
            except QwenError as error:
                reason = str(error)
                if not first.done():
                    first.set_exception(error)
                    return
            except TimeoutError:
                reason = "it has said nothing for too long" if was_ready else "it was not ready in time"
            except ReplicaGone as error:
                reason = str(error)
            except Exception as error:  # of ours; a place must not stay empty for it
                reason = f"{type(error).__name__}: {first_line(error)}"
            finally:
                if handle is not None:
                    handle.kill()
            num_failures = 0 if was_ready else num_failures + 1
            if num_failures == len(_PAUSES_S) and not first.done():
                first.set_exception(EngineError(f"a replica ends before it has answered: {reason}"))
                return
            self._leave(place, reason)
            await asyncio.sleep(_PAUSES_S[min(num_failures, len(_PAUSES_S) - 1)])

    def _compare(self, found: Description) -> None:
        """
        Raises:
            EngineError: a replica differs from the first in what decides about an answer.
        """
        expected = self._expected = self._expected or found
        for name, value in expected.identity.items():
            if found.identity.get(name) != value:
                raise EngineError(
                    f"replicas would not answer alike: {name} is {found.identity.get(name)} at {found.name} and "
                    f"{value} at {expected.name}; give all machines the same engine, package and QWEN_PLUGIN_ISA"
                )
        if self._least_room is not None and found.max_seq_len < self._least_room:
            raise EngineError(
                f"a replica has room for {found.max_seq_len} tokens at {found.name}, those before it had for "
                f"{self._least_room}; free memory there, or start with a smaller --max-seq-len"
            )

    async def _listen(self, place: _Place, handle: Handle) -> None:
        """Pass on what the replica tells, until it is gone.

        Raises:
            ReplicaGone, TimeoutError: it has ended, or says nothing, or its engine stands still.
        """
        patience = self._patience
        answered = ran = time.monotonic()
        while True:
            news = await within(handle.news(_POLL_S), _POLL_S + patience.silence_s)
            now = time.monotonic()
            if news.told or not place.tickets or news.statistics.num_steps != place.statistics.num_steps:
                ran = now
            elif now - ran > patience.stall_s:
                raise ReplicaGone(f"its engine has not run for {patience.stall_s:g} s")
            if news.told:
                answered = now
            self._take(place, news)
            if not place.tickets and now - answered > patience.probe_s:
                await within(handle.probe(), patience.stall_s)
                answered = ran = time.monotonic()

    def _take(self, place: _Place, news: News) -> None:
        place.statistics = news.statistics
        outputs: list[tuple[RequestStream, Output]] = []
        had_suspect = any(ticket.is_suspect for ticket in place.tickets.values())
        for request_id, length in news.lengths.items():
            if ticket := place.tickets.get(request_id):
                ticket.reach(length)
        for request_id, told in news.told.items():
            ticket = place.tickets.get(request_id)
            output = None if ticket is None else ticket.take(told)
            if ticket is None or output is None:
                continue
            outputs.append((ticket.stream, output))
            if isinstance(output, QwenError) or output.finished:
                del place.tickets[request_id]
                if told.error is None and isinstance(output, QwenError):
                    self._errand(place, request_id)
        send(outputs)
        if had_suspect and not any(ticket.is_suspect for ticket in place.tickets.values()):
            self._place_waiting()

    def _put(self, ticket: Ticket) -> None:
        """Ask a replica for ``ticket``, or keep it until there is one."""
        ready = [place for place in self._places if place.is_ready]
        if ticket.is_suspect:
            ready = [place for place in ready if not any(each.is_suspect for each in place.tickets.values())]
        loads = {place.number: len(place.tickets) for place in ready}
        if not self.has(ticket.request_id):  # nobody reads it any more
            return
        if not loads:
            self._waiting[ticket.request_id] = ticket
            return
        place = self._places[self._router.choose(loads, ticket.keys, ticket.session)]
        ticket.place()
        place.tickets[ticket.request_id] = ticket
        if not place.outbox:
            self._run(self._send(place))
        place.outbox.append(ticket.asked)

    def _place_waiting(self) -> None:
        waiting, self._waiting = self._waiting, {}
        for ticket in waiting.values():
            self._put(ticket)

    async def _send(self, place: _Place) -> None:
        """Hand over what has come together in one turn of the loop."""
        asked, place.outbox = place.outbox, []
        handle = place.handle
        if handle is None or not asked:
            return
        try:
            await handle.begin(asked)
        except ReplicaGone:
            return  # whoever listens to it is told, too
        except Exception as error:  # what a request holds cannot be sent to another process
            refusal = RequestError(f"a request cannot be passed on: {first_line(error)}; leave out functions")
            tickets = [ticket for each in asked if (ticket := place.tickets.pop(each.request_id, None))]
            send([(ticket.stream, refusal) for ticket in tickets])

    def _leave(self, place: _Place, reason: str) -> None:
        """The replica in ``place`` is gone: what it had to do is done elsewhere."""
        self._num_deaths += 1
        self._why = reason
        tickets, place.tickets, place.outbox = place.tickets, {}, []
        _log.warning("replica %d is gone, %d requests move: %s", place.number, len(tickets), reason)
        self._gone, place.statistics = total([self._gone, done_by(place.statistics)]), NOTHING
        place.is_ready, place.handle = False, None
        self._router.forget(place.number)
        refused: list[tuple[RequestStream, Output]] = []
        for ticket in tickets.values():
            if (error := ticket.move()) is not None:
                refused.append((ticket.stream, error))
                continue
            self._num_moved += 1
            self._put(ticket)
        send(refused)

    def _abort(self, ticket: Ticket) -> None:
        if self._drop(ticket):
            send([(ticket.stream, ticket.aborted())])

    def _drop(self, ticket: Ticket) -> bool:
        """Have nothing more to do with ``ticket``; False where that is so already."""
        request_id = ticket.request_id
        if self._waiting.pop(request_id, None) is not None:
            return True
        for place in self._places:
            if place.tickets.get(request_id) is ticket:
                del place.tickets[request_id]
                if not any(each.request_id == request_id for each in place.outbox):
                    self._errand(place, request_id)
                place.outbox = [each for each in place.outbox if each.request_id != request_id]
                if ticket.is_suspect:
                    self._place_waiting()
                return True
        return False

    def _errand(self, place: _Place, request_id: str) -> None:
        """Tell a replica that nobody wants an answer any more."""
        handle = place.handle

        async def tell() -> None:
            if handle is not None:
                with contextlib.suppress(ReplicaGone):
                    await handle.abort([request_id])

        self._run(tell())

    def _run(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.ensure_future(work)
        self._errands.add(task)
        task.add_done_callback(self._errands.discard)
