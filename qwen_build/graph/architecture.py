"""What a decoder layer consists of, written down once: every other table about a layer is derived from this one.

A *layer kind* is a row of ``LAYER_KINDS``: the sub-blocks of a layer in the order they run, each
``x + block(norm(x))``, with its linears, norms and states. An architecture, a row of ``ARCHITECTURES`` in
``qwen_build/architectures.py``, says which kinds its layers are. A new kind needs a row here, a module for each new
computation (``BLOCK_MODULES`` in ``model.py``), and an operator only for what ONNX cannot compute.

Names are Hugging Face's, seen from inside the layer: ``self_attn.q_proj``.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property

from qwen_build.checkpoint.config import ModelConfig
from qwen_engine.graph_io import EMBEDDING, HEAD, TensorSpec, cache_inputs
from qwen_engine.manifest import LinearPart, stacked_parts
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
        routed: whether each expert has one of its own, of its tokens.
    """

    name: str
    size: Size
    producer: str | None = None
    copies: Size = lambda config: 1
    run: Size = lambda config: 1
    routed: bool = False


@dataclass(frozen=True)
class FusedSpec:
    """A graph module that holds the rows of several linears with one input, one after the other.

    Attributes:
        gated: whether its outputs are silu of the first half times the second.
    """

    name: str
    gated: bool = False


@dataclass(frozen=True)
class StackSpec:
    """What a linear is that has the weights of all experts, one after the other.

    Attributes:
        count: of the experts.
        parts: the linears of an expert whose rows follow each other, by their names in the layer with * for its
            number; all have as many rows.
        gated: whether silu of the first half of an expert's outputs is multiplied with the second.
    """

    count: Size
    parts: tuple[str, ...]
    gated: bool = False


@dataclass(frozen=True)
class LinearSpec:
    """A linear.

    Attributes:
        rows: out_features; in_features are those of what it reads.
        bias: whether it has one.
        fused: the graph module that its rows stand in where it is stored like the others there.
        stack: of which linears of the checkpoint it consists; None: it is one itself.
    """

    name: str
    rows: Size
    reads: InputSpec
    bias: Flag = lambda config: False
    fused: FusedSpec | None = None
    stack: StackSpec | None = None

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
class FloatSpec:
    """A matrix inside a sub-block that no scheme stores, float32: its module and its shape."""

    name: str
    shape: Callable[[ModelConfig], tuple[int, int]]


@dataclass(frozen=True)
class BlockSpec:
    """A sub-block of a layer.

    Attributes:
        name: its name in the checkpoint; its linears' names begin with it.
        computes: what computes it, a key of ``BLOCK_MODULES``: two kinds may have different blocks of one name.
        norm: the module of the norm before it.
        inner_norms: those inside it.
        floats: its matrices that are never quantised.
        states: what it keeps from one run to the next, as inputs of the graph.
    """

    name: str
    computes: str
    norm: str
    linears: tuple[LinearSpec, ...]
    inner_norms: tuple[NormSpec, ...] = ()
    floats: tuple[FloatSpec, ...] = ()
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

    @cached_property
    def stacks(self) -> Mapping[str, StackSpec]:
        """The linears that have the weights of all experts."""
        return {linear.name: linear.stack for linear in self.linears if linear.stack}

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

    def plain(self, config: ModelConfig) -> tuple[str, ...]:
        """The parameters that no scheme stores: norms, biases, and the few matrices that stay float."""
        weights = [block.norm for block in self.blocks]
        weights += [norm.name for block in self.blocks for norm in block.inner_norms if norm.present(config)]
        weights += [matrix.name for block in self.blocks for matrix in block.floats]
        biased = [linear.name for linear in self.linears if linear.bias(config)]
        return (*(f"{weight}.weight" for weight in weights), *(f"{linear}.bias" for linear in biased))

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


def _experts(config: ModelConfig) -> int:
    return config.mixture.num_experts


def _expert_inner(config: ModelConfig) -> int:
    return config.mixture.moe_intermediate_size


def _shared_inner(config: ModelConfig) -> int:
    return config.mixture.shared_expert_intermediate_size


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
# The experts of a layer read what a dense MLP does; no factor is folded: the router reads it too.
_TO_EXPERTS = replace(_TO_MLP, producer=None)
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

_TO_EXPERT_DOWN = InputSpec("mlp.experts.down_proj.input", _expert_inner, routed=True)
_TO_SHARED_DOWN = InputSpec("mlp.shared_expert.down_proj.input", _shared_inner, producer="mlp.shared_expert.up_proj")
_SHARED_GATE_UP = FusedSpec("mlp.shared_expert.gate_up_proj", gated=True)

