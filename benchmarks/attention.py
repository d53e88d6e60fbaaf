"""Time of one attention layer: qwen::PagedAttention beside ONNX Runtime's GroupQueryAttention and the limits.

    python -m benchmarks.attention
    python -m benchmarks.attention --shapes 28/4x128 --rows 4096+1 --seconds 5

Both do rotation, update of the cache and causal attention, from packed queries, keys and values of one sequence.
A graph holds some layers, each with its own cache, so that these are not all in L1 or L2; the time of a run is
divided by the number of layers. The variants and the limits take turns, after pauses in which the threads of the one
before stop spinning; the table gives medians.

For one new token the limit is the fastest read of as many bytes as the caches of all layers have: GB/s of keys, values
and scales, and its share of that. For more, float32 multiply-adds on registers: GFLOP/s of queries with the keys they
see and of weights with the values, 2 for each product, and its share of that. Cells are us, GB/s or GFLOP/s, share.
"""

from __future__ import annotations

import argparse
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import onnxruntime as ort
from onnx import TensorProto, helper

import qwen_plugin
from benchmarks.limits import float_operations_per_s
from qwen_run.bench.bandwidth import Reader

KINDS = {
    np.dtype(np.float32): TensorProto.FLOAT,
    np.dtype(np.float16): TensorProto.FLOAT16,
    np.dtype(np.int8): TensorProto.INT8,
    np.dtype(np.int32): TensorProto.INT32,
}
Feeds = dict[str, np.ndarray]


@dataclass(frozen=True)
class AttentionShape:
    """Of the attention, and of the tokens: ``new`` ones after ``past`` that are cached."""

    heads: int
    kv_heads: int
    head_dim: int
    past: int
    new: int
    block_size: int

    @property
    def tokens(self) -> int:
        return self.past + self.new

    def cache_bytes(self, dtype: str) -> int:
        """Of one layer: keys and values, and the scales that int8 ones have."""
        scale = 4 if dtype == "int8" else 0
        return 2 * self.tokens * self.kv_heads * (self.head_dim * np.dtype(dtype).itemsize + scale)

    @property
    def operations(self) -> int:
        """Two for each product of queries with keys and of weights with values."""
        return sum(4 * self.heads * self.head_dim * (self.past + i + 1) for i in range(self.new))


def session(nodes: list, inputs: Feeds, threads: int, in_out: dict[str, str]) -> Callable[[], None]:
    """A prebound run of a graph; ``in_out``: outputs that share the memory of an input."""
    names = [name for node in nodes for name in node.output]
    graph = helper.make_graph(
        nodes,
        "attention",
        [helper.make_tensor_value_info(name, KINDS[x.dtype], x.shape) for name, x in inputs.items()],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in names],
    )
    opsets = [helper.make_opsetid(domain, version) for domain, version in (("", 21), ("com.microsoft", 1), ("qwen", 1))]
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    qwen_plugin.register(options, threads)
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10).SerializeToString()
    built = ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    binding = built.io_binding()
    values = {name: ort.OrtValue.ortvalue_from_numpy(x) for name, x in inputs.items()}
    for name, value in values.items():
        binding.bind_ortvalue_input(name, value)
    for name in names:
        if name in in_out:
            binding.bind_ortvalue_output(name, values[in_out[name]])
        else:
            binding.bind_output(name)
    keep_alive = (values, inputs)
    return lambda: (built.run_with_iobinding(binding), keep_alive)[0]


