"""What a step costs outside the ONNX Runtime run: scheduling, the batch's arrays, sampling.

    qwen-build DEMO --output build/engine
    python -m benchmarks.overhead build/engine

As many greedy sequences as the batch size decode together, each after a prompt of 64 random tokens. "run" is the time
in ``Engine.run``, "outside" the rest of ``Core.step``; both are medians over the steps in which all decode. The share
is of the whole step.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime

from qwen_run.core import Core, CoreOptions
from qwen_run.engine import Engine
from qwen_run.request import Request
from qwen_run.sampling import SamplingParams

PROMPT = 64


def measure(engine: Engine, batch_size: int, steps: int, **params: Any) -> tuple[float, float]:
    """Median milliseconds in the run and outside it."""
    rng = np.random.default_rng(0)
    core = Core(engine, CoreOptions(max_batch_size=batch_size, max_batch_tokens=max(512, batch_size * PROMPT)))
    for seed in range(batch_size):
        prompt = tuple(rng.integers(0, engine.manifest.model.vocab_size, PROMPT).tolist())
        core.add(Request(prompt, SamplingParams(max_tokens=steps + 1, seed=seed, **params)))
    run_ms, outside_ms = [], []
    while not core.is_done:
        run_before, started = core.statistics.run_s, time.perf_counter()
        num_tokens = len(core.step())
        step_s = time.perf_counter() - started
        run_s = core.statistics.run_s - run_before
        if num_tokens == batch_size:
            run_ms.append(run_s * 1e3)
            outside_ms.append((step_s - run_s) * 1e3)
    return statistics.median(run_ms[1:]), statistics.median(outside_ms[1:])  # the first step fed the prompts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("engine", type=Path)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--steps", type=int, default=50)
    arguments = parser.parse_args()
    engine = Engine.load(arguments.engine, threads=arguments.threads)
    model = engine.manifest.model
    print(
        f"{arguments.engine.name}, vocabulary {model.vocab_size}, {len(engine.cache.pools)} cache pools, "
        f"{arguments.threads} threads, onnxruntime {onnxruntime.__version__}, median of {arguments.steps - 1} steps\n"
    )
    print("| batch | sampling | run, ms | outside, ms | outside, share |\n|---|---|---|---|---|")
    kinds: dict[str, dict[str, Any]] = {"greedy": {"temperature": 0.0}, "temperature 0.7": {"temperature": 0.7}}
    for name, params in kinds.items():
        for batch_size in (1, 4, 16, 32):
            run_ms, outside_ms = measure(engine, batch_size, arguments.steps, **params)
            share = outside_ms / (run_ms + outside_ms)
            print(f"| {batch_size} | {name} | {run_ms:.2f} | {outside_ms:.3f} | {share:.1%} |", flush=True)


if __name__ == "__main__":
    main()