# the sum over the experts that the router chooses for a token
EXPERTS = BlockSpec(
    "mlp",
    computes="experts",
    norm="post_attention_layernorm",
    linears=(
        LinearSpec(
            "mlp.experts.gate_up_proj", lambda config: 2 * _experts(config) * _expert_inner(config), _TO_EXPERTS,
            stack=StackSpec(_experts, ("mlp.experts.*.gate_proj", "mlp.experts.*.up_proj"), gated=True),
        ),
        LinearSpec(
            "mlp.experts.down_proj", lambda config: _experts(config) * _hidden(config), _TO_EXPERT_DOWN,
            stack=StackSpec(_experts, ("mlp.experts.*.down_proj",)),
        ),
    ),
    floats=(FloatSpec("mlp.gate", lambda config: (_experts(config), _hidden(config))),),
)  # fmt: skip
# the same and an expert that every token has, behind a gate
SHARED_EXPERTS = replace(
    EXPERTS,
    computes="shared_experts",
    linears=(
        *EXPERTS.linears,
        LinearSpec("mlp.shared_expert.gate_proj", _shared_inner, _TO_EXPERTS, fused=_SHARED_GATE_UP),
        LinearSpec("mlp.shared_expert.up_proj", _shared_inner, _TO_EXPERTS, fused=_SHARED_GATE_UP),
        LinearSpec("mlp.shared_expert.down_proj", _hidden, _TO_SHARED_DOWN),
    ),
    floats=(*EXPERTS.floats, FloatSpec("mlp.shared_expert_gate", lambda config: (1, _hidden(config)))),
)

# by the names that config.json has in layer_types; mixtures of experts, which have none there, by what they compute
LAYER_KINDS = {
    "full_attention": LayerKind((ATTENTION, DENSE_MLP)),
    "sliding_attention": LayerKind((SLIDING_ATTENTION, DENSE_MLP)),
    "experts": LayerKind((ATTENTION, EXPERTS)),
    "shared_experts": LayerKind((ATTENTION, SHARED_EXPERTS)),
}


def layer_kind(config: ModelConfig, layer: int) -> LayerKind:
    """The kind of the layer with this number."""
    return LAYER_KINDS[config.layer_kinds[layer % len(config.layer_kinds)]]


def distinct_kinds(config: ModelConfig) -> list[LayerKind]:
    """The kinds that the model's layers are, each once."""
    return [LAYER_KINDS[name] for name in dict.fromkeys(config.layer_kinds[: config.num_hidden_layers])]


def linear_names(config: ModelConfig) -> list[str]:
    """Every linear and the embedding, by its name: those that a scheme stores."""
    return list(linear_members(config))


def linear_members(config: ModelConfig) -> dict[str, tuple[str, ...]]:
    """Every linear and the embedding, and the linears of the checkpoint that it consists of: itself, but of experts."""
    found: dict[str, tuple[str, ...]] = {EMBEDDING: (EMBEDDING,)}
    for layer in range(config.num_hidden_layers):
        for linear in layer_kind(config, layer).linears:
            name = f"model.layers.{layer}.{linear.name}"
            parts = module_parts(name, linear.rows(config), config)
            found[name] = tuple(part.name for part in parts.all) if linear.stack else (name,)
    return found | ({HEAD: (HEAD,)} if config.task == GENERATE else {})


@dataclass(frozen=True)
class ModuleParts:
    """The linears of the checkpoint whose rows follow each other in a graph module.

    Attributes:
        parts: their names and rows.
        stack: how often they follow each other; * in a name stands for the number of the time.
    """

    parts: tuple[LinearPart, ...]
    stack: int = 1

    @property
    def all(self) -> Iterator[LinearPart]:
        """Each of them, in order."""
        return stacked_parts(self.parts, self.stack)


def module_parts(module: str, rows: int, config: ModelConfig) -> ModuleParts:
    """The linears of the checkpoint whose rows follow each other in a graph module of ``rows``."""
    if match := LAYER.match(module):
        kind, name = layer_kind(config, int(match[1])), module[match.end() :]
        if fused := kind.fused.get(name, ()):
            return ModuleParts(tuple(LinearPart(match[0] + linear.name, linear.rows(config)) for linear in fused))
        if stack := kind.stacks.get(name):
            count = stack.count(config)
            each = rows // count // len(stack.parts)
            return ModuleParts(tuple(LinearPart(match[0] + part, each) for part in stack.parts), count)
    return ModuleParts((LinearPart(module, rows),))
