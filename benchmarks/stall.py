"""What a long prompt does to those who are answering, and how soon a late short one begins.

    python -m benchmarks.random_checkpoint qwen2.5-0.5b build/random
    qwen-build build/random --output build/engine
    python -m benchmarks.stall build/engine

Eight requests decode. Then a prompt of 4,000 random tokens comes, and five steps later one of 32. For each
``max_batch_tokens``: the time per token of the eight, that is of a step, without the long prompt and while it is fed
(median and worst); the time of the same chunks of the long prompt when nothing else runs (median), which with that
without it is the most that the budget's share explains; time to the first token of the long prompt beside the eight
and alone, and of the late one, with the steps that it took.
"""

from __future__ import annotations

import argparse
import statistics
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnxruntime

from qwen_run.runtime.core import Core, CoreOptions
from qwen_run.runtime.engine import Engine
from qwen_run.runtime.request import Request
from qwen_run.sampling.sample import SamplingParams

DECODING, PROMPT, LONG, LATE = 8, 128, 4000, 32  # requests; tokens of their prompts, of the long and of the late one
STEPS_BEFORE, STEPS_BETWEEN = 30, 5


@dataclass(frozen=True)
class Stall:
    """Milliseconds; a step gives each of the decoding requests one token."""

    without_ms: float
    during_ms: float
    worst_ms: float
    chunk_ms: float
    long_first_ms: float
    long_alone_ms: float
    late_first_ms: float
    late_steps: int


def measure(engine: Engine, budget: int) -> Stall:
    """One round with ``budget`` tokens a step."""
    rng = np.random.default_rng(0)

    def request(length: int, max_tokens: int) -> Request:
        prompt = tuple(rng.integers(0, engine.manifest.model.vocab_size, length).tolist())
        return Request(prompt, SamplingParams(temperature=0, max_tokens=max_tokens))

    core = make_core(engine, budget)
    decoding = [request(PROMPT, 10**6) for _ in range(DECODING)]
    for each in decoding:
        core.add(each)
    while not all(each.sequences[0].num_output for each in decoding):
        core.step()
    without = [step_ms(core) for _ in range(STEPS_BEFORE)]

    long, late = request(LONG, 1), request(LATE, 1)
    core.add(long)
    during = [step_ms(core) for _ in range(STEPS_BETWEEN)]
    core.add(late)
    since_late = []
    while not late.is_finished:
        since_late.append(step_ms(core))
    during += since_late
    while not long.is_finished:
        during.append(step_ms(core))
    core.close()

    alone = make_core(engine, budget - DECODING)
    alone.add(request(LONG, 1))
    chunks = []
    while not alone.is_done:
        chunks.append(step_ms(alone))
    return Stall(
        without_ms=statistics.median(without),
        during_ms=statistics.median(during),
        worst_ms=max(during),
        chunk_ms=statistics.median(chunks),
        long_first_ms=sum(during),
        long_alone_ms=sum(chunks),
        late_first_ms=sum(since_late),
        late_steps=len(since_late),
    )


def make_core(engine: Engine, budget: int) -> Core:
    return Core(engine, CoreOptions(max_batch_size=DECODING + 2, max_batch_tokens=budget, prefix_caching=False))


def step_ms(core: Core) -> float:
    started = time.perf_counter()
    core.step()
    return (time.perf_counter() - started) * 1e3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("engine", type=Path)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--budgets", type=int, nargs="+", default=[128, 256, 512])
    parser.add_argument("--rounds", type=int, default=3, help="budgets take turns; the medians over the rounds")
    arguments = parser.parse_args()
    engine = Engine.load(arguments.engine, threads=arguments.threads)
    print(
        f"{arguments.engine.name}, {DECODING} requests decode after {PROMPT} tokens, a prompt of {LONG} comes, "
        f"then one of {LATE}; {arguments.threads} threads, onnxruntime {onnxruntime.__version__}, "
        f"{arguments.rounds} rounds\n"
    )
    found: dict[int, list[Stall]] = {budget: [] for budget in arguments.budgets}
    for _ in range(arguments.rounds):
        for budget, stalls in found.items():
            stalls.append(measure(engine, budget))
    print(
        "| tokens a step | time per token, ms | while the long prompt is fed | worst | a chunk alone, ms | "
        "long prompt's first token, s | alone | late one's first token, ms | in steps |\n"
        "|---|---|---|---|---|---|---|---|---|"
    )
    for budget, stalls in found.items():
        median = {name: statistics.median(getattr(stall, name) for stall in stalls) for name in vars(stalls[0])}
        print(
            f"| {budget} | {median['without_ms']:.1f} | {median['during_ms']:.1f} | {median['worst_ms']:.1f} | "
            f"{median['chunk_ms']:.1f} | {median['long_first_ms'] / 1e3:.2f} | {median['long_alone_ms'] / 1e3:.2f} | "
            f"{median['late_first_ms']:.0f} | {median['late_steps']:.0f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
