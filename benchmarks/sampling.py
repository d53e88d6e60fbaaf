"""What choosing one token costs, by the options of its request and the size of the vocabulary.

    python -m benchmarks.sampling

Microseconds a row, medians of --repetitions: normal random logits (standard deviation 3), a prompt of 1,000 tokens and
an answer of 200. One thread. "beam" is a step of a search with four beams, their log probabilities given.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np

from qwen_run.sampling.beam import BeamSearch, beam_logprobs
from qwen_run.sampling.processors import SamplingContext
from qwen_run.sampling.sample import SamplingParams, sample

VOCABULARIES = (49_152, 151_936)
PENALTIES = {"repetition_penalty": 1.1, "presence_penalty": 0.5, "frequency_penalty": 0.5}
OPTIONS: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0},
    "greedy, logprobs 0": {"temperature": 0, "logprobs": 0},
    "greedy, logprobs 5": {"temperature": 0, "logprobs": 5},
    "greedy, repetition": {"temperature": 0, "repetition_penalty": 1.1},
    "greedy, presence and frequency": {"temperature": 0, "presence_penalty": 0.5, "frequency_penalty": 0.5},
    "greedy, all three penalties": {"temperature": 0, **PENALTIES},
    "greedy, 10 biases": {"temperature": 0, "logit_bias": {3 * i: 1.0 for i in range(10)}},
    "greedy, min_tokens": {"temperature": 0, "min_tokens": 500},
    "temperature": {"temperature": 0.7},
    "temperature, top-k 20": {"temperature": 0.7, "top_k": 20},
    "temperature, top-k 20, top-p 0.8": {"temperature": 0.7, "top_k": 20, "top_p": 0.8},
    "temperature, top-p 0.9": {"temperature": 0.7, "top_p": 0.9},
    "temperature, min-p 0.1": {"temperature": 0.7, "min_p": 0.1},
}


def microseconds(call: Callable[[], object], repetitions: int) -> float:
    """Median time of ``call``."""
    times = []
    for _ in range(repetitions):
        started = time.perf_counter()
        call()
        times.append(time.perf_counter() - started)
    return statistics.median(times) * 1e6


def measure(vocab_size: int, repetitions: int) -> dict[str, float]:
    """Microseconds of every row of the table."""
    generator = np.random.default_rng(0)
    rows = generator.normal(0, 3, (4, vocab_size)).astype(np.float32)
    prompt = generator.integers(0, vocab_size, 1000).tolist()
    found = {}
    for name, options in OPTIONS.items():
        params = SamplingParams(**options)
        context = SamplingContext(params, prompt, stop_token_ids=(2,))
        for token_id in generator.integers(0, vocab_size, 200).tolist():
            context.append(token_id)
        found[name] = microseconds(partial(sample, rows[0], params, context, context.position), repetitions)

    params = SamplingParams(temperature=0, num_beams=4)
    context = SamplingContext(params, prompt)
    found["log probabilities of a beam"] = microseconds(partial(beam_logprobs, rows[0], params, context), repetitions)
    logprobs = np.stack([beam_logprobs(row, params, context) for row in rows])
    search = BeamSearch(params, (2,), max_tokens=2 + repetitions)
    search.advance(logprobs[:1])
    found["beam"] = microseconds(partial(search.advance, logprobs), repetitions)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repetitions", type=int, default=51)
    repetitions = parser.parse_args().repetitions
    columns = [measure(vocab_size, repetitions) for vocab_size in VOCABULARIES]
    print("microseconds".ljust(34), *(f"{vocab_size:>9,}" for vocab_size in VOCABULARIES))
    for name in columns[0]:
        print(name.ljust(34), *(f"{column[name]:9.1f}" for column in columns))


if __name__ == "__main__":
    main()
