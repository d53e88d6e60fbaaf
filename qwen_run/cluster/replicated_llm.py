"""An engine in several processes, with the methods of :class:`AsyncLLM`: :class:`ReplicatedLLM`."""

from __future__ import annotations

import asyncio
import atexit
import itertools
import time
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from qwen_engine.errors import EngineError
from qwen_run.api.async_llm import RequestStream
from qwen_run.api.llm import LLM
from qwen_run.api.outputs import RequestOutput
from qwen_run.api.pending_request import PendingRequest
from qwen_run.api.places import Places
from qwen_run.api.pooling import PoolingParams
from qwen_run.api.prompts import Prompt
from qwen_run.cluster.fleet import Fleet
from qwen_run.cluster.fleet_statistics import FleetStatistics
from qwen_run.cluster.front import front_of
from qwen_run.cluster.handles import RayReplicas, Replicas
from qwen_run.cluster.patience import Patience
from qwen_run.cluster.ray_nodes import keep_signals
from qwen_run.cluster.ticket import Ticket
from qwen_run.runtime.core_options import CoreOptions
from qwen_run.sampling.params import SamplingParams
from qwen_run.text.chat_template import Message

_DRAIN_POLL_S = 0.01


class ReplicatedLLM:
    """Replicas of one engine that answer as one: who asks sees neither where an answer is made nor that one has died.

    Prompts are tokenized here, once, and a seed is drawn. When a replica ends, its requests begin again on others, and
    what a reader has already is left out: answers have the bits they would have had.

    Args:
        model: an engine directory or a checkpoint, of the same path on every machine.
        ray_address: of the cluster: ``auto``, ``local`` or ``HOST:PORT``.
        num_replicas: processes, each with its own engine.
        max_requests: most unfinished requests; :meth:`add_request` waits while there are so many.
        patience: when a replica counts as gone.
        replicas: what makes replicas, in place of Ray.
        options: of each replica, as :class:`~qwen_run.api.llm.LLM` has them, and ``raw`` to do without a chat
            template; ``threads`` is as many as let all replicas have their processors if it is not given.

    Raises:
        EngineError, BuildError: as LLM; or ray is not installed, there is no cluster, it has too few processors, or
            replicas would not answer alike.
    """

    def __init__(
        self,
        model: str | Path,
        *,
        ray_address: str = "auto",
        num_replicas: int = 1,
        max_requests: int = 1024,
        patience: Patience | None = None,
        replicas: Callable[[], Replicas] | None = None,
        **options: Any,
    ) -> None:
        for name, value in (("num_replicas", num_replicas), ("max_requests", max_requests)):
            if not isinstance(value, int) or value < 1:
                raise EngineError(f"{name} is {value!r}, expected a whole number, 1 or more")
        make = replicas or partial(RayReplicas, ray_address, num_replicas, model, options)
        batch_size = options.get("max_batch_size", CoreOptions.max_batch_size)
        self._fleet = Fleet(make, num_replicas, max(1, batch_size // 4), patience or Patience())
        self.descriptions = self._fleet.open()
        keep_signals()
        atexit.register(self._fleet.close)
        try:
            self._llm = front_of(model, options, self.descriptions)
        except BaseException:
            self._end()
            raise
        self.default_params = self._llm.default_params
        self._places = Places(max_requests)
        self._numbers = itertools.count()

    async def generate(
        self, prompt: Prompt, sampling_params: SamplingParams | None = None, request_id: str | None = None
    ) -> AsyncGenerator[RequestOutput, None]:
        """As :meth:`AsyncLLM.generate`."""
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
        session: str | None = None,
    ) -> RequestStream:
        """As :meth:`AsyncLLM.add_request`; it waits for a replica where none answers at the moment.

        Args:
            session: requests of one session go to one replica, as long as that has not much more to do than others.
        """
        self._fleet.check_open()
        async with self._places.taken():
            if request_id is None:
                request_id = self._free_name()
            pending = await asyncio.to_thread(self._llm.prepare, prompt, sampling_params, request_id)
            return self._begin(pending, sampling_params, session)

    async def begin(self, pending: PendingRequest) -> RequestStream:
        """As :meth:`add_request`, for an answer that ``llm.prepare`` has prepared.

        Raises:
            RequestError, EngineError: as there.
        """
        self._fleet.check_open()
        async with self._places.taken():
            return self._begin(pending, None, None)

    async def abort(self, request_id: str) -> None:
        """As :meth:`AsyncLLM.abort`."""
        self._fleet.abort(request_id)

    async def chat_prompt(
        self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]] | None = None, **variables: Any
    ) -> str:
        """As :meth:`LLM.chat_prompt`."""
        return await asyncio.to_thread(self._llm.chat_prompt, messages, tools, **variables)

    @property
    def statistics(self) -> FleetStatistics:
        """Where the replicas stand, and what they have done; any thread may ask."""
        return self._fleet.statistics

    @property
    def llm(self) -> LLM:
        """The front of the engine, for what needs no answer: ``chat_prompt``, ``tokenizer``; it cannot be run."""
        return self._llm

    async def check_health(self) -> None:
        """
        Raises:
            NoReplica: none has answered and lives at this moment.
            EngineError: the replicas are closed.
        """
        self._fleet.check_ready()

    async def drain(self, timeout: float | None = None) -> bool:
        """As :meth:`AsyncLLM.drain`."""
        self._fleet.refuse()
        ends = None if timeout is None else time.monotonic() + timeout
        while not self._fleet.is_idle:
            if ends is not None and time.monotonic() >= ends:
                return False
            await asyncio.sleep(_DRAIN_POLL_S)
        return True

    async def close(self) -> None:
        """Give up what is unfinished, and end the replicas."""
        await asyncio.to_thread(self._end)

    def _begin(
        self, pending: PendingRequest, given: SamplingParams | PoolingParams | None, session: str | None
    ) -> RequestStream:
        stream = RequestStream(pending, self._fleet, self._places, self)
        return self._fleet.begin(Ticket(stream, given, session))

    def _end(self) -> None:
        self._fleet.close()
        atexit.unregister(self._fleet.close)

    def _free_name(self) -> str:
        while self._fleet.has(name := str(next(self._numbers))):
            pass
        return name

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None
    ) -> None:
        await self.close()
