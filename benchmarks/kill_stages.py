"""Stages of an engine that are killed at random steps: answers and blocks afterwards, and how soon they went on.

    python -m benchmarks.kill_stages ENGINE --kills 50 --stages 3

Requests of all kinds are answered by one process, and then by stages of which one is killed (SIGKILL) now and then.
Ends with 1 where an answer differs, is missing, or a block is not free at the end.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import statistics
import time
from pathlib import Path
from typing import Any

from qwen_run.pipeline.local import LocalStages
from qwen_run.pipeline.staged_engine import StagedEngine, open_engine
from qwen_run.runtime.core import Core, CoreOptions
from qwen_run.runtime.flights import AnyEngine
from qwen_run.runtime.request import Request
from qwen_run.sampling.params import SamplingParams

BLOCKS = 160
WAYS: list[dict[str, Any]] = [
    {"temperature": 0},
    {"temperature": 0.8, "logprobs": 2},
    {"temperature": 0.9, "n": 2},
    {"temperature": 0, "num_beams": 2, "max_tokens": 12},
    {"temperature": 0, "prompt_logprobs": 1, "max_tokens": 8},
]


def some_requests(seed: int, vocab_size: int, count: int) -> list[Request]:
    """Prompts of 3 to 200 random tokens."""
    rng = random.Random(seed)
    made = []
    for index in range(count):
        prompt = tuple(rng.randrange(vocab_size) for _ in range(rng.choice([3, 17, 64, 200])))
        options = {"max_tokens": 40, "seed": index, "ignore_eos": True} | WAYS[index % len(WAYS)]
        made.append(Request(prompt, SamplingParams(**options)))
    return made


def answer(
    engine: AnyEngine, requests: list[Request], kill_at: set[int], rng: random.Random
) -> tuple[Any, list[float]]:
    """What is told of ``requests``, and the seconds from each kill to the first token of those who began again."""
    core = Core(engine, CoreOptions(max_batch_size=8, max_drafts=2))
    for request in requests:
        core.add(request)
    gaps: list[float] = []
    killed_at, num_lost = 0.0, 0
    step = 0
    while not core.is_done:
        if step in kill_at and isinstance(engine, StagedEngine) and isinstance(engine.executor, LocalStages):
            os.kill(rng.choice(engine.executor.pids), signal.SIGKILL)
            killed_at = time.perf_counter()
        if core.step() and core.statistics.num_lost_stages > num_lost:
            gaps.append(time.perf_counter() - killed_at)
            num_lost = core.statistics.num_lost_stages
        step += 1
    told = [[(s.token_ids, s.finish_reason, s.logprobs) for s in r.sequences] + [r.prompt_logprobs] for r in requests]
    return told, gaps


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("engine", type=Path)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--stages", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    rng = random.Random(asked.seed)
    whole = open_engine(asked.engine, 1, num_blocks=BLOCKS)
    staged = open_engine(asked.engine, 1, num_blocks=BLOCKS, pipeline_parallel_size=asked.stages)
    vocab_size = whole.manifest.model.vocab_size
    done, wrong, gaps, rounds = 0, 0, list[float](), 0
    while done < asked.kills:
        count = min(5, asked.kills - done)
        kills = set(rng.sample(range(10, 160), count))
        expected, _ = answer(whole, some_requests(rounds, vocab_size, 12), set(), rng)
        found, waited = answer(staged, some_requests(rounds, vocab_size, 12), kills, rng)
        wrong += sum(a != b for a, b in zip(expected, found, strict=True))
        done, rounds, gaps = done + count, rounds + 1, gaps + waited
        free = staged.cache.num_free == staged.cache.num_blocks
        print(f"{done} kills: {12 * rounds} requests, {wrong} answers differ, all blocks free: {free}", flush=True)
        wrong += not free
    print(f"from a kill to the first token after it: median {statistics.median(gaps):.2f} s, at most {max(gaps):.2f} s")
    raise SystemExit(1 if wrong else 0)


if __name__ == "__main__":
    main()
