"""Replicas in the process of a test, which can be ended, stopped and made to differ; and ways to ask them."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from cases.processes import PATIENCE_S
from qwen_run.api.outputs import RequestOutput
from qwen_run.cluster.handles import Handle, ReplicaGone
from qwen_run.cluster.patience import Patience
from qwen_run.cluster.replica import Description, Forwarded, News, Replica
from qwen_run.cluster.replicated_llm import ReplicatedLLM
from qwen_run.sampling.params import SamplingParams

Differs = Callable[[int, Description], Description]

QUICK = Patience(open_s=PATIENCE_S, silence_s=3.0, stall_s=PATIENCE_S, probe_s=PATIENCE_S)


class LocalReplica:
    """A replica in this process, and its handle.

    Attributes:
        num_begun: requests it was asked.
        num_tokens: that it has told.
        is_frozen: it says nothing, and takes what it is told.
    """

    def __init__(self, model: Path, options: Mapping[str, Any], describe: Callable[[Description], Description]) -> None:
        self._replica = Replica(model, options, self.die)
        self._describe = describe
        self._dead: asyncio.Future[None] | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self.is_dead = self.is_frozen = False
        self.num_begun = self.num_tokens = 0

    def die(self) -> None:
        """End, as a process that is killed."""
        self.is_dead = True
        if self._loop is not None and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(lambda: self._dead.done() or self._dead.set_result(None))

    async def _ask(self, work: Any) -> Any:
        if self._loop is None:
            self._loop = asyncio.get_running_loop()
            self._dead = self._loop.create_future()
        if self.is_dead:
            work.close()
            raise ReplicaGone("it was ended by a test")
        task = asyncio.ensure_future(work)
        await asyncio.wait({task, self._dead}, timeout=PATIENCE_S, return_when=asyncio.FIRST_COMPLETED)
        if self.is_dead:
            task.cancel()
            raise ReplicaGone("it was ended by a test")
        return await asyncio.wait_for(task, PATIENCE_S)

    async def open(self) -> Description:
        return self._describe(await self._ask(self._replica.open()))

    async def probe(self) -> str:
        return await self._ask(self._replica.probe())

    async def begin(self, asked: Sequence[Forwarded]) -> None:
        self.num_begun += len(asked)
        await self._ask(self._replica.begin(asked))

    async def abort(self, request_ids: Sequence[str]) -> None:
        await self._ask(self._replica.abort(request_ids))

    async def news(self, wait_s: float) -> News:
        news = await self._ask(self._replica.news(wait_s))
        while self.is_frozen:
            await asyncio.sleep(0.01)
        told = [told.output for told in news.told.values() if told.output is not None]
        self.num_tokens += sum(len(answer.token_ids) for output in told for answer in output.outputs)
        return news

    def kill(self) -> None:
        self.die()
        if (opened := self._replica._opened) is not None:
            threading.Thread(target=asyncio.run, args=(opened.close(),)).start()


class LocalReplicas:
    """Makes them; ``made`` has them in order.

    Args:
        differs: what a description of the replica of a number becomes.
    """

    def __init__(self, model: Path, differs: Differs = lambda number, found: found, **options: Any) -> None:
        self._model, self._options, self._differs = model, options, differs
        self.made: list[LocalReplica] = []

    def start(self) -> Handle:
        number = len(self.made)
        self.made.append(LocalReplica(self._model, self._options, lambda found: self._differs(number, found)))
        return self.made[-1]

    def close(self) -> None:
        """There is nothing to leave."""

    def llm(self, num_replicas: int, patience: Patience = QUICK, **options: Any) -> ReplicatedLLM:
        """As many of them as one engine."""
        return ReplicatedLLM(
            self._model,
            num_replicas=num_replicas,
            patience=patience,
            replicas=lambda: self,
            **self._options,
            **options,
        )


@asynccontextmanager
async def fleet_of(replicas: LocalReplicas, num_replicas: int, **options: Any):
    """A ReplicatedLLM for a block of a test."""
    llm = await asyncio.to_thread(lambda: replicas.llm(num_replicas, **options))
    try:
        yield llm
    finally:
        await llm.close()


def answer_of(output: RequestOutput) -> list[Any]:
    """What has to be the same whoever answers."""
    return [
        output.prompt_token_ids,
        output.prompt_logprobs,
        output.finished,
        output.seed,
        [replace(answer, error=None) for answer in output.outputs],
    ]


async def read(llm: Any, prompt: Any, params: SamplingParams, **options: Any) -> RequestOutput:
    """The whole answer, joined where it comes in parts."""
    stream = await llm.add_request(prompt, params, **options)
    found: RequestOutput | None = None
    async for output in stream:
        is_part = params.output_kind.name == "DELTA" and found is not None
        found = found.followed_by(output) if is_part else output
    assert found is not None
    return found
