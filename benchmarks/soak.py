"""A hundred thousand requests through one core, on an engine without a model: memory must stay level.

    python -m benchmarks.soak --requests 100000

Prompts of 1 to 60 tokens, half of them beginning alike, come in as fast as they are served; some are samples, some are
aborted on their way; a small pool keeps preemption and eviction busy. Prints the resident memory after every tenth of
the requests, and at the end whether every block is free.
"""

from __future__ import annotations

import argparse
import random
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from qwen_engine.graph_io import TensorSpec
from qwen_run.runtime.core import Core, CoreOptions
from qwen_run.runtime.engine import Batch
from qwen_run.runtime.kv_cache import KVCache
from qwen_run.runtime.request import Request
from qwen_run.sampling.sample import SamplingParams

VOCAB_SIZE, BLOCK_SIZE, NUM_BLOCKS, MAX_SEQ_LEN = 64, 8, 40, 128


class InstantEngine:
    """Stands where an ``Engine`` does, and answers with logits that depend on the last token and its position."""

    def __init__(self) -> None:
        self.manifest: Any = SimpleNamespace(
            limits=SimpleNamespace(max_seq_len=MAX_SEQ_LEN), model=SimpleNamespace(vocab_size=VOCAB_SIZE)
        )
        pool = TensorSpec("pool", "paged_state", "int8", ("num_blocks", BLOCK_SIZE))
        self.cache = KVCache([pool], BLOCK_SIZE, NUM_BLOCKS)
        self._table = np.random.default_rng(0).normal(size=(VOCAB_SIZE, VOCAB_SIZE)).astype(np.float32)

    def run(self, batch: Batch) -> np.ndarray:
        """Logits (L, VOCAB_SIZE)."""
        return self._table[batch.input_ids[batch.logits_indices]]


def resident_mib() -> float:
    """Memory of this process, MiB (Linux)."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096 / 2**20


def make_request(rng: random.Random) -> Request:
    beginning = list(range(24)) if rng.random() < 0.5 else []
    prompt = beginning + [rng.randrange(VOCAB_SIZE) for _ in range(rng.randint(1, 36))]
    sampled = rng.random() < 0.3
    params = SamplingParams(
        temperature=0.8 if sampled else 0.0,
        n=rng.choice([1, 1, 3]) if sampled else 1,
        seed=rng.randrange(1000),
        max_tokens=rng.randint(1, 40),
    )
    return Request(tuple(prompt), params, frozenset({5}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=100_000)
    arguments = parser.parse_args()
    rng, engine = random.Random(0), InstantEngine()
    core = Core(engine, CoreOptions(max_batch_size=12, max_batch_tokens=64, max_drafts=3))  # type: ignore[arg-type]
    open_requests: list[Request] = []
    num_added, started = 0, time.perf_counter()
    while num_added < arguments.requests or not core.is_done:
        while num_added < arguments.requests and core.statistics.num_waiting < 8:
            open_requests.append(make_request(rng))
            core.add(open_requests[-1])
            num_added += 1
            if num_added % max(1, arguments.requests // 10) == 0:
                print(
                    f"{num_added} requests, {time.perf_counter() - started:.0f} s, {resident_mib():.1f} MiB", flush=True
                )
        core.step()
        open_requests = [request for request in open_requests if not request.is_finished]
        if open_requests and rng.random() < 0.05:
            core.abort(rng.choice(open_requests))
    print(core.statistics)
    print("every block is free" if engine.cache.num_free == NUM_BLOCKS else "BLOCKS ARE LOST")


if __name__ == "__main__":
    main()