def paged(shape: AttentionShape, layers: int, threads: int, dtype: str) -> Callable[[], None]:
    rng = np.random.default_rng(0)
    blocks = -(-shape.tokens // shape.block_size)
    inputs = common(shape) | {
        "cumulative_lengths": np.array([0, shape.new], np.int32),
        "past_lengths": np.array([shape.past], np.int32),
        "block_table": rng.permutation(blocks).astype(np.int32)[None],
    }
    nodes = []
    for i in range(layers):
        names = ["query", "", "", f"key.{i}", f"value.{i}", "cumulative_lengths", "past_lengths", "block_table"]
        names += ["cos", "sin"]
        pools = {
            f"key.{i}": (blocks, shape.kv_heads, shape.block_size // 32, shape.head_dim, 32),
            f"value.{i}": (blocks, shape.kv_heads, shape.block_size, shape.head_dim),
        }
        if dtype == "int8":
            inputs |= {name: rng.integers(-127, 128, pool, np.int8) for name, pool in pools.items()}
            scales = {f"{kind}_scale.{i}": (blocks, shape.kv_heads, shape.block_size) for kind in ("key", "value")}
            inputs |= {name: np.full(pool, 3 / 127, np.float32) for name, pool in scales.items()}
            names += ["", "", "", "", *scales]
        else:
            inputs |= {name: draw(*pool).astype(dtype) for name, pool in pools.items()}
        nodes.append(helper.make_node("PagedAttention", names, [f"out.{i}"], domain="qwen", **attributes(shape)))
    return session(nodes, inputs, threads, {})


def stock(shape: AttentionShape, layers: int, threads: int, dtype: str) -> Callable[[], None]:
    pool = (1, shape.kv_heads, shape.tokens, shape.head_dim)
    inputs = common(shape) | {
        "seqlens_k": np.array([shape.tokens - 1], np.int32),
        "total": np.array(shape.tokens, np.int32),
    }
    inputs["query"] = inputs["query"][None]
    nodes, in_out = [], {}
    for i in range(layers):
        inputs |= {f"key.{i}": draw(*pool).astype(dtype), f"value.{i}": draw(*pool).astype(dtype)}
        names = ["query", "", "", f"key.{i}", f"value.{i}", "seqlens_k", "total", "cos", "sin"]
        outputs = [f"out.{i}", f"new_key.{i}", f"new_value.{i}"]
        in_out |= {f"new_key.{i}": f"key.{i}", f"new_value.{i}": f"value.{i}"}
        node = helper.make_node("GroupQueryAttention", names, outputs, domain="com.microsoft", **attributes(shape))
        nodes.append(node)
    return session(nodes, inputs, threads, in_out)


def attributes(shape: AttentionShape) -> dict[str, int]:
    return {"num_heads": shape.heads, "kv_num_heads": shape.kv_heads, "do_rotary": 1}


def draw(*shape: int) -> np.ndarray:
    return np.random.default_rng(1).standard_normal(shape, dtype=np.float32)


def common(shape: AttentionShape) -> Feeds:
    angles = draw(shape.tokens, shape.head_dim // 2)
    query = draw(shape.new, (shape.heads + 2 * shape.kv_heads) * shape.head_dim)
    return {"query": query, "cos": np.cos(angles), "sin": np.sin(angles)}


PASS_BYTES = 1 << 26  # read at a time, at least
PAUSE_S = 0.1  # a turn's length, too

VARIANTS = {
    "stock float32": (stock, "float32"),
    "paged float32": (paged, "float32"),
    "paged float16": (paged, "float16"),
    "paged int8": (paged, "int8"),
}


def take_turn(run: Callable[[], None]) -> Iterator[float]:
    """Seconds of each run."""
    time.sleep(PAUSE_S)
    end = time.perf_counter() + PAUSE_S
    while (start := time.perf_counter()) < end:
        run()
        yield time.perf_counter() - start


def row(shape: AttentionShape, layers: int, threads: int, seconds: float) -> Iterator[str]:
    """Cells of the table: the tokens, the limit, and every variant."""
    runs = {title: make(shape, layers, threads, dtype) for title, (make, dtype) in VARIANTS.items()}
    dtypes = [dtype for _, dtype in VARIANTS.values()]
    readers = {dtype: Reader(layers * shape.cache_bytes(dtype), threads, PASS_BYTES) for dtype in dict.fromkeys(dtypes)}
    decode = shape.new == 1
    times: dict[str, list[float]] = {title: [] for title in runs}
    limits: dict[str, list[float]] = {dtype: [] for dtype in readers}
    for run in runs.values():
        run()
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(times["paged int8"]) < 5:
        for dtype, reader in readers.items():
            time.sleep(PAUSE_S)
            limits[dtype].append(reader.bytes_per_s(passes=1) if decode else float_operations_per_s(threads))
        for title, run in runs.items():
            times[title] += [one / layers for one in take_turn(run)]
    yield f"{shape.past} + {shape.new}"
    yield f"{np.median([*limits['float16'], *limits['int8']]) / 1e9:.0f}"
    for found, dtype in zip(times.values(), dtypes, strict=True):
        median = float(np.median(found))
        rate = (shape.cache_bytes(dtype) if decode else shape.operations) / median
        yield f"{median * 1e6:.1f} us, {rate / 1e9:.1f}, {100 * rate / np.median(limits[dtype]):.0f} %"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", default="14/2x64,12/2x128,28/4x128", help="heads/kv_heads x head_dim")
    parser.add_argument("--rows", default="0+1,512+1,4096+1,16384+1,32768+1,0+512,3584+512", help="past + new tokens")
    parser.add_argument("--layers", type=int, default=24, help="at most; fewer where a float16 cache takes over 256 MB")
    parser.add_argument("--block-size", type=int, default=64, help="tokens of a cache block of qwen::PagedAttention")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=2.0, help="of measuring, for each row of the table")
    a = parser.parse_args()
    print(f"{a.threads} threads, blocks of {a.block_size}, onnxruntime {ort.__version__}; medians for one layer\n")
    for name in a.shapes.split(","):
        heads, kv_heads, head_dim = map(int, re.split("[/x]", name))
        print(f"{heads} heads, {kv_heads} kv heads of {head_dim}\n")
        print("| past + new | limit | " + " | ".join(VARIANTS) + " |\n" + "|---" * (2 + len(VARIANTS)) + "|")
        for tokens in a.rows.split(","):
            shape = AttentionShape(heads, kv_heads, head_dim, *map(int, tokens.split("+")), a.block_size)
            layers = max(1, min(a.layers, 256_000_000 // shape.cache_bytes("float16")))
            print("| " + " | ".join(row(shape, layers, a.threads, a.seconds)) + " |", flush=True)
        print()


if __name__ == "__main__":
    main()
