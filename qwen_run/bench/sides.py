"""Who is measured: an engine, or transformers, each answering requests that arrive as time goes by."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np

from qwen_engine.errors import EngineError, RequestError
from qwen_engine.graph_io import EMBEDDING
from qwen_engine.manifest import Manifest
from qwen_run.accuracy.reference import HuggingFace
from qwen_run.api.llm import LLM
from qwen_run.bench.figures import Reads, Timeline
from qwen_run.bench.trace import Arrival
from qwen_run.runtime.flights import AnyEngine
from qwen_run.sampling.sample import SamplingParams

REFERENCE_ITEM_BYTES = {"float32": 4, "bfloat16": 2}  # what transformers is measured in

Prompts = Sequence[Sequence[int]]


class Side(Protocol):
    """Somebody who answers; ``name`` heads a column or row, ``reads`` is what a decode step must read."""

    name: str
    reads: Reads

    def serve(self, arrivals: Sequence[Arrival], prompts: Prompts) -> list[Timeline]:
        """Answer ``prompts`` when they arrive, greedy, past any end of sequence; arrivals come in order of time."""


def draw_prompts(arrivals: Sequence[Arrival], vocab_size: int, *seed: int) -> list[list[int]]:
    """Random token ids, as many for each as it wants: no two prompts begin alike, so no cached prefix helps."""
    rng = np.random.default_rng(seed)
    return [rng.integers(0, vocab_size, arrival.input_tokens).tolist() for arrival in arrivals]


def check_lengths(arrivals: Sequence[Arrival], max_seq_len: int) -> None:
    """Make sure that an engine of ``max_seq_len`` can answer every arrival.

    Raises:
        RequestError: one is too long.
    """
    for number, arrival in enumerate(arrivals, start=1):
        if arrival.input_tokens + arrival.output_tokens > max_seq_len:
            raise RequestError(
                f"request {number} has {arrival.input_tokens} input and {arrival.output_tokens} output tokens, "
                f"the engine takes {max_seq_len} together; ask for fewer, "
                "or run or build it with a larger --max-seq-len if its model was trained for more"
            )


class EngineSide:
    """An engine behind its scheduler: requests join and leave at every step."""

    def __init__(self, engine: AnyEngine, max_batch_size: int, max_batch_tokens: int) -> None:
        self.name = engine.directory.resolve().name
        self.reads = engine_reads(engine.manifest)
        # Without guesses, of which random prompts allow none, a step brings one token to every request that answers.
        self._llm = LLM(
            engine,
            skip_tokenizer_init=True,
            max_batch_size=max_batch_size,
            max_batch_tokens=max_batch_tokens,
            max_drafts=0,
        )

    def serve(self, arrivals: Sequence[Arrival], prompts: Prompts) -> list[Timeline]:
        params = [SamplingParams(temperature=0, max_tokens=each.output_tokens, ignore_eos=True) for each in arrivals]
        requests = [self._llm.prepare(prompt, each) for prompt, each in zip(prompts, params, strict=True)]
        indexes = {pending: index for index, pending in enumerate(requests)}
        clock = _Clock(arrivals)
        while not (clock.all_arrived and self._llm.core.is_done):
            for index in clock.arrived():
                self._llm.submit(requests[index])
            if self._llm.core.is_done:
                clock.sleep_until_next()
                continue
            grown = self._llm.step()
            moment = clock.now()
            for pending in grown:
                if pending.request.is_finished and (error := pending.output().error):
                    raise EngineError(error)
                clock.timelines[indexes[pending]].token_s.append(moment)
        return clock.timelines


class HuggingFaceSide:
    """transformers in static batches: whoever waits when the last batch is done makes the next one, padded."""

    def __init__(self, manifest: Manifest, checkpoint: Path, threads: int, dtype: str, max_batch_size: int) -> None:
        self.name = f"transformers {dtype}"
        self.reads = dense_reads(manifest, REFERENCE_ITEM_BYTES[dtype])
        self._model = HuggingFace(checkpoint, threads, dtype=dtype)
        self._max_batch_size = max_batch_size

    def serve(self, arrivals: Sequence[Arrival], prompts: Prompts) -> list[Timeline]:
        clock = _Clock(arrivals)
        waiting: list[int] = []
        while waiting or not clock.all_arrived:
            waiting += clock.arrived()
            if not waiting:
                clock.sleep_until_next()
                continue
            batch, waiting = waiting[: self._max_batch_size], waiting[self._max_batch_size :]
            longest = max(arrivals[index].output_tokens for index in batch)
            for step, _ in enumerate(self._model.stream_batch([prompts[index] for index in batch], longest)):
                moment = clock.now()
                for index in batch:
                    if step < arrivals[index].output_tokens:
                        clock.timelines[index].token_s.append(moment)
        return clock.timelines


class _Clock:
    """Time since the start, and who has arrived by now."""

    def __init__(self, arrivals: Sequence[Arrival]) -> None:
        self.timelines = [Timeline(arrival.arrived_s, arrival.input_tokens) for arrival in arrivals]
        self._next = 0
        self._started = time.perf_counter()

    @property
    def all_arrived(self) -> bool:
        return self._next == len(self.timelines)

    def now(self) -> float:
        return time.perf_counter() - self._started

    def arrived(self) -> Iterator[int]:
        """Indexes of those that came since it was asked last."""
        now = self.now()
        while not self.all_arrived and self.timelines[self._next].arrived_s <= now:
            self._next += 1
            yield self._next - 1

    def sleep_until_next(self) -> None:
        time.sleep(max(0.0, self.timelines[self._next].arrived_s - self.now()))


def engine_reads(manifest: Manifest) -> Reads:
    """Every matrix as the engine stores it; of an embedding that is no head too, a step reads a few rows: nothing."""
    weight_bytes = sum(linear.stored_bytes for linear in manifest.linears if linear.name != EMBEDDING)
    return Reads(weight_bytes, manifest.cache.bytes_per_token)


def dense_reads(manifest: Manifest, item_bytes: int) -> Reads:
    """The same model with every weight, key and value in ``item_bytes``."""
    model = manifest.model
    elements = sum(linear.in_features * linear.out_features for linear in manifest.linears if linear.name != EMBEDDING)
    per_token = 2 * model.num_hidden_layers * model.num_key_value_heads * model.head_dim
    return Reads(elements * item_bytes, per_token * item_bytes)
