"""qwen::QuantLinear against ONNX Runtime's MatMulNBits and the machine's limits, in the same minutes.

    python -m benchmarks.linear
    python -m benchmarks.linear --shapes 7B --group-size 128 --precision int8x2 --isa avx512
    python -m benchmarks.linear --bits 6 --against 4            weights of 6 bits and of 4, in turns
    python -m benchmarks.linear --all benchmarks/results/linear.md      all tables that are kept, a quarter of an hour

One graph holds the matrices of as many layers as make --megabytes at 4 bits, each with its own weights: random, with
zero points where the builder's default has them. The variants and the two limits take turns, after pauses in which the
threads of the one before stop spinning; the table gives medians, and shares are medians over the turns.
MatMulNBits rounds its inputs to int8 too, but for --precision float32. It has no 5 and 6 bits and takes 8 for them.
--against has our own operator with other bits in its place, for the same layers.
GB/s counts the weights' bytes; a plain read goes over the same ones with as many threads, and so does the fastest,
which may be one from several pages in turn. GOPS counts two for each product; the peak is that of
``benchmarks.int8_peak`` without AMX, not a number where none is known.
"""

from __future__ import annotations

import argparse
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
from onnx import TensorProto, helper

import qwen_plugin
from benchmarks.int8_peak import int8_peak
from qwen_build.quantization.scheme_table import SCHEMES
from qwen_build.quantization.schemes import ACCURACY_LEVELS
from qwen_plugin.layout import BITS, BLOCK_BITS, BLOCK_COLUMNS, PANEL, panel_bytes
from qwen_run.bench.bandwidth import Reader
from qwen_run.bench.measure import processor_name

# name -> (in_features, out_features) of a layer's q/k/v, o, gate/up and down
SHAPES = {
    "0.5B": ((896, 1152), (896, 896), (896, 9728), (4864, 896)),
    "1.5B": ((1536, 2048), (1536, 1536), (1536, 17920), (8960, 1536)),
    "7B": ((3584, 4608), (3584, 3584), (3584, 37888), (18944, 3584)),
}
ROWS = (1, 4, 8, 16, 64, 512)
PASS_BYTES = 1 << 26  # read at a time, at least
PAUSE_S = 0.1  # until the threads of the variant before no longer spin

# What --all measures: every group size and precision with the best kernels, one with each of the others, and larger
# shapes.
TABLES = (
    "--group-size 32",
    "--group-size 64",
    "--group-size 128",
    "--group-size 32 --bits 5 --against 4",
    "--group-size 32 --bits 6 --against 4",
    "--group-size 32 --bits 8 --against 4",
    "--group-size 32 --precision int8x2",
    "--group-size 32 --precision float32",
    "--group-size 32 --isa avx512",
    "--group-size 32 --isa avx512 --bits 5 --against 4",
    "--group-size 32 --isa avx512 --bits 6 --against 4",
    "--group-size 64 --isa avx512",
    "--group-size 128 --isa avx512",
    "--group-size 32 --isa avxvnni",
    "--group-size 32 --isa avx2",
    "--group-size 32 --isa avx2 --bits 5 --against 4",
    "--group-size 32 --isa avx2 --bits 6 --against 4",
    "--group-size 32 --shapes 1.5B",
    "--group-size 32 --shapes 7B",
)


# What Linux calls what kernels need.
FLAG_OF_ISA = {"amx": "amx_int8", "avx512": "avx512_vnni", "avxvnni": "avx_vnni", "avx2": "avx2", "neon": "asimd"}


def is_supported(isa: str) -> bool:
    """Whether this processor can run the kernels; where Linux does not say it, the plain ones alone."""
    cpuinfo = Path("/proc/cpuinfo")
    return isa == "plain" or (cpuinfo.exists() and FLAG_OF_ISA[isa] in cpuinfo.read_text().split())


