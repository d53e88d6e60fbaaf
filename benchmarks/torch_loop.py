"""What a token costs in transformers' loop around an engine, beside the engine's own loop.

    python -m benchmarks.torch_loop ENGINE
    python -m benchmarks.torch_loop ENGINE --batch 1,8 --new 128 --rounds 15

One engine answers greedily in three ways, in turns: by arrays of NumPy, as where torch is missing; by
QwenForCausalLM in the engine's loop; by QwenForCausalLM in transformers' loop. A step is an answer of --new tokens less
one of a single token, over the steps between. "in the run" is what ONNX Runtime took of it. Medians of --rounds; the
tokens of all three are the same. Needs the extra hf.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.command import run
from benchmarks.peer_report import machine_notes
from qwen_run.api.causal_lm import EngineForCausalLM
from qwen_run.runtime.machine import physical_cores

PROMPT = 64
Answer = Callable[[int], Any]


class RunTime:
    """Seconds that an engine was running, since the last look."""

    def __init__(self, engine: Any) -> None:
        self._seconds, self._run = 0.0, engine.run
        engine.run = self._timed

    def _timed(self, batch: Any) -> Any:
        started = time.perf_counter()
        try:
            return self._run(batch)
        finally:
            self._seconds += time.perf_counter() - started

    def taken(self) -> float:
        """Seconds since this was asked last."""
        seconds, self._seconds = self._seconds, 0.0
        return seconds


def make_ways(arrays: EngineForCausalLM, batch: int) -> dict[str, Answer]:
    """Three functions of the number of new tokens, by their names."""
    import torch

    from qwen_run import QwenForCausalLM

    model: Any = QwenForCausalLM(arrays)
    model.generation_config.eos_token_id = None
    vocab_size = arrays.engine.manifest.model.vocab_size
    ids = np.random.default_rng(0).integers(0, vocab_size, (batch, PROMPT))
    tensor = torch.from_numpy(ids)
    common = {"do_sample": False, "pad_token_id": 0}
    return {
        "arrays": lambda new: arrays.generate(ids, eos_token_id=[], max_new_tokens=new, **common),
        "the engine's loop": lambda new: model.generate(tensor, max_new_tokens=new, **common).numpy(),
        "transformers' loop": lambda new: model.generate(
            tensor, max_new_tokens=new, logits_processor=[], **common
        ).numpy(),
    }


def measure(arrays: EngineForCausalLM, batch: int, new: int, rounds: int) -> dict[str, tuple[float, float]]:
    """Milliseconds of a step, and in the run of it, by the name of the way."""
    inside, ways = RunTime(arrays.engine), make_ways(arrays, batch)
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
    for number in range(rounds + 1):
        answers = []
        for name, answer in ways.items():
            times = []
            for length in (1, new):
                inside.taken()
                started = time.perf_counter()
                answers.append(answer(length))
                times.append((time.perf_counter() - started, inside.taken()))
            if number:  # the first round warms up
                (short, short_run), (long, long_run) = times
                steps = new - 1
                found[name].append(((long - short) * 1e3 / steps, (long_run - short_run) * 1e3 / steps))
        assert all(np.array_equal(one, answers[1]) for one in answers[1::2])
    return {
        name: (statistics.median(step for step, _ in pairs), statistics.median(ran for _, ran in pairs))
        for name, pairs in found.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("engine", type=Path)
    parser.add_argument("--batch", default="1,4", help="rows at once, with commas")
    parser.add_argument("--new", type=int, default=64, help="tokens of an answer")
    parser.add_argument("--rounds", type=int, default=7)
    arguments = parser.parse_args()
    print(f"{arguments.engine.name}, {machine_notes(physical_cores())[0]}, median of {arguments.rounds} rounds\n")
    print("| rows | answered by | a step, ms | in the run, ms | beside it, ms |\n|---|---|---|---|---|")
    for batch in map(int, arguments.batch.split(",")):
        arrays = EngineForCausalLM.from_pretrained(arguments.engine, engine_config={"batch_size": batch})
        for name, (step, ran) in measure(arrays, batch, arguments.new, arguments.rounds).items():
            print(f"| {batch} | {name} | {step:.2f} | {ran:.2f} | {step - ran:.2f} |", flush=True)


if __name__ == "__main__":
    run(main)
