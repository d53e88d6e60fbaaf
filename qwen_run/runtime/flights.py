"""Batches on their way through an engine: one at a time, or as many as it has stages.

A stage works first in, first out. So what a batch writes to the cache is there for every batch behind it, and what has
happened to blocks in between reaches each stage between the two.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections import deque
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import numpy as np

from qwen_engine.errors import EngineError
from qwen_engine.manifest import Manifest
from qwen_run.runtime.chunk import Chunk, build_batch
from qwen_run.runtime.engine import Batch, Engine
from qwen_run.runtime.kv_cache import Blocks


class StageLost(Exception):
    """A stage does not answer any more, and its cache is gone: what is on its way, and what has been fed."""


class PipelinedEngine(ABC):
    """An engine in stages: what :class:`Engine` does, for several batches at a time.

    Attributes:
        directory, manifest: as those of :class:`Engine`.
        cache: accounting alone; what happens to blocks travels with batches.
        num_stages: batches that keep all of it busy.
    """

    directory: Path
    manifest: Manifest
    cache: Blocks
    num_stages: int

    @abstractmethod
    def submit(self, batch: Batch) -> None:
        """Send ``batch`` after those that are on their way.

        Raises:
            StageLost: a stage does not answer.
        """

    @abstractmethod
    def collect(self) -> tuple[np.ndarray, float]:
        """Wait for the oldest batch on its way.

        Returns:
            what the graph ends in, as of :meth:`Engine.run`, and the seconds that the last stage took for it.

        Raises:
            EngineError: a stage refuses this batch; those behind it come.
            StageLost: a stage does not answer.
        """

    @abstractmethod
    def recover(self) -> None:
        """Let every stage run again, whatever was on its way; the caller forgets what blocks held.

        Raises:
            EngineError: one does not, time and again.
        """

    @abstractmethod
    def close(self) -> None:
        """End the stages."""

    def run(self, batch: Batch) -> np.ndarray:
        """As :meth:`Engine.run`, while nothing is on its way.

        Raises:
            EngineError, StageLost: as :meth:`collect`.
        """
        self.submit(batch)
        return self.collect()[0]


AnyEngine = Engine | PipelinedEngine


class Flight(NamedTuple):
    """Chunks that are fed together, and what an engine is given of them."""

    chunks: list[Chunk]
    batch: Batch


class Flights:
    """The batches whose results nobody has taken, oldest first.

    Attributes:
        most: how many keep the engine busy.
        num_runs: batches that have come back.
        run_s: seconds that they took, in the last stage where there are several.
    """

    def __init__(self, engine: AnyEngine) -> None:
        self._engine = engine
        self._pipeline = engine if isinstance(engine, PipelinedEngine) else None
        self._flights: deque[Flight] = deque()
        self.most = 1 if self._pipeline is None else self._pipeline.num_stages
        self.num_runs = 0
        self.run_s = 0.0

    def __len__(self) -> int:
        return len(self._flights)

    @property
    def oldest(self) -> list[Chunk]:
        """The chunks that come back next."""
        return self._flights[0].chunks

    def submit(self, chunks: list[Chunk]) -> None:
        """Send ``chunks`` on their way.

        Raises:
            StageLost: a stage does not answer.
        """
        flight = Flight(chunks, build_batch(chunks))
        self._flights.append(flight)
        if self._pipeline is not None:
            self._pipeline.submit(flight.batch)

    def collect(self) -> tuple[Flight, np.ndarray | None, float]:
        """The oldest batch, what the engine made of it, and seconds; None where the engine refuses it.

        Then nothing is on its way any more: what was behind it has been given back, and is to be fed again.

        Raises:
            StageLost: a stage does not answer.
        """
        flight = self._flights.popleft()
        try:
            if self._pipeline is None:
                started = time.perf_counter()
                logits = self._engine.run(flight.batch)
                run_s = time.perf_counter() - started
            else:
                logits, run_s = self._pipeline.collect()
        except EngineError:
            self._give_back()
            return flight, None, 0.0
        self.num_runs += 1
        self.run_s += run_s
        return flight, logits, run_s

    def disown(self) -> None:
        """Nobody wants the results of what is on its way."""
        for flight in self._flights:
            flight.chunks.clear()

    def recover(self) -> None:
        """Let the stages run again; nothing is on its way any more.

        Raises:
            EngineError: one does not.
        """
        assert self._pipeline is not None, "an engine in one process has no stage to lose"
        self._flights.clear()
        self._pipeline.recover()

    def _give_back(self) -> None:
        """Wait for what is on its way, and count it as not fed: a part of it may need what was refused."""
        assert self._pipeline is not None or not self._flights
        while self._flights:
            flight = self._flights.popleft()
            if self._pipeline is not None:
                with suppress(EngineError):
                    self._pipeline.collect()
            for chunk in flight.chunks:
                chunk.sequence.num_in_flight -= len(chunk.token_ids)
