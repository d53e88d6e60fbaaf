"""What an answer costs on each side: time to the first token, tokens a second, peak memory.

Each side is measured in a fresh process that holds nothing else, so that peak memory is its own: this module run as a
program, which reads a :class:`Job` from standard input and writes the figures to standard output, both as JSON.
"""

from __future__ import annotations

import dataclasses
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from qwen_engine.errors import EngineError
from qwen_run.accuracy.report import Cost

ANSWER_TOKENS = 32


@dataclass(frozen=True)
class Job:
    """Answer each prompt (token ids) alone with ``ANSWER_TOKENS`` greedy tokens, past any end of sequence."""

    side: str  # "engine" or "reference"
    directory: str
    threads: int
    prompts: Sequence[Sequence[int]]


def measure_cost(side: str, directory: Path, threads: int, prompts: Sequence[Sequence[int]], size_bytes: int) -> Cost:
    """Medians over ``prompts`` of one side; ``directory`` is the engine's or the checkpoint's.

    Raises:
        EngineError: the process that measures failed.
    """
    job = Job(side, str(directory), threads, [list(prompt) for prompt in prompts])
    command = [sys.executable, "-P", "-m", "qwen_run.accuracy.answer_cost"]  # -P: no module of the current folder
    done = subprocess.run(command, input=json.dumps(dataclasses.asdict(job)), capture_output=True, text=True)
    if done.returncode != 0:
        reason = (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
        raise EngineError(f"the cost of the {side} cannot be measured: {reason}")
    figures = json.loads(done.stdout)
    return Cost(
        side=side,
        batch=1,
        threads=threads,
        ttft_ms=figures["ttft_ms"],
        decode_tokens_per_s=figures["decode_tokens_per_s"],
        peak_memory_bytes=figures["peak_memory_bytes"],
        size_bytes=size_bytes,
    )


def _answerer(job: Job) -> Callable[[Sequence[int], int], object]:
    """A function that answers one prompt with so many tokens."""
    if job.side == "reference":
        from qwen_run.accuracy.reference import HuggingFace

        reference = HuggingFace(Path(job.directory), job.threads)
        return lambda prompt, count: reference.continuation(prompt, count, frozenset())

    from qwen_run.accuracy.both_sides import greedy
    from qwen_run.api.llm import LLM

    # the same prompt comes twice: what the first has cached would make the second cheap
    llm = LLM(job.directory, threads=job.threads, skip_tokenizer_init=True, prefix_caching=False, max_drafts=0)
    return lambda prompt, count: greedy(llm, prompt, count, ignore_eos=True)


def _figures(job: Job) -> dict[str, float]:
    from qwen_run.runtime.machine import peak_memory_bytes

    answer = _answerer(job)
    answer(job.prompts[0], 2)  # warm up
    first_s: list[float] = []
    all_s: list[float] = []
    for prompt in job.prompts:
        for count, seconds in ((1, first_s), (ANSWER_TOKENS, all_s)):
            started = time.perf_counter()
            answer(prompt, count)
            seconds.append(time.perf_counter() - started)
    decode_s = statistics.median(whole - first for whole, first in zip(all_s, first_s, strict=True))
    return {
        "ttft_ms": statistics.median(first_s) * 1e3,
        "decode_tokens_per_s": (ANSWER_TOKENS - 1) / decode_s,
        "peak_memory_bytes": peak_memory_bytes(),
    }


if __name__ == "__main__":
    print(json.dumps(_figures(Job(**json.load(sys.stdin)))))
