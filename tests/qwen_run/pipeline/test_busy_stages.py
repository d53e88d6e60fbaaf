"""Stages that only sleep: does the schedule keep them busy? What they would compute takes no processor."""

from __future__ import annotations

import queue
import random
import threading
import time
from collections import deque
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from cases.processes import PATIENCE_S
from qwen_engine.tasks import GENERATE
from qwen_run.runtime.core import Core, CoreOptions
from qwen_run.runtime.engine import Batch
from qwen_run.runtime.flights import PipelinedEngine
from qwen_run.runtime.kv_cache import Blocks
from qwen_run.runtime.request import Request
from qwen_run.sampling.params import SamplingParams

VOCAB_SIZE = 32
# Of a batch, over all stages: to read the weights, and for each token. A hop costs HOP_S.
READ_S, TOKEN_S, HOP_S = 0.08, 0.004, 0.001


class SleepingStages(PipelinedEngine):
    """``num_stages`` threads in a row, each of which sleeps for its part of a batch."""

    def __init__(self, num_stages: int) -> None:
        self.manifest: Any = SimpleNamespace(
            limits=SimpleNamespace(max_seq_len=4096),
            model=SimpleNamespace(vocab_size=VOCAB_SIZE, experts=None),
            task=GENERATE,
        )
        self.directory, self.num_stages = Path("sleeping"), num_stages
        self.cache = Blocks(64, 2000, 1, lambda edit: None)
        self.busy_s = [0.0] * num_stages
        self._sent: deque[Batch] = deque()
        self._queues: list[queue.SimpleQueue[tuple[float, Batch | None]]] = [
            queue.SimpleQueue() for _ in range(num_stages + 1)
        ]
        for index in range(num_stages):
            threading.Thread(target=self._serve, args=(index,), daemon=True).start()

    def _serve(self, index: int) -> None:
        while True:
            ready, batch = self._queues[index].get(timeout=PATIENCE_S)
            if batch is None:
                return self._queues[index + 1].put((0.0, None))
            time.sleep(max(0.0, ready - time.perf_counter()))
            started = time.perf_counter()
            time.sleep((READ_S + TOKEN_S * len(batch.input_ids)) / self.num_stages)
            ended = time.perf_counter()
            self.busy_s[index] += ended - started
            self._queues[index + 1].put((ended + HOP_S, batch))

    def submit(self, batch: Batch) -> None:
        self._sent.append(batch)
        self._queues[0].put((0.0, batch))

    def collect(self) -> tuple[np.ndarray, float]:
        _, batch = self._queues[-1].get(timeout=PATIENCE_S)
        assert batch is self._sent.popleft()
        rows = np.zeros((len(batch.logits_indices), VOCAB_SIZE), np.float32)
        rows[:, 7] = 1
        return rows, 0.01

    def recover(self) -> None:
        raise AssertionError("none is lost")

    def close(self) -> None:
        self._queues[0].put((0.0, None))


def answer(num_stages: int, prompts: list[int], tokens: int) -> tuple[float, float]:
    """Tokens a second, and the share of the time that the stage works which does least."""
    engine = SleepingStages(num_stages)
    core = Core(engine, CoreOptions(max_batch_size=len(prompts), max_batch_tokens=256))
    rng = random.Random(0)
    for length in prompts:
        core.add(Request(tuple(rng.randrange(VOCAB_SIZE) for _ in range(length)), SamplingParams(0, max_tokens=tokens)))
    started, count = time.perf_counter(), 0
    while not core.is_done:
        count += len(core.step())
    took_s = time.perf_counter() - started
    engine.close()
    return count / took_s, min(engine.busy_s) / took_s


def test_more_stages_answer_more_requests() -> None:
    """N times the requests through N stages; the bounds are those of an idle machine, which sleeping ones allow."""
    one, _ = answer(1, [64] * 16, 24)
    two, _ = answer(2, [64] * 32, 24)
    four, busy = answer(4, [64] * 64, 24)
    assert two >= 1.7 * one
    assert four >= 3.0 * one
    assert busy >= 0.85


def test_a_long_prompt_passes_through_four_stages_at_once() -> None:
    """Its chunks follow each other."""
    alone, _ = answer(1, [2048], 1)
    staged, _ = answer(4, [2048], 1)
    assert alone <= 0.4 * staged
