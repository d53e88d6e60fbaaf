"""The Qwen graph: the same modules and the same names as ``transformers``' Qwen2 and Qwen3."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
from onnxscript import GraphBuilder, OpBuilder, nn

from qwen_build.checkpoint.config import ModelConfig
from qwen_build.graph.architecture import layer_kind
from qwen_build.graph.experts import Experts, SharedExperts
from qwen_build.graph.layers import (
    MLP,
    Attention,
    Embedding,
    Linear,
    RMSNorm,
    Schemes,
    SlidingAttention,
    StepTensors,
    StoredModule,
    SubBlock,
)
from qwen_build.graph.rope import rope_tables
from qwen_build.quantization.schemes import Norm
from qwen_engine.graph_io import (
    CHOSEN,
    EMBEDDING,
    EMBEDS,
    EMBEDS_INDICES,
    HEAD,
    INPUT_IDS,
    LOGITS_INDICES,
    PLUGIN_DOMAIN,
    TensorSpec,
)
from qwen_engine.tasks import GENERATE, output_of

CLASSIFIER = "score"  # the head of a classifier, as Hugging Face names it
OPSET = 23  # first with RMSNormalization
DTYPES = {
    "int64": ir.DataType.INT64,
    "int32": ir.DataType.INT32,
    "float32": ir.DataType.FLOAT,
    "float16": ir.DataType.FLOAT16,
    "int8": ir.DataType.INT8,
}


# what a sub-block computes -> the module that does
BLOCK_MODULES: dict[str, type[SubBlock]] = {
    "attention": Attention,
    "sliding_attention": SlidingAttention,
    "gated_mlp": MLP,
    "experts": Experts,
    "shared_experts": SharedExperts,
}


class DecoderLayer(nn.Module):
    """The sub-blocks of its kind, one after the other, each behind a norm and with a residual around both."""

    def __init__(self, config: ModelConfig, layer: int, schemes: Schemes):
        super().__init__()
        self.path, self.blocks = f"model.layers.{layer}", layer_kind(config, layer).blocks
        for block in self.blocks:
            setattr(self, block.norm, RMSNorm(config.hidden_size, config.rms_norm_eps))
            setattr(self, block.name, BLOCK_MODULES[block.computes](config, layer, schemes, block))

    def forward(self, op: OpBuilder, x: ir.Value, step: StepTensors) -> ir.Value:
        for block in self.blocks:
            x = getattr(self, block.name)(op, x, getattr(self, block.norm)(op), step)
        return step.expose(self.path, x)


class Decoder(nn.Module):
    def __init__(self, config: ModelConfig, schemes: Schemes):
        super().__init__()
        self.embed_tokens = Embedding((config.vocab_size, config.hidden_size), schemes.choice_of(EMBEDDING).scheme)
        self.layers = nn.ModuleList([DecoderLayer(config, i, schemes) for i in range(config.num_hidden_layers)])
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, op: OpBuilder, step: StepTensors) -> tuple[ir.Value, Norm]:
        """What the head multiplies (L, H), and the norm it still has to go through."""
        x = step.expose(EMBEDDING, self.embed_tokens(op, step.inputs[INPUT_IDS]))  # (T, H)
        if EMBEDS in step.inputs:
            places = op.Unsqueeze(step.inputs[EMBEDS_INDICES], [-1])  # (E, 1)
            x = op.ScatterND(x, places, step.inputs[EMBEDS])
        for layer in self.layers:
            x = layer(op, x, step)
        x = op.Gather(x, step.inputs[LOGITS_INDICES])  # (L, H): the vocabulary is multiplied only where asked
        return x, self.norm(op)


class Rows(nn.Module):
    """``norm(x) @ weight.T`` of a few outputs, in float32.

    The products of a row are summed by themselves, so that its bits do not depend on the rows beside it.
    """

    def __init__(self, shape: tuple[int, int]):
        super().__init__()
        self.weight = nn.Parameter(shape)

    def forward(self, op: OpBuilder, x: ir.Value) -> ir.Value:
        axis = [op.initializer(ir.tensor(np.array([each], np.int64)), f"axis.{each}") for each in (1, 2)]
        return op.ReduceSum(op.Mul(op.Unsqueeze(x, axis[0]), self.weight), axis[1], keepdims=0)


class PooledModel(nn.Module):
    """A graph without a vocabulary at its end: the hidden state after the last norm, or a few outputs of it.

    The few have the name of their weight in the checkpoint: ``score`` of a classifier, ``lm_head`` of a reranker.
    """

    def __init__(self, config: ModelConfig, schemes: Schemes):
        super().__init__()
        self.model = Decoder(config, schemes)
        self.head = {"classify": CLASSIFIER, "score": HEAD}.get(config.task)
        if self.head:
            setattr(self, self.head, Rows((config.width, config.hidden_size)))

    def forward(self, op: OpBuilder, step: StepTensors) -> ir.Value:
        x, norm = self.model(op, step)
        x = op.RMSNormalization(x, norm.weight, axis=-1, epsilon=norm.eps)
        if self.head is None:
            return x
        found: ir.Value = getattr(self, self.head)(op, step.expose("model.norm", x))
        return found


class CausalLM(nn.Module):
    """A tied head is a linear like any other; ``writing/weights_file.py`` writes its bytes once."""

    def __init__(self, config: ModelConfig, schemes: Schemes):
        super().__init__()
        self.model = Decoder(config, schemes)
        self.lm_head = Linear((config.vocab_size, config.hidden_size), schemes.choice_of(HEAD), input_name="model.norm")

    def forward(self, op: OpBuilder, step: StepTensors) -> ir.Value:
        x, norm = self.model(op, step)
        return self.lm_head(op, x, step, norm=norm)


@dataclass(frozen=True)
class Graph:
    """The graph, its weights still without values.

    ``stored`` holds the modules whose weight a scheme stores, ``plain`` the remaining parameters
    (norms, biases, routers, the few rows of :class:`PooledModel`: float32), both by the name of the weight in the
    checkpoint's manner.
    """

    model: ir.Model
    stored: Mapping[str, StoredModule]
    plain: Mapping[str, ir.Value]


def build_graph(
    config: ModelConfig, schemes: Schemes, inputs: Sequence[TensorSpec], max_seq_len: int, expose: bool = False
) -> Graph:
    """Define the engine graph over ``inputs`` (see :mod:`qwen_engine.graph_io`).

    With ``expose`` the output of every sub-block is an output of the graph too, named as the module
    in Hugging Face; the input of ``o_proj`` and ``down_proj`` is named ``….input``, what a router chose
    ``….experts``.
    """
    opsets = {"": OPSET, "com.microsoft": 1, PLUGIN_DOMAIN: 1}
    graph = ir.Graph([], [], nodes=[], opset_imports=opsets, name="qwen")
    builder = GraphBuilder(graph)
    values = {spec.name: builder.input(spec.name, DTYPES[spec.dtype], list(spec.shape)) for spec in inputs}
    cos, sin = rope_tables(config.head_dim, config.rope, max_seq_len)
    step = StepTensors(
        values,
        builder.op.initializer(ir.tensor(cos), "rope.cos"),
        builder.op.initializer(ir.tensor(sin), "rope.sin"),
        exposing=expose,
    )
    model = (CausalLM if config.task == GENERATE else PooledModel)(config, schemes)
    output = output_of(config.task, config.width)
    last = model(builder.op, step)
    for name, value in {output.name: last, **step.exposed}.items():
        value.type = ir.TensorType(ir.DataType.INT32 if name.endswith(CHOSEN) else ir.DataType.FLOAT)
        builder.add_output(value, name)
    last.shape = ir.Shape(output.shape)
    stored = {f"{name}.weight": module for name, module in model.named_modules() if isinstance(module, StoredModule)}
    held = {id(part) for module in stored.values() for part in module.parts.values()}
    plain = {name: value for name, value in model.named_parameters() if id(value) not in held}
    return Graph(ir.Model(graph, ir_version=11), stored, plain)
