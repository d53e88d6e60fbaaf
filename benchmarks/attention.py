"""Time of one attention layer: qwen::PagedAttention against ONNX Runtime's GroupQueryAttention, in the same minutes.

    python benchmarks/attention.py
    python benchmarks/attention.py --heads 28 --kv-heads 4 --head-dim 128 --layers 8

Both do rotation, update of the cache and causal attention, from packed queries, keys and values of one sequence.
A graph holds --layers of them, each with its own cache, so that caches are not all in L1 or L2; the time of a run is
divided by the number of layers. The variants take turns; the table gives medians and 10th to 90th percentiles.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import numpy as np
import onnxruntime as ort
from onnx import TensorProto, helper

from qwen_plugin import library_path

BLOCK_SIZE = 64


def session(nodes: list, inputs: dict[str, np.ndarray], threads: int, in_out: dict[str, str]) -> Callable[[], None]:
    """A prebound run of a graph; ``in_out``: outputs that share the memory of an input."""
    kinds = {np.dtype(np.float32): TensorProto.FLOAT, np.dtype(np.float16): TensorProto.FLOAT16}
    kinds[np.dtype(np.int32)] = TensorProto.INT32
    names = [name for node in nodes for name in node.output]
    graph = helper.make_graph(
        nodes,
        "attention",
        [helper.make_tensor_value_info(name, kinds[x.dtype], x.shape) for name, x in inputs.items()],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in names],
    )
    opsets = [helper.make_opsetid(domain, version) for domain, version in (("", 21), ("com.microsoft", 1), ("qwen", 1))]
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    options.register_custom_ops_library(str(library_path()))
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


def paged(a: argparse.Namespace, past: int, new: int, dtype: str) -> Callable[[], None]:
    rng = np.random.default_rng(0)
    blocks = -(-(past + new) // BLOCK_SIZE)
    inputs = common(a, past, new) | {
        "cumulative_lengths": np.array([0, new], np.int32),
        "past_lengths": np.array([past], np.int32),
        "block_table": rng.permutation(blocks).astype(np.int32)[None],
    }
    nodes = []
    for i in range(a.layers):
        inputs[f"key.{i}"] = draw(blocks, a.kv_heads, BLOCK_SIZE // 32, a.head_dim, 32).astype(dtype)
        inputs[f"value.{i}"] = draw(blocks, a.kv_heads, BLOCK_SIZE, a.head_dim).astype(dtype)
        names = ["query", "", "", f"key.{i}", f"value.{i}", "cumulative_lengths", "past_lengths", "block_table"]
        attributes = {"num_heads": a.heads, "kv_num_heads": a.kv_heads, "do_rotary": 1}
        nodes.append(
            helper.make_node("PagedAttention", [*names, "cos", "sin"], [f"out.{i}"], domain="qwen", **attributes)
        )
    return session(nodes, inputs, a.threads, {})


def stock(a: argparse.Namespace, past: int, new: int, dtype: str) -> Callable[[], None]:
    shape = (1, a.kv_heads, past + new, a.head_dim)
    inputs = common(a, past, new) | {
        "seqlens_k": np.array([past + new - 1], np.int32),
        "total": np.array(past + new, np.int32),
    }
    inputs["query"] = inputs["query"][None]
    nodes, in_out = [], {}
    for i in range(a.layers):
        inputs[f"key.{i}"], inputs[f"value.{i}"] = draw(*shape), draw(*shape)
        names = ["query", "", "", f"key.{i}", f"value.{i}", "seqlens_k", "total", "cos", "sin"]
        outputs = [f"out.{i}", f"new_key.{i}", f"new_value.{i}"]
        in_out |= {f"new_key.{i}": f"key.{i}", f"new_value.{i}": f"value.{i}"}
        attributes = {"num_heads": a.heads, "kv_num_heads": a.kv_heads, "do_rotary": 1}
        nodes.append(helper.make_node("GroupQueryAttention", names, outputs, domain="com.microsoft", **attributes))
    return session(nodes, inputs, a.threads, in_out)


def draw(*shape: int) -> np.ndarray:
    return np.random.default_rng(1).standard_normal(shape, dtype=np.float32)


def common(a: argparse.Namespace, past: int, new: int) -> dict[str, np.ndarray]:
    angles = draw(past + new, a.head_dim // 2)
    query = draw(new, (a.heads + 2 * a.kv_heads) * a.head_dim)
    return {"query": query, "cos": np.cos(angles), "sin": np.sin(angles)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("heads", 14), ("kv-heads", 2), ("head-dim", 64), ("layers", 24), ("threads", 2)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--seconds", type=float, default=2.0, help="of measuring, for each row of the table")
    a = parser.parse_args()
    print(f"{a.heads} heads, {a.kv_heads} kv heads of {a.head_dim}, {a.layers} layers, {a.threads} threads, "
          f"onnxruntime {ort.__version__}; us for one layer: median (10th-90th percentile)")  # fmt: skip
    variants = {
        "stock float32": (stock, "float32"),
        "paged float32": (paged, "float32"),
        "paged float16": (paged, "float16"),
    }
    print("".join(f"{title:>26}" for title in ("past + new tokens", *variants, "stock / paged float32")))
    for past, new in ((64, 1), (512, 1), (4096, 1), (0, 512), (512, 64)):
        runs = {title: make(a, past, new, dtype) for title, (make, dtype) in variants.items()}
        times: dict[str, list[float]] = {title: [] for title in variants}
        for run in runs.values():
            run()
        end = time.perf_counter() + a.seconds
        while time.perf_counter() < end or len(times["stock float32"]) < 5:
            for title, run in runs.items():
                start = time.perf_counter()
                run()
                times[title].append((time.perf_counter() - start) * 1e6 / a.layers)
        row = [f"{past} + {new}"]
        for found in times.values():
            low, middle, high = np.percentile(found, [10, 50, 90])
            row.append(f"{middle:.1f} ({low:.1f}-{high:.1f})")
        ratio = np.median(times["stock float32"]) / np.median(times["paged float32"])
        print("".join(f"{cell:>26}" for cell in (*row, f"{ratio:.2f}")))


if __name__ == "__main__":
    main()
