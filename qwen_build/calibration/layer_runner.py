"""One decoder layer, embedding and head in float32, over any weights: what calibration runs.

The graph is made of the builder's own modules. Its weights are inputs of the graph, so that one session serves every
layer, and every altered copy of a layer's weights, without a second copy of them.
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
from qwen_build.checkpoint.packed import read_linear
from qwen_build.checkpoint.safetensors import Checkpoint
from qwen_build.graph.layers import Schemes, StepTensors
from qwen_build.graph.model import DTYPES, OPSET, DecoderLayer
from qwen_build.graph.rope import rope_tables
from qwen_build.graph.weight_map import EMBEDDING, HEAD
from qwen_build.quantization.schemes import Float32
from qwen_engine.graph_io import (
    BLOCK_TABLE,
    CUMULATIVE_LENGTHS,
    KEY_TILE,
    PAST_LENGTHS,
    PLUGIN_DOMAIN,
    TensorSpec,
    cache_inputs,
)

# float32, by the name inside the layer, such as "self_attn.q_proj.weight" (out_features, in_features)
LayerWeights = dict[str, np.ndarray]

# what a layer multiplies, as the layers graph names it -> the linears that read it
INPUTS: dict[str, tuple[str, ...]] = {
    "input_layernorm": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "self_attn.o_proj.input": ("self_attn.o_proj",),
    "post_attention_layernorm": ("mlp.gate_proj", "mlp.up_proj"),
    "mlp.down_proj.input": ("mlp.down_proj",),
}

HIDDEN, OUTPUT = "hidden", "output"

# Rows of embedding and head in memory at a time.
_VOCABULARY_ROWS = 8192


def linear_shapes(config: ModelConfig) -> dict[str, tuple[int, int]]:
    """(out_features, in_features) of the linears of a layer."""
    hidden, inner = config.hidden_size, config.intermediate_size
    heads, kv_heads = (n * config.head_dim for n in (config.num_attention_heads, config.num_key_value_heads))
    return {
        "self_attn.q_proj": (heads, hidden),
        "self_attn.k_proj": (kv_heads, hidden),
        "self_attn.v_proj": (kv_heads, hidden),
        "self_attn.o_proj": (hidden, heads),
        "mlp.gate_proj": (inner, hidden),
        "mlp.up_proj": (inner, hidden),
        "mlp.down_proj": (hidden, inner),
    }


def vector_names(config: ModelConfig) -> tuple[str, ...]:
    """The norms and biases of a layer."""
    family = config.architecture
    biases = ("self_attn.q_proj.bias", "self_attn.k_proj.bias", "self_attn.v_proj.bias")
    norms = ("self_attn.q_norm.weight", "self_attn.k_norm.weight")
    return (
        "input_layernorm.weight",
        "post_attention_layernorm.weight",
        *(biases if family.attention_bias else ()),
        *(norms if family.qk_norm else ()),
    )


def read_layer(checkpoint: Checkpoint, config: ModelConfig, layer: int) -> LayerWeights:
    """The weights of one layer; those that the checkpoint has packed as the floats they stand for.

    Raises:
        CheckpointError: one cannot be read or is not finite.
    """
    path = f"model.layers.{layer}"
    weights = {
        f"{name}.weight": read_linear(checkpoint, config.packed, f"{path}.{name}", shape)
        for name, shape in linear_shapes(config).items()
    }
    return weights | {name: checkpoint.read(f"{path}.{name}") for name in vector_names(config)}


@dataclass(frozen=True)
class LayerRun:
    """What a layer made of T tokens: ``output`` (T, hidden_size), and what its linears read, by the keys of INPUTS."""

    output: np.ndarray
    inputs: dict[str, np.ndarray]


class LayerRunner:
    """A decoder layer of ``config``, for any weights.

    Args:
        max_tokens: the longest sequence.
        threads: of one run.
    """

    def __init__(self, config: ModelConfig, max_tokens: int, threads: int) -> None:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        options.log_severity_level = 3
        options.enable_cpu_mem_arena = False  # it would keep the largest run's memory for ever
        qwen_plugin.register(options, threads)
        self._caches = cache_inputs([0], config.num_key_value_heads, config.head_dim, KEY_TILE, "float32")
        graph = _layer_graph(config, max_tokens, self._caches)
        self._session = onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])

    def run(
        self, weights: Mapping[str, np.ndarray], hidden: np.ndarray, lengths: Sequence[int], with_inputs: bool = True
    ) -> LayerRun:
        """Run sequences from their first token on.

        Args:
            weights: see ``LayerWeights``.
            hidden: float32 (T, hidden_size), the tokens of all sequences, one after the other.
            lengths: tokens of each sequence, T in all.
            with_inputs: whether to return what the linears read; without, ``inputs`` is empty.
        """
        assert sum(lengths) == len(hidden)
        blocks = [-(-length // KEY_TILE) for length in lengths]
        table = np.zeros((len(lengths), max(blocks)), np.int32)
        for row, first, count in zip(table, np.cumsum([0, *blocks]), blocks, strict=False):
            row[:count] = np.arange(first, first + count)
        feeds = {
            HIDDEN: np.ascontiguousarray(hidden),
            CUMULATIVE_LENGTHS: np.cumsum([0, *lengths]).astype(np.int32),
            PAST_LENGTHS: np.zeros(len(lengths), np.int32),
            BLOCK_TABLE: table,
            **{spec.name: np.zeros((sum(blocks), *map(int, spec.shape[1:])), np.float32) for spec in self._caches},
            **{name: np.ascontiguousarray(weight) for name, weight in weights.items()},
        }
        names = [OUTPUT, *(INPUTS if with_inputs else ())]
        output, *inputs = self._session.run(names, feeds)
        return LayerRun(output, dict(zip(names[1:], inputs, strict=True)))


def _layer_graph(config: ModelConfig, max_tokens: int, caches: Sequence[TensorSpec]) -> bytes:
    graph = ir.Graph([], [], nodes=[], opset_imports={"": OPSET, PLUGIN_DOMAIN: 1}, name="layer")
    builder = GraphBuilder(graph)
    hidden = builder.input(HIDDEN, ir.DataType.FLOAT, ["T", config.hidden_size])
    sequences = {
        CUMULATIVE_LENGTHS: ["S+1"],
        PAST_LENGTHS: ["S"],
        BLOCK_TABLE: ["S", "max_blocks"],
    }
    values = {name: builder.input(name, ir.DataType.INT32, shape) for name, shape in sequences.items()}
    values |= {spec.name: builder.input(spec.name, DTYPES[spec.dtype], list(spec.shape)) for spec in caches}
    cos, sin = rope_tables(config.head_dim, config.rope_theta, max_tokens)
    step = StepTensors(
        values,
        builder.op.initializer(ir.tensor(cos), "cos"),
        builder.op.initializer(ir.tensor(sin), "sin"),
        exposing=True,
    )

    module = DecoderLayer(config, 0, Schemes(Float32(), Float32(), fuse=False))
    output = module(builder.op, hidden, step)
    for name, parameter in module.named_parameters():
        graph.initializers.pop(parameter.name)
        parameter.name = name
        graph.inputs.append(parameter)
    for name, value in {OUTPUT: output, **{key: step.exposed[f"{module.path}.{key}"] for key in INPUTS}}.items():
        value.type = ir.TensorType(ir.DataType.FLOAT)
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
    shape = (config.vocab_size, config.hidden_size)
    for start in range(0, config.vocab_size, _VOCABULARY_ROWS):
        stop = min(start + _VOCABULARY_ROWS, config.vocab_size)
        yield start, read_linear(checkpoint, config.packed, name.removesuffix(".weight"), shape, start, stop)
