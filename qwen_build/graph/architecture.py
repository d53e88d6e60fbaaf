"""What a decoder layer consists of, written down once: every other table about a layer is derived from this one.

A *layer kind* is a row of ``LAYER_KINDS``: the sub-blocks of a layer in the order they run, each
``x + block(norm(x))``, with its linears, norms and states. An architecture, a row of ``ARCHITECTURES`` in
``qwen_build/architectures.py``, says which kinds its layers are. A new kind needs a row here, a module for each new
computation (``BLOCK_MODULES`` in ``model.py``), and an operator only for what ONNX cannot compute.

Names are Hugging Face's, seen from inside the layer: ``self_attn.q_proj``.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property

from qwen_build.checkpoint.config import ModelConfig
from qwen_engine.graph_io import EMBEDDING, HEAD, TensorSpec, cache_inputs
from qwen_engine.tasks import GENERATE

# The name of anything in a layer; what follows the match is its name inside the layer.
LAYER = re.compile(r"model\.layers\.(\d{1,9})\.")

Size = Callable[[ModelConfig], int]
Flag = Callable[[ModelConfig], bool]
# config, number of the layer, tokens of a cache block, dtype of the cache -> what the layer keeps between runs
States = Callable[[ModelConfig, int, int, str], tuple[TensorSpec, ...]]


@dataclass(frozen=True)
class InputSpec:
    """What linears of a layer multiply: those with one input are calibrated together.

    Attributes:
        name: as the layers graph exposes it: that of the norm before, or ``LINEAR.input``.
        size: features.
        producer: the module into whose outputs a factor of each column can be folded; None: there is none.
        copies: columns that one output of the producer feeds.
        run: outputs of the producer between two copies of them: the columns are (..., copies, run).
    """

    name: str
    size: Size
    producer: str | None = None
    copies: Size = lambda config: 1
    run: Size = lambda config: 1


@dataclass(frozen=True)
class FusedSpec:
    """A graph module that holds the rows of several linears with one input, one after the other.

    Attributes:
        gated: whether its outputs are silu of the first half times the second.
    """

    name: str
    gated: bool = False


@dataclass(frozen=True)
class LinearSpec:
    """A linear.

    Attributes:
        rows: out_features; in_features are those of what it reads.
        bias: whether it has one.
        fused: the graph module that its rows stand in where it is stored like the others there.
    """

    name: str
    rows: Size
    reads: InputSpec
    bias: Flag = lambda config: False
    fused: FusedSpec | None = None

    def shape(self, config: ModelConfig) -> tuple[int, int]:
        """(out_features, in_features)"""
        return self.rows(config), self.reads.size(config)


@dataclass(frozen=True)
class NormSpec:
    """A norm inside a sub-block: features, and whether a model has it."""

    name: str
    size: Size
    present: Flag = lambda config: True


@dataclass(frozen=True)
class BlockSpec:
    """A sub-block of a layer.

    Attributes:
        name: its name in the checkpoint; its linears' names begin with it.
        computes: what computes it, a key of ``BLOCK_MODULES``: two kinds may have different blocks of one name.
        norm: the module of the norm before it.
        inner_norms: those inside it.
        states: what it keeps from one run to the next, as inputs of the graph.
    """

    name: str
    computes: str
    norm: str
    linears: tuple[LinearSpec, ...]
    inner_norms: tuple[NormSpec, ...] = ()
    states: States = lambda config, layer, block_size, dtype: ()


@dataclass(frozen=True)
class LayerKind:
    """A kind of decoder layer: its sub-blocks, in the order they run."""

    blocks: tuple[BlockSpec, ...]

    @cached_property
    def linears(self) -> tuple[LinearSpec, ...]:
        return tuple(linear for block in self.blocks for linear in block.linears)

    @cached_property
    def inputs(self) -> Mapping[str, InputSpec]:
        """What its linears multiply, by name and in the order of the linears."""
        return {linear.reads.name: linear.reads for linear in self.linears}

    @cached_property
    def fused(self) -> Mapping[str, tuple[LinearSpec, ...]]:
        """Graph module -> the linears whose rows follow each other in it."""
        names = dict.fromkeys(linear.fused.name for linear in self.linears if linear.fused)
        return {name: tuple(one for one in self.linears if one.fused and one.fused.name == name) for name in names}

    def readers(self, name: str) -> tuple[LinearSpec, ...]:
        """The linears that multiply the input ``name``."""
        return tuple(linear for linear in self.linears if linear.reads.name == name)

    @cached_property
    def reader_names(self) -> Mapping[str, tuple[str, ...]]:
        """Every input -> the names of the linears that multiply it."""
        return {name: tuple(linear.name for linear in self.readers(name)) for name in self.inputs}

    def shapes(self, config: ModelConfig) -> dict[str, tuple[int, int]]:
        """(out_features, in_features) of every linear."""
        return {linear.name: linear.shape(config) for linear in self.linears}

    def widest_input(self, config: ModelConfig) -> int:
        """Features of the widest of its inputs."""
        return max(read.size(config) for read in self.inputs.values())

    def vectors(self, config: ModelConfig) -> tuple[str, ...]:
        """The norms and biases, all parameters with one dimension."""
        norms = [block.norm for block in self.blocks]
        norms += [norm.name for block in self.blocks for norm in block.inner_norms if norm.present(config)]
        biased = [linear.name for linear in self.linears if linear.bias(config)]
        return (*(f"{norm}.weight" for norm in norms), *(f"{linear}.bias" for linear in biased))

    def states(self, config: ModelConfig, layer: int, block_size: int, dtype: str) -> tuple[TensorSpec, ...]:
        """What the layer keeps from one run to the next.

        Args:
            layer: its number, which is part of the names.
            block_size: tokens of a cache block.
            dtype: of keys and values.
        """
        return tuple(state for block in self.blocks for state in block.states(config, layer, block_size, dtype))


def _hidden(config: ModelConfig) -> int:
    return config.hidden_size


def _inner(config: ModelConfig) -> int:
    return config.intermediate_size


def _queries(config: ModelConfig) -> int:
    return config.num_attention_heads * config.head_dim


def _keys(config: ModelConfig) -> int:
    return config.num_key_value_heads * config.head_dim


def _head(config: ModelConfig) -> int:
    return config.head_dim


def _qkv_bias(config: ModelConfig) -> bool:
    return config.qkv_bias


def _o_bias(config: ModelConfig) -> bool:
    return config.o_bias


def _has_qk_norm(config: ModelConfig) -> bool:
    return config.architecture.qk_norm


def _key_value_cache(config: ModelConfig, layer: int, block_size: int, dtype: str) -> tuple[TensorSpec, ...]:
    return cache_inputs([layer], config.num_key_value_heads, config.head_dim, block_size, dtype)


_TO_ATTENTION = InputSpec("input_layernorm", _hidden, producer="input_layernorm")
# Attention takes weighted means of the rows of v: all query heads of a key/value head read the same outputs.
_ATTENDED = InputSpec(
    "self_attn.o_proj.input", _queries, producer="self_attn.v_proj",
    copies=lambda config: config.num_attention_heads // config.num_key_value_heads, run=_head,
)  # fmt: skip
_TO_MLP = InputSpec("post_attention_layernorm", _hidden, producer="post_attention_layernorm")
_GATED = InputSpec("mlp.down_proj.input", _inner, producer="mlp.up_proj")  # a product with its outputs
_QKV, _GATE_UP = FusedSpec("self_attn.qkv_proj"), FusedSpec("mlp.gate_up_proj", gated=True)

ATTENTION = BlockSpec(
    "self_attn",
    computes="attention",
    norm="input_layernorm",
    linears=(
        LinearSpec("self_attn.q_proj", _queries, _TO_ATTENTION, _qkv_bias, _QKV),
        LinearSpec("self_attn.k_proj", _keys, _TO_ATTENTION, _qkv_bias, _QKV),
        LinearSpec("self_attn.v_proj", _keys, _TO_ATTENTION, _qkv_bias, _QKV),
        LinearSpec("self_attn.o_proj", _hidden, _ATTENDED, _o_bias),
    ),
    inner_norms=(
        NormSpec("self_attn.q_norm", _head, _has_qk_norm),
        NormSpec("self_attn.k_norm", _head, _has_qk_norm),
    ),
    states=_key_value_cache,
)
DENSE_MLP = BlockSpec(
    "mlp",
    computes="gated_mlp",
    norm="post_attention_layernorm",
    linears=(
        LinearSpec("mlp.gate_proj", _inner, _TO_MLP, fused=_GATE_UP),
        LinearSpec("mlp.up_proj", _inner, _TO_MLP, fused=_GATE_UP),
        LinearSpec("mlp.down_proj", _hidden, _GATED),
    ),
)

# attends to the last config.sliding_window tokens alone
SLIDING_ATTENTION = replace(ATTENTION, computes="sliding_attention")

# by the names that config.json has in layer_types
LAYER_KINDS = {
    "full_attention": LayerKind((ATTENTION, DENSE_MLP)),
    "sliding_attention": LayerKind((SLIDING_ATTENTION, DENSE_MLP)),
}


def layer_kind(config: ModelConfig, layer: int) -> LayerKind:
    """The kind of the layer with this number."""
    return LAYER_KINDS[config.layer_kinds[layer % len(config.layer_kinds)]]


def distinct_kinds(config: ModelConfig) -> list[LayerKind]:
    """The kinds that the model's layers are, each once."""
    return [LAYER_KINDS[name] for name in dict.fromkeys(config.layer_kinds[: config.num_hidden_layers])]


def linear_names(config: ModelConfig) -> list[str]:
    """Every linear and the embedding, by its name in the checkpoint: those that a scheme stores."""
    layers = [
        f"model.layers.{layer}.{linear.name}"
        for layer in range(config.num_hidden_layers)
        for linear in layer_kind(config, layer).linears
    ]
    return [EMBEDDING, *layers, *([HEAD] if config.task == GENERATE else [])]


def module_parts(module: str, rows: int, config: ModelConfig) -> tuple[tuple[str, int], ...]:
    """The linears of the checkpoint whose rows follow each other in a graph module of ``rows``; how many each has."""
    if match := LAYER.match(module):
        fused = layer_kind(config, int(match[1])).fused.get(module[match.end() :], ())
        if fused:
            return tuple((match[0] + linear.name, linear.rows(config)) for linear in fused)
    return ((module, rows),)
