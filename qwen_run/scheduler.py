"""Which requests run in the next step, and which of their tokens. Policy only: no tensors, no model.

A request feeds its pending tokens: its prompt in chunks as large as the step's budget allows, then one sampled
token a step. Blocks are given out as sequences grow. When none are left the youngest running request
is preempted: it gives its blocks back, waits first in line, and later feeds prompt and answer again,
which is the same as a longer prompt. Requests start in the order they came.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

from qwen_run.kv_cache import KVCache
from qwen_run.request import Request


@dataclass(frozen=True)
class Chunk:
    """The tokens one request feeds in one step; ``wants_logits`` when they are the last it has."""

    request: Request
    token_ids: list[int]
    wants_logits: bool


class Scheduler:
    """The queue of waiting requests and the running ones, oldest first."""

    def __init__(self, cache: KVCache, max_batch_size: int, max_batch_tokens: int) -> None:
        self._cache = cache
        self._max_batch_size = max_batch_size
        self._max_batch_tokens = max_batch_tokens
        self._waiting: deque[Request] = deque()
        self._running: list[Request] = []

    @property
    def is_done(self) -> bool:
        """No request is waiting or running."""
        return not self._waiting and not self._running

    def add(self, request: Request) -> None:
        self._waiting.append(request)

    def schedule(self) -> list[Chunk]:
        """The next step: at least one chunk while a request is left, none empty.

        Every chunk's request owns the blocks its tokens will be written to. After the engine has run,
        :meth:`advance` must be called before the next step.
        """
        chunks: list[Chunk] = []
        budget = self._max_batch_tokens
        position = 0  # not a for loop: preemption takes requests off the end of the list
        while position < len(self._running) and budget:
            request = self._running[position]
            count = min(request.num_pending, budget)
            if not self._grow(request, count):
                break
            chunks.append(_chunk(request, count))
            budget -= count
            position += 1
        while self._waiting and len(self._running) < self._max_batch_size and budget:
            request = self._waiting[0]
            # Room for all it has and the next token, or it would soon be preempted again.
            if self._cache.blocks_for(request.num_tokens + 1) > self._cache.num_free and self._running:
                break
            count = min(request.num_pending, budget)
            self._running.append(self._waiting.popleft())
            grown = self._grow(request, count)
            assert grown, "the pool does not hold a single sequence"
            chunks.append(_chunk(request, count))
            budget -= count
        assert chunks or self.is_done, "no request can run"
        return chunks

    def advance(self, chunks: list[Chunk]) -> None:
        """Note that the engine has run ``chunks``: their tokens are in the cache."""
        for chunk in chunks:
            chunk.request.num_cached += len(chunk.token_ids)

    def finish(self, request: Request) -> None:
        """Take ``request`` off the running ones and free its blocks."""
        self._running.remove(request)
        self._release(request)

    def close(self) -> None:
        """Give up all requests and free their blocks."""
        for request in self._running:
            self._release(request)
        self._running.clear()
        self._waiting.clear()

    def _grow(self, request: Request, count: int) -> bool:
        """Give ``request`` blocks for ``count`` more tokens; False when it was itself the youngest and had to go."""
        missing = self._cache.blocks_for(request.num_cached + count) - len(request.block_ids)
        while (block_ids := self._cache.allocate(missing)) is None:
            youngest = self._running.pop()
            self._release(youngest)
            self._waiting.appendleft(youngest)
            if youngest is request:
                return False
        request.block_ids += block_ids
        return True

    def _release(self, request: Request) -> None:
        block_ids, request.block_ids = request.block_ids, []  # first: an interrupt here must not free them twice
        request.num_cached = 0
        self._cache.free(block_ids)


def _chunk(request: Request, count: int) -> Chunk:
    token_ids = request.tokens(request.num_cached, request.num_cached + count)
    return Chunk(request, token_ids, count == request.num_pending)
