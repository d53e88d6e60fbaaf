"""What constrained answers may go on with, worked out while the model runs: :class:`BoundsAhead`."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

from qwen_run.runtime.chunk import Chunk
from qwen_run.sampling.constraint import Constraint


class BoundsAhead:
    """A thread that prepares constraints. It is begun with the first of them."""

    def __init__(self) -> None:
        self._pool: ThreadPoolExecutor | None = None

    @contextmanager
    def working(self, constraints: Sequence[Constraint]) -> Iterator[None]:
        """Prepare ``constraints`` beside the body; nobody else may use them in it."""
        if not constraints:
            yield
            return
        if self._pool is None:
            self._pool = ThreadPoolExecutor(1, "qwen-bounds")
        prepared = self._pool.submit(_prepare, constraints)
        try:
            yield
        finally:
            prepared.result()

    def close(self) -> None:
        """End the thread; the next constraint begins another."""
        pool, self._pool = self._pool, None
        if pool is not None:
            pool.shutdown()


def constraints_of(chunks: Iterable[Chunk]) -> list[Constraint]:
    """Of the answers that get a token; forks for the samples of a prompt take along what was prepared."""
    return [
        constraint
        for chunk in chunks
        if chunk.num_logits and not chunk.sequence.finish_reason
        for constraint in chunk.sequence.context.constraints
    ]


def _prepare(constraints: Iterable[Constraint]) -> None:
    for constraint in constraints:
        constraint.prepare()