def vector_peak(threads: int) -> float:
    """int8 operations a second without AMX, two for each product; not a number where no such peak is known."""
    peak = int8_peak(threads, tiles=False)
    return float("nan") if peak is None else peak[1]


@dataclass
class Variant:
    """A session's weights, one after the other in memory, and a run of it."""

    weights: np.ndarray
    run: Callable[[], None]


def draw_bytes(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, shape, np.uint8)


def activation_scales(a: argparse.Namespace, bits: int) -> str:
    """Those asked for, or as the builder has them."""
    has_blocks = bits in BLOCK_BITS and a.group_size < BLOCK_COLUMNS and a.precision != "float32"
    return a.activation_scales or ("block" if has_blocks else "group")


def own(a: argparse.Namespace, bits: int, layers: int, rows: int) -> Variant:
    scales = activation_scales(a, bits)
    blocks = scales == "block"
    symmetric = SCHEMES[f"int{bits}"].symmetric

    def bytes_of_panel(in_features: int) -> int:
        return panel_bytes(in_features, bits, a.group_size, symmetric, blocks)

    def sizes(in_features: int, out_features: int) -> dict[str, tuple[int, ...]]:
        return {"weight": (-(-out_features // PANEL), bytes_of_panel(in_features))}

    def attributes(in_features: int, out_features: int) -> dict[str, Any]:
        shape = {"N": out_features, "K": in_features, "bits": bits, "group_size": a.group_size}
        shape["symmetric"] = int(symmetric)
        return {**shape, "precision": a.precision, "activation_scales": scales}

    variant = build(a, layers, rows, ("qwen", "QuantLinear"), sizes, attributes)
    start = 0
    for in_features, out_features in SHAPES[a.shapes] * layers:  # random scales may be NaN
        panels, size = -(-out_features // PANEL), bytes_of_panel(in_features)
        part = variant.weights[start : start + panels * size].reshape(panels, size)
        for at in header_places(in_features, bits, a.group_size, symmetric, blocks):
            part[:, at : at + 2 * PANEL] = np.ones(PANEL, "<f2").view(np.uint8)
        start += panels * size
    return variant


def header_places(in_features: int, bits: int, group_size: int, symmetric: bool, blocks: bool) -> Iterator[int]:
    """Where in a panel scales or units lie."""
    columns = BLOCK_COLUMNS if blocks else group_size
    whole = panel_bytes(columns, bits, group_size, symmetric, blocks)
    last = panel_bytes(in_features, bits, group_size, symmetric, blocks)
    if blocks or symmetric:
        return iter(range(0, last, whole))
    each = panel_bytes(columns, bits, group_size, True)
    return iter(range(last - -(-in_features // columns) * each, last, each))


def stock(a: argparse.Namespace, layers: int, rows: int) -> Variant:
    bits = 4 if a.bits == 4 else 8

    def sizes(in_features: int, out_features: int) -> dict[str, tuple[int, ...]]:
        groups = -(-in_features // a.group_size)
        return {"weight": (out_features, groups, a.group_size * bits // 8), "scales": (out_features * groups,)}

    def attributes(in_features: int, out_features: int) -> dict[str, Any]:
        shape = {"N": out_features, "K": in_features, "bits": bits, "block_size": a.group_size}
        return {**shape, "accuracy_level": ACCURACY_LEVELS["float32" if a.precision == "float32" else "int8"]}

    return build(a, layers, rows, ("com.microsoft", "MatMulNBits"), sizes, attributes)


def build(
    a: argparse.Namespace,
    layers: int,
    rows: int,
    operator: tuple[str, str],
    sizes: Callable[[int, int], dict[str, tuple[int, ...]]],
    attributes: Callable[[int, int], dict[str, Any]],
) -> Variant:
    """A graph of ``layers`` times the shapes, all products of one shape with one buffer for their output.

    ``sizes``: the shapes of a matrix's arrays, of which ``weight`` is bytes and ``scales`` float32 ones.
    """
    domain, kind = operator
    matrices = [(layer, i, shape) for layer in range(layers) for i, shape in enumerate(SHAPES[a.shapes])]
    total = sum(math.prod(sizes(*shape)["weight"]) for _, _, shape in matrices)
    memory = np.random.default_rng(0).integers(0, 256, total + 63, np.uint8)
    memory = memory[-memory.ctypes.data % 64 :][:total]
    options = ort.SessionOptions()
    options.intra_op_num_threads = a.threads
    options.log_severity_level = 3
    qwen_plugin.register(options, a.threads)
    nodes, initializers, arrays, keep, used = [], [], {}, [], 0
    for layer, i, shape in matrices:
        names = [f"x.{shape[0]}"]
        for name, size in sizes(*shape).items():
            array = np.ones(size, np.float32)
            if name == "weight":
                array = memory[used : used + math.prod(size)].reshape(size)
                used += array.nbytes
            names.append(f"{name}.{layer}.{i}")
            arrays[names[-1]] = ort.OrtValue.ortvalue_from_numpy(array)
            initializers.append(placeholder(names[-1], array))
        nodes.append(helper.make_node(kind, names, [f"y.{layer}.{i}"], domain=domain, **attributes(*shape)))
    widths = sorted({shape[0] for shape in SHAPES[a.shapes]})
    inputs = [helper.make_tensor_value_info(f"x.{width}", TensorProto.FLOAT, [rows, width]) for width in widths]
    outputs = [helper.make_tensor_value_info(node.output[0], TensorProto.FLOAT, None) for node in nodes]
    graph = helper.make_graph(nodes, "linear", inputs, outputs, initializer=initializers)
    opsets = [helper.make_opsetid(name, version) for name, version in (("", 21), ("com.microsoft", 1), ("qwen", 1))]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10).SerializeToString()
    options.add_external_initializers(list(arrays), list(arrays.values()))
    session = ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    binding = session.io_binding()
    rng = np.random.default_rng(1)
    for width in widths:
        x = ort.OrtValue.ortvalue_from_numpy(rng.standard_normal((rows, width), dtype=np.float32))
        binding.bind_ortvalue_input(f"x.{width}", x)
        keep.append(x)
    buffers = [ort.OrtValue.ortvalue_from_numpy(np.empty((rows, n), np.float32)) for _, n in SHAPES[a.shapes]]
    for (_, i, _), node in zip(matrices, nodes, strict=True):
        binding.bind_ortvalue_output(node.output[0], buffers[i])
    return Variant(memory, lambda: (session.run_with_iobinding(binding), keep, arrays, buffers)[0])


def placeholder(name: str, array: np.ndarray) -> TensorProto:
    """An initializer that the session replaces with ``array``."""
    kind = helper.np_dtype_to_tensor_dtype(array.dtype)
    tensor = TensorProto(name=name, data_type=kind, dims=array.shape, data_location=TensorProto.EXTERNAL)
    tensor.external_data.add(key="location", value="replaced")
    return tensor


def seconds(run: Callable[[], None]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def measure(a: argparse.Namespace) -> None:
    """Print a table of the chosen shapes and kernels."""
    if a.isa:
        os.environ["QWEN_PLUGIN_ISA"] = a.isa
    weights = sum(k * n for k, n in SHAPES[a.shapes])
    layers = max(1, round(a.megabytes * 2e6 / weights))
    print(
        f"{layers} layers of {a.shapes}, {a.bits} bits, group size {a.group_size}, {a.precision} per "
        f"{activation_scales(a, a.bits)}, {a.isa or 'best'} kernels, {a.threads} threads\n"
    )
    other = f"{a.against} bits" if a.against else "MatMulNBits"
    print(f"| rows | ms | GB/s | of a plain read | of the fastest | GOPS | of the peak | {other} ms | over it |")
    print("|---" * 9 + "|")
    for rows in ROWS:
        variants = (
            own(a, a.bits, layers, rows),
            own(a, a.against, layers, rows) if a.against else stock(a, layers, rows),
        )
        rounds: list[tuple[float, ...]] = []
        for variant in variants:
            variant.run()
        size = variants[0].weights.nbytes
        reader = Reader(variants[0].weights, a.threads, pass_bytes=PASS_BYTES)
        end = time.perf_counter() + a.seconds
        while time.perf_counter() < end or len(rounds) < 3:
            first = seconds(variants[0].run)
            time.sleep(PAUSE_S)
            plain = reader.measure()  # after ours: what caches keep is to its advantage
            fastest = max(plain, reader.measure(in_turn=True))
            peak = vector_peak(a.threads)
            second = seconds(variants[1].run)
            time.sleep(PAUSE_S)
            rounds.append((first, second, plain, fastest, peak))
        own_s, stock_s, plain, fastest, peak = np.array(rounds).T
        bandwidth, operations = size / own_s, 2 * rows * layers * weights / own_s
        cells = [
            f"{np.median(own_s) * 1e3:.2f}",
            f"{np.median(bandwidth) / 1e9:.1f}",
            f"{np.median(bandwidth / plain):.0%}",
            f"{np.median(bandwidth / fastest):.0%}",
            f"{np.median(operations) / 1e9:.0f}",
            f"{np.median(operations / peak):.0%}",
            f"{np.median(stock_s) * 1e3:.2f}",
            f"{np.median(stock_s / own_s):.2f} x",
        ]
        print(f"| {rows} | {' | '.join(cells)} |", flush=True)


def write_all(path: Path, common: list[str]) -> None:
    """Write every table of :data:`TABLES` to ``path``, each from a process of its own: kernels are chosen once.

    Those of kernels that this processor cannot run are left out.
    """
    conditions = f"{processor_name()}; {datetime.now(UTC):%Y-%m-%d}; onnxruntime {ort.__version__}"
    parts = [f"{conditions}\n\nWhat the columns mean: `benchmarks/linear.py`. AMX may exceed the peak.\n"]
    for table in TABLES:
        _, forced, rest = table.partition("--isa ")
        if forced and not is_supported(rest.split()[0]):
            continue
        command = [sys.executable, "-m", "benchmarks.linear", *table.split(), *common]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        print(done.stdout, flush=True)
        parts.append(done.stdout)
    path.write_text("\n".join(parts), encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", choices=SHAPES, default="0.5B")
    parser.add_argument("--bits", type=int, choices=BITS, default=4, help="of a weight")
    parser.add_argument("--against", type=int, choices=BITS, metavar="BITS", help="instead of MatMulNBits")
    parser.add_argument("--group-size", type=int, choices=(32, 64, 128), default=32)
    parser.add_argument("--precision", choices=("int8", "int8x2", "float32"), default="int8")
    parser.add_argument("--activation-scales", choices=("group", "block"), help="default: as the builder has it")
    parser.add_argument("--isa", choices=(*FLAG_OF_ISA, "plain"), help="force kernels")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--megabytes", type=int, default=250, help="of weights")
    parser.add_argument("--seconds", type=float, default=4.0, help="of measuring, for each row of the table")
    parser.add_argument("--all", type=Path, metavar="FILE", help="write many tables; takes --threads and --seconds")
    a = parser.parse_args()
    if a.all:
        write_all(a.all, ["--threads", str(a.threads), "--seconds", str(a.seconds)])
        return
    if a.isa and not is_supported(a.isa):
        parser.error(
            f"--isa {a.isa}: not on this processor; it has {', '.join(filter(is_supported, FLAG_OF_ISA))}, plain"
        )
    most = max(a.bits, a.against or 0)
    if a.activation_scales == "block" and (a.precision == "float32" or a.group_size == 128 or most == 8):
        parser.error("--activation-scales block goes with --precision int8 or int8x2, groups of 32 or 64, below 8 bits")
    measure(a)


if __name__ == "__main__":
    main()
