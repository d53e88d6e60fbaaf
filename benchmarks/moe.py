"""qwen::MoE against one qwen::QuantLinear an expert, and the machine's limits, in the same minutes.

    python -m benchmarks.moe
    python -m benchmarks.moe --shape A2.7B --precision int8x2 --tokens 1 64 --isa avx2
    python -m benchmarks.moe --output benchmarks/results/moe.md

The weights are those of one layer, random, in the layout that the builder's int4 has (--bits, --group-size); of
Qwen3-30B-A3B they take 330 MB. A router of random numbers sends random tokens to experts. Where few of these are hit,
the graph has several sets of tokens one after the other, until --megabytes are read. The other side computes the same
products with two QuantLinear an expert that is hit, of as many rows: neither router nor sum, and rows that lie sorted.
The sides and the two limits take turns, after pauses in which the threads of the one before stop spinning; the table
gives medians, and shares are medians over the turns. GB/s counts what a step has to read: the weights of the experts
that are hit, and the router's. A plain read goes over all weights with as many threads, and so does the fastest, which
may be one from several pages in turn. GOPS counts two for each product of the experts.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

import numpy as np
import onnxruntime as ort
from onnx import NodeProto, TensorProto, helper

import qwen_plugin
from benchmarks.linear import FLAG_OF_ISA, PASS_BYTES, PAUSE_S, header_places, is_supported, placeholder, seconds
from qwen_build.quantization.scheme_table import SCHEMES
from qwen_plugin.layout import BITS, BLOCK_BITS, BLOCK_COLUMNS, PANEL, panel_bytes
from qwen_plugin.reference_moe import MoEAttributes, route
from qwen_run.bench.bandwidth import Reader
from qwen_run.bench.measure import processor_name

# name -> hidden_size, moe_intermediate_size, num_experts, num_experts_per_tok
SHAPES = {
    "30B-A3B": (2048, 768, 128, 8),
    "A2.7B": (2048, 1408, 60, 4),
    "57B-A14B": (3584, 2560, 64, 8),
    "235B-A22B": (4096, 1536, 128, 8),
}
TOKENS = (1, 4, 16, 64, 512)


@dataclass
class Layer:
    """One layer's weights: ``panels`` of gate_up and down are in ``memory``, the router is float32 (E, H)."""

    attributes: MoEAttributes
    memory: np.ndarray
    panels: dict[str, np.ndarray]
    router: np.ndarray


def attributes_of(a: argparse.Namespace) -> MoEAttributes:
    hidden_size, intermediate_size, num_experts, top_k = SHAPES[a.shape]
    has_blocks = a.bits in BLOCK_BITS and a.group_size < BLOCK_COLUMNS and a.precision != "float32"
    scheme = {"bits": a.bits, "group_size": a.group_size, "symmetric": int(SCHEMES[f"int{a.bits}"].symmetric)}
    scheme |= {"precision": a.precision, "activation_scales": "block" if has_blocks else "group"}
    each = {f"{name}_{kind}": value for name in ("gate_up", "down") for kind, value in scheme.items()}
    return MoEAttributes(num_experts, top_k, hidden_size, intermediate_size, norm_topk_prob=1, **each)


