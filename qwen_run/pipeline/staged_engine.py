"""An engine in stages: this process has the last one, and everything that is known of blocks and requests.

Logits never travel: the last stage is where tokens are chosen. Between stages travels the hidden state of each new
token, and with it what has happened to cache blocks since the batch before.
"""

from __future__ import annotations

import time
import weakref
from collections import deque
from collections.abc import Callable
from pathlib import Path

import numpy as np

from qwen_engine.errors import EngineError
from qwen_engine.manifest import Manifest
from qwen_run.pipeline.alike import check_alike, facts
from qwen_run.pipeline.executor import Executor, StagePlan
from qwen_run.pipeline.local import LocalStages
from qwen_run.runtime.capacity import choose_capacity, warn_of_shorter, with_limit
from qwen_run.runtime.engine import Batch, Engine, check_counts, read_manifest
from qwen_run.runtime.flights import PipelinedEngine
from qwen_run.runtime.kv_cache import Blocks, Edit, block_bytes
from qwen_run.runtime.machine import available_bytes, physical_cores
from qwen_run.runtime.stage import Stage, even_cuts


def _ray_stages() -> Executor:
    from qwen_run.pipeline.ray_stages import RayStages

    return RayStages()


# vLLM's names of who runs the stages -> what makes one; a process a stage is vLLM's "mp"
BACKENDS: dict[str, Callable[[], Executor]] = {"local": LocalStages, "mp": LocalStages, "ray": _ray_stages}


class StagedEngine(PipelinedEngine):
    """Several batches in flight through stages of one engine. Make one with :func:`open_engine`.

    One that nobody holds any more ends its stages.

    Attributes:
        executor: who runs the stages before the last.
    """

    def __init__(self, last: Stage, executor: Executor, manifest: Manifest, num_blocks: int, num_stages: int) -> None:
        self.directory = last.directory
        self.manifest = manifest
        self.num_stages = num_stages
        self.executor = executor
        self._noted: list[Edit] = []
        self.cache = Blocks(manifest.cache.block_size, num_blocks, block_bytes(manifest.states), self._noted.append)
        self._last = last
        self._sent: deque[tuple[Batch, list[Edit]]] = deque()
        weakref.finalize(self, executor.close)

    def submit(self, batch: Batch) -> None:
        edits = self._noted.copy()
        self._noted.clear()
        self._sent.append((batch, edits))
        self.executor.send(batch, edits)

    def collect(self) -> tuple[np.ndarray, float]:
        hidden = self.executor.receive()
        batch, edits = self._sent.popleft()
        self._last.apply(edits)
        if isinstance(hidden, str):
            raise EngineError(hidden)
        started = time.perf_counter()
        logits = self._last.run(batch, hidden)
        return logits, time.perf_counter() - started

    def recover(self) -> None:
        self._sent.clear()
        self._noted.clear()
        self.executor.recover()

    def close(self) -> None:
        self.executor.close()


def open_engine(
    directory: Path,
    threads: int | None = None,
    num_blocks: int | None = None,
    cache_bytes: int | None = None,
    max_seq_len: int | None = None,
    pipeline_parallel_size: int | None = None,
    distributed_executor_backend: str | None = None,
) -> Engine | StagedEngine:
    """The engine in ``directory``, in one process or in stages.

    Args:
        threads: as :meth:`Engine.load` takes it; of each stage. Stages share the physical cores if None.
        num_blocks, cache_bytes, max_seq_len: as :meth:`Engine.load` takes them, for all stages together.
        pipeline_parallel_size: stages; 1 is an engine in one process.
        distributed_executor_backend: who runs them, of ``BACKENDS``.

    Raises:
        EngineError: as :meth:`Engine.load`, or the engine cannot be cut into so many stages.
    """
    check_counts(threads=threads, pipeline_parallel_size=pipeline_parallel_size)
    backend = distributed_executor_backend or "local"
    if backend not in BACKENDS:
        raise EngineError(f"distributed_executor_backend is {backend!r}, expected one of {', '.join(BACKENDS)}")
    num_stages = pipeline_parallel_size or 1
    if num_stages == 1:
        return Engine.load(directory, threads, num_blocks, cache_bytes=cache_bytes, max_seq_len=max_seq_len)
    check_counts(None, num_blocks=num_blocks, cache_bytes=cache_bytes, max_seq_len=max_seq_len)
    manifest = read_manifest(directory)
    cuts = even_cuts(manifest.model.num_hidden_layers, num_stages)
    capacity = choose_capacity(
        manifest, available_bytes(), num_blocks=num_blocks, cache_bytes=cache_bytes, max_seq_len=max_seq_len
    )
    if max_seq_len is None and capacity.max_seq_len < manifest.limits.max_seq_len:
        warn_of_shorter(manifest, capacity)
    each = threads or max(1, physical_cores() // num_stages)
    executor = BACKENDS[backend]()
    try:
        executor.start([StagePlan(directory.absolute(), layers, capacity.num_blocks, each) for layers in cuts[:-1]])
        last = Stage.load(directory, cuts[-1], capacity.num_blocks, each, checks_others=True)
        check_alike(facts(last), executor.connect())
    except BaseException:
        executor.close()
        raise
    return StagedEngine(last, executor, with_limit(manifest, capacity.max_seq_len), capacity.num_blocks, num_stages)
