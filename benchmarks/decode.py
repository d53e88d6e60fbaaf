"""Decode and prefill speed of an engine, side by side with the stock graph of onnxruntime-genai's model builder.

    python -m benchmarks.random_checkpoint qwen2.5-0.5b /tmp/checkpoint
    python -m onnxruntime_genai.models.builder -i /tmp/checkpoint -o /tmp/stock -p int4 -e cpu \
        --extra_options int4_accuracy_level=4 int4_block_size=32      (in an environment that has it)
    python -m benchmarks.decode /tmp/checkpoint --stock /tmp/stock

Both run in a plain loop over one sequence: 512 prompt tokens at once, then 64 tokens one at a time, greedy. The stock
graph runs in ONNX Runtime with its cache bound in place. All take turns in one process; figures are medians over
the rounds, output tokens only for decode. "equal bits" is our engine with the stock graph's bits: int4 group 32
symmetric, embedding and head too.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime

from qwen_build.build import plan_build, write_engine
from qwen_build.checkpoint import Checkpoint
from qwen_build.locate import resolve_checkpoint
from qwen_build.options import BuildOptions
from qwen_run.engine import Engine
from qwen_run.evaluate import one_sequence

PROMPT, ANSWER = 512, 64
Feed = Callable[[np.ndarray, int], int]  # token ids and how many came before -> the likeliest next token

SCHEMES: dict[str, dict[str, Any]] = {
    "default (int4 g32 asymmetric, int8 head)": {},
    "default, int8x2 activations": {"activations": "int8x2"},
    "equal bits (int4 g32 symmetric, int4 head)": {"symmetric": True, "embedding_quant": "int4"},
    "int8 g32 symmetric": {"quant": "int8"},
    "default, ONNX Runtime's matrix operators": {"kernels": "stock"},
    "equal bits, ONNX Runtime's matrix operators": {
        "symmetric": True,
        "embedding_quant": "int4",
        "kernels": "stock",
    },
}


def engine_feed(engine: Engine) -> Feed:
    blocks = engine.cache.allocate(engine.cache.blocks_for(PROMPT + ANSWER))
    assert blocks is not None

    def feed(token_ids: np.ndarray, past: int) -> int:
        batch = one_sequence(token_ids, past, blocks, first_logits=len(token_ids) - 1)
        return int(engine.run(batch)[0].argmax())

    return feed


def stock_feed(directory: Path, threads: int) -> Feed:
    """The graph of the model builder, its key/value cache in buffers bound as past and as present."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(directory / "model.onnx", options, providers=["CPUExecutionProvider"])
    binding = onnxruntime.IOBinding(session)
    for value in session.get_inputs():
        if value.name.startswith("past_key_values"):
            _, heads, _, width = value.shape
            width = width if isinstance(width, int) else 64
            cache = np.zeros((1, heads, PROMPT + ANSWER, width), np.float32)
            shared = onnxruntime.OrtValue.ortvalue_from_numpy(cache)
            binding.bind_ortvalue_input(value.name, shared)
            binding.bind_ortvalue_output(value.name.replace("past_key_values", "present"), shared)

    def feed(token_ids: np.ndarray, past: int) -> int:
        binding.bind_cpu_input("input_ids", token_ids[None].astype(np.int64))
        binding.bind_cpu_input("attention_mask", np.ones((1, past + len(token_ids)), np.int64))
        binding.bind_output("logits")  # the last output bound, so the last one returned
        session.run_with_iobinding(binding)
        return int(binding.get_outputs()[-1].numpy()[0, -1].argmax())

    return feed


def timed(feed: Feed, prompt: np.ndarray) -> tuple[float, float]:
    """Prefill and decode in tokens a second."""
    started = time.perf_counter()
    token = feed(prompt, 0)
    middle = time.perf_counter()
    for i in range(ANSWER):
        token = feed(np.array([token]), PROMPT + i)
    return PROMPT / (middle - started), ANSWER / (time.perf_counter() - middle)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint")
    parser.add_argument("--stock", type=Path, help="directory the model builder wrote")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=7)
    arguments = parser.parse_args()
    located = resolve_checkpoint(arguments.checkpoint)
    feeds: dict[str, Feed] = {}
    with tempfile.TemporaryDirectory() as scratch:
        for number, (name, options) in enumerate(SCHEMES.items()):
            directory = Path(scratch) / str(number)
            with Checkpoint.open(located.path) as weights:
                write_engine(plan_build(weights, located, BuildOptions(**options)), weights, directory)
            feeds[f"engine, {name}"] = engine_feed(Engine.load(directory, threads=arguments.threads))
    if arguments.stock:
        feeds["stock graph (int4 g32 symmetric, int4 head)"] = stock_feed(arguments.stock, arguments.threads)
    prompt = np.random.default_rng(0).integers(0, 10_000, PROMPT)
    results: dict[str, list[tuple[float, float]]] = {name: [] for name in feeds}
    for _ in range(arguments.rounds + 1):
        for name, feed in feeds.items():
            time.sleep(0.1)  # the other session's threads stop spinning
            results[name].append(timed(feed, prompt))
    print(
        f"{located.name}, {arguments.threads} threads, onnxruntime {onnxruntime.__version__}, {platform.processor()}, "
        f"prompt {PROMPT}, then {ANSWER} tokens, median of {arguments.rounds} rounds\n"
    )
    print("| | prefill tok/s | decode tok/s |\n|---|---|---|")
    for name, rounds in results.items():
        prefill, decode = (statistics.median(speeds) for speeds in zip(*rounds[1:], strict=True))
        print(f"| {name} | {prefill:.0f} | {decode:.1f} |")


if __name__ == "__main__":
    main()