def draw_layer(a: MoEAttributes) -> Layer:
    shapes = {}
    for name in ("gate_up", "down"):
        linear = a.linear(name)
        assert linear is not None
        blocks = linear.activation_scales == "block"
        stored = (linear.K, linear.bits, linear.group_size, bool(linear.symmetric), blocks)
        shapes[name] = (a.num_experts * linear.N // PANEL, panel_bytes(*stored), stored)
    total = sum(count * size for count, size, _ in shapes.values())
    rng = np.random.default_rng(0)
    memory = rng.integers(0, 256, total + 63, np.uint8)
    memory = memory[-memory.ctypes.data % 64 :][:total]
    panels, start = {}, 0
    for name, (count, size, stored) in shapes.items():
        panels[name] = memory[start : start + count * size].reshape(count, size)
        start += count * size
        for at in header_places(*stored):  # random scales may be NaN
            panels[name][:, at : at + 2 * PANEL] = np.ones(PANEL, "<f2").view(np.uint8)
    router = rng.standard_normal((a.num_experts, a.hidden_size), dtype=np.float32) / np.float32(a.hidden_size**0.5)
    return Layer(a, memory, panels, router)


def rows_of_experts(layer: Layer, x: np.ndarray) -> dict[int, int]:
    """The experts that tokens hit, and how many of them."""
    experts, counts = np.unique(route(layer.attributes, x, layer.router)[0], return_counts=True)
    return dict(zip(experts.tolist(), counts.tolist(), strict=True))


def moe_side(layer: Layer, sets: Sequence[np.ndarray], threads: int) -> Callable[[], None]:
    """A graph with an operator for each set of tokens, all of one layer's weights."""
    nodes = [
        helper.make_node(
            "MoE",
            [f"x.{i}", "router", "gate_up", "down"],
            [f"y.{i}"],
            domain="qwen",
            **layer.attributes.of_node(),
        )
        for i in range(len(sets))
    ]
    inputs = {f"x.{i}": x for i, x in enumerate(sets)}
    outputs = {f"y.{i}": np.empty_like(sets[0]) for i in range(len(sets))}
    return new_side(nodes, {"router": layer.router, **layer.panels}, inputs, outputs, threads)


def linear_side(layer: Layer, hits: Sequence[dict[int, int]], threads: int) -> Callable[[], None]:
    """A graph with two products for each expert of each set, of as many rows as the set has for it."""
    nodes, weights, inputs, outputs = [], {}, {}, {}
    a = layer.attributes
    for i, rows_of_expert in enumerate(hits):
        for expert, rows in rows_of_expert.items():
            x, gated, y = f"x.{rows}", f"gated.{i}.{expert}", f"y.{i}.{expert}"
            for name, source, target, width in (
                ("gate_up", x, gated, 2 * a.intermediate_size),
                ("down", gated, y, a.hidden_size),
            ):
                linear = a.linear(name)
                weight = f"{name}.{expert}"
                weights[weight] = layer.panels[name][expert * width // PANEL : (expert + 1) * width // PANEL]
                scheme = {kind: getattr(linear, kind) for kind in ("N", "K", "bits", "group_size", "symmetric")}
                scheme |= {"precision": linear.precision, "activation_scales": linear.activation_scales}
                scheme |= {"swiglu": int(name == "gate_up")}
                nodes.append(helper.make_node("QuantLinear", [source, weight], [target], domain="qwen", **scheme))
            inputs.setdefault(x, np.random.default_rng(1).standard_normal((rows, a.hidden_size), dtype=np.float32))
            outputs[y] = outputs.get(y, np.empty((rows, a.hidden_size), np.float32))
    return new_side(nodes, weights, inputs, outputs, threads)


def new_side(
    nodes: Sequence[NodeProto],
    weights: dict[str, np.ndarray],
    inputs: dict[str, np.ndarray],
    outputs: dict[str, np.ndarray],
    threads: int,
) -> Callable[[], None]:
    """A run of a session with these nodes."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    qwen_plugin.register(options, threads)
    graph = helper.make_graph(
        nodes,
        "experts",
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, x.shape) for name, x in inputs.items()],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in outputs],
        initializer=[placeholder(name, array) for name, array in weights.items()],
    )
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("qwen", 1)]
    values = {name: ort.OrtValue.ortvalue_from_numpy(array) for name, array in weights.items()}
    options.add_external_initializers(list(values), list(values.values()))
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10).SerializeToString()
    session = ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    binding = session.io_binding()
    keep = [values, weights]
    for bind, arrays in ((binding.bind_ortvalue_input, inputs), (binding.bind_ortvalue_output, outputs)):
        for name, array in arrays.items():
            value = ort.OrtValue.ortvalue_from_numpy(array)
            bind(name, value)
            keep.append({name: value})

    def run(_: object) -> None:
        session.run_with_iobinding(binding)

    return partial(run, keep)


def bytes_read(layer: Layer, rows_of_expert: dict[int, int]) -> int:
    """By one operator: the router, and the panels of the experts that are hit."""
    of_expert: int = layer.memory.nbytes // layer.attributes.num_experts
    return layer.router.nbytes + of_expert * len(rows_of_expert)


def measure(a: argparse.Namespace) -> list[str]:
    """The lines of a table, printed as they come."""
    layer = draw_layer(attributes_of(a))
    m = layer.attributes
    lines = [
        f"{a.shape}: {m.num_experts} experts of {m.intermediate_size} x {m.hidden_size}, {m.top_k} for a token; "
        f"{a.bits} bits, group size {a.group_size}, {a.precision} per {m.down_activation_scales}, {a.isa or 'best'} "
        f"kernels, {a.threads} threads; {layer.memory.nbytes / 1e6:.0f} MB",
        "",
        "| tokens | experts | MB | ms | GB/s | of a plain read | of the fastest | GOPS | linears ms | over it |",
        "|---" * 10 + "|",
    ]
    print("\n".join(lines), flush=True)
    reader = Reader(layer.memory, a.threads, pass_bytes=PASS_BYTES)
    for tokens in a.tokens:
        rng = np.random.default_rng(2)
        sets: list[np.ndarray] = []
        hits: list[dict[int, int]] = []
        while not sets or sum(bytes_read(layer, hit) for hit in hits) < a.megabytes * 1e6:
            sets.append(rng.standard_normal((tokens, m.hidden_size), dtype=np.float32))
            hits.append(rows_of_experts(layer, sets[-1]))
        sides = (moe_side(layer, sets, a.threads), linear_side(layer, hits, a.threads))
        turns = take_turns(sides, reader, a.seconds)
        size = sum(bytes_read(layer, hit) for hit in hits) / len(sets)
        lines.append(row(m, tokens, sum(map(len, hits)) / len(sets), size, turns / [len(sets), len(sets), 1, 1]))
        print(lines[-1], flush=True)
    return lines


def take_turns(sides: Sequence[Callable[[], None]], reader: Reader, wanted_s: float) -> np.ndarray:
    """Of each turn the seconds of both sides, and what two reads gave in bytes a second."""
    turns: list[tuple[float, ...]] = []
    for side in sides:
        side()
    end = time.perf_counter() + wanted_s
    while time.perf_counter() < end or len(turns) < 3:
        own = seconds(sides[0])
        time.sleep(PAUSE_S)
        plain = reader.measure()
        fastest = max(plain, reader.measure(in_turn=True))
        other = seconds(sides[1])
        time.sleep(PAUSE_S)
        turns.append((own, other, plain, fastest))
    return np.array(turns)


def row(m: MoEAttributes, tokens: int, experts: float, size: float, turns: np.ndarray) -> str:
    own, other, plain, fastest = turns.T
    operations = 6 * tokens * m.top_k * m.hidden_size * m.intermediate_size / own
    cells = [
        f"{tokens} | {experts:.1f} | {size / 1e6:.1f} | {np.median(own) * 1e3:.3f} | {np.median(size / own) / 1e9:.1f}",
        f"{np.median(size / own / plain):.0%}",
        f"{np.median(size / own / fastest):.0%}",
        f"{np.median(operations) / 1e9:.0f}",
        f"{np.median(other) * 1e3:.3f}",
        f"{np.median(other / own):.2f} x",
    ]
    return f"| {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="30B-A3B")
    parser.add_argument("--tokens", type=int, nargs="+", default=TOKENS)
    parser.add_argument("--bits", type=int, choices=BITS, default=4, help="of a weight")
    parser.add_argument("--group-size", type=int, choices=(32, 64, 128), default=32)
    parser.add_argument("--precision", choices=("int8", "int8x2", "float32"), default="int8")
    parser.add_argument("--isa", choices=(*FLAG_OF_ISA, "plain"), help="force kernels")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--megabytes", type=int, default=300, help="to be read in a run, at least")
    parser.add_argument("--seconds", type=float, default=4.0, help="of measuring, for each row of the table")
    parser.add_argument("--output", type=Path, metavar="FILE", help="write the table here too")
    a = parser.parse_args()
    if a.isa and not is_supported(a.isa):
        parser.error(
            f"--isa {a.isa}: not on this processor; it has {', '.join(filter(is_supported, FLAG_OF_ISA))}, plain"
        )
    if a.isa:
        os.environ["QWEN_PLUGIN_ISA"] = a.isa
    lines = measure(a)
    if a.output:
        conditions = f"{processor_name()}; {datetime.now(UTC):%Y-%m-%d}; onnxruntime {ort.__version__}"
        a.output.write_text("\n".join([conditions, "\nWhat the columns mean: `benchmarks/moe.py`.\n", *lines, ""]))


if __name__ == "__main__":
    main()
