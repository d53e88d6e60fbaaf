"""One decoder layer, embedding and head in float32, over any weights: what calibration runs.

The graph is made of the builder's own modules. Its weights are inputs of the graph, so that one session serves every
layer of its kind, and every altered copy of a layer's weights, without a second copy of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
import onnxruntime
from onnxscript import GraphBuilder

import qwen_plugin
from qwen_build.checkpoint.config import ModelConfig
from qwen_build.checkpoint.weights import Checkpoint
from qwen_build.graph.architecture import LayerKind, layer_kind
from qwen_build.graph.layers import Schemes, StepTensors
from qwen_build.graph.model import DTYPES, OPSET, DecoderLayer
from qwen_build.graph.rope import rope_tables
from qwen_build.graph.weight_map import source
from qwen_build.quantization.schemes import Float32
from qwen_engine.graph_io import (
    BLOCK_TABLE,
    CHOSEN,
    CUMULATIVE_LENGTHS,
    EMBEDDING,
    HEAD,
    KEY_TILE,
    PAST_LENGTHS,
    PLUGIN_DOMAIN,
    TensorSpec,
)

# float32, by the name inside the layer, such as "self_attn.q_proj.weight" (out_features, in_features)
LayerWeights = dict[str, np.ndarray]

HIDDEN, OUTPUT, ROUTER = "hidden", "output", f"mlp.gate{CHOSEN}"

# Rows of embedding and head in memory at a time.
_VOCABULARY_ROWS = 8192


def read_layer(checkpoint: Checkpoint, config: ModelConfig, layer: int) -> LayerWeights:
    """The weights of one layer; those that the checkpoint has packed as the floats they stand for.

    Raises:
        CheckpointError: one cannot be read or is not finite.
    """
    path, kind = f"model.layers.{layer}", layer_kind(config, layer)
    weights = {}
    for name, shape in kind.shapes(config).items():
        rows = source(f"{path}.{name}.weight", shape, config).read(checkpoint, 0, shape[0])
        assert isinstance(rows, np.ndarray), "what is packed is read as floats"
        weights[f"{name}.weight"] = rows
    return weights | {name: checkpoint.read(f"{path}.{name}") for name in kind.plain(config)}


@dataclass(frozen=True)
class LayerRun:
    """What a layer made of T tokens.

    Attributes:
        output: (T, hidden_size).
        inputs: by name those of its kind (T, features), but of those that each expert has of its own.
        chosen: int32 (T, k), the experts of each token; None where there are none, or they were not asked for.
    """

    output: np.ndarray
    inputs: dict[str, np.ndarray]
    chosen: np.ndarray | None = None


class LayerRunner:
    """The decoder layers of ``config``, for any weights.

    Args:
        max_tokens: the longest sequence.
        threads: of one run.
    """

    def __init__(self, config: ModelConfig, max_tokens: int, threads: int) -> None:
        self._config, self._max_tokens, self._threads = config, max_tokens, threads
        self._sessions: dict[LayerKind, _LayerSession] = {}

    def run(
        self,
        layer: int,
        weights: Mapping[str, np.ndarray],
        hidden: np.ndarray,
        lengths: Sequence[int],
        with_inputs: bool = True,
    ) -> LayerRun:
        """Run sequences from their first token on.

        Args:
            layer: its number, which says of what kind it is.
            weights: see ``LayerWeights``.
            hidden: float32 (T, hidden_size), the tokens of all sequences, one after the other.
            lengths: tokens of each sequence, T in all.
            with_inputs: whether to return what the linears read, and what routers chose; without, there is neither.
        """
        assert sum(lengths) == len(hidden)
        kind = layer_kind(self._config, layer)
        if kind not in self._sessions:
            self._sessions[kind] = _open_layer(self._config, layer, self._max_tokens, self._threads)
        session, states = self._sessions[kind].session, self._sessions[kind].states
        blocks = [-(-length // KEY_TILE) for length in lengths]
        table = np.zeros((len(lengths), max(blocks)), np.int32)
        for row, first, count in zip(table, np.cumsum([0, *blocks]), blocks, strict=False):
            row[:count] = np.arange(first, first + count)
        rows = {"paged_state": sum(blocks), "sequence_state": len(lengths)}
        feeds = {
            HIDDEN: np.ascontiguousarray(hidden),
            CUMULATIVE_LENGTHS: np.cumsum([0, *lengths]).astype(np.int32),
            PAST_LENGTHS: np.zeros(len(lengths), np.int32),
            BLOCK_TABLE: table,
            **{state.name: np.zeros((rows[state.kind], *map(int, state.shape[1:])), state.dtype) for state in states},
            **{name: np.ascontiguousarray(weight) for name, weight in weights.items()},
        }
        names = [name for name, read in kind.inputs.items() if not read.routed] if with_inputs else []
        asked = [OUTPUT, *names, *([ROUTER] if with_inputs and kind.stacks else [])]
        output, *found = session.run(asked, feeds)
        return LayerRun(output, dict(zip(names, found, strict=False)), found[-1] if ROUTER in asked else None)


@dataclass(frozen=True)
class _LayerSession:
    """A layer of one kind, ready to run, and its states."""

    session: onnxruntime.InferenceSession
    states: tuple[TensorSpec, ...]


def _open_layer(config: ModelConfig, layer: int, max_tokens: int, threads: int) -> _LayerSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    options.enable_cpu_mem_arena = False  # it would keep the largest run's memory for ever
    qwen_plugin.register(options, threads)
    states = layer_kind(config, layer).states(config, layer, KEY_TILE, "float32")
    graph = _layer_graph(config, layer, max_tokens, states)
    return _LayerSession(onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"]), states)


def _layer_graph(config: ModelConfig, layer: int, max_tokens: int, states: Sequence[TensorSpec]) -> bytes:
    graph = ir.Graph([], [], nodes=[], opset_imports={"": OPSET, PLUGIN_DOMAIN: 1}, name="layer")
    builder = GraphBuilder(graph)
    hidden = builder.input(HIDDEN, ir.DataType.FLOAT, ["T", config.hidden_size])
    sequences = {
        CUMULATIVE_LENGTHS: ["S+1"],
        PAST_LENGTHS: ["S"],
        BLOCK_TABLE: ["S", "max_blocks"],
    }
    values = {name: builder.input(name, ir.DataType.INT32, shape) for name, shape in sequences.items()}
    values |= {spec.name: builder.input(spec.name, DTYPES[spec.dtype], list(spec.shape)) for spec in states}
    cos, sin = rope_tables(config.head_dim, config.rope, max_tokens)
    step = StepTensors(
        values,
        builder.op.initializer(ir.tensor(cos), "cos"),
        builder.op.initializer(ir.tensor(sin), "sin"),
        exposing=True,
    )

    module = DecoderLayer(config, layer, Schemes(Float32(), Float32(), fuse=False))
    output = module(builder.op, hidden, step)
    for name, parameter in module.named_parameters():
        graph.initializers.pop(parameter.name)
        parameter.name = name
        graph.inputs.append(parameter)
    values = step.exposed | step.inside
    inputs = {name: values[f"{module.path}.{name}"] for name in layer_kind(config, layer).inputs}
    if layer_kind(config, layer).stacks:
        inputs[ROUTER] = values[f"{module.path}.{ROUTER}"]
    for name, value in {OUTPUT: output, **inputs}.items():
        value.type = ir.TensorType(ir.DataType.INT32 if name == ROUTER else ir.DataType.FLOAT)
        builder.add_output(value, name)
    return bytes(ir.to_proto(ir.Model(graph, ir_version=11)).SerializeToString())


def embed(checkpoint: Checkpoint, config: ModelConfig, token_ids: np.ndarray) -> np.ndarray:
    """Rows ``token_ids`` (T) of the embedding, float32 (T, hidden_size)."""
    hidden = np.empty((len(token_ids), config.hidden_size), np.float32)
    for start, rows in _vocabulary(checkpoint, config, EMBEDDING):
        here = (token_ids >= start) & (token_ids < start + len(rows))
        hidden[here] = rows[token_ids[here] - start]
    return hidden


def final_norm(checkpoint: Checkpoint, config: ModelConfig, hidden: np.ndarray) -> np.ndarray:
    """What the head multiplies, float32 (T, hidden_size): the RMS norm (arXiv 1910.07467, eq. 4) of the last layer."""
    rms = np.sqrt(np.square(hidden).mean(axis=-1, keepdims=True) + config.rms_norm_eps)
    return np.asarray(hidden / rms * checkpoint.read("model.norm.weight"))


def logits(
    checkpoint: Checkpoint,
    config: ModelConfig,
    hidden: np.ndarray,
    stored: Callable[[np.ndarray], np.ndarray] = lambda rows: rows,
) -> np.ndarray:
    """Last norm and head over ``hidden`` (T, hidden_size): float32 (T, vocab_size).

    Args:
        stored: makes of rows of the head those that are multiplied.
    """
    normed = final_norm(checkpoint, config, hidden)
    result = np.empty((len(hidden), config.vocab_size), np.float32)
    for start, rows in _vocabulary(checkpoint, config, EMBEDDING if config.tie_word_embeddings else HEAD):
        np.matmul(normed, stored(rows).T, out=result[:, start : start + len(rows)])
    return result


def _vocabulary(checkpoint: Checkpoint, config: ModelConfig, name: str) -> Iterator[tuple[int, np.ndarray]]:
    """Embedding or head, some rows at a time: the first one's number and the rows."""
    for start in range(0, config.vocab_size, _VOCABULARY_ROWS):
        stop = min(start + _VOCABULARY_ROWS, config.vocab_size)
        yield start, checkpoint.read(f"{name}.weight", start, stop)
