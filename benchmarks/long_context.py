"""A prompt longer than its model was trained for: time and memory of building, loading, reading and answering.

    python -m benchmarks.long_context build/long                    # 49,152 tokens: minutes
    python -m benchmarks.long_context build/long --tokens 4096      # a first look

DIRECTORY gets a random checkpoint of the shape of Qwen2.5-0.5B, whose config.json says 32,768 tokens. `qwen-build`
stretches it with YaRN to 131,072 and gives it a cache of int8, in a process of its own. A new process loads the engine
with a cache of that length, feeds the prompt in chunks and answers, greedy. Peak memory is VmHWM of each process:
resident pages, mapped files included. Pages of the cache come into memory when they are written, so the last figure is
taken after all of them have been.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
import time
from datetime import UTC, datetime
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from benchmarks.command import run, say
from benchmarks.random_checkpoint import write_checkpoint
from qwen_run.runtime.core import Core, CoreOptions
from qwen_run.runtime.engine import Engine
from qwen_run.runtime.machine import peak_memory_bytes, physical_cores
from qwen_run.runtime.request import Request
from qwen_run.sampling.sample import SamplingParams

SHAPE, YARN = "qwen2.5-0.5b", 4
PIECES = 6  # rows of the table of speeds


class Fed(NamedTuple):
    """After a step: tokens of the prompt that are in the cache, and when that was."""

    tokens: int
    seconds: float


def answer(directory: Path, prompt_tokens: int, answer_tokens: int, chunk: int, threads: int | None) -> dict[str, Any]:
    """Load the engine, feed the prompt and answer; meant for a fresh process."""
    started = time.perf_counter()
    engine = Engine.load(directory, threads=threads, num_blocks=_blocks_of_one_sequence(directory))
    load_s = time.perf_counter() - started
    loaded_bytes = peak_memory_bytes()
    core = Core(engine, CoreOptions(max_batch_size=1, max_batch_tokens=chunk, prefix_caching=False))
    prompt = tuple(np.random.default_rng(0).integers(0, engine.manifest.model.vocab_size, prompt_tokens).tolist())
    request = Request(prompt, SamplingParams(temperature=0, max_tokens=answer_tokens))
    core.add(request)
    fed = _feed(core, request)
    started = time.perf_counter()
    while not request.is_finished:
        core.step()
    decode_s = time.perf_counter() - started
    answered_bytes = peak_memory_bytes()
    core.close()
    for pool in engine.cache.pools.values():
        pool.fill(1)
    return {
        "max_seq_len": engine.manifest.limits.max_seq_len,
        "cache_bytes": sum(pool.nbytes for pool in engine.cache.pools.values()),
        "load_s": load_s,
        "fed": fed,
        "decode_tokens_per_s": (answer_tokens - 1) / decode_s,
        "loaded_bytes": loaded_bytes,
        "answered_bytes": answered_bytes,
        "full_bytes": peak_memory_bytes(),
    }


def _blocks_of_one_sequence(directory: Path) -> int:
    manifest = json.loads((directory / "engine.json").read_bytes())
    return math.ceil(manifest["limits"]["max_seq_len"] / manifest["cache"]["block_size"])


def _feed(core: Core, request: Request) -> list[Fed]:
    """Step until the prompt is fed, which gives the first token."""
    (sequence,), length = request.sequences, len(request.prompt)
    fed, started = [Fed(0, 0.0)], time.perf_counter()
    while not sequence.num_output:
        core.step()
        fed.append(Fed(sequence.num_cached, time.perf_counter() - started))
        if len(fed) % 16 == 0:
            say(f"{fed[-1].tokens:,} of {length:,} tokens fed, {fed[-1].seconds:.0f} s")
    return fed


def speeds(fed: list[Fed], pieces: int) -> list[tuple[int, int, float]]:
    """(first token, last token, tokens a second) of about equal pieces of a prompt.

    >>> speeds([Fed(0, 0.0), Fed(4, 1.0), Fed(8, 3.0)], 2)
    [(0, 4, 4.0), (4, 8, 2.0)]
    """
    borders = [fed[round(index)] for index in np.linspace(0, len(fed) - 1, min(pieces, len(fed) - 1) + 1)]
    return [
        (before.tokens, after.tokens, (after.tokens - before.tokens) / (after.seconds - before.seconds))
        for before, after in pairwise(borders)
    ]


def build(checkpoint: Path, engine: Path) -> dict[str, Any]:
    """`qwen-build` with YaRN and a cache of int8, in a process of its own; what it says with ``--json``."""
    options = ["--yarn", str(YARN), "--kv-cache-dtype", "int8", "--output", str(engine), "--force", "--json"]
    built = subprocess.run(
        [sys.executable, "-m", "qwen_build.cli", str(checkpoint), *options], check=True, stdout=subprocess.PIPE
    )
    return dict(json.loads(built.stdout))


def report(built: dict[str, Any], answered: dict[str, Any], arguments: argparse.Namespace) -> str:
    """The tables."""
    fed = [Fed(*each) for each in answered["fed"]]
    tokens, seconds = fed[-1]
    threads = arguments.threads or physical_cores()
    gigabytes = {name: f"{value / 1e9:.2f} GB" for name, value in answered.items() if name.endswith("_bytes")}
    lines = [
        f"Shape of {SHAPE}, int4, YaRN {YARN}, a cache of int8; {threads} threads, chunks of {arguments.chunk} tokens; "
        f"{datetime.now(UTC):%Y-%m-%d}",
        "",
        "| | |\n|---|---|",
        f"| build | {built['seconds']:.1f} s; peak memory {built['peak_memory_bytes'] / 1e6:.0f} MB |",
        f"| engine | {built['engine_bytes'] / 1e6:.0f} MB, {answered['max_seq_len']:,} tokens |",
        f"| cache of {answered['max_seq_len']:,} tokens | {gigabytes['cache_bytes']} |",
        f"| load | {answered['load_s']:.2f} s; peak memory {gigabytes['loaded_bytes']} |",
        f"| prompt of {tokens:,} tokens | {seconds:.0f} s, {tokens / seconds:.0f} tokens/s |",
        f"| decode after it, {arguments.answer_tokens} tokens | {answered['decode_tokens_per_s']:.1f} tokens/s |",
        f"| peak memory of the answer | {gigabytes['answered_bytes']} |",
        f"| the same, with all of the cache in memory | {gigabytes['full_bytes']} |",
        "",
        "| tokens of the prompt | tokens/s |\n|---|---|",
        *(f"| {first:,} to {last:,} | {speed:.0f} |" for first, last, speed in speeds(fed, PIECES)),
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path, help="where checkpoint and engine are written")
    parser.add_argument("--tokens", type=int, default=49152, help="of the prompt")
    parser.add_argument("--answer-tokens", type=int, default=32)
    parser.add_argument("--chunk", type=int, default=256, help="most tokens of a step")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--answer", action="store_true", help="only load the engine and answer, print JSON")
    arguments = parser.parse_args()
    checkpoint, engine = arguments.directory / "checkpoint", arguments.directory / "engine"
    if arguments.answer:
        print(json.dumps(answer(engine, arguments.tokens, arguments.answer_tokens, arguments.chunk, arguments.threads)))
        return
    if not checkpoint.is_dir():
        write_checkpoint(SHAPE, checkpoint)
    built = build(checkpoint, engine)
    command = [sys.executable, "-m", "benchmarks.long_context", *sys.argv[1:], "--answer"]
    answered = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)
    print(report(built, answered, arguments))


if __name__ == "__main__":
    run(main)
