"""Faults to plant in a copy of an engine, or in the kernels that run it: what `benchmarks.gate_faults` is about.

A fault of weights, graph or texts is made by editing the engine's files, whose checksums are then made right. A fault
of a kernel is made around ``Engine.run``, which then answers as a wrong kernel would. The product has no hooks for it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from qwen_engine.manifest import GRAPH_FILE, LAYERS_GRAPH_FILE, MANIFEST_FILE, WEIGHTS_FILE, Manifest
from qwen_plugin.layout import GATED_PANELS, gated_order, pack_panels, round_block_scales, round_scales
from qwen_run.engine_files.checksums import measure_part
from qwen_run.engine_files.onnx_file import read_graph
from qwen_run.engine_files.stored_rows import READERS
from qwen_run.engine_files.weights import EngineWeights
from qwen_run.runtime.engine import Batch, Engine

LAYER = 2
DOWN, OUT, HEAD = f"model.layers.{LAYER}.mlp.down_proj", f"model.layers.{LAYER}.self_attn.o_proj", "lm_head"
POSITIONS = (512, 600)


class Rows:
    """The rows of a linear as they are stored, to be changed: q, scales and zero points, or float32 values."""

    def __init__(
        self, q: np.ndarray, scales: np.ndarray | None = None, zero_points: np.ndarray | None = None,
        bits: int = 32, width: int = 1,
    ) -> None:  # fmt: skip
        """``width``: columns of a group."""
        self.q, self.scales, self.zero_points, self.bits, self.width = q, scales, zero_points, bits, width

    def reorder(self, order: np.ndarray) -> None:
        for array in (self.q, self.scales, self.zero_points):
            if array is not None:
                array[:] = array[order]

    def multiply(self, factor: float, first: int = 0, last: int | None = None) -> None:
        """Columns [first, last), whole groups."""
        if self.scales is None:
            self.q[:, first:last] *= factor
        else:
            self.scales[:, first // self.width : None if last is None else last // self.width] *= factor

    def clear(self, row: int) -> None:
        if self.scales is None:
            self.q[row] = 0
        else:
            middle = np.full(self.scales.shape[1], 1 << self.bits - 1)
            zero = middle if self.zero_points is None else self.zero_points[row]
            self.q[row] = np.repeat(zero, self.width)[: self.q.shape[1]]

    def raise_zero_points(self) -> None:
        if self.scales is None:
            self.q += 0.3 * self.q.std()
        elif self.zero_points is None:
            self.q[:] = np.maximum(self.q, 1) - 1
        else:
            self.zero_points[:] = np.minimum(self.zero_points + 1, (1 << self.bits) - 1)

    def coarsen(self) -> None:
        """Scales of the first block to bfloat16."""
        scales = self.q if self.scales is None else self.scales
        block = np.ascontiguousarray(scales[:, : 128 if self.scales is None else 128 // self.width], np.float32)
        scales[:, : block.shape[1]] = ((block.view(np.uint32) + 0x8000) & 0xFFFF0000).view(np.float32)

    def disturb(self) -> None:
        """One step up or down, of every twentieth value."""
        rng = np.random.default_rng(0)
        change = rng.integers(0, 2, self.q.shape) * 2 - 1
        change[rng.random(self.q.shape) > 0.05] = 0
        if self.scales is None:
            self.q += change * 0.01 * self.q.std()
        else:
            self.q[:] = np.clip(self.q.astype(np.int64) + change, 0, (1 << self.bits) - 1)


class Files:
    """The files of an engine, to be changed in place; :meth:`seal` makes their checksums right."""

    def __init__(self, directory: Path) -> None:
        self.directory, self.manifest = directory, Manifest.read(directory)
        self.weights = EngineWeights(directory)
        self._bytes = np.memmap(directory / WEIGHTS_FILE, np.uint8, "r+")
        self._tensors = read_graph(directory / GRAPH_FILE).initializers

    def array(self, name: str) -> np.ndarray:
        """An initializer of the graph, to be written to."""
        tensor = self._tensors[name]
        dtype = np.dtype(tensor.dtype)
        assert tensor.offset is not None, f"{name} lies in the graph"
        stop = tensor.offset + dtype.itemsize * int(np.prod(tensor.shape))
        return self._bytes[tensor.offset : stop].view(dtype).reshape(tensor.shape)

    def vector(self, name: str) -> np.ndarray:
        """A norm or bias by Hugging Face's name, to be written to."""
        module, _, kind = name.rpartition(".")
        if kind == "bias":
            part = self.weights.parts[module]
            return self.array(f"{part.owner}.bias")[part.start : part.stop]
        return self.array(name)

    def change(self, name: str, change: Callable[[Rows], object]) -> None:
        """Let ``change`` alter the rows of the linear that Hugging Face calls ``name``."""
        part = self.weights.parts[name]
        linear = self.weights.linears[part.owner]
        record, grid = linear.record, linear.record.quantization
        if not grid.group_size:
            change(Rows(self.array(f"{part.owner}.weight")[part.start : part.stop]))
            return
        shape = record.out_features, record.in_features
        stored = READERS[grid.layout](grid, shape, linear.tensors, 0, record.out_features)
        q, scales, zero_points = np.array(stored[0]), np.array(stored[1]), stored[2]
        zero_points = None if zero_points is None else np.array(zero_points)
        own = slice(part.start, part.stop)
        own_zeros = None if zero_points is None else zero_points[own]
        change(Rows(q[own], scales[own], own_zeros, grid.bits, grid.group_size))
        blocks = grid.activation_scales == "block"
        scales = round_block_scales(scales, grid.bits, grid.group_size, zero_points) if blocks else round_scales(scales)
        arrays = [q, scales, zero_points]
        if grid.layout == GATED_PANELS:
            order = gated_order(0, record.out_features, record.out_features)
            arrays = [None if array is None else array[order] for array in arrays]
        self.array(f"{part.owner}.panels")[:] = pack_panels(*arrays, grid.bits, grid.group_size, blocks)

    def edit_graphs(self, change: Callable[[onnx.NodeProto], object]) -> None:
        for name in (GRAPH_FILE, LAYERS_GRAPH_FILE):
            model = onnx.load(self.directory / name, load_external_data=False)
            for node in model.graph.node:
                change(node)
            (self.directory / name).write_bytes(model.SerializeToString())

    def seal(self) -> None:
        """Make the manifest say what the files are."""
        self._bytes.flush()
        parts = {name: measure_part(self.directory / name) for name in self.manifest.parts}
        manifest = replace(self.manifest, parts=parts)
        (self.directory / MANIFEST_FILE).write_text(manifest.to_json(), encoding="utf-8")


