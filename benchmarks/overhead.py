"""What a step costs beside its matrices: attention, nodes, scheduling, the batch's arrays, sampling.

    qwen-build DEMO --output build/engine
    python -m benchmarks.overhead build/engine

First, one greedy sequence after prompts of 512 and 4,096 random tokens. "matrices" is the time of a graph that has
only the products of the engine's, with what their operators compute along (norms, gates, residuals), one after the
other; step and matrices take turns.

Then as many sequences as the batch size decode together, each after a prompt of 64 random tokens. "run" is the time in
``Engine.run``, "outside" the rest of ``Core.step``; both are medians over the steps in which all decode. The share is
of the whole step.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
from onnx import helper

import qwen_plugin
from qwen_engine.manifest import GRAPH_FILE
from qwen_run.runtime.core import Core, CoreOptions
from qwen_run.runtime.engine import Engine
from qwen_run.runtime.request import Request
from qwen_run.sampling.sample import SamplingParams

PROMPT = 64
LONG_PROMPTS = (512, 4096)
ROUNDS = 5


def measure(
    engine: Engine, batch_size: int, steps: int, prompt_tokens: int = PROMPT, **params: Any
) -> tuple[float, float]:
    """Median milliseconds in the run and outside it."""
    rng = np.random.default_rng(0)
    core = Core(engine, CoreOptions(max_batch_size=batch_size, max_batch_tokens=max(512, batch_size * PROMPT)))
    for seed in range(batch_size):
        prompt = tuple(rng.integers(0, engine.manifest.model.vocab_size, prompt_tokens).tolist())
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


def products(directory: Path, threads: int) -> Callable[[], None]:
    """A function that multiplies a row with every matrix of the engine, in the order of its graph."""
    model = onnx.load(directory / GRAPH_FILE, load_external_data=False)
    initializers = {tensor.name for tensor in model.graph.initializer}
    nodes = [node for node in model.graph.node if node.op_type == "QuantLinear"]
    if not nodes:
        raise SystemExit(f"{directory} has no native products; build it with --kernels native")
    inputs: dict[str, int] = {}
    outputs: dict[str, int] = {}
    for node in nodes:
        sizes = {attribute.name: attribute.i for attribute in node.attribute}
        width = sizes["N"] // (2 if sizes["swiglu"] else 1)
        for i, name in enumerate(node.input):
            if name and name not in initializers:
                columns = sizes["K"] if i == 0 else width  # of the rows, or of what is added to the product
                node.input[i] = f"rows{columns}"
                inputs[node.input[i]] = columns
        outputs[node.output[0]] = width

    def declared(columns: dict[str, int]) -> list[onnx.ValueInfoProto]:
        return [helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [1, n]) for name, n in columns.items()]

    used = {name for node in nodes for name in node.input}
    graph = helper.make_graph(
        nodes, "products", declared(inputs), declared(outputs), [t for t in model.graph.initializer if t.name in used]
    )
    alone = helper.make_model(graph, opset_imports=model.opset_import, ir_version=model.ir_version)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    qwen_plugin.register(options, threads)
    folder = str(directory.resolve())
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", folder)
    session = onnxruntime.InferenceSession(alone.SerializeToString(), options, providers=["CPUExecutionProvider"])
    binding = onnxruntime.IOBinding(session)
    rng = np.random.default_rng(0)

    def row(columns: int) -> onnxruntime.OrtValue:
        return onnxruntime.OrtValue.ortvalue_from_numpy(rng.standard_normal((1, columns)).astype(np.float32))

    for name, columns in inputs.items():
        binding.bind_ortvalue_input(name, row(columns))
    for name, columns in outputs.items():
        binding.bind_ortvalue_output(name, row(columns))
    return lambda: session.run_with_iobinding(binding)


def measure_matrices(multiply: Callable[[], None], steps: int) -> float:
    """Median milliseconds of a pass."""
    found = []
    for _ in range(steps):
        started = time.perf_counter()
        multiply()
        found.append((time.perf_counter() - started) * 1e3)
    return statistics.median(found)


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
    multiply = products(arguments.engine, arguments.threads)
    print("| past tokens | step, ms | matrices, ms | beyond them |\n|---|---|---|---|")
    for prompt in LONG_PROMPTS:
        pairs = [
            (sum(measure(engine, 1, arguments.steps, prompt)), measure_matrices(multiply, arguments.steps))
            for _ in range(ROUNDS)
        ]
        step_ms, matrices_ms = (statistics.median(column) for column in zip(*pairs, strict=True))
        print(f"| {prompt} | {step_ms:.2f} | {matrices_ms:.2f} | {1 - matrices_ms / step_ms:.0%} |", flush=True)
    print("\n| batch | sampling | run, ms | outside, ms | outside, share |\n|---|---|---|---|---|")
    kinds: dict[str, dict[str, Any]] = {"greedy": {"temperature": 0.0}, "temperature 0.7": {"temperature": 0.7}}
    for name, params in kinds.items():
        for batch_size in (1, 4, 16, 32):
            run_ms, outside_ms = measure(engine, batch_size, arguments.steps, **params)
            share = outside_ms / (run_ms + outside_ms)
            print(f"| {batch_size} | {name} | {run_ms:.2f} | {outside_ms:.3f} | {share:.1%} |", flush=True)


if __name__ == "__main__":
    main()
