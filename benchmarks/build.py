"""Time and memory of building an engine, of loading it and of answering with it.

    python -m benchmarks.random_checkpoint qwen2.5-7b build/7b
    python -m benchmarks.build build/7b
    python -m benchmarks.build build/7b --group-size 64 --int4-method gptq

The build is `qwen-build`, with the options behind the checkpoint, in a process of its own. Then a new process loads
the engine, feeds 512 prompt tokens and answers with 32, greedy. Peak memory is VmHWM of each process: resident pages,
mapped files included.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

PROMPT, ANSWER = 512, 32


def answer(directory: Path, threads: int | None) -> dict[str, float]:
    """Load the engine and answer; meant for a fresh process."""
    import numpy as np

    from qwen_run import LLM, SamplingParams
    from qwen_run.runtime.machine import peak_memory_bytes

    started = time.perf_counter()
    llm = LLM(directory, threads=threads, skip_tokenizer_init=True, max_drafts=0)
    loaded = time.perf_counter()
    prompt = np.random.default_rng(0).integers(0, 10_000, PROMPT).tolist()
    params = SamplingParams(temperature=0, max_tokens=ANSWER, ignore_eos=True)
    times = [time.perf_counter() for _ in llm.stream(prompt, params)]
    return {
        "load_s": loaded - started,
        "first_token_s": times[0] - loaded,
        "decode_tokens_per_s": (ANSWER - 1) / (times[-1] - times[0]),
        "peak_memory_bytes": peak_memory_bytes(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path, help="checkpoint; with --answer, engine")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--answer", action="store_true", help="only load the engine and answer, print JSON")
    arguments, options = parser.parse_known_args()
    if arguments.answer:
        print(json.dumps(answer(arguments.directory, arguments.threads)))
        return
    with tempfile.TemporaryDirectory(dir=arguments.directory.parent) as scratch:
        engine = str(Path(scratch) / "engine")
        command = ["-m", "qwen_build.cli", str(arguments.directory), *options, "--output", engine]
        built = json.loads(subprocess.check_output([sys.executable, *command, "--json"]))
        used = resource.getrusage(resource.RUSAGE_CHILDREN)
        threads = ["--threads", str(arguments.threads)] if arguments.threads else []
        command = ["-m", "benchmarks.build", "--answer", engine, *threads]
        answered = json.loads(subprocess.check_output([sys.executable, *command]))
    checkpoint = f"checkpoint {built['checkpoint_bytes'] / 1e9:.2f} GB"
    print(f"{arguments.directory.name}, {' '.join(options) or 'no options'}, {checkpoint}\n")
    print("| | |\n|---|---|")
    print(f"| engine | {built['engine_bytes'] / 1e9:.2f} GB |")
    seconds = f"{built['seconds']:.0f} s, {used.ru_utime + used.ru_stime:.0f} of the processor's"
    print(f"| build | {seconds}; peak memory {built['peak_memory_bytes'] / 1e6:.0f} MB |")
    print(f"| load | {answered['load_s']:.1f} s |")
    print(f"| first token of a {PROMPT}-token prompt | {answered['first_token_s']:.1f} s |")
    print(f"| decode, {ANSWER} tokens | {answered['decode_tokens_per_s']:.1f} tokens/s |")
    print(f"| peak memory of the answer | {answered['peak_memory_bytes'] / 1e9:.1f} GB |")


if __name__ == "__main__":
    main()