def _heads(files: Files, linear: str, order: Callable[[np.ndarray], np.ndarray]) -> None:
    """Reorder the outputs of q, k or v, seen as (heads, head_dim), with their biases."""
    name = f"model.layers.{LAYER}.self_attn.{linear}_proj"
    part = files.weights.parts[name]
    rows = np.arange(part.stop - part.start).reshape(-1, files.manifest.model.head_dim)
    new = order(rows).reshape(-1)
    files.change(name, lambda stored: stored.reorder(new))
    if f"{name}.bias" in files.weights.vectors:
        bias = files.vector(f"{name}.bias")
        bias[:] = bias[new]


def exchange_heads(files: Files) -> None:
    for linear in "qk":
        _heads(files, linear, lambda rows: rows[::-1])


def interleave_rotation(files: Files) -> None:
    half = files.manifest.model.head_dim // 2
    for linear in "qk":
        _heads(files, linear, lambda rows: rows.reshape(-1, 2, half).swapaxes(1, 2))


def shift_value_heads(files: Files) -> None:
    _heads(files, "v", lambda rows: np.roll(rows, 1, axis=0))


def clear_biases(files: Files, pattern: str) -> None:
    for name in files.weights.vectors:
        if re.fullmatch(pattern, name):
            files.vector(name)[:] = 0


def scale_vector(files: Files, name: str, factor: float) -> None:
    files.vector(name)[:] *= np.float32(factor)


def exchange_norms(files: Files) -> None:
    one, other = (files.vector(f"model.layers.{layer}.input_layernorm.weight") for layer in (LAYER, LAYER + 1))
    one[:], other[:] = other.copy(), one.copy()


def change_rows(files: Files, name: str, change: Callable[[Rows], object]) -> None:
    files.change(name, change)


def copy_layer(files: Files) -> None:
    last = files.manifest.model.num_hidden_layers - 1
    prefix = f"model.layers.{last}."
    for name in files._tensors:
        if name.startswith(prefix) and files._tensors[name].offset is not None:
            files.array(name)[:] = files.array(name.replace(prefix, f"model.layers.{last - 1}."))


def shift_positions(files: Files, first: int) -> None:
    for name in ("rope.cos", "rope.sin"):
        table = files.array(name)
        table[first:-1] = table[first + 1 :].copy()


def change_epsilon(files: Files) -> None:
    def change(node: onnx.NodeProto) -> None:
        for attribute in node.attribute:
            if attribute.name == "epsilon" and attribute.f > 0:
                attribute.f /= 10

    files.edit_graphs(change)


def change_template(files: Files) -> None:
    path = files.directory / "tokenizer_config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    config["chat_template"] = config["chat_template"].replace("\n", "", 1)
    path.write_text(json.dumps(config), encoding="utf-8")


