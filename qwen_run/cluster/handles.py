"""How a :class:`~qwen_run.cluster.replica.Replica` is reached: what a fleet asks of it, and the way through Ray."""

from __future__ import annotations

import os
from collections.abc import Awaitable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeVar

from qwen_engine.errors import EngineError, QwenError, first_line
from qwen_run.cluster.ray_nodes import check_free, choose_threads, cpus_of, join
from qwen_run.cluster.replica import Description, Forwarded, News, Replica

Result = TypeVar("Result")

_FAILED = 1  # exit status of a process whose engine has stopped


class ReplicaGone(Exception):
    """The process of a replica has ended, or cannot be reached."""


class NoReplica(EngineError):
    """No replica answers at this moment; one is being started."""


class Handle(Protocol):
    """A replica as its fleet sees it. Every call raises :class:`ReplicaGone` where it is no longer there."""

    async def open(self) -> Description:
        """As :meth:`Replica.open`."""

    async def probe(self) -> str:
        """As :meth:`Replica.probe`."""

    async def begin(self, asked: Sequence[Forwarded]) -> None:
        """As :meth:`Replica.begin`."""

    async def abort(self, request_ids: Sequence[str]) -> None:
        """As :meth:`Replica.abort`."""

    async def news(self, wait_s: float) -> News:
        """As :meth:`Replica.news`."""

    def kill(self) -> None:
        """End the process; nothing where it has ended."""


class Replicas(Protocol):
    """What makes replicas, each in a process of its own."""

    def start(self) -> Handle:
        """A new one, which is not open yet."""

    def close(self) -> None:
        """There will be no more."""


class RayReplicas:
    """Replicas as actors of a Ray cluster, each with as many processors as it has threads.

    An actor is never started again by Ray: a call that was repeated on a new process would find no request there.

    Args:
        address: of the cluster, as :func:`~qwen_run.cluster.ray_nodes.join` takes it.
        model, options: as :class:`~qwen_run.api.llm.LLM` has them; the path is the same on every machine.

    Raises:
        EngineError: ray is not installed, there is no such cluster, or it has too few processors.
    """

    def __init__(self, address: str, num_replicas: int, model: str | Path, options: Mapping[str, Any]) -> None:
        self._ray = join(address)
        try:
            threads = choose_threads(cpus_of(self._ray.nodes()), num_replicas, options.get("threads"))
            check_free(num_replicas * threads, self._ray.available_resources().get("CPU", 0.0))
        except BaseException:
            self._ray.shutdown()
            raise
        self._model = str(Path(model).resolve()) if Path(model).exists() else model
        self._options = {**options, "threads": threads}
        self._actors = self._ray.remote(
            num_cpus=threads, max_restarts=0, max_task_retries=0, max_concurrency=1000, scheduling_strategy="SPREAD"
        )(_ReplicaActor)

    def start(self) -> Handle:
        """A new actor."""
        return _RayHandle(self._ray, self._actors.remote(self._model, self._options))

    def close(self) -> None:
        """Leave the cluster, which ends the actors."""
        self._ray.shutdown()


class _ReplicaActor(Replica):
    """A replica whose process ends when its engine does."""

    def __init__(self, model: str, options: Mapping[str, Any]) -> None:
        super().__init__(model, options, lambda: os._exit(_FAILED))


class _RayHandle:
    """An actor of Ray's."""

    def __init__(self, ray: Any, actor: Any) -> None:
        self._ray, self._actor = ray, actor

    async def open(self) -> Description:
        return await self._ask(self._actor.open.remote())

    async def probe(self) -> str:
        return await self._ask(self._actor.probe.remote())

    async def begin(self, asked: Sequence[Forwarded]) -> None:
        await self._ask(self._actor.begin.remote(list(asked)))

    async def abort(self, request_ids: Sequence[str]) -> None:
        await self._ask(self._actor.abort.remote(list(request_ids)))

    async def news(self, wait_s: float) -> News:
        return await self._ask(self._actor.news.remote(wait_s))

    def kill(self) -> None:
        self._ray.kill(self._actor, no_restart=True)

    async def _ask(self, reference: Awaitable[Result]) -> Result:
        errors = self._ray.exceptions
        try:
            return await reference
        except errors.RayTaskError as error:
            if isinstance(error.cause, QwenError):
                raise error.cause from None
            raise ReplicaGone(first_line(error.cause)) from error
        except errors.RayError as error:
            raise ReplicaGone(first_line(error)) from error