# fault -> how it is planted in the files of an engine
FILE_FAULTS: dict[str, Callable[[Files], object]] = {
    "heads of q and k exchanged": exchange_heads,
    "rotation interleaved in a layer": interleave_rotation,
    "heads of v shifted by one": shift_value_heads,
    "k biases of all layers 0": partial(clear_biases, pattern=r".*k_proj\.bias"),
    "q bias of a layer 0": partial(clear_biases, pattern=rf"model\.layers\.{LAYER}\..*q_proj\.bias"),
    "v bias of a layer 0": partial(clear_biases, pattern=rf"model\.layers\.{LAYER}\..*v_proj\.bias"),
    "post-attention norm x 1.1": partial(
        scale_vector, name=f"model.layers.{LAYER}.post_attention_layernorm.weight", factor=1.1
    ),
    "input norms of two layers exchanged": exchange_norms,
    "final norm / 1.01": partial(scale_vector, name="model.norm.weight", factor=1 / 1.01),
    "final norm / 1.1": partial(scale_vector, name="model.norm.weight", factor=1 / 1.1),
    "zero points of o_proj up one": partial(change_rows, name=OUT, change=Rows.raise_zero_points),
    "down_proj x 1.05": partial(change_rows, name=DOWN, change=partial(Rows.multiply, factor=1.05)),
    "down_proj x 1.5": partial(change_rows, name=DOWN, change=partial(Rows.multiply, factor=1.5)),
    "o_proj x 1.3": partial(change_rows, name=OUT, change=partial(Rows.multiply, factor=1.3)),
    "128 columns of down_proj x 2": partial(change_rows, name=DOWN, change=partial(Rows.multiply, factor=2, last=128)),
    "scales of a block to bfloat16": partial(change_rows, name=DOWN, change=Rows.coarsen),
    "a row of down_proj 0": partial(change_rows, name=DOWN, change=partial(Rows.clear, row=5)),
    "head noisy": partial(change_rows, name=HEAD, change=Rows.disturb),
    "last layer a copy of the one before": copy_layer,
    "epsilon a tenth": change_epsilon,
    "template lacks a newline": change_template,
    **{f"positions off by one from {first} on": partial(shift_positions, first=first) for first in POSITIONS},
}

# a run's batch and logits, and whether the engine computes with float activations -> the logits of a wrong kernel
Kernel = Callable[[Batch, np.ndarray, bool], np.ndarray]


def _where(wrong: Callable[[Batch], bool], change: Callable[[np.ndarray], np.ndarray]) -> Kernel:
    return lambda batch, logits, is_float: change(logits) if wrong(batch) else logits


def _rolled(logits: np.ndarray) -> np.ndarray:
    return np.roll(logits, 7, axis=1)


def _disturbed(logits: np.ndarray) -> np.ndarray:
    noise = np.random.default_rng(len(logits)).normal(0, 0.3, logits.shape)
    return (logits + noise).astype(np.float32)


def _tokens(batch: Batch) -> int:
    return len(batch.input_ids)


def _far(batch: Batch, logits: np.ndarray, is_float: bool) -> np.ndarray:
    """Logits of positions from 600 on a little too large, as of an attention that adds up wrongly there."""
    sequence = np.searchsorted(batch.cumulative_lengths, batch.logits_indices, side="right") - 1
    positions = batch.past_lengths[sequence] + batch.logits_indices - batch.cumulative_lengths[sequence]
    return np.where(positions[:, None] >= 600, logits * np.float32(1.02), logits)


# fault -> what a wrong kernel says
KERNEL_FAULTS: dict[str, Kernel] = {
    "steps of 1 token rolled by 7": _where(lambda batch: _tokens(batch) == 1, _rolled),
    "steps of 2 to 7 tokens noisy": _where(lambda batch: 2 <= _tokens(batch) <= 7, _disturbed),
    "steps of 2 sequences or more 0": _where(lambda batch: len(batch.past_lengths) > 1, np.zeros_like),
    "pieces of odd length noisy": _where(
        lambda batch: _tokens(batch) % 32 not in (0, 1) and batch.past_lengths[0] > 0, _disturbed
    ),
    "texts after cached blocks noisy": _where(
        lambda batch: _tokens(batch) > 1 and 0 < batch.past_lengths[0] % 128 == 64, _disturbed
    ),
    "logits from position 600 on x 1.02": _far,
    "int8 kernels x 1.1": lambda batch, logits, is_float: logits if is_float else logits * np.float32(1.1),
    "int8 kernels noisy": lambda batch, logits, is_float: logits if is_float else _disturbed(logits),
}
# faults of kernels that round their inputs
OF_ROUNDED_INPUTS = ("int8 kernels x 1.1", "int8 kernels noisy")


@contextmanager
def wrong_kernel(kernel: Kernel) -> Iterator[None]:
    """Every engine that is opened inside answers as ``kernel`` does."""
    load, run = Engine.__dict__["load"], Engine.run
    floats: dict[int, bool] = {}

    def wrong_load(cls: type[Engine], *arguments: Any, **named: Any) -> Engine:
        engine: Engine = load.__func__(cls, *arguments, **named)
        floats[id(engine)] = bool(named.get("float_activations", False))
        return engine

    def wrong_run(self: Engine, batch: Batch) -> np.ndarray:
        return kernel(batch, run(self, batch), floats.get(id(self), False))

    Engine.load, Engine.run = classmethod(wrong_load), wrong_run  # type: ignore[method-assign,assignment]
    try:
        yield
    finally:
        Engine.load, Engine.run = load, run  # type: ignore[method-assign]


def plant(fault: str, directory: Path) -> None:
    """Plant one of :data:`FILE_FAULTS` in the engine ``directory``, and make its checksums right."""
    files = Files(directory)
    FILE_FAULTS[fault](files)
    files.seal()
